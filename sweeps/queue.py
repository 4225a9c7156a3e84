"""What has been submitted to Slurm: the record of it, kept beside the runs.

    runs/slurm/lock                    held by whoever submits or takes back
    runs/slurm/<sweep>-<token>/        one array: submitit's script and pickles, Slurm's logs, and
        submission.json                who submitted which runs; written before `sbatch` is called

        {"schema": 1, "sweep", "job": id or null, "tasks": [[run ids of element 0], …],
         "cluster": {…}, "slurm": its ClusterName, "snapshot", "user", "host", "time"}

The folder's name is the job's name in Slurm, so that an id that nobody came to write down (a login
node that died in the middle of `sbatch`) is found again. A run's newest submission counts.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.registry import UserError
from experiments.record import hold_file, read_json, write_json

SCHEMA = 1
PREFIX = "ceteris-"


@dataclass(frozen=True)
class Submission:
    """One array of jobs; `tasks[i]` are the runs of its element i."""

    folder: Path
    sweep: str
    tasks: tuple[tuple[str, ...], ...]
    cluster: Mapping[str, Any]
    snapshot: str
    time: float
    slurm: str | None = None
    job: str | None = None
    user: int = field(default_factory=os.getuid)
    host: str = field(default_factory=socket.gethostname)

    @property
    def name(self) -> str:
        return PREFIX + self.folder.name

    def write(self, job: str | None) -> None:
        """Puts it on record, before and after Slurm has given it an id."""
        data = {k: v for k, v in vars(self).items() if k != "folder"}
        tasks = [list(runs) for runs in self.tasks]
        data |= {"schema": SCHEMA, "job": job, "tasks": tasks, "cluster": dict(self.cluster)}
        write_json(self.folder / "submission.json", data)


@dataclass(frozen=True)
class Place:
    """Where a run stands in the queue: an element of a submission."""

    submission: Submission
    index: int

    def element(self, job: str) -> str:
        return f"{job}_{self.index}" if len(self.submission.tasks) > 1 else job

    def log(self, job: str, ending: str = "err") -> Path:
        """What Slurm itself and the process that starts the runs printed."""
        return self.submission.folder / f"{self.element(job)}_0_log.{ending}"


# --- the record ----------------------------------------------------------------------------------


def folder(root: Path) -> Path:
    return root / "slurm"


def submissions(root: Path) -> list[Submission]:
    """Every submission below `root`, oldest first.

    Raises:
        UserError: one is damaged; says which.
    """
    found = []
    for path in folder(root).glob("*/submission.json"):
        data = read_json(path)
        try:
            if data.pop("schema") != SCHEMA:
                raise ValueError("another version wrote it")
            data["tasks"] = tuple(tuple(map(str, runs)) for runs in data["tasks"])
            found.append(Submission(folder=path.parent, **data))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: can't be read ({error}); move its folder away") from error
    return sorted(found, key=lambda s: (s.time, s.folder.name))


def places(root: Path) -> dict[str, Place]:
    """The newest place of each run that was ever submitted, by the run's id."""
    return {
        run: Place(submission, index)
        for submission in submissions(root)
        for index, runs in enumerate(submission.tasks)
        for run in runs
    }


def lock(root: Path) -> contextlib.AbstractContextManager[None]:
    """One submitter at a time in a folder of runs, see `record.hold_file`."""
    return hold_file(folder(root) / "lock")
