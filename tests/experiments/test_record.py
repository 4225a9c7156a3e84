"""The run directory: whole files or none, one process at a time, a state that is no guess."""

from __future__ import annotations

import builtins
import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from experiments import progress as progress_module
from experiments import record
from experiments.progress import Progress
from experiments.record import Run, UserError, append_rows, find, read_rows, write_atomically

spawn = multiprocessing.get_context("spawn")


def hold(root: Path, id: str, pipe: Connection) -> None:
    """In a process of its own: holds a run's lock until told to let go."""
    with Run(root, id).lock():
        Run(root, id).heartbeat(step=3)
        pipe.send("held")
        pipe.recv()


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs", "3f9a1c2b7d-s0")


def begin(run: Run) -> Run:
    """The run as it is after its first moments."""
    write_atomically(run / "experiment.yaml", "model: {}\n")
    return run


# --- state ---------------------------------------------------------------------------------------


def test_a_run_is_pending_interrupted_failed_running_then_done_or_diverged(run: Run) -> None:
    assert run.state == "pending"
    begin(run)
    assert run.state == "interrupted"
    record.write_json(run / "failure.json", {"error": "no space left"})
    assert run.state == "failed"
    with run.lock():
        assert run.state == "running"
    assert run.state == "failed"
    for status in ("diverged", "done"):
        record.write_json(run / "result.json", {"status": status})
        assert run.state == status
        with run.lock():  # what is finished stays so, whoever looks at it
            assert run.state == status


def test_asking_for_the_state_leaves_no_trace(run: Run) -> None:
    assert (run.state, run.locked, run.live()) == ("pending", False, {})
    assert not run.root.exists()


def test_a_heartbeat_says_who_and_how_far_and_a_half_written_one_is_no_error(run: Run) -> None:
    run.heartbeat(step=3, steps=10)
    live = run.live()
    assert (live["pid"], live["step"], live["steps"]) == (os.getpid(), 3, 10)
    (run / "running.json").write_text('{"pid": 1')
    assert run.live() == {}


SLURM = {
    "JOB_ID": "SLURM_JOB_ID",
    "ARRAY_JOB_ID": "SLURM_ARRAY_JOB_ID",
    "ARRAY_TASK_ID": "SLURM_ARRAY_TASK_ID",
    "NODE": "SLURMD_NODENAME",
}


