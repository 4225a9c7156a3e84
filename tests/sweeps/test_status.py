"""Where runs stand is read from their directories; cancel asks only the right process to stop."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from components.registry import UserError
from experiments.record import Run, append_rows, write_json
from sweeps import control, manifest, status

EXPERIMENT = {"training": {"tokens": 100, "seq_len": 5, "global_batch_size": 2}}
HOLD = """
import json, os, signal, sys, time
from pathlib import Path
from experiments.record import Run
run = Run(Path(sys.argv[1]), sys.argv[2])
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
with run.lock():
    run.heartbeat(**json.loads(sys.argv[3]))
    print("held", flush=True)
    while not stop:
        time.sleep(0.01)
"""


def sweep(*ids: str, name: str = "demo") -> dict[str, Any]:
    rows = [
        {"label": f"row {n}", "group": "rows", "changes": {}, "experiment": EXPERIMENT}
        | {"runs": {"0": id}}
        for n, id in enumerate(ids)
    ]
    head = {"schema": 1, "name": name, "file": f"{name}.yaml", "baseline": "row 0", "seeds": [0]}
    return {**head, "tokens": 100, "rows": rows}


def begin(run: Run) -> None:
    run.folder.mkdir(parents=True)
    (run / "experiment.yaml").write_text("{}\n")


@pytest.fixture
def hold() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Another process that holds a run's lock, with what it says of itself."""
    holders: list[subprocess.Popen[str]] = []

    def start(run: Run, **live: Any) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", HOLD, str(run.root), run.id, json.dumps(live)]
        root = str(Path(__file__).parent.parent.parent)
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
        )
        holders.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in holders:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_each_state_is_told_with_what_is_known_of_it(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    ids = ["done-s0", "burst-s0", "alive-s0", "failed-s0", "cut-s0", "new-s0"]
    done, burst, alive, failed, cut = (Run(tmp_path, id) for id in ids[:5])
    for run in (done, burst, alive, failed, cut):
        begin(run)
    write_json(done / "result.json", {"status": "done", "step": 10, "val/loss": 3.5})
    reason = {"status": "diverged", "step": 4, "val/loss": None, "reason": "non-finite loss"}
    write_json(burst / "result.json", reason)
    holder = hold(alive, step=6, steps=10, seconds_left=7.5, **{"train/loss": 4.5})
    write_json(failed / "failure.json", {"error": "KeyError: 'x'"})
    append_rows(cut / "metrics.jsonl", {"step": 3, "train/loss": 5.0})
    write_json(cut / "running.json", {"pid": 1, "host": "elsewhere", "step": 3})

    rows = {row.id: row for row in status.sweep_status(tmp_path, sweep(*ids))}
    assert [row.state for row in rows.values()] == [
        *("done", "diverged", "running", "failed", "interrupted", "pending")
    ]
    assert [(r.step, r.steps) for r in rows.values()] == [
        *((10, 10), (4, 10), (6, 10), (None, 10), (3, 10), (None, 10))
    ]
    assert rows["done-s0"].val_loss == 3.5
    assert rows["burst-s0"].note == "non-finite loss"
    assert (rows["alive-s0"].pid, rows["alive-s0"].seconds_left) == (holder.pid, 7.5)
    assert rows["failed-s0"].note == "KeyError: 'x'"
    assert rows["cut-s0"].note == "cut off: process 1 on elsewhere is gone"
    assert status.summary(list(rows.values())).startswith("1 done, 1 diverged, 1 running")


def test_a_running_run_that_gives_no_sign_is_pointed_out(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    hold(Run(tmp_path, "a-s0"), updated=time.time() - 720)
    (row,) = status.sweep_status(tmp_path, sweep("a-s0"))
    assert re.fullmatch(r"no sign for 12:\d\d", row.note or "")


def test_a_damaged_record_hides_no_other_run(tmp_path: Path) -> None:
    begin(Run(tmp_path, "bad-s0"))
    (Run(tmp_path, "bad-s0") / "result.json").write_text("{")
    write_json(Run(tmp_path, "good-s0") / "result.json", {"status": "done"})
    bad, good = status.sweep_status(tmp_path, sweep("bad-s0", "good-s0"))
    assert bad.state == "failed"
    assert "result.json: can't be read" in str(bad.note)
    assert good.state == "done"


def test_json_has_a_version_counts_and_the_metrics_own_names(tmp_path: Path) -> None:
    write_json(Run(tmp_path, "a-s0") / "result.json", {"status": "done", "val/loss": 3.5})
    data = status.as_json(status.sweep_status(tmp_path, sweep("a-s0", "b-s0")), "demo")
    assert (data["schema"], data["sweep"], data["counts"]) == (1, "demo", {"done": 1, "pending": 1})
    assert data["runs"][0]["val/loss"] == 3.5
    assert data["runs"][1]["steps"] == 10


def test_all_runs_are_told_once_with_their_sweep_or_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, ids in (("one", ["a-s0", "b-s0"]), ("two", ["b-s0"])):
        manifest.write(tmp_path, sweep(*ids, name=name))
    begin(Run(tmp_path, "lone-s3"))
    rows = status.all_status(tmp_path)
    assert [(r.id, r.sweep, r.seed) for r in rows] == [
        *(("a-s0", "one", 0), ("b-s0", "one", 0), ("lone-s3", None, 3))
    ]
    status.command(tmp_path, None)
    assert "lone-s3" in capsys.readouterr().out
    status.command(tmp_path, "one", as_json=True)
    assert [r["id"] for r in json.loads(capsys.readouterr().out)["runs"]] == ["a-s0", "b-s0"]


def test_watching_ends_when_every_run_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest.write(tmp_path, sweep("a-s0"))
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 2:
            write_json(Run(tmp_path, "a-s0") / "result.json", {"status": "done"})

    monkeypatch.setattr(status.time, "sleep", sleep)
    status.command(tmp_path, "demo", as_json=True, watch=True)
    assert json.loads(capsys.readouterr().out)["counts"] == {"done": 1}
    assert len(slept) == 2


def test_a_markup_in_a_label_is_shown_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = sweep("a-s0")
    record["rows"][0]["label"] = "[red]x[/]"
    manifest.write(tmp_path, record)
    status.command(tmp_path, "demo")
    assert "[red]x[/]" in capsys.readouterr().out


def test_cancel_asks_the_process_that_holds_the_run(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    record = sweep("a-s0", "b-s0")
    holder = hold(Run(tmp_path, "a-s0"))
    dry = control.cancel(tmp_path, record, dry_run=True)
    assert holder.poll() is None
    assert not manifest.cancel_marker(tmp_path, "demo").exists()
    lines = control.cancel(tmp_path, record)
    assert lines == dry
    assert f"process {holder.pid} saves a checkpoint and stops" in lines[0]
    assert lines[1] == "demo: 1 more will not start until it is run again"
    assert holder.wait() == 0
    assert manifest.cancel_marker(tmp_path, "demo").exists()


def test_cancel_never_signals_a_process_whose_number_was_passed_on(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    other = hold(Run(tmp_path, "other-s0"))
    hold(Run(tmp_path, "a-s0"))
    live = {"pid": other.pid, "host": socket.gethostname(), "updated": time.time()}
    write_json(Run(tmp_path, "a-s0") / "running.json", live)  # as an attempt before left it
    signalled: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: signalled.append(pid))
        assert control.cancel(tmp_path, sweep("a-s0")) == [
            "row 0 s0 (a-s0): starting; its sweep stops it"
        ]
    assert signalled == []


def test_cancel_names_runs_on_other_hosts(
    tmp_path: Path, hold: Callable[..., subprocess.Popen[str]]
) -> None:
    holder = hold(Run(tmp_path, "a-s0"), host="node7")
    signalled: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "kill", lambda pid, number: signalled.append(pid))
        (line,) = control.cancel(tmp_path, sweep("a-s0"))
    assert f"on node7, process {holder.pid}" in line
    assert signalled == []


def test_cancel_of_a_finished_sweep_does_nothing(tmp_path: Path) -> None:
    write_json(Run(tmp_path, "a-s0") / "result.json", {"status": "done"})
    assert control.cancel(tmp_path, sweep("a-s0")) == []
    assert not manifest.cancel_marker(tmp_path, "demo").exists()


def test_retry_frees_failed_and_interrupted_runs_and_the_sweep(tmp_path: Path) -> None:
    failed, cut = Run(tmp_path, "a-s0"), Run(tmp_path, "b-s0")
    begin(failed)
    begin(cut)
    write_json(failed / "failure.json", {"error": "out of luck"})
    record = sweep("a-s0", "b-s0", "c-s0")
    control.cancel(tmp_path, record)
    rows = status.sweep_status(tmp_path, record)
    assert "row 0 s0: out of luck" in status.failures(rows)[0]
    expected = ["a-s0  row 0 s0  failed: out of luck", "b-s0  row 1 s0  interrupted"]
    found, cluster = control.to_retry(tmp_path, record)
    assert control.described(found) == expected
    assert cluster is None
    assert failed.state == "failed"
    control.free(tmp_path, record, found)
    assert failed.state == "interrupted"
    assert not manifest.cancel_marker(tmp_path, "demo").exists()


def test_an_unknown_sweep_is_a_plain_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep 'demo'"):
        status.command(tmp_path, "demo")


def test_status_needs_no_torch() -> None:
    code = "import sys; from sweeps import status, live, local; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parent.parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (41.2, "41 s"), (200, "3:20"), (7500, "2:05:00")]
)
def test_durations_read_easily(seconds: float | None, text: str) -> None:
    assert status.duration(seconds) == text
