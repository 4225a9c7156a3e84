"""The run directory: what a run leaves behind, and the only thing that tables are made from.

    runs/<id>/              another attempt at it, on other text or asked for, is runs/<id>.2/
        experiment.yaml     the resolved experiment, every default filled in
        provenance.json     code, versions, hardware, data fingerprint, command; each attempt
        metrics.jsonl       what was measured, by step and tokens; byte-identical after a resume
        timing.jsonl        how long it took; the one record that differs between two machines
        checkpoints/        weights and optimizer, see checkpoint.py
        running.json        who runs it and how far it is; refreshed while it runs
        failure.json        why the last attempt stopped, if it crashed
        lengths.json        loss by position in windows of other lengths, where these are asked for
    result.json         written once, atomically, last; sealed
        tracking.json       what wandb has of it, see tracking.py
        log.txt             what a worker printed
    runs/sweeps/<name>.json the rows of a sweep and their runs, see sweeps/manifest.py

Nothing here imports torch: `status` and `table` answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.registry import UserError, path_from

__all__ = ["Run", "UserError", "append_rows", "read_json", "read_rows", "write_atomically"]

SCHEMA = 1
FINISHED = ("done", "diverged")  # states that a result.json gives
HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)  # what a lock in other hands answers
LOOK_SECONDS = 0.1  # between looks at a lock that another process holds
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # and a file system that has none


class Locked(UserError):
    """Another process works on the run."""


class Interrupted(Exception):
    """A signal asked the run to stop; it has saved a checkpoint and can go on from it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.signal = number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return Interrupted, (self.signal,)  # to other processes of the same run


