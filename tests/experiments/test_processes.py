"""Several processes are one run: they stop, go on and end together, however they hold the model.

Two real processes, over gloo on a CPU unless a test says otherwise; see ranks.py.
"""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from experiments import checkpoint, loader, sharding
from experiments.model import LanguageModel, build
from experiments.record import Run, UserError, read_json, read_rows
from experiments.trainer import train
from tests.experiments.ranks import TERM, USR2, together

DONE = {"status": "done", "step": 40}


def run_of(yaml: Path, overrides: list[str], root: Path) -> Run:
    return Run(root, loader.run_id(loader.load(yaml, overrides), 0))


def short(ended: list[list[dict[str, Any]]], number: int) -> list[dict[str, Any]]:
    """How the n-th training ended on each process."""
    return [{k: v for k, v in of[number].items() if k != "steps_under_them"} for of in ended]


def curves_agree(run: Run, other: Run, rel: float = 2e-5) -> None:
    rows, others = read_rows(run / "metrics.jsonl"), read_rows(other / "metrics.jsonl")
    assert [sorted(row) for row in rows] == [sorted(row) for row in others]
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=rel)


def result_of(run: Run) -> dict[str, Any]:
    result = read_json(run / "result.json")
    for measured in ("tokens_per_s", "seconds", "peak_memory_bytes", "seal"):
        del result[measured]
    return result


