"""Products of linear layers, fast in bf16 also on a CPU that has no instructions for it.

There torch's products in bf16 take 2 to 14 times as long as in fp32 (one thread, torch 2.13: x86-64
with AVX-512 and with AVX2 alone). A product of bf16 numbers summed in fp32 and rounded once is what
the instructions compute; so it is computed in fp32, from rounded numbers, and rounded at the end.
"""

import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

# How many times as long as in fp32 a step in bf16 takes, one thread, 4 layers of 128: our gpt2, and
# torch's own products. Keyed by whether oneDNN takes bf16 at all. AVX2 alone (emulated by
# ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2), tokens per CPU second by
# benchmarks/train_step.py: 4,242 to 3,237, and a plain GPT-2's 4,479 to 363. AVX-512 without bf16:
# 5,961 to 4,906; of torch's, one linear layer of 128 x 512 alone was measured, 7.9 to 26.9 ms.
SLOWER = {False: ("1.3", "12"), True: ("1.2", "3")}


@cache
def bf16_instructions() -> bool:
    """Whether the CPU multiplies bf16 numbers: AVX512_BF16 or AMX on x86-64, BF16 on arm64.

    oneDNN, which would use them, is asked too: it can be told to use fewer than there are.
    """
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def slow_bf16(precisions: dict[str, tuple[str, str]]) -> str | None:
    """A line for those who train in bf16 on a CPU that has no instructions for it.

    `precisions`: label -> (training.precision, execution.device); the label is empty for one run.
    """
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    slow = [
        label
        for label, (precision, device) in precisions.items()
        if precision == "bf16" and (device == "cpu" or (device == "auto" and not gpu))
    ]
    if not slow or bf16_instructions():
        return None
    ours, torchs = SLOWER[bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())]
    where = f" ({', '.join(slow)})" if any(slow) else ""
    return (
        f"training.precision: bf16{where}: this processor has no bf16 instructions; a step takes "
        f"about {ours} times as long as in fp32, and layers that call torch's own products (such "
        f"as nn.Linear) about {torchs}; write training.precision=fp32"
    )


def by_fp32(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether products of `x` in `dtype` are better computed in fp32 and rounded."""
    return dtype == torch.bfloat16 and x.device.type == "cpu" and not bf16_instructions()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, x weight^T + bias: (..., D) and (V, D) to (..., V); follows autocast."""
    dtype = x.dtype
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    if not by_fp32(x, dtype):
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        rounded = [None if t is None else t.to(dtype).float() for t in (x, weight, bias)]
        return F.linear(*rounded).to(dtype)  # type: ignore[arg-type]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b of two matrices of one dtype, in that dtype, outside autocast."""
    return (a.float() @ b.float()).to(a.dtype) if by_fp32(a, a.dtype) else a @ b
