"""What training promises besides resuming: equal over processes, splits and precisions; honest."""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import loader, trainer
from experiments.data import load as load_data
from experiments.data import prepare
from experiments.model import build, load_trained
from experiments.provenance import source
from experiments.record import Run, UserError, read_rows
from experiments.trainer import train
from tests.conftest import ROOT
from tests.slurm import free_ports


def losses(run: Run, key: str) -> list[float]:
    return [row[key] for row in read_rows(run / "metrics.jsonl") if key in row]


def trained(yaml: Path, root: Path, *overrides: str, seed: int = 0) -> Run:
    experiment = loader.load(yaml, overrides)
    train(experiment, seed, root, progress="none")
    return Run(root, loader.run_id(experiment, seed))


def test_two_processes_give_the_loss_curve_of_one(tiny_yaml: Path, tmp_path: Path) -> None:
    alone = trained(tiny_yaml, tmp_path / "one")
    port = next(free_ports())
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"),
            *("--master_addr=127.0.0.1", f"--master_port={port}"),
            *("run.py", "train", str(tiny_yaml), "--runs", str(tmp_path / "two")),
        ],
        cwd=ROOT,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
    )
    both = Run(tmp_path / "two", alone.id)
    assert json.loads((both / "provenance.json").read_text())["attempts"][0]["processes"] == 2
    for key in ("train/loss", "val/loss", "optim/grad_norm"):
        assert losses(both, key) == pytest.approx(losses(alone, key), rel=2e-5), key


