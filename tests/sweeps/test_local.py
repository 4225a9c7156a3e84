"""Many runs on one machine: what a crash, a kill or Ctrl-C does to the others, which is nothing."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from components.registry import UserError
from experiments import loader
from experiments.record import Run, read_json, read_rows
from sweeps import control, live, local, machine, manifest, server, worker
from sweeps.manifest import Job
from tests import PATIENCE

HERE = Path(__file__).parent
FINISH, LINGER = {"do": "finish"}, {"do": "linger"}


def jobs_of(*experiments: dict[str, Any]) -> list[Job]:
    return [Job(f"{n:010x}-s0", 0, f"row {n}", e) for n, e in enumerate(experiments)]


def execute(jobs: list[Job], root: Path, **options: Any) -> local.Outcome:
    options = {"workers": 2, "target": "fake_runs:train", "preload": ["fake_runs"], **options}
    return local.execute(jobs, root, **options)


def begun(root: Path) -> list[str]:
    return [row["id"] for row in read_rows(root / "begun.jsonl")]


def wait_until(condition: Callable[[], Any]) -> None:
    """Waits; a test that hangs is ended here, after far longer than it takes."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            pytest.fail("it never came to that")
        time.sleep(0.01)


class Driver:
    """Another process that executes jobs, to send signals to."""

    def __init__(self, root: Path, jobs: list[Job]) -> None:
        self.root, self.jobs = root, jobs
        plain = [dataclasses.asdict(job) for job in jobs]
        root.mkdir(exist_ok=True)
        (root / "jobs.json").write_text(json.dumps(plain))
        path = os.pathsep.join([str(HERE.parent.parent), str(HERE)])
        self.said = root / "said.txt"
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, str(HERE / "fake_runs.py"), str(root)],
                env={**os.environ, "PYTHONPATH": path},
                stderr=said,
                start_new_session=True,
            )

    def running(self, count: int) -> list[int]:
        """The processes of the runs, once so many work."""
        wait_until(lambda: sum(Run(self.root, j.id).live() != {} for j in self.jobs) >= count)
        return [row["pid"] for row in read_rows(self.root / "begun.jsonl")]

    def state(self) -> list[str]:
        return [Run(self.root, job.id).state for job in self.jobs]


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., Driver]]:
    started: list[Driver] = []

    def start(*experiments: dict[str, Any]) -> Driver:
        started.append(Driver(tmp_path / "runs", jobs_of(*experiments)))
        return started[-1]

    yield start
    (tmp_path / "runs" / "go").touch()  # whatever still lingers ends
    for each in started:
        each.process.kill()
        each.process.wait()


def test_a_run_that_fails_in_any_way_takes_no_other_along(tmp_path: Path) -> None:
    ways: list[tuple[dict[str, Any], str]] = [
        ({"do": "crash"}, "RuntimeError: the sky fell"),
        ({"do": "refuse"}, "data.txt: no such file"),
        ({"do": "exit", "code": 7}, "its process ended with code 7 and no result; see log.txt"),
        ({"do": "exit", "code": 0}, "its process ended with code 0 and no result; see log.txt"),
        ({"do": "kill", "signal": 9}, "killed by signal 9 (SIGKILL): out of memory?"),
        ({"do": "kill", "signal": 11}, "killed by signal 11 (SIGSEGV); see log.txt"),
    ]
    jobs = jobs_of(*(way for way, _ in ways), FINISH, FINISH)
    outcome = execute(jobs, tmp_path)
    errors = [read_json(Run(tmp_path, job.id) / "failure.json")["error"] for job in jobs[:6]]
    assert errors == [error for _, error in ways]
    assert outcome.failed == [job.id for job in jobs[:6]]
    assert [outcome.states[job.id] for job in jobs[6:]] == ["done", "done"]
    assert not outcome.interrupted