@pytest.mark.parametrize(
    ("given", "job", "node"),
    [
        ({}, None, None),
        ({"JOB_ID": "12"}, "12", None),
        ({"JOB_ID": "15", "ARRAY_JOB_ID": "12", "ARRAY_TASK_ID": "3"}, "12_3", None),
        ({"JOB_ID": "12", "NODE": "gpu07"}, "12", "gpu07"),
        ({"JOB_ID": "12", "NODE": socket.gethostname()}, "12", None),
    ],
)
def test_a_heartbeat_names_the_slurm_job_and_the_node_where_it_is_not_the_host(
    given: dict[str, str],
    job: str | None,
    node: str | None,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, variable in SLURM.items():
        monkeypatch.delenv(variable, raising=False)
        if name in given:
            monkeypatch.setenv(variable, given[name])
    run.heartbeat()
    live = run.live()
    assert (live["host"], live["job"], live.get("node")) == (socket.gethostname(), job, node)


def test_the_first_heartbeat_is_at_once_and_the_next_before_it_is_taken_for_silence(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Progress("none", run) as progress:
        first = run.live()
        assert first["pid"] == os.getpid() and "step" not in first
        progress.show(1, 10, 256, {"train/loss": 2.5}, 1000.0)
        assert run.live()["step"] == 1
        progress.pulse(step=2)
        assert run.live()["step"] == 1  # a moment ago
        monkeypatch.setattr(progress_module, "PULSE_SECONDS", 0.0)
        progress.pulse(step=2)
        assert (run.live()["step"], run.live()["train/loss"]) == (2, 2.5)
        with Progress("none", None) as other:  # another process of the same run
            other.pulse(step=3)
        assert run.live()["step"] == 2
    assert run.live() == {}


def test_a_damaged_result_is_named_and_never_taken_for_done(run: Run) -> None:
    begin(run)
    for damaged in ("", "{", "[]", "\0"):
        (run / "result.json").write_text(damaged)
        with pytest.raises(UserError, match=r"result\.json: "):
            assert run.state


# --- the lock ------------------------------------------------------------------------------------


def test_one_process_at_a_time_and_a_killed_one_lets_go(run: Run) -> None:
    begin(run)
    here, there = spawn.Pipe()
    process = spawn.Process(target=hold, args=(run.root, run.id, there))
    process.start()
    assert here.recv() == "held"
    try:
        assert run.state == "running"
        with (
            pytest.raises(UserError, match=rf"another process .* \(process {process.pid} on "),
            run.lock(),
        ):
            pass
        assert run.locked, "the attempt must not have taken the lock away"
    finally:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    assert run.state == "interrupted"
    with run.lock():
        assert run.locked
    assert not run.locked


def test_the_lock_is_free_after_an_error_inside_it(run: Run) -> None:
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    assert not run.locked


def test_lookers_share_the_lock_and_meet_neither_each_other_nor_a_starting_run(run: Run) -> None:
    begin(run)
    with run.lock():
        pass
    looker = os.open(run / "lock", os.O_RDONLY)
    try:
        fcntl.flock(looker, fcntl.LOCK_SH)
        assert not run.locked
    finally:
        os.close(looker)
    with run.lock():
        assert run.locked


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_sees_whether_a_run_is_worked_on_and_can_not_take_it() -> None:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        run = begin(Run(Path(folder), "3f9a1c2b7d-s0"))
        with run.lock():
            os.seteuid(65534)
            try:
                assert run.state == "running"
            finally:
                os.seteuid(0)
        os.seteuid(65534)
        try:
            assert run.state == "interrupted"
            with pytest.raises(UserError, match="Permission denied"), run.lock():
                pass
        finally:
            os.seteuid(0)


def test_a_lock_that_can_not_be_read_tells_of_no_owner(run: Run) -> None:
    begin(run)
    (run / "lock").symlink_to("lock")  # ELOOP for every user
    assert not run.locked


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_in_one_line_and_nobody_seems_to_run_there(
    code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(run)
    (run / "lock").touch()

    def none_here(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none_here)
    assert not run.locked
    with pytest.raises(UserError, match=r"no locks .* mounted with `flock`") as caught, run.lock():
        pass
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, record.Locked)


def test_a_folder_that_can_not_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file in the way")
    with pytest.raises(UserError, match=r"3f-s0: (Not a directory|File exists)"), \
            Run(tmp_path / "runs", "3f-s0").lock():  # fmt: skip
        pass


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "no space left on the disk"), (errno.EIO, "error")]
)
@pytest.mark.parametrize("fails", ["open", "write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_whole_and_nothing_beside_it(
    fails: str, code: int, words: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run / "result.json"
    write_atomically(path, "old")

    def failing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(code, os.strerror(code))

    class Full:
        """A file on a disk that takes half of what is written."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = real_open(*args, **kwargs)

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *exception: object) -> None:
            self.file.close()

        def write(self, text: str) -> None:
            self.file.write(text[: len(text) // 2])
            failing()

    real_open = builtins.open
    with monkeypatch.context() as patch:
        if fails == "open":
            patch.setattr(builtins, "open", failing)
        elif fails == "write":
            patch.setattr(builtins, "open", Full)
        elif fails == "fsync":
            patch.setattr(os, "fsync", failing)
        else:
            patch.setattr(Path, "replace", failing)
        with pytest.raises(UserError, match=words) as caught:
            write_atomically(path, "new, and longer")
    assert str(caught.value).startswith(f"{path}: ")
    assert path.read_text() == "old"
    assert [p.name for p in run.folder.iterdir()] == ["result.json"]


def test_a_write_is_whole_and_replaces(run: Run) -> None:
    for text in ("a" * 100_000, "é\n", ""):
        write_atomically(run / "x", text)
        assert (run / "x").read_text(encoding="utf-8") == text
    assert [p.name for p in run.folder.iterdir()] == ["x"]


def test_json_keeps_every_digit_and_refuses_what_is_no_json(run: Run) -> None:
    values = {"a": 0.1 + 0.2, "b": 5e-324, "c": 2**70, "d": None}
    record.write_json(run / "x.json", values)
    assert record.read_json(run / "x.json") == values
    with pytest.raises(ValueError, match="JSON compliant"):
        record.write_json(run / "x.json", {"loss": float("nan")})
    assert record.read_json(run / "x.json") == values


def test_rows_come_back_as_written_and_a_line_cut_off_in_the_middle_is_left_out(run: Run) -> None:
    path = run / "metrics.jsonl"
    assert read_rows(path) == []
    assert record.last_row(path) is None
    run.folder.mkdir(parents=True)
    rows = [{"step": i, "train/loss": i / 3} for i in range(300)]
    append_rows(path, *rows[:2])
    append_rows(path, *rows[2:])
    assert read_rows(path) == rows
    assert record.last_row(path) == rows[-1]
    whole = path.read_bytes()
    for cut in range(1, len(json.dumps(rows[-1])) + 1):
        path.write_bytes(whole[:-cut])
        assert read_rows(path) == rows[:-1]
        assert record.last_row(path) == rows[-2]


@pytest.mark.parametrize("damage", ["{", "not json", "", '{"step": 1}{"step": 2}', "\0\0\0"])
def test_a_damaged_line_is_named(damage: str, run: Run) -> None:
    run.folder.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: not a JSON row"):
        read_rows(run / "metrics.jsonl")


def test_a_seal_fits_what_was_sealed_and_no_other_byte_or_number(run: Run) -> None:
    run.folder.mkdir(parents=True)
    for name, text in (("experiment.yaml", "model: {}\n"), ("metrics.jsonl", '{"step": 1}\n')):
        (run / name).write_text(text)
    result = {"val/loss": 1.5, "code": {"commit": None, "dirty": True}, "lengths": [1, 2]}
    sealed = record.seal(run.folder, result)
    assert len(sealed) == 32
    record.write_json(run / "result.json", {**result, "seal": sealed})
    read = record.read_json(run / "result.json")
    assert record.seal(run.folder, read) == sealed
    assert record.seal(run.folder, dict(reversed(read.items()))) == sealed
    experiment, metrics = (
        (run / "experiment.yaml").read_bytes(),
        (run / "metrics.jsonl").read_bytes(),
    )
    assert record.seal_of(experiment, metrics, read) == sealed
    assert record.seal(run.folder, {**read, "val/loss": 1.4999999999999998}) != sealed
    for name in ("experiment.yaml", "metrics.jsonl"):
        before = (run / name).read_bytes()
        (run / name).write_bytes(before + b"\n")
        assert record.seal(run.folder, read) != sealed
        (run / name).unlink()
        assert record.seal(run.folder, read) != sealed
        (run / name).write_bytes(before)
    assert record.seal_of(experiment + metrics[:1], metrics[1:], read) != sealed


def test_truncating_cuts_to_the_byte_and_makes_what_is_missing(run: Run) -> None:
    run.folder.mkdir(parents=True)
    path = run / "metrics.jsonl"
    record.truncate(path, 0)
    append_rows(path, {"step": 1})
    size = path.stat().st_size
    append_rows(path, {"step": 2})
    record.truncate(path, size)
    assert read_rows(path) == [{"step": 1}]


# --- finding a run -------------------------------------------------------------------------------


def test_a_run_is_found_by_its_id_a_beginning_of_it_or_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    for id in ("3f9a-s0", "3f9a-s1", "3f9a-s10", "77aa-s0"):
        begin(Run(root, id))
    assert record.all_ids(root) == ["3f9a-s0", "3f9a-s1", "3f9a-s10", "77aa-s0"]
    assert find(root, "77").id == "77aa-s0"
    assert find(root, "3f9a-s1").id == "3f9a-s1"  # whole, though it begins another
    monkeypatch.chdir(tmp_path)
    assert find(Path("elsewhere"), "runs/77aa-s0").folder == root / "77aa-s0"
    monkeypatch.chdir(root / "77aa-s0")
    assert find(Path("elsewhere"), ".").id == "77aa-s0"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="'3f9a' may mean 3f9a-s0, 3f9a-s1, 3f9a-s10: write more"):
        find(root, "3f9a")
    for none in ("zz", ""):
        with pytest.raises(UserError, match=rf"no run '{none}' in .* holds 4 runs; list them with"):
            find(root, none)
    with pytest.raises(UserError, match=r"no run 'zz' in .* \(no runs yet\)"):
        find(tmp_path / "none", "zz")


def test_the_record_needs_no_torch_and_none_of_the_trainings_libraries() -> None:
    code = (
        "import sys, experiments.record\n"
        "print([m for m in ('torch', 'numpy', 'scipy', 'yaml', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, cwd=Path(record.__file__).parent.parent,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
