"""What a run has printed, and what Slurm printed for it."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from components.registry import UserError, did_you_mean
from experiments.record import FINISHED, Run
from sweeps import manifest, queue, status
from sweeps.status import Row

LOOK_SECONDS = 1.0


def chosen(root: Path, record: Mapping[str, Any], label: str | None, seed: int | None) -> Row:
    """The one run of a sweep that a row's label and a seed mean.

    Raises:
        UserError: none or several; says what to choose from.
    """
    jobs = list(manifest.jobs(record))
    labels = [str(row["label"]) for row in record["rows"]]
    numbers = sorted({job.seed for job in jobs})
    seeds = ", ".join(map(str, numbers))
    if label is not None and label not in labels:
        raise UserError(f"{record['name']}: no row '{label}'{did_you_mean(label, labels)}")
    if seed is not None and seed not in numbers:
        raise UserError(f"{record['name']}: no seed {seed} (seeds: {seeds})")
    wanted = {
        run
        for row in record["rows"]
        for run in row["runs"].values()
        if label in (None, row["label"])
    }
    found = [job for job in jobs if job.id in wanted and seed in (None, job.seed)]
    if len(found) == 1:
        view = status.unfinished(root, found)
        return status.read(root, found[0], record["name"], view)
    missing = [] if label is not None else [f"--row ({', '.join(labels)})"]
    missing += [] if seed is not None else [f"--seed ({seeds})"]
    raise UserError(f"{record['name']}: {len(found)} runs are meant; add {' and '.join(missing)}")


def sources(root: Path, row: Row) -> list[Path]:
    """The logs of a run that hold something: its own, then what Slurm and submitit wrote."""
    place = queue.places(root).get(row.id)
    paths = [Run(root, row.id) / "log.txt"]
    if place is not None and row.job is not None:
        array = row.job.partition("_")[0]
        paths += [place.log(array, "out"), place.log(array, "err")]
    return [path for path in paths if path.is_file() and path.stat().st_size]


def follow(root: Path, record: Mapping[str, Any], row: Row, write: Callable[[str], None]) -> None:
    """Writes what the run prints from now on, until nobody works on it and it waits for nobody."""
    run = Run(root, row.id)
    (job,) = (job for job in manifest.jobs(record) if job.id == row.id)
    path = run / "log.txt"
    at = path.stat().st_size if path.exists() else 0
    for look in looks():
        ended = not run.locked and manifest.state(root, job) in FINISHED
        if not ended and not run.locked and look % status.ASK_SECONDS == 0:
            now = status.read(root, job, record["name"], status.unfinished(root, [job]))
            ended = now.state not in ("running", "queued")
        if path.exists():
            with open(path, "rb") as file:
                file.seek(at)
                new = file.read()
            at += len(new)
            if new:
                write(new.decode(errors="replace"))
        if ended:
            return


def looks() -> Iterator[int]:
    """Numbers, one every LOOK_SECONDS."""
    for number in itertools.count():
        yield number
        time.sleep(LOOK_SECONDS)