def test_micro_batches_and_an_undivided_batch_give_the_same_curve(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    whole = trained(tiny_yaml, tmp_path / "whole")
    split = trained(tiny_yaml, tmp_path / "split", "execution.micro_batch_size=2")
    assert whole.id == split.id
    for key in ("train/loss", "val/loss"):
        assert losses(split, key) == pytest.approx(losses(whole, key), rel=2e-5), key


def test_bf16_and_compile_stay_close_to_fp32(tiny_yaml: Path, tmp_path: Path) -> None:
    plain = trained(tiny_yaml, tmp_path / "fp32")
    half = trained(tiny_yaml, tmp_path / "bf16", "training.precision=bf16")
    assert half.id != plain.id
    assert losses(half, "val/loss") == pytest.approx(losses(plain, "val/loss"), rel=0.02)
    assert losses(half, "val/loss") != losses(plain, "val/loss")


@pytest.mark.slow
def test_compiled_training_gives_the_same_curve(tiny_yaml: Path, tmp_path: Path) -> None:
    plain = trained(tiny_yaml, tmp_path / "eager")
    compiled = trained(tiny_yaml, tmp_path / "compiled", "execution.compile=true")
    assert plain.id == compiled.id
    assert losses(compiled, "val/loss") == pytest.approx(losses(plain, "val/loss"), rel=1e-4)


def test_same_seed_same_bytes_and_another_seed_other_numbers(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    first, again = trained(tiny_yaml, tmp_path / "a"), trained(tiny_yaml, tmp_path / "b")
    other = trained(tiny_yaml, tmp_path / "a", seed=1)
    assert (first / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    assert losses(other, "val/loss") != losses(first, "val/loss")


def test_validation_loss_and_bits_per_byte_equal_a_direct_computation(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    run = trained(tiny_yaml, tmp_path / "runs")
    experiment = loader.load(run / "experiment.yaml")
    data = prepare(experiment.data, run.root / "data", progress=False)
    model = load_trained(run, experiment, data.vocab_size).model
    ids = torch.from_numpy(data.val[: 2000 // 32 * 32 + 1].astype("int64"))
    windows = torch.stack([ids[i : i + 33] for i in range(0, 2000 // 32 * 32, 32)])
    with torch.no_grad():
        logits = model.logits(model(windows[:, :-1]))
        nats = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).double(), windows[:, 1:].flatten(), reduction="sum"
        )
    tokens = windows[:, 1:].numel()
    text_bytes = int(sum(data.tokenizer.decode([int(i)]) != "" for i in ids[1:]))
    result = json.loads((run / "result.json").read_text())
    assert result["val/loss"] == pytest.approx(float(nats) / tokens, rel=1e-6)
    assert result["val/bpb"] == pytest.approx(float(nats) / text_bytes / math.log(2), rel=1e-3)


def test_a_loss_that_is_not_finite_ends_the_run_as_diverged_with_its_step(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    run = trained(
        tiny_yaml, tmp_path, "training.lr=1e12", "training.optimizer=sgd", "training.grad_clip=null"
    )
    result = json.loads((run / "result.json").read_text())
    assert run.state == result["status"] == "diverged"
    assert 1 <= result["diverged_step"] < 40
    assert result["reason"] == f"non-finite loss or gradient at step {result['diverged_step']}"
    assert result["val/loss"] is None


def test_a_step_cut_in_two_by_an_experiment_change_is_refused_with_both_values(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    run = trained(tiny_yaml, tmp_path)
    text = (run / "experiment.yaml").read_text()
    assert "grad_clip: 1.0" in text
    (run / "experiment.yaml").write_text(text.replace("grad_clip: 1.0", "grad_clip: 0.5"))
    with pytest.raises(UserError, match=r"training\.grad_clip: stored 0\.5, now 1\.0"):
        trained(tiny_yaml, tmp_path)


def test_data_that_changed_under_an_unfinished_run_is_refused(
    tiny_yaml: Path, tmp_path: Path, text_file: Path
) -> None:
    copy = tmp_path / "own.txt"
    copy.write_bytes(text_file.read_bytes())
    words = [f"data.corpus.files={copy}"]
    run = trained(tiny_yaml, tmp_path / "runs", *words)
    (run / "result.json").unlink()
    copy.write_text(copy.read_text()[:40_000])
    with pytest.raises(UserError, match="the data has changed since this run began"):
        trained(tiny_yaml, tmp_path / "runs", *words)


def test_a_run_that_somebody_else_works_on_is_left_alone(tiny_yaml: Path, tmp_path: Path) -> None:
    run = Run(tmp_path, loader.run_id(loader.load(tiny_yaml), 0))
    with run.lock(), pytest.raises(UserError, match="another process works on this run"):
        trained(tiny_yaml, tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("execution.device=cuda", "execution.device: cuda is asked for, but torch finds none here"),
        ("training.precision=fp16", "training.precision: fp16 needs a CUDA device"),
        ("training.global_batch_size=5000", "fewer than one batch of 5,000"),
        ("evaluation.tokens=20", "no validation window of seq_len 32 fits"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has what is asked for")
def test_what_the_machine_or_the_data_can_not_do_is_one_line_and_leaves_no_run(
    override: str, message: str, tiny_yaml: Path, tmp_path: Path
) -> None:
    words = [override, "training.tokens=1e6"]
    with pytest.raises(UserError, match=message):
        trained(tiny_yaml, tmp_path, *words)
    assert not list(tmp_path.glob("*/experiment.yaml"))


def test_initial_values_shared_by_two_variants_are_the_same_numbers(tiny_yaml: Path) -> None:
    base = build(loader.load(tiny_yaml), 300, seed=3).state_dict()
    other = build(loader.load(tiny_yaml, ["model.norm=rmsnorm", "model.ffn=swiglu"]), 300, seed=3)
    shared = [k for k, v in other.state_dict().items() if k in base and base[k].shape == v.shape]
    assert len(shared) > 10
    assert all(torch.equal(other.state_dict()[k], base[k]) for k in shared)


def test_provenance_names_versions_data_command_and_job_but_no_variables(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = secrets.token_hex(16)  # not in this file, whose changes are in the record too
    monkeypatch.setenv("WANDB_API_KEY", secret)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.delenv("SLURM_ARRAY_JOB_ID", raising=False)
    run = trained(tiny_yaml, tmp_path)
    known = json.loads((run / "provenance.json").read_text())
    (attempt,) = known["attempts"]
    assert attempt["versions"]["torch"] == torch.__version__
    assert (attempt["job"], attempt["host"]) == ("12", socket.gethostname())
    assert "snapshot" not in attempt
    assert (
        load_data(tmp_path / "data" / known["data"]["folder"]).fingerprint
        == (known["data"]["fingerprint"])
    )
    assert secret not in (run / "provenance.json").read_text()


def test_a_snapshot_of_the_source_says_itself_what_it_is_and_git_is_not_asked(
    tmp_path: Path,
) -> None:
    """Also where the snapshot lies inside a checkout, of which git would speak."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    copy = tmp_path / "code" / "9ab3"
    for room in ("components", "experiments"):
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        *(sys.executable, "-c"),
        "import json, experiments.provenance as p; print(json.dumps(p.describe('cpu', 1)))",
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy)}

    def described() -> dict[str, Any]:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, check=True, text=True
        )
        return json.loads(done.stdout)

    assert described()["git"] is None  # what git would say there is of something else
    for git_then in ({"commit": "c0ffee", "patch": ""}, None):
        record = {"schema": 1, "id": "9ab3", "git": git_then, "time": "2026-01-01T00:00:00"}
        (copy / "snapshot.json").write_text(json.dumps(record))
        told = described()
        assert (told["snapshot"], told["git"]) == ({"id": "9ab3"}, git_then)
    (copy / "snapshot.json").write_text("{")
    with pytest.raises(UserError, match=r"snapshot\.json: can't be read: damaged"):
        source(copy)


def test_a_run_has_a_heartbeat_before_its_model_is_built(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, loader.run_id(loader.load(tiny_yaml), 0))
    seen = []

    def building(*args: Any) -> Any:
        seen.append((run.state, run.live().get("pid")))
        return build(*args)

    monkeypatch.setattr(trainer, "build", building)
    trained(tiny_yaml, tmp_path)
    assert seen == [("running", os.getpid())]
    assert run.live() == {}


def test_several_processes_look_up_about_every_ten_seconds_however_fast_they_are() -> None:
    assert trainer.steps_ahead(1, 30.0) == 1
    assert trainer.steps_ahead(10, 1.0) == 100
    assert trainer.steps_ahead(1, 120.0) == 1  # a first step that was compiled
    assert trainer.steps_ahead(3, 0.0) >= 1
