"""Killed at any moment and started again, a run ends as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from experiments import checkpoint, loader
from experiments import record as records
from experiments.record import Interrupted, Run
from experiments.trainer import train

# dropout, so that random numbers matter; a checkpoint at every step, so that kills meet them
OVERRIDES = [
    "model.dropout=0.1",
    "execution.checkpoint_minutes=0",
    "evaluation.lengths=[16, 48]",
]
forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload(["experiments.trainer", "torch._dynamo"])


def attempt(yaml: Path, root: Path, die: tuple[str, int] | None = None) -> None:
    """In a process of its own: trains, and kills itself at the n-th call of a chosen function."""
    if die is not None:
        kill_at(*die)
    train(loader.load(yaml, OVERRIDES), 0, root, progress="none")


def kill_at(name: str, count: int) -> None:
    owner: Any = {"append_rows": records, "truncate": records}.get(name, checkpoint)
    if name in ("append_rows", "truncate"):
        import experiments.trainer as owner  # it holds its own reference
    original = getattr(owner, name)
    left = [count]

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if name == "save_file":  # half a file, as a kill in the middle of writing leaves it
                Path(args[1]).write_bytes(b"\x10" * 100)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def run_until_killed_or_done(yaml: Path, root: Path, die: tuple[str, int] | None) -> int | None:
    process = forks.Process(target=attempt, args=(yaml, root, die))
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture
def undisturbed(tiny_yaml: Path, tmp_path: Path) -> Run:
    root = tmp_path / "undisturbed"
    assert run_until_killed_or_done(tiny_yaml, root, None) == 0
    return Run(root, loader.run_id(loader.load(tiny_yaml, OVERRIDES), 0))


def assert_identical(run: Run, other: Run) -> None:
    for name in ("metrics.jsonl", "experiment.yaml", "lengths.json"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    last = [checkpoint.path_of(r / "checkpoints", 40) / "model.safetensors" for r in (run, other)]
    assert last[0].read_bytes() == last[1].read_bytes()
    results = [json.loads((r / "result.json").read_text()) for r in (run, other)]
    for measured in ("tokens_per_s", "seconds", "peak_memory_bytes", "seal"):
        for result in results:
            del result[measured]
    assert results[0] == results[1]
    assert None not in (results[0]["init/loss"], results[0]["init/grad_norm_ffn"])


@pytest.mark.parametrize(
    "where",
    [
        *("save_file", "_sync", "append_rows"),
        pytest.param("digest", marks=pytest.mark.slow),
        pytest.param("truncate", marks=pytest.mark.slow),
        pytest.param("sweep_temporaries", marks=pytest.mark.slow),
    ],
)
def test_killed_inside_each_part_of_saving_it_ends_bit_identical(
    where: str, tiny_yaml: Path, undisturbed: Run, tmp_path: Path
) -> None:
    root = tmp_path / "killed"
    killed = 0
    for count in (1, 2, 5, 11):  # the n-th call of this attempt
        code = run_until_killed_or_done(tiny_yaml, root, (where, count))
        killed += code == -signal.SIGKILL
    assert killed >= 2
    assert run_until_killed_or_done(tiny_yaml, root, None) == 0
    assert_identical(Run(root, undisturbed.id), undisturbed)


def test_killed_at_random_moments_it_ends_bit_identical(
    tiny_yaml: Path, undisturbed: Run, tmp_path: Path
) -> None:
    root = tmp_path / "killed"
    moments = random.Random(7)
    kills = 0
    for _ in range(60):
        process = forks.Process(target=attempt, args=(tiny_yaml, root))
        process.start()
        process.join(moments.uniform(0.0, 0.5) if kills < 12 else None)
        if process.exitcode is None:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            kills += 1
        elif process.exitcode == 0:
            break
    assert_identical(Run(root, undisturbed.id), undisturbed)


@pytest.mark.parametrize("harm", ["cut off", "altered", "state missing", "folder empty"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_aloud(
    harm: str,
    tiny_yaml: Path,
    undisturbed: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "damaged"
    assert run_until_killed_or_done(tiny_yaml, root, ("save_file", 8)) == -signal.SIGKILL
    run = Run(root, undisturbed.id)
    steps = checkpoint.steps(run / "checkpoints")
    assert len(steps) == 2
    newest = checkpoint.path_of(run / "checkpoints", steps[-1])
    weights = newest / "model.safetensors"
    if harm == "cut off":
        os.truncate(weights, weights.stat().st_size // 2)
    elif harm == "altered":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
    elif harm == "state missing":
        (newest / "state.json").unlink()
    else:
        shutil.rmtree(newest)
        newest.mkdir()
    train(loader.load(tiny_yaml, OVERRIDES), 0, root, progress="log")
    said = capsys.readouterr().err
    assert "checkpoint passed over" in said
    assert f"going on from step {steps[0]} of 40" in said
    assert_identical(run, undisturbed)


def test_a_signal_saves_at_the_next_step_and_says_so(tiny_yaml: Path, tmp_path: Path) -> None:
    experiment = loader.load(tiny_yaml)
    run = Run(tmp_path / "runs", loader.run_id(experiment, 0))
    import experiments.trainer as trainer

    original = trainer.append_rows

    def once(*args: Any) -> None:
        original(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "append_rows", once)
        with pytest.raises(Interrupted, match="SIGTERM"):
            train(experiment, 0, run.root, progress="none")
    assert run.state == "interrupted"
    assert len(checkpoint.steps(run / "checkpoints")) == 1
    assert train(experiment, 0, run.root, progress="none")["status"] == "done"


def test_a_finished_run_is_not_trained_again(tiny_yaml: Path, undisturbed: Run) -> None:
    before = (undisturbed / "result.json").stat().st_mtime_ns
    result = train(loader.load(tiny_yaml, OVERRIDES), 0, undisturbed.root, progress="none")
    assert result["status"] == "done"
    assert (undisturbed / "result.json").stat().st_mtime_ns == before
