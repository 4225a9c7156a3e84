"""Removing runs and sweeps: what would go, and that nobody else needs it.

A run that some sweep has is not removed by itself, and a sweep's removal leaves the runs that
another sweep has, too. Prepared text under data/ and copies of code under code/ stay.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.registry import UserError
from experiments.record import Run, disk_error, find
from sweeps import manifest, status


@dataclass(frozen=True)
class Found:
    """What is to be removed.

    Attributes:
        sweep: the name of the sweep that goes, if one does.
        files: its manifest, tables, figures and report.
        shared: runs that stay, and the sweep that has them.
    """

    sweep: str | None
    runs: tuple[Run, ...]
    files: tuple[Path, ...]
    shared: Mapping[str, str]

    def lines(self) -> list[str]:
        """What goes and what stays, to be read before it is confirmed."""
        lines = [f"run {run.folder} ({run.state})" for run in self.runs]
        lines += [str(path) for path in self.files]
        stays = [f"stays: {id}, of the sweep '{name}'" for id, name in self.shared.items()]
        return [*lines, *stays]


def found(root: Path, target: str, record: Mapping[str, Any] | None) -> Found:
    """What `rm` of a run or a sweep (whose manifest is `record`) would remove.

    Raises:
        UserError: a run is at work or waits, or a sweep has it; or there is none of that name.
    """
    records, wrong = manifest.all_of(root)
    if wrong:
        raise UserError(f"{wrong[0]}; until that is put right, nobody knows which runs it has")
    name = record["name"] if record is not None else None
    users = {job.id: r["name"] for r in records if r["name"] != name for job in manifest.jobs(r)}
    if record is None:
        run = find(root, target)
        if run.root.resolve() != root.resolve():
            raise UserError(f"{run.folder}: lies in another folder of runs; name that with --runs")
        if run.id in users:
            raise UserError(
                f"{run.folder}: the sweep '{users[run.id]}' has this run; remove the sweep first: "
                f"run.py rm {users[run.id]}"
            )
        jobs, files = [manifest.Job(run.id, 0, "", {})], []
    else:
        jobs = list(manifest.jobs(record))
        files = _files(root, record["name"], {r["name"] for r in records})
    view = status.unfinished(root, jobs)
    for job in jobs:
        row = status.read(root, job, name, view)
        if row.state in ("running", "queued") and job.id not in users:
            raise UserError(f"{root / job.id}: is {row.state}; stop it first, with run.py cancel")
    mine = [Run(root, job.id) for job in jobs if job.id not in users]
    return Found(
        name,
        tuple(run for run in mine if run.folder.is_dir()),
        tuple(files),
        {job.id: users[job.id] for job in jobs if job.id in users},
    )


def _files(root: Path, name: str, names: set[str]) -> list[Path]:
    """All that lies beside a manifest under the sweep's name, but for other sweeps' files."""
    longer = [n for n in names if n != name and n.startswith(name)]
    beside = sorted((root / "sweeps").glob(f"{name}*"))
    own = [p for p in beside if p.name.startswith((f"{name}.", f"{name}-"))]
    return [p for p in own if not any(p.name.startswith((f"{n}.", f"{n}-")) for n in longer)]


def remove(root: Path, found: Found) -> None:
    """Removes it; the manifest last, so that what is interrupted can be done again.

    Raises:
        UserError: the disk refuses, or a run has begun to work meanwhile.
    """
    manifests = [manifest.path_of(root, found.sweep)] if found.sweep else []
    try:
        for run in found.runs:
            with run.lock():
                shutil.rmtree(run.folder)
        for path in [*(p for p in found.files if p not in manifests), *manifests]:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise disk_error(error, Path(str(error.filename or root))) from error
