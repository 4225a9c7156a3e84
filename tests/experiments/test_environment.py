"""What is set in the shell decides no result: the same bytes, or one clear line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from components.registry import UserError
from experiments import environment
from experiments.loader import load
from experiments.start import accelerate_on
from tests.conftest import ROOT

CLEAN = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
HOSTILE = {
    # ASCII, for file names and arguments too
    "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "fp16",
    "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_DEBUG_MODE": "maybe", "ACCELERATE_LOG_LEVEL": "loud", "FORK_LAUNCHED": "maybe",
    "PARALLELISM_CONFIG_TP_SIZE": "2", "FSDP_VERSION": "new",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "TORCHDYNAMO_DISABLE": "1", "PYTORCH_JIT": "0",
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "3", "OMP_DYNAMIC": "true", "MKL_DYNAMIC": "TRUE",
    "HF_HOME": "/nonexistent", "HF_HUB_OFFLINE": "1", "HF_DATASETS_IN_MEMORY_MAX_SIZE": "10",
    "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "1",
    "PYTHONHASHSEED": "7", "PYTHONOPTIMIZE": "2", "PYTHONWARNINGS": "error",
    "TZ": "Asia/Kathmandu", "COLUMNS": "20", "FORCE_COLOR": "1", "TERM": "dumb",
    "TMPDIR": "/nonexistent", "CUDA_VISIBLE_DEVICES": "-1",
}  # fmt: skip


def command(
    variables: dict[str, str], cwd: Path, *words: object
) -> subprocess.CompletedProcess[str]:
    """`python run.py WORDS` with these variables alone."""
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *map(str, words)],
        cwd=cwd,
        env={"PATH": CLEAN["PATH"], "WANDB_MODE": "disabled", **variables},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """Five steps of plain SGD in two micro-batches, on text that ASCII and Latin-1 can't hold."""
    text = "".join(f"Größe {n}: naïve café – {n * n} Δ 猫 and the house.\n\n" for n in range(600))
    (tmp_path / "tëxt.txt").write_text(text, encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""\
model: {{d_model: 32, n_layers: 2, n_heads: 2, max_seq_len: 64}}
data:
  corpus: {{name: text, files: ["{tmp_path / "tëxt.txt"}"], separator: "\\n\\n"}}
  tokenizer: {{name: bpe, vocab_size: 400}}
  validation_fraction: 0.2
training:
  {{tokens: 1280, seq_len: 32, global_batch_size: 8, lr: 0.3, optimizer: sgd, grad_clip: null}}
evaluation: {{every_tokens: null, tokens: 1000}}
execution: {{threads: 1, micro_batch_size: 4, device: cpu}}
""",
        encoding="utf-8",
    )
    return path


def made(root: Path) -> dict[str, bytes]:
    """What a training left: id, text as ids, tokenizer, losses and weights."""
    names = ("model.safetensors", "metrics.jsonl", "tokenizer.json", "train.bin", "val.bin")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in root.rglob("*")
        if path.name in names
    }


def test_hostile_variables_change_no_byte_of_a_run(experiment: Path, tmp_path: Path) -> None:
    roots = tmp_path / "clean", tmp_path / "hostile"
    done = command(CLEAN, tmp_path, "train", experiment, "--runs", roots[0])
    assert done.returncode == 0, done.stderr
    other = command(HOSTILE, Path("/"), "train", experiment, "--runs", roots[1])
    assert other.returncode == 0, other.stderr
    assert made(roots[0]) == made(roots[1])
    assert len(made(roots[0])) == 5
    assert "no effect: ACCELERATE_DEBUG_MODE, " in other.stderr
    assert "no effect" not in done.stderr

    (run,) = (path.parent for path in roots[0].glob("*/result.json"))
    words = ["generate", run, "--prompt", "Größe 猫", "--max-tokens", "9", "--json"]
    texts = [command(variables, tmp_path, *words) for variables in (CLEAN, HOSTILE)]
    first, second = (json.loads(text.stdout) for text in texts)
    assert first == second and first["prompt"] == "Größe 猫"


def test_accelerate_hears_the_experiment_alone(
    experiment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in HOSTILE.items():
        if name.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_", "FORK_")):
            monkeypatch.setenv(name, value)
    accelerator = accelerate_on(load(str(experiment)))
    assert accelerator.gradient_accumulation_steps == 1
    assert (accelerator.mixed_precision, accelerator.device.type) == ("no", "cpu")
    assert str(accelerator.state.dynamo_plugin.backend).endswith("NO")


def test_memory_caches_and_connections_are_left_alone() -> None:
    kept = {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "TORCHINDUCTOR_CACHE_DIR": "/x",
        "TORCH_NCCL_BLOCKING_WAIT": "1", "TORCHELASTIC_RUN_ID": "1", "HF_HOME": "/x", "RANK": "0",
        "OMP_NUM_THREADS": "3", "ATEN_CPU_CAPABILITY": "avx2", "CETERIS_RUNS": "/x",
    }  # fmt: skip
    variables = {**kept, "ACCELERATE_USE_CPU": "1", "TORCHINDUCTOR_USE_FAST_MATH": "1"}
    assert environment.forget(variables) == ["ACCELERATE_USE_CPU", "TORCHINDUCTOR_USE_FAST_MATH"]
    assert variables == kept
    assert environment.recorded(kept) == {"ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "3"}


def test_what_rounds_sums_otherwise_is_recorded() -> None:
    known = {"OMP_NUM_THREADS": "3", "ATEN_CPU_CAPABILITY": "avx2"}
    assert environment.recorded({**known, "HOME": "/"}) == dict(sorted(known.items()))


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "first"}, "RANK=first in the environment is no number; unset it"),
        ({"LOCAL_RANK": "0"}, "has LOCAL_RANK=0 without RANK, WORLD_SIZE, MASTER_ADDR"),
        ({"WORLD_SIZE": "4", "RANK": "0"}, "has RANK=0, WORLD_SIZE=4 without LOCAL_RANK"),
        ({"RANK": "1"}, "has RANK=1 without WORLD_SIZE"),
        (
            {"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
            "has RANK=2, WORLD_SIZE=2, LOCAL_RANK=0: there is no such process",
        ),
    ],
)
def test_half_of_a_launchers_variables_is_refused(variables: dict[str, str], line: str) -> None:
    meeting = {"MASTER_ADDR": "here", "MASTER_PORT": "29500"} if len(variables) == 3 else {}
    with pytest.raises(UserError) as refused:
        environment.check_ranks(variables | meeting)
    assert line in str(refused.value)


def test_a_launchers_complete_variables_are_heard() -> None:
    environment.check_ranks({})
    environment.check_ranks({"RANK": "0", "WORLD_SIZE": "1"})  # a pod of one process
    several = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    environment.check_ranks({**several, "MASTER_ADDR": "here", "MASTER_PORT": "29500"})
