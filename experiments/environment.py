"""Which variables of the environment are heard. The experiment decides; a variable may not.

    none        what changes a model, its training or its precision (`ACCELERATE_*`, `FSDP_*`, most
                of `TORCH_*` and `PYTORCH_*`): removed before anything reads it
    recorded    what chooses kernels and threads on this machine, as another machine would
                (`OMP_NUM_THREADS`, `ATEN_CPU_CAPABILITY`): sums round otherwise; in provenance.json
    ranks       what says which process of several this is (`RANK`, …): heard, and checked

Everything else, where files lie (`HF_HOME`, `TMPDIR`) and who may fetch them, decides no number.
Named in docs/experiment-files.md. Imports nothing heavy: it has to run before torch is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from components.registry import UserError

_IGNORED = re.compile(
    r"(ACCELERATE|FSDP|DEEPSPEED|MEGATRON_LM|PARALLELISM_CONFIG|TORCHDYNAMO|TORCHINDUCTOR)_.*"
    r"|(PY)?TORCH_.*|AOT_?INDUCTOR_.*|FORK_LAUNCHED|USE_TORCH_XLA|XLA_.*"
    r"|TRITON_(INTERPRET|F32_DEFAULT|DEFAULT_FP_FUSION)"
    r"|NVIDIA_TF32_OVERRIDE|(ONEDNN|DNNL)_DEFAULT_FPMATH_MODE"
    r"|OMP_(DYNAMIC|THREAD_LIMIT|MAX_ACTIVE_LEVELS|NESTED|SCHEDULE)|KMP_(ALL|DEVICE)_.*"
    r"|MKL_(DYNAMIC|NUM_STRIPES|DISABLE_FAST_MM|DOMAIN_NUM_THREADS)"
    r"|LM_HARNESS_CACHE_PATH|LMEVAL_HASHMM"
)
# Of those: memory, files, messages and how processes meet.
_HARMLESS = re.compile(
    r"PYTORCH_((CUDA_|HIP_)?ALLOC_CONF|NVML_BASED_CUDA_CHECK|KERNEL_CACHE_PATH|NO_CUDA_MEMORY_CACHING"
    r"|MPS_(HIGH|LOW)_WATERMARK_RATIO|ENABLE_MPS_FALLBACK)"
    r"|TORCH_(NCCL|GLOO|DISTRIBUTED|DIST|ELASTIC|FR|LOGS|TRACE|SHOW|HOME|EXTENSIONS_DIR|CUDA_ARCH"
    r"|CPP_LOG_LEVEL|DEVICE_BACKEND_AUTOLOAD|DISABLE_ADDR2LINE|SYMBOLIZE_MODE)(_.*)?"
    r"|TORCHINDUCTOR_(CACHE_DIR|COMPILE_THREADS)"
)
_RECORDED = re.compile(
    r"(OMP|MKL)_NUM_THREADS|ATEN_CPU_CAPABILITY"
    r"|(ONEDNN|DNNL)_(MAX_CPU_ISA|CPU_ISA_HINTS)|MKL_(CBWR|ENABLE_INSTRUCTIONS|DEBUG_CPU_TYPE)"
    r"|CUBLAS(LT)?_WORKSPACE_.*"
)
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def forget(environ: MutableMapping[str, str] = os.environ) -> list[str]:
    """Removes the variables that may decide nothing; returns their names."""
    names = [name for name in environ if _IGNORED.fullmatch(name) and not _HARMLESS.fullmatch(name)]
    for name in names:
        del environ[name]
    return sorted(names)


def recorded(environ: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that choose kernels and threads here, by name."""
    return {name: environ[name] for name in sorted(environ) if _RECORDED.fullmatch(name)}


def check_ranks(environ: MutableMapping[str, str] = os.environ) -> None:
    """What a launcher says of this process must be complete.

    Raises:
        UserError: a variable is no number, or lacks another: torch would wait for processes that
            nobody started, or each process would train the whole run.
    """
    found: dict[str, int] = {}
    for name in (*_RANKS, "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        if (value := environ.get(name)) is not None:
            if not value.isdecimal():
                raise UserError(f"{name}={value} in the environment is no number; unset it")
            found[name] = int(value)
    alone = found.get("WORLD_SIZE", 1) == 1 and not found.get("RANK")
    if alone and "LOCAL_RANK" not in found:
        return
    absent = [n for n in (*_RANKS, "MASTER_ADDR", "MASTER_PORT") if n not in environ]
    present = ", ".join(f"{name}={found[name]}" for name in _RANKS if name in found)
    if absent:
        raise UserError(
            f"the environment has {present} without {', '.join(absent)}; start several processes "
            "with torchrun, or unset these for one"
        )
    if not found["LOCAL_RANK"] <= found["RANK"] < found["WORLD_SIZE"]:
        raise UserError(f"the environment has {present}: there is no such process; unset these")
