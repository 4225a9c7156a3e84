"""Submitting, stopping and freeing the runs of a sweep, wherever they run.

A run that is done, running or queued is left alone by all of these, whoever submitted it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from components.registry import UserError
from experiments.record import FINISHED, Run, write_atomically
from sweeps import manifest, queue, scheduler, slurm, status
from sweeps.cluster import Cluster, ClusterFile
from sweeps.queue import Place
from sweeps.scheduler import Element, View
from sweeps.status import Row

UNDERWAY = (*FINISHED, "running", "queued")
FREED = ("failed", "interrupted", "stale", "unscored")  # what `retry` takes up
CONFIRM_SECONDS = 2.0
IDS_AT_ONCE = 500


@dataclass(frozen=True)
class Sent:
    """What a submission came to: rows as they stood before, and what Slurm took of them."""

    rows: Sequence[Row]
    submitted: slurm.Submitted

    @property
    def underway(self) -> list[Row]:
        return [row for row in self.rows if row.state in ("running", "queued")]


def submit(
    root: Path,
    record: Mapping[str, Any],
    file: ClusterFile,
    which: Literal["lacking", "freed", "unscored"] = "lacking",
) -> Sent:
    """Submits what a sweep lacks and nobody works on or has queued, and writes its manifest.

    Args:
        which: `freed`: only those that failed, were cut off or taken back, not those never
            submitted; `unscored`: only those that are trained and not scored yet.

    Raises:
        UserError: Slurm gives no answer, or takes none of them; in its own words.
    """
    with queue.lock(root):
        slurm.clear_up(root)
        rows = certain(root, record)
        submitted_before = queue.places(root) if which == "freed" else {}
        takes = {
            "lacking": lambda row: row.state not in UNDERWAY,
            "freed": lambda row: is_freed(row, submitted_before),
            "unscored": lambda row: row.state == "unscored",
        }[which]
        wanted = {row.id for row in rows if takes(row)}
        jobs = [job for job in manifest.jobs(record) if job.id in wanted]
        path = manifest.path_of(root, record["name"])
        before = path.read_bytes() if path.exists() else None
        manifest.write(root, record)  # before the jobs that begin at once; not if none is taken
        if not jobs:
            return Sent(rows, slurm.Submitted(()))
        manifest.cancel_marker(root, record["name"]).unlink(missing_ok=True)
        try:
            submitted = slurm.submit(root, record["name"], jobs, file)
        except BaseException:
            path.unlink() if before is None else path.write_bytes(before)
            raise
        return Sent(rows, submitted)


def lacking(root: Path, record: Mapping[str, Any]) -> tuple[list[manifest.Job], str | None]:
    """The runs that `submit` would submit now; where Slurm is silent, queued ones too, and why."""
    jobs = list(manifest.jobs(record))
    view = status.unfinished(root, jobs)
    rows = {row.id: row.state for row in status.sweep_status(root, record, view)}
    return [job for job in jobs if rows[job.id] not in UNDERWAY], view.answer.silence


def certain(root: Path, record: Mapping[str, Any]) -> list[Row]:
    """The rows of a sweep once Slurm's answer is sure: a job is not lost for one silent look.

    Raises:
        UserError: Slurm gives no answer.
    """
    rows: list[Row] = []
    for attempt in range(2):
        view = status.unfinished(root, manifest.jobs(record))
        if view.answer.silence:
            raise UserError(
                f"Slurm gives no answer, so nobody knows what is queued: {view.answer.silence}"
            )
        rows = status.sweep_status(root, record, view)
        if attempt or all(row.state != "stale" for row in rows):
            break
        time.sleep(CONFIRM_SECONDS)
    return rows


def cancel(root: Path, record: Mapping[str, Any], *, dry_run: bool = False) -> list[str]:
    """Stops a sweep: its running runs save and end, those that wait leave the queue.

    Returns:
        What was done (or would be), a line for each run and one for those not begun.
    """
    with queue.lock(root) if queue.folder(root).is_dir() else contextlib.nullcontext():
        if not dry_run:
            slurm.clear_up(root)
        view = status.unfinished(root, manifest.jobs(record))
        rows = [r for r in status.sweep_status(root, record, view) if r.state not in FINISHED]
        if view.answer.silence:
            raise UserError(f"Slurm gives no answer, nothing is cancelled: {view.answer.silence}")
        held = {row.id: element for row in rows if (element := in_slurm(row, view))}
        own = {row.id for row in rows if row.id in held
               and view.places[row.id].submission.sweep == record["name"]}  # fmt: skip
        queued = sorted({e.job for id, e in held.items() if id in own and e.waiting})
        if rows and not dry_run:
            for start in range(0, len(queued), IDS_AT_ONCE):  # which Slurm may refuse
                scheduler.ask("scancel", *queued[start : start + IDS_AT_ONCE])
            write_atomically(manifest.cancel_marker(root, record["name"]), "")
        lines = []
        for row in rows:
            element = held.get(row.id)
            if row.state == "running" and element is None:
                lines.append(f"{who(row)}: {stop_here(Run(root, row.id), row, dry_run)}")
            elif row.state in ("running", "queued") and element is not None:
                # One that runs looks for the marker, and saves for as long as that takes.
                what = "leaves the queue" if element.waiting else "saves a checkpoint and stops"
                if row.id not in own:
                    what = f"is of the sweep {view.places[row.id].submission.sweep}: left alone"
                lines.append(f"{who(row)}: job {element.job} {what}")
    waiting = sum(row.state not in ("running", "queued") for row in rows)
    if waiting:
        lines.append(f"{record['name']}: {waiting} more will not start until it is run again")
    return lines


def who(row: Row) -> str:
    return f"{row.label} s{row.seed} ({row.id})"


def in_slurm(row: Row, view: View) -> Element | None:
    """The job that a run was last submitted in, if it is still there."""
    place = view.places.get(row.id)
    element = view.answer.of(place) if place else None
    return element if element is not None and not element.ended else None


def stop_here(run: Run, row: Row, dry_run: bool) -> str:
    """Asks the process of a run to save and end, if it is on this machine."""
    here = row.host == socket.gethostname()
    if here and row.pid is not None and holds(row.pid, run):
        if not dry_run:
            with contextlib.suppress(ProcessLookupError):
                os.kill(row.pid, signal.SIGTERM)
        return f"process {row.pid} saves a checkpoint and stops"
    if row.host is None or here:
        return "starting; its sweep stops it"
    return f"on {row.host}, process {row.pid}: its sweep there stops it"


def holds(pid: int, run: Run) -> bool:
    """Whether this process has the run's lock file open: its number may be another's by now."""
    import psutil

    lock = str((run / "lock").resolve())
    try:
        return any(file.path == lock for file in psutil.Process(pid).open_files())
    except psutil.Error:
        return False


def to_retry(root: Path, record: Mapping[str, Any]) -> tuple[list[Row], ClusterFile | None]:
    """The runs to be taken up again, and the cluster that the sweep was last submitted to."""
    view = status.unfinished(root, manifest.jobs(record))
    every = status.sweep_status(root, record, view)
    rows = [row for row in every if is_freed(row, view.places)]
    open_ = [view.places[r.id] for r in every if r.id in view.places and r.state not in FINISHED]
    if not open_:
        return rows, None
    newest = max((place.submission for place in open_), key=lambda s: s.time)
    return rows, ClusterFile(Cluster.model_validate_json(json.dumps(dict(newest.cluster))))


def is_freed(row: Row, places: Mapping[str, Place]) -> bool:
    """Whether a run failed, was cut off, or was submitted and never begun."""
    return row.state in FREED or (row.state == "pending" and row.id in places)


def free(root: Path, record: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Lets runs be run again here."""
    manifest.cancel_marker(root, record["name"]).unlink(missing_ok=True)
    for row in rows:
        (Run(root, row.id) / "failure.json").unlink(missing_ok=True)


def described(rows: Sequence[Row]) -> list[str]:
    """A line for each run that is taken up again."""
    return [
        f"{row.id}  {row.label} s{row.seed}  {row.state}{f': {row.note}' if row.note else ''}"
        for row in rows
    ]