def test_what_a_run_prints_and_its_traceback_are_in_its_log(tmp_path: Path) -> None:
    crash, segfault = jobs_of({"do": "crash"}, {"do": "kill", "signal": 11})
    execute([crash, segfault], tmp_path)
    log = (Run(tmp_path, crash.id) / "log.txt").read_text()
    assert "hello from row 0" in log
    assert "Traceback" in log
    assert "Segmentation fault" in (Run(tmp_path, segfault.id) / "log.txt").read_text()


def test_a_stop_that_comes_with_the_start_is_not_lost(tmp_path: Path) -> None:
    (job,) = jobs_of(LINGER)
    settings = worker.Settings(str(tmp_path), "fake_runs:train", ("fake_runs",))
    plain = {**dataclasses.asdict(job), "experiment": LINGER}
    with server.Server(settings) as forking:
        both = [{"do": "start", "job": plain, "threads": 1, "device": None},
                {"do": "signal", "number": signal.SIGTERM}]  # fmt: skip
        text = "".join(json.dumps(message) + "\n" for message in both)
        forking.lines.channel.sendall(text.encode())  # read as one
        said: list[dict[str, Any]] = []
        while not (said and said[-1]["said"] == "ended"):
            said += forking.messages(1.0)
    assert said[-1]["code"] in (worker.INTERRUPTED, -signal.SIGTERM)


def test_finished_runs_are_not_run_again_and_failed_ones_are(tmp_path: Path) -> None:
    good, bad = jobs_of(FINISH, {"do": "crash"})
    execute([good, bad], tmp_path)
    mended = dataclasses.replace(bad, experiment=FINISH)
    outcome = execute([good, mended], tmp_path)
    assert begun(tmp_path).count(good.id) == 1
    assert outcome.states == {good.id: "done", bad.id: "done"}
    assert not (Run(tmp_path, bad.id) / "failure.json").exists()
    assert execute([good, mended], tmp_path, preload=["no_such_module"]).states == outcome.states


def test_each_run_has_a_process_in_another_session_and_its_share_of_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setattr(machine, "visible_gpus", list)
    jobs = jobs_of(FINISH, FINISH)
    execute(jobs, tmp_path, workers=None)
    seen = [read_json(Run(tmp_path, job.id) / "seen.json") for job in jobs]
    assert [s["OMP_NUM_THREADS"] for s in seen] == ["4", "4"]
    assert all(s["argv"] == sys.argv and s["sid"] != os.getsid(0) for s in seen)
    assert len({row["pid"] for row in read_rows(tmp_path / "begun.jsonl")}) == 2


def test_cores_are_divided_and_gpus_are_dealt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 8)
    monkeypatch.setattr(machine, "visible_gpus", list)
    many = jobs_of(*[{"execution": {"threads": None}}] * 20)
    assert machine.plan_slots(many) == machine.Slots((None,) * 8, 1)
    assert machine.plan_slots(many[:3]) == machine.Slots((None,) * 3, 2)
    assert machine.plan_slots(many, 4) == machine.Slots((None,) * 4, 2)
    wide = jobs_of(*[{"execution": {"threads": 4}}] * 20)
    assert machine.plan_slots(wide).workers == 2
    monkeypatch.setattr(machine, "visible_gpus", lambda: ["0", "3"])
    assert machine.plan_slots(many) == machine.Slots(("0", "3"), 4)
    assert machine.plan_slots(many, 3).devices == ("0", "3", "0")
    assert machine.plan_slots(jobs_of({"execution": {"device": "cpu"}})).devices == (None,)


