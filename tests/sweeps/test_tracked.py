"""A sweep in wandb, by its real client against a stand-in for its server: grouped, tagged, summed
up as promised, and the table that comes back from there is the one from disk."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.record import read_json, read_rows
from tests import PATIENCE
from tests.command_line import Outcome, desk, start
from tests.experiments.lm_tasks import write_tasks
from tests.wandb_server import Stored, WandbServer

ROWS = [
    {"label": "RMSNorm", "set": {"model.norm": "rmsnorm"}},
    {"label": "SwiGLU", "set": {"model.ffn": "swiglu"}},
    {"label": "Both", "set": {"model.norm": "rmsnorm", "model.ffn": "swiglu"}},
]


@pytest.fixture
def server(
    tmp_path: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[WandbServer]:
    with desk(tmp_path, monkeypatch), WandbServer(tmp_path / "wandb") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        for name in ("WANDB_MODE", "WANDB_DATA_DIR"):
            monkeypatch.delenv(name, raising=False)
        write_tasks(tmp_path / "tasks")
        write("small", tiny_yaml, rows=ROWS, seeds=[0, 1, 2], match="params")
        yield server


def write(name: str, base: Path, **sweep: Any) -> None:
    settings = {
        "tracking.wandb.project": "lab",
        "evaluation.tasks": ["tiny_choice", "tiny_both"],  # a task and a group
        "evaluation.include_path": "tasks",
        "training.tokens": 2560,
    }
    settings["evaluation.include_path"] = str(Path("tasks").resolve())
    content = {"base": str(base), "name": name, "set": settings, **sweep}
    Path(f"{name}.yaml").write_text(json.dumps(content))


def command(*words: str) -> Outcome:
    """In a process of its own, as wandb stays in one that has imported it."""
    process = start(*words)
    out, err = process.communicate(timeout=PATIENCE)
    return Outcome(process.returncode, out, err)


def of_type(server: WandbServer, kind: str) -> dict[str, Stored]:
    """Runs of a `job_type` by name."""
    return {run.name: run for run in server.runs.values() if run.job_type == kind}


def lines(server: WandbServer) -> dict[str, int]:
    return {run.id: len(run.history) for run in server.runs.values()}


@pytest.mark.slow
def test_a_sweep_of_twelve_runs(server: WandbServer) -> None:
    done = command("sweep", "small.yaml")
    assert done.code == 0, done.err
    assert "12 of 12 runs mirrored online" in done.err
    trained, scored = of_type(server, "train"), of_type(server, "eval")
    labels = ["baseline", "RMSNorm", "SwiGLU", "Both"]
    names = [f"{label} s{seed}" for label in labels for seed in range(3)]
    assert sorted(trained) == sorted(names)
    assert sorted(scored) == sorted(f"{name} eval" for name in names)
    assert {run.project for run in server.runs.values()} == {"lab"}
    assert {run.group for run in server.runs.values()} == {"small"}

    record = read_json(Path("runs/sweeps/small.json"))
    for index, row in enumerate(record["rows"]):
        for seed, id in row["runs"].items():
            run = trained[f"{row['label']} s{seed}"]
            folder = Path("runs", id)
            result, config = read_json(folder / "result.json"), run.config
            assert run.id.startswith(id) and run.state == "finished"
            assert [len(run.history), run.history[-1]["tokens"]] == [
                len(read_rows(folder / "metrics.jsonl")),
                2560,
            ]
            assert (config["variant"], config["seed"], config["row"]) == (
                row["label"],
                int(seed),
                index,
            )
            assert config["is_baseline"] == (index == 0)
            assert config["parameters"] == row["parameters"] == result["parameters"]
            assert config["flops_per_token"] == row["flops_per_token"]
            score = read_json(next(folder.glob("scores/step-*/tiny_choice.json")))
            value = score["metrics"][score["primary"]]["value"]
            assert run.summary["score/tiny_choice"] == value
            for key in ("val/loss", "val/bpb", "best/val/loss", "status"):
                assert run.summary[key] == result[key]
            found = {k: v for row in scored[f"{run.name} eval"].history for k, v in row.items()}
            assert found["score/tiny_choice"] == value and found["tokens"] == 2560
            assert "score/tiny_both" in found
    assert set(trained["RMSNorm s0"].tags) == {
        "sweep:small",
        "variant:RMSNorm",
        "axis:model.norm",
    }
    assert "baseline" in trained["baseline s2"].tags
    both = trained["Both s1"].config
    assert both["axis"] == "model.norm, model.ffn"
    assert "model.norm: layernorm → rmsnorm" in both["diff"]
    assert "model.ffn: mlp → swiglu" in both["diff"]

    (summary,) = of_type(server, "summary").values()
    assert len(summary.history) == 1 and "ablation" in summary.summary

    # nothing is added by another push, nor by running the sweep again
    before = lines(server)
    assert command("wandb", "push", "small").code == 0
    assert command("sweep", "small.yaml").code == 0
    assert lines(server) == before

    # the table from wandb is the one from disk
    disk = command("table", "small", "--format", "csv")
    there = command("wandb", "pull", "me/lab", "--group", "small", "--format", "csv")
    assert there.code == 0, there.err
    assert there.out == disk.out and "tiny_both" in disk.out


@pytest.mark.slow
def test_scores_that_are_added_later_are_pushed_and_a_second_sweep_has_its_tag(
    server: WandbServer, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    write("first", tiny_yaml, rows=ROWS[:1], seeds=[0])
    assert command("sweep", "first.yaml").code == 0
    assert not server.runs
    monkeypatch.delenv("WANDB_MODE")
    assert command("wandb", "push", "first").code == 0
    assert len(of_type(server, "train")) == len(of_type(server, "eval")) == 2
    id = next(iter(read_json(Path("runs/sweeps/first.json"))["rows"][0]["runs"].values()))
    before = lines(server)
    scored = command("eval", id, "--tasks", "tiny_last")
    assert scored.code == 0 and "wandb:" in scored.err, scored.err
    run = of_type(server, "eval")["baseline s0 eval"]
    assert [key for row in run.history for key in row if key.startswith("score/tiny_last")]
    assert lines(server) == before | {run.id: before[run.id] + 1}
    assert of_type(server, "train")["baseline s0"].summary["score/tiny_last"] is not None

    # the runs of two sweeps have the tags of both, and stay in the group where they are
    write("second", tiny_yaml, rows=ROWS[:2], seeds=[0])
    assert command("sweep", "second.yaml").code == 0
    assert command("wandb", "push").code == 0
    base = of_type(server, "train")["baseline s0"]
    assert {"sweep:first", "sweep:second"} <= set(base.tags) and base.group == "first"
    pulled = command("wandb", "pull", "me/lab", "--group", "second", "--format", "csv")
    assert pulled.code == 0, pulled.err
    assert pulled.out == command("table", "second", "--format", "csv").out


@pytest.mark.slow
def test_a_sweep_whose_server_is_gone_is_done_and_says_how_to_push(server: WandbServer) -> None:
    server.stop()
    write_small = json.loads(Path("small.yaml").read_text())
    Path("small.yaml").write_text(json.dumps({**write_small, "seeds": [0], "rows": ROWS[:1]}))
    done = command("sweep", "small.yaml")
    assert done.code == 0, done.err
    assert "can't be reached" in done.err and "wandb push small" in done.err
    refused = command("wandb", "push", "small")
    assert refused.code == 2 and len(refused.err.splitlines()) == 1
    server.start()
    assert command("wandb", "push", "small").code == 0
    assert len(of_type(server, "train")) == 2 and len(of_type(server, "summary")) == 1
    nothing = command("wandb", "push", "--runs", "elsewhere")
    assert nothing.code == 2 and "nothing has been trained" in nothing.err
    assert os.environ["WANDB_API_KEY"] not in done.err + refused.err