def assert_identical(run: Run, other: Run) -> None:
    assert (run / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert result_of(run) == result_of(other)
    if result_of(run)["status"] == "done":
        files = [
            checkpoint.path_of(r / "checkpoints", 40) / "model.safetensors" for r in (run, other)
        ]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_signal_to_one_process_stops_all_at_one_step_and_they_go_on_bit_identical(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    """Dropout, so that random numbers matter; log rows at 7, 14, …; evaluations at 12, 24, …

    Looking for signals at each step and at none but log rows are the two ends of what the
    measured speed may give: records are the same bytes under both.
    """
    words = ["model.dropout=0.1", "execution.log_every=7"]
    diverging = ["training.lr=1e12", "training.optimizer=sgd", "training.grad_clip=null"]
    bad = [*diverging, "execution.log_every=30", "evaluation.every_tokens=null"]
    signals = [[1, 17, USR2]]
    always = {"yaml": str(tiny_yaml), "look_seconds": 0.0}
    rarely = {"yaml": str(tiny_yaml), "look_seconds": 1e9}
    path = {name: str(tmp_path / name) for name in ("whole", "cut", "rows", "bad", "cut bad")}
    ended = together(
        tmp_path / "plan",
        {**rarely, "overrides": words, "root": path["whole"]},
        {**always, "overrides": words, "root": path["cut"], "signals": signals, "catches": [USR2]},
        {**always, "overrides": words, "root": path["cut"]},
        {**rarely, "overrides": words, "root": path["rows"], "signals": [[1, 17, TERM]]},
        {**rarely, "overrides": bad, "root": path["bad"]},
        {**always, "overrides": bad, "root": path["cut bad"], "signals": [[1, 20, TERM]]},
        {**always, "overrides": bad, "root": path["cut bad"]},
    )
    assert short(ended, 0) == short(ended, 2) == [DONE, DONE]
    assert short(ended, 1) == [{"status": "interrupted", "signal": USR2, "step": 17}] * 2
    assert short(ended, 3) == [{"status": "interrupted", "signal": TERM, "step": 21}] * 2
    assert short(ended, 5) == [{"status": "interrupted", "signal": TERM, "step": 20}] * 2
    # With `stop`, the caller's handlers stand; without, training has its own.
    assert [of[1]["steps_under_them"] for of in ended] == [17, 17]
    assert [of[2]["steps_under_them"] for of in ended] == [0, 0]

    whole = run_of(tiny_yaml, words, tmp_path / "whole")
    assert_identical(run_of(tiny_yaml, words, tmp_path / "cut"), whole)
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 12, 24, 36, 40]
    assert [row["step"] for row in rows if "train/loss" in row] == [7, 14, 21, 28, 35, 40]

    diverged = run_of(tiny_yaml, bad, tmp_path / "bad")
    assert result_of(diverged)["diverged_step"] < 20  # known at the cut, before any row says it
    assert_identical(run_of(tiny_yaml, bad, tmp_path / "cut bad"), diverged)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch would spread it over the GPUs")
def test_a_model_spread_by_fsdp2_gives_the_run_of_one_process_and_either_goes_on_with_the_other(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    """FSDP2 is real here: torch's fully_shard, through Accelerate's own `prepare`, over gloo.

    What is patched: Accelerate takes up its FSDP plugin only on GPUs, so its state's distributed
    type and plugin are set by hand, and our own refusal of CPUs is lifted (`fsdp2_on_a_cpu`).
    CUDA, NCCL and how much memory it saves were NOT shown by this.

    Two micro-batches a step, and 65 validation windows in pieces of 2: one process has a piece
    more to evaluate than the other.
    """
    words = [
        "evaluation.tokens=2080",
        "evaluation.lengths=[16, 48, 2080]",
        "model.position=alibi",
        "execution.micro_batch_size=2",
    ]
    spread = {"yaml": str(tiny_yaml), "overrides": words, "sharding": "fsdp2", "look_seconds": 0.0}
    path = {name: str(tmp_path / name) for name in ("whole", "cut", "to one", "to ddp", "from ddp")}
    signals = [[1, 17, TERM]]
    ended = together(
        tmp_path / "plan",
        {**spread, "root": path["whole"]},
        {**spread, "root": path["cut"], "signals": signals},
        {**spread, "root": path["cut"]},
        {**spread, "root": path["to one"], "signals": signals},
        {**spread, "root": path["to ddp"], "signals": signals},
        {**spread, "root": path["to ddp"], "sharding": "ddp"},
        {**spread, "root": path["from ddp"], "sharding": "ddp", "signals": signals},
        {**spread, "root": path["from ddp"]},
    )
    for number in (0, 2, 5, 7):
        assert short(ended, number) == [DONE, DONE]
    for number in (1, 3, 4, 6):
        stopped = {"status": "interrupted", "signal": TERM, "step": 17}
        assert short(ended, number) == [stopped, stopped]
    train(loader.load(tiny_yaml, words), 0, tmp_path / "to one", progress="none")
    train(loader.load(tiny_yaml, words), 0, tmp_path / "alone", progress="none")

    runs = {name: run_of(tiny_yaml, words, tmp_path / name) for name in [*path, "alone"]}
    assert_identical(runs["cut"], runs["whole"])
    for name in path:
        curves_agree(runs[name], runs["alone"])
    lengths = {name: read_json(run / "lengths.json") for name, run in runs.items()}
    measured = ("tuning/loss", "init/loss", "init/grad_norm_ffn", "val/loss@2080")
    for name in path:
        for key in measured:
            known = result_of(runs["alone"])[key]
            assert result_of(runs[name])[key] == pytest.approx(known, rel=2e-5), (name, key)
        for length, found in lengths["alone"].items():
            assert lengths[name][length]["windows"] == found["windows"]
            assert lengths[name][length]["by_position"] == pytest.approx(
                found["by_position"], rel=1e-4
            )
    attempts = read_json(runs["to ddp"] / "provenance.json")["attempts"]
    assert [(a["processes"], a["sharding"]) for a in attempts] == [(2, "fsdp2"), (2, None)]

    files = {
        name: checkpoint.path_of(runs[name] / "checkpoints", 40) for name in ("whole", "alone")
    }
    weights = {name: load_file(file / "model.safetensors") for name, file in files.items()}
    assert weights["whole"].keys() == weights["alone"].keys()  # the tied matrix once
    for name, tensor in weights["alone"].items():
        torch.testing.assert_close(weights["whole"][name], tensor, rtol=1e-3, atol=1e-5)
    saved = {name: checkpoint.load_optimizer(file)["optimizer"] for name, file in files.items()}
    assert saved["whole"]["param_groups"] == saved["alone"]["param_groups"]
    for index, state in saved["alone"]["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(
                saved["whole"]["state"][index][key], value, rtol=1e-2, atol=1e-6
            )


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch would spread it over the GPUs")
@pytest.mark.parametrize(
    "words",
    [
        ["execution.compile=true"],
        ["model.tie_embeddings=false", "training.optimizer=sgd", "training.grad_clip=null"],
        ["model.mixer=lstm", "model.ffn=none", "model.block=plain"],
        ["model.norm=dyt", "model.ffn=swiglu", "model.position=rotary"],
    ],
    ids=["compiled", "sgd", "lstm", "dyt"],
)
def test_fsdp2_gives_the_curve_of_one_process_with_other_parts_too(
    words: list[str], tiny_yaml: Path, tmp_path: Path
) -> None:
    """Patched as in the test above, and not shown on CUDA either."""
    spread = {"yaml": str(tiny_yaml), "overrides": words, "sharding": "fsdp2"}
    together(tmp_path / "plan", {**spread, "root": str(tmp_path / "two")})
    train(loader.load(tiny_yaml, words), 0, tmp_path / "one", progress="none")
    two, one = (run_of(tiny_yaml, words, tmp_path / name) for name in ("two", "one"))
    curves_agree(two, one)


def test_a_parameter_that_can_not_be_spread_is_named(tiny_yaml: Path) -> None:
    experiment = loader.load(tiny_yaml)
    decoder = build(experiment, 300, seed=0)
    decoder.blocks[1].scale = torch.nn.Parameter(torch.ones(()))
    model = LanguageModel(decoder, experiment.training.objective.build())
    accelerator = accelerate.Accelerator(cpu=True)
    with pytest.raises(UserError, match=r"can't spread the parameter blocks\.1\.scale, a single"):
        sharding.shard(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1), False)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fsdp2_on_two_gpus_is_stopped_and_goes_on_to_the_curve_of_one(
    precision: str, tiny_yaml: Path, tmp_path: Path
) -> None:
    """Nothing is patched here: CUDA and NCCL."""
    words = [f"training.precision={precision}", "execution.micro_batch_size=2"]
    spread: dict[str, Any] = {"yaml": str(tiny_yaml), "overrides": words, "sharding": "fsdp2"}
    spread |= {"root": str(tmp_path / "two"), "look_seconds": 0.0}
    ended = together(tmp_path / "plan", {**spread, "signals": [[1, 17, TERM]]}, spread)
    assert short(ended, 0) == [{"status": "interrupted", "signal": TERM, "step": 17}] * 2
    assert short(ended, 1) == [DONE, DONE]
    train(loader.load(tiny_yaml, words), 0, tmp_path / "one", progress="none")
    two, one = (run_of(tiny_yaml, words, tmp_path / name) for name in ("two", "one"))
    curves_agree(two, one, rel=1e-3 if precision == "fp32" else 2e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the machine has what is asked for")
def test_what_can_not_be_spread_is_one_line_and_leaves_no_run(
    tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = loader.load(tiny_yaml)
    with pytest.raises(UserError, match=r"^sharding: fsdp2 needs CUDA devices.* on cpu; use ddp$"):
        train(experiment, 0, tmp_path, progress="none", sharding="fsdp2")
    monkeypatch.setattr(sharding, "DEVICES", ("cpu",))
    with pytest.raises(UserError, match="fsdp2 needs several processes, one for each GPU"):
        train(experiment, 0, tmp_path, progress="none", sharding="fsdp2")
    assert "ACCELERATE_USE_FSDP" not in os.environ
    AcceleratorState._reset_state()
    with pytest.raises(UserError, match="no loss scaling for fp16; use bf16, or ddp"):
        sharding.accelerator_for("fsdp2", "cpu", "fp16")
    assert not list(tmp_path.glob("*/experiment.yaml"))


def test_with_the_callers_list_its_first_number_stops_the_run_and_no_handler_is_installed(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    from experiments import record

    experiment = loader.load(tiny_yaml)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(record.Interrupted, match="SIGUSR2") as stopped:
        train(experiment, 0, tmp_path, progress="none", stop=[USR2, TERM])
    assert stopped.value.signal == USR2
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    run = Run(tmp_path, loader.run_id(experiment, 0))
    assert checkpoint.steps(run / "checkpoints") == [1]
    assert json.loads((run / "provenance.json").read_text())["attempts"][0]["sharding"] is None


@pytest.mark.slow
def test_two_processes_are_one_run_in_wandb(tiny_yaml: Path, tmp_path: Path) -> None:
    training: dict[str, Any] = {"yaml": str(tiny_yaml), "root": str(tmp_path / "runs")}
    training["environment"] = {"WANDB_MODE": "offline"}
    assert short(together(tmp_path / "two", training), 0) == [DONE, DONE]
    run = run_of(tiny_yaml, [], tmp_path / "runs")
    (folder,) = (run.root / "wandb").glob("offline-run-*")
    record = read_json(run / "tracking.json")
    assert (record["state"], record["folder"]) == ("complete", str(folder))
    assert record["rows"] == len(read_rows(run / "metrics.jsonl"))