def write_atomically(path: Path, text: str, durable: bool = True) -> None:
    """Writes beside and renames, so that a reader sees the old file or the new one, never half.

    `durable` waits until the disk has it, so that it outlives the machine too.

    Raises:
        UserError: the disk is full or the folder can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(error, path) from error


def write_json(path: Path, data: dict[str, Any]) -> None:
    """`data` as indented JSON, atomically. Floats keep every digit."""
    write_atomically(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def disk_error(error: OSError, path: Path) -> UserError:
    """One line for an operating-system error on `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"{path}: no space left on the disk; free some, then run the same again")
    return UserError(f"{path}: {error.strerror or error}")


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        UserError: it can't be read, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path}: can't be read: damaged ({error}); remove it and run the same again"
        ) from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds {type(data).__name__}, not the record of a run")
    return data


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a last line cut off in the middle is left out.

    Raises:
        UserError: another line is damaged; names it.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last newline is incomplete
        try:
            row = json.loads(line)
        except ValueError:
            raise UserError(f"{path}:{number}: not a JSON row; is this a run's record?") from None
        rows.append(row)
    return rows


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest whole row, reading only the end of the file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1]) if lines else None
    except (OSError, ValueError):
        return None


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log that say something; none if it can't be read."""
    most = 8192 + 200 * lines  # bytes
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]


def append_rows(path: Path, *rows: dict[str, Any]) -> None:
    """Adds whole rows at the end, each one line."""
    text = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise disk_error(error, path) from error


def seal(folder: Path, result: Mapping[str, Any]) -> str:
    """A digest of a run's experiment.yaml, metrics.jsonl and result, which is written into the
    result: a directory that was edited by hand later does not fit it. A file that is not there
    counts as empty.

    Raises:
        UserError: a file can't be read.
    """
    return seal_of(_content(folder / "experiment.yaml"), _content(folder / "metrics.jsonl"), result)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


def seal_of(experiment: bytes, metrics: bytes, result: Mapping[str, Any]) -> str:
    """As `seal`, from the contents of the two files. BLAKE2b-128 in hexadecimal."""
    sealed = {key: value for key, value in result.items() if key != "seal"}
    text = json.dumps(sealed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest = hashlib.blake2b(digest_size=16)
    for part in (experiment, metrics, text.encode()):
        digest.update(len(part).to_bytes(8, "big"))  # so that nothing moves between the parts
        digest.update(part)
    return digest.hexdigest()


def truncate(path: Path, size: int) -> None:
    """Cuts what was written after the checkpoint that training goes on from (bytes)."""
    path.touch()
    os.truncate(path, size)


def id_parts(id: str) -> tuple[str, str, int]:
    """(identity, seed as written, number of the attempt from 1 on) of a run's id:
    `<identity>-s<seed>`, and `.2` behind it for a second attempt beside the first."""
    base, _, number = id.partition(".")
    identity, _, seed = base.rpartition("-s")
    return identity, seed, int(number) if number.isdecimal() else 1


@dataclass(frozen=True)
class Run:
    """One run's directory.

    `state` is one of: done, diverged, failed, running, interrupted (it has begun and nobody works
    on it: the next start goes on from its checkpoint), pending (nothing there yet).
    """

    root: Path
    id: str

    @property
    def folder(self) -> Path:
        return self.root / self.id

    def __truediv__(self, name: str) -> Path:
        return self.folder / name

    @property
    def state(self) -> str:
        if (path := self / "result.json").exists():
            status = read_json(path).get("status")
            if status not in FINISHED:
                raise UserError(
                    f"{path}: status is {status!r}, neither done nor diverged; "
                    "remove it and run the same again"
                )
            return str(status)
        if self.locked:
            return "running"
        if (self / "failure.json").exists():
            return "failed"
        return "interrupted" if (self / "experiment.yaml").exists() else "pending"

    @property
    def locked(self) -> bool:
        """Whether a living process works on this run (it holds the lock; a dead one can't)."""
        # Shared and read-only: anybody may look, also at others' runs, and lookers don't meet.
        try:
            descriptor = os.open(self / "lock", os.O_RDONLY)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in HELD
        finally:
            os.close(descriptor)
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the run for this process; the kernel lets go when the process ends, however.

        Raises:
            Locked: somebody else works on it; says who.
            UserError: the folder can't be written, or its file system has no locks.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self / "lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise disk_error(error, self.folder) from error
        try:
            if not self._take(descriptor):
                raise Locked(
                    f"{self.folder}: another process works on this run ({self.owner}); "
                    "wait for it, or stop that process"
                )
            yield
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> bool:
        # `locked` shares the lock for an instant when it looks: a few tries tell it from an owner
        for _ in range(20):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError as error:
                if error.errno in NO_LOCKS:
                    raise UserError(
                        f"{self.root}: its file system has no locks ({error.strerror}); choose a "
                        "--runs folder on one whose locks hold between nodes, such as NFS, or "
                        "Lustre mounted with `flock`"
                    ) from error
                time.sleep(0.02)
        return False

    @property
    def owner(self) -> str:
        with contextlib.suppress(UserError):
            live = read_json(self / "running.json")
            return f"process {live.get('pid')} on {live.get('host')}"
        return "not yet named"

    def heartbeat(self, **progress: Any) -> None:
        """Refreshes running.json: who runs this and how far it is."""
        who = {"schema": SCHEMA, "pid": os.getpid(), **whereabouts()}
        beat = {**who, "updated": time.time(), **progress}
        write_atomically(self / "running.json", json.dumps(beat) + "\n", durable=False)

    def live(self) -> dict[str, Any]:
        """What the newest heartbeat said; empty if there is none."""
        with contextlib.suppress(UserError):
            return read_json(self / "running.json")
        return {}


@contextlib.contextmanager
def hold_file(path: Path, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Holds a lock file for this process, on whichever node; waits for another that holds it.

    Args:
        wait: called now and then while waiting; may raise.

    Raises:
        UserError: the folder can't be written, or its file system has no locks.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        while not _taken(descriptor, path):
            wait()
            time.sleep(LOOK_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _taken(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno in NO_LOCKS:
            raise UserError(
                f"{path}: this file system has no locks; keep runs on one that has (--runs)"
            ) from error
        raise disk_error(error, path) from error
    return True


def whereabouts() -> dict[str, str | None]:
    """Where this process runs: host, and Slurm's job (`12`, or `12_3` in an array) and node.

    Slurm's name of the node is left out where it is the host's.
    """
    host, given = socket.gethostname(), os.environ.get
    job, task = given("SLURM_ARRAY_JOB_ID"), given("SLURM_ARRAY_TASK_ID")
    known = {"host": host, "job": f"{job}_{task}" if job and task else given("SLURM_JOB_ID")}
    node = given("SLURMD_NODENAME")
    return {**known, "node": node} if node and node != host else known


def find(root: Path, prefix: str) -> Run:
    """The run whose id begins with `prefix`, or that lies at this path.

    Raises:
        UserError: none or several; says which.
    """
    as_path = path_from("", prefix)
    with contextlib.suppress(OSError):  # a name too long for a path
        if (as_path / "experiment.yaml").is_file():
            return Run(as_path.resolve().parent, as_path.resolve().name)
    ids = all_ids(root)
    if prefix in ids:
        return Run(root, prefix)
    found = [name for name in ids if name.startswith(prefix)] if prefix else []
    if len({id_parts(name)[:2] for name in found}) == 1:  # attempts at one run: the newest
        found = [max(found, key=lambda name: id_parts(name)[2])]
    if len(found) == 1:
        return Run(root, found[0])
    if found:
        raise UserError(f"run '{prefix}' may mean {', '.join(found[:6])}: write more of it")
    where = f"{root} holds {len(ids)} runs; list them with: run.py status" if ids else "no runs yet"
    raise UserError(f"no run '{prefix}' in {root} ({where})")


def all_ids(root: Path) -> list[str]:
    """Ids of every run below `root`, sorted."""
    if not root.is_dir():
        return []
    return sorted(p.parent.name for p in root.glob("*/experiment.yaml"))