def test_a_containers_share_of_the_cores_counts(tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("100000 100000\n")
    assert machine.usable_cores(quota) == 1
    quota.write_text("max 100000\n")
    assert machine.usable_cores(quota) == machine.usable_cores(tmp_path / "none") >= 1


@pytest.mark.parametrize(("chosen", "gpus"), [("", []), ("-1", []), ("2, GPU-ab", ["2", "GPU-ab"])])
def test_chosen_gpus_are_kept_to(
    chosen: str, gpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert machine.visible_gpus() == gpus


def test_ctrl_c_saves_and_exits_130_and_the_next_start_does_only_what_is_missing(
    driver: Callable[..., Driver],
) -> None:
    first = driver(FINISH, LINGER, LINGER, FINISH, FINISH)
    pids = first.running(2)
    first.process.send_signal(signal.SIGINT)
    assert first.process.wait() == 130
    assert first.state() == ["done", "interrupted", "interrupted", "pending", "pending"]
    assert all((Run(first.root, job.id) / "saved").exists() for job in first.jobs[1:3])
    assert not any(psutil.pid_exists(pid) for pid in pids)
    (first.root / "go").touch()
    second = driver(FINISH, LINGER, LINGER, FINISH, FINISH)
    assert second.process.wait() == 0
    assert second.state() == ["done"] * 5
    assert [begun(first.root).count(job.id) for job in first.jobs] == [1, 2, 2, 1, 1]


def test_a_second_ctrl_c_does_not_wait(driver: Callable[..., Driver]) -> None:
    one = driver({"do": "stubborn"}, FINISH)
    one.running(1)
    one.process.send_signal(signal.SIGINT)
    wait_until(lambda: "stopping: the running run saves" in one.said.read_text())
    one.process.send_signal(signal.SIGINT)
    assert one.process.wait() == 130
    assert one.state()[0] == "interrupted"
    assert not (Run(one.root, one.jobs[0].id) / "failure.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
@pytest.mark.parametrize("victim", ["scheduler", "forking process"])
def test_killed_outright_its_runs_save_and_end_and_can_go_on(
    victim: str, driver: Callable[..., Driver]
) -> None:
    one = driver(LINGER, LINGER, FINISH)
    pids = one.running(2)
    forking = psutil.Process(pids[0]).ppid()
    os.kill(one.process.pid if victim == "scheduler" else forking, signal.SIGKILL)
    assert one.process.wait() != 0
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in [*pids, forking]))
    assert one.state() == ["interrupted", "interrupted", "pending"]
    (one.root / "go").touch()
    assert driver(LINGER, LINGER, FINISH).process.wait() == 0
    assert one.state() == ["done"] * 3


def test_a_run_stopped_from_outside_is_no_failure(tmp_path: Path) -> None:
    outcome = execute(jobs_of({"do": "stop"}, FINISH), tmp_path)
    assert sorted(outcome.states.values()) == ["done", "interrupted"]
    assert outcome.interrupted
    assert not outcome.failed


def test_cancel_stops_the_running_runs_and_starts_no_more(driver: Callable[..., Driver]) -> None:
    one = driver(LINGER, LINGER, FINISH)
    one.running(2)
    experiments = {job.label: job for job in one.jobs}
    rows = [
        {"label": label, "runs": {"0": job.id}, "experiment": job.experiment}
        for label, job in experiments.items()
    ]
    lines = control.cancel(one.root, {"name": "fake", "seeds": [0], "rows": rows})
    assert "saves a checkpoint and stops" in lines[0]
    assert "1 more" in lines[2]
    assert one.process.wait() == 130
    assert one.state() == ["interrupted", "interrupted", "pending"]


def test_a_run_that_another_process_works_on_is_waited_for(driver: Callable[..., Driver]) -> None:
    one = driver(LINGER)
    one.running(1)

    class GoOnceWaiting(live.Lines):
        def waiting(self, job: Job) -> None:
            super().waiting(job)
            (one.root / "go").touch()

    outcome = execute([*one.jobs], one.root, watcher=GoOnceWaiting(one.root))
    assert outcome.states == {one.jobs[0].id: "done"}
    assert begun(one.root) == [one.jobs[0].id]


def test_a_run_lost_to_another_process_at_the_last_moment_is_waited_for(
    driver: Callable[..., Driver], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = driver(LINGER)
    one.running(1)
    waited: list[Job] = []

    class GoOnceWaiting(live.Lines):
        def waiting(self, job: Job) -> None:
            waited.append(job)
            monkeypatch.undo()
            (one.root / "go").touch()

    monkeypatch.setattr(Run, "locked", False)  # as if it were taken just after the look
    outcome = execute([*one.jobs], one.root, watcher=GoOnceWaiting(one.root))
    assert outcome.states == {one.jobs[0].id: "done"}
    assert waited == one.jobs
    assert not (Run(one.root, one.jobs[0].id) / "failure.json").exists()


def test_where_no_run_can_start_the_error_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No module named 'no_such_module'"):
        execute(jobs_of(FINISH), tmp_path, preload=["no_such_module"])


def test_without_a_terminal_each_change_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = live.watcher(tmp_path)
    execute(jobs_of(FINISH, {"do": "crash"}), tmp_path, watcher=watcher, workers=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("2 runs to do; 1 at a time")
    assert lines[1] == "[0/2] row 0 s0 started"
    assert re.fullmatch(r"\[1/2\] row 0 s0 done  val/loss 1\.500  .+", lines[2])
    assert lines[4].startswith("[2/2] row 1 s0 failed  RuntimeError: the sky fell")


def test_threads_that_an_experiment_asks_for_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    slots = machine.Slots((None,), threads=2)
    for asked, said in (([1], "one thread"), ([None], "2 threads"), ([1, None], "1 or 2 threads")):
        jobs = jobs_of(*({"execution": {"threads": threads}} for threads in asked))
        live.watcher(tmp_path).begin(jobs, 0, slots)
        assert f"1 at a time, {said} each" in capsys.readouterr().err


def test_on_a_terminal_the_table_shows_every_run_and_what_is_left(tmp_path: Path) -> None:
    from rich.console import Console

    board, jobs = live.Board(tmp_path), jobs_of(FINISH, {"do": "crash"}, LINGER)
    board.console = Console(file=io.StringIO(), width=100)
    board.begin(jobs, 0, machine.Slots((None,), 1))
    execute(jobs[:2], tmp_path)
    run = Run(tmp_path, jobs[2].id)
    run.folder.mkdir()
    board.started(jobs[2], os.getpid())
    run.heartbeat(step=1, steps=4, tokens_per_s=1234.0, seconds_left=30.0, **{"train/loss": 2.5})
    board.ended(jobs[0], "done")
    board.ended(jobs[1], "failed")
    board.look()
    console = Console(width=100)
    with console.capture() as capture:
        console.print(board.draw())
    board.close()
    text = capture.get()
    for expected in ("row 0", "done", "val 1.500", "failed", "1/4", "train 2.500", "1,234", "30 s"):
        assert expected in text
    assert "2 of 3 ended, about 30 s left" in text


def test_real_runs_train_side_by_side_to_the_same_records_as_one_alone(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    from experiments.trainer import train

    experiment = loader.load(tiny_yaml)
    rows = [
        {
            "label": "tiny",
            "runs": {str(seed): loader.run_id(experiment, seed) for seed in (0, 1)},
            "experiment": loader.resolved(experiment),
        }
    ]
    record = {"name": "tiny", "seeds": [0, 1], "rows": rows}
    root = tmp_path / "runs"
    outcome = local.run_manifest(record, root)
    assert set(outcome.states.values()) == {"done"}, outcome.states
    alone = train(experiment, 1, tmp_path / "alone", progress="none")
    for name in ("metrics.jsonl", "experiment.yaml"):
        ours, theirs = (Run(r, alone["id"]) / name for r in (root, tmp_path / "alone"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert "step 40/40" in (Run(root, alone["id"]) / "log.txt").read_text()
    stale = manifest.Job(alone["id"] + "9", 1, "tiny", loader.resolved(experiment))
    assert local.execute([stale], root, preload=[]).failed == [stale.id]
