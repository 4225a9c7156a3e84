"""The stand-in for the W&B server carries wandb's own client, and fails when it is told to."""

from __future__ import annotations

import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import PATIENCE
from tests.wandb_server import Stored, WandbServer, matches

pytest.importorskip("wandb")

START = """
import sys, time, numpy, wandb
settings = wandb.Settings(
    init_timeout=300, login_timeout=300, finish_timeout=300, finish_timeout_raises=True,
    silent=True, console="off", disable_git=True, disable_code=True, x_disable_stats=True,
    x_disable_meta=True, x_disable_machine_info=True, x_save_requirements=False,
    x_file_stream_transmit_interval=1)
def begin(id="r1", **more):
    return wandb.init(project="lab", id=id, resume="allow", settings=settings, **more)
def outcome(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return "fine"
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbServer]:
    with WandbServer(tmp_path) as server:
        yield server
        assert server.errors == []


def client(server: WandbServer, program: str) -> list[str]:
    """What a program prints that uses wandb, in a process of its own."""
    command = [sys.executable, "-c", START + program]
    done = subprocess.run(command, env=server.env, cwd=server.folder,
                          capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def steps(run: Stored) -> list[int]:
    return [row["_step"] for row in run.history]


def test_an_online_run_is_stored_resumed_and_read_back(server: WandbServer) -> None:
    half = """
run = begin(name="norm s0", group="norm", job_type="train", tags=["a"], config={"model": {"d": 8}})
print(run.starting_step)
losses = [1, None, float("nan"), 0.4, 0.3, 0.2]
for i in range(run.starting_step, run.starting_step + 3):
    run.log({"tokens": 10 * i, "loss": losses[i]}, step=i)
run.summary["end"] = 1
run.finish()
"""
    assert client(server, half) == ["0"]
    assert client(server, half) == ["3"]
    run = server.runs["me", "lab", "r1"]
    assert (run.name, run.group, run.job_type, run.tags) == ("norm s0", "norm", "train", ["a"])
    assert (run.state, run.exit_code, run.config) == ("finished", 0, {"model": {"d": 8}})
    assert steps(run) == [0, 1, 2, 3, 4, 5]
    assert [row["loss"] for row in run.history] == [1, None, "NaN", 0.4, 0.3, 0.2]

    read = """
api = wandb.Api()
wanted = {"group": "norm", "config.model.d": 8, "tags": {"$in": ["a", "b"]}, "jobType": "train"}
print([run.id for run in api.runs("me/lab", filters={"$and": [wanted, {"state": "finished"}]})])
print([run.id for run in api.runs("me/lab", filters={"display_name": "another"})])
run = api.run("me/lab/r1")
print(run.lastHistoryStep, run.summary["end"], run.config, run.name, run.group, run.state)
print([row["_step"] for row in run.scan_history()], len(run.history(pandas=False)))
print([row["tokens"] for row in run.scan_history(keys=["tokens"])])
print("wandb" in run.file("config.yaml").download(root="down").read())
run.delete()
print(len(api.runs("me/lab")))
"""
    assert client(server, read) == [
        "['r1']", "[]", "5 1 {'model': {'d': 8}} norm s0 norm finished",
        "[0, 1, 2, 3, 4, 5] 6", "[0, 10, 20, 30, 40, 50]", "True", "0"]  # fmt: skip
    assert server.viewer_calls >= 1 and server.operations[-2:] == ["DeleteRun", "Runs"]


def test_tables_images_and_reports_are_stored(server: WandbServer) -> None:
    pytest.importorskip("wandb_workspaces")
    program = """
for _ in range(2):
    with begin("sum", reinit="create_new") as run:
        table = wandb.Table(columns=["a", "b"], data=[[1, "x"], [2, None]])
        image = wandb.Image(numpy.zeros((2, 2, 3), "uint8"))
        run.log({"t": table, "i": image}, step=run.starting_step)
import wandb_workspaces.reports.v2 as wr
report = wr.Report(entity="me", project="lab", title="norm", blocks=[wr.H1("Norm")])
report.save()
again = wr.Report.from_url(report.url)
again.description = "new"
again.save()
print(again.title, again.id == report.id, len(wandb.Api().reports("me/lab")))
"""
    assert client(server, program) == ["norm True 1"]
    run = server.runs["me", "lab", "sum"]
    kinds = sorted(Path(name).suffix for name in run.files if name.startswith("media/"))
    assert kinds == [".json", ".json", ".png", ".png"] and run.history[1]["t"]["nrows"] == 2
    assert [(a.name, a.state) for a in server.artifacts.values()] == [("run-sum-t", "COMMITTED")]
    (report,) = server.reports.values()
    assert report["description"] == "new" and "Norm" in report["spec"]


def test_what_is_sent_twice_is_there_once(server: WandbServer) -> None:
    server.fail("file_stream", 500, times=1, after=1)
    program = """
run = begin()
for i in range(5):
    run.log({"tokens": i}, step=i)
    time.sleep(0.1)
run.mark_preempting()
run.finish(exit_code=1)
"""
    client(server, program)
    run = server.runs["me", "lab", "r1"]
    assert steps(run) == [0, 1, 2, 3, 4]
    assert (run.state, run.exit_code, run.preempting) == ("preempted", 1, True)
    lines = {"wandb-history.jsonl": {"offset": 3, "content": ['{"_step": 3}', '{"_step": 4}']}}
    server.stream(("me", "lab", "r1"), {"files": lines})
    assert steps(run) == [0, 1, 2, 3, 4]


def test_a_refused_upload_leaves_no_row_and_the_api_says_so(server: WandbServer) -> None:
    server.fail("file_stream", 401)
    program = """
run = begin()
run.log({"tokens": 1}, step=0)
print(outcome(run.finish), wandb.Api().run("me/lab/r1").lastHistoryStep)
"""
    assert client(server, program) == ["fine -1"]
    server.heal()
    assert client(server, "run = begin(); run.log({}, step=0); run.finish()") == []
    assert steps(server.runs["me", "lab", "r1"]) == [0]


@pytest.mark.parametrize("how", ["hang", "close"])
def test_a_server_that_does_not_answer_costs_the_time_given(server: WandbServer, how: str) -> None:
    server.fail("graphql", how)
    assert client(
        server, "settings.init_timeout = settings.login_timeout = 1; print(outcome(begin))"
    ) == ["CommError"]


def test_a_wrong_key_is_refused_and_a_stopped_server_comes_back(server: WandbServer) -> None:
    wrong = 'import os; os.environ["WANDB_API_KEY"] = "w" * 40; print(outcome(begin))'
    assert client(server, wrong) == ["CommError"]
    assert client(server, "begin().finish()") == []
    server.stop()  # its port is closed at once
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(server.url, timeout=5)
    server.start()
    assert client(server, 'print(wandb.Api().run("me/lab/r1").state)') == ["finished"]


def test_runs_are_filtered_like_documents() -> None:
    run = Stored("me", "lab", "r1", 0, "one", tags=["a"], raw_config={"x": {"value": {"y": 1}}})
    assert matches(run, {"config.x.y": 1, "tags": "a", "name": "r1", "display_name": "one"})
    assert matches(run, {"$or": [{"state": "failed"}, {"config.x.y.value": {"$ne": 2}}]})
    assert not matches(run, {"$and": [{"tags": "a"}, {"config.z": {"$exists": True}}]})
