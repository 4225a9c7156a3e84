"""Mirrors a run's metrics.jsonl to wandb: while it is trained, in a process of its own, or later.

Both are one thing: read the rows from the first, pass over those that wandb has, log the rest, set
the summary, finish. The number of a row in the file is its step in wandb, so that nothing is there
twice, however often it is done and wherever training went on from; the axes to plot against,
`tokens`, `step` and `seconds`, are logged with each row.

Online, wandb is asked at the end how many rows it has: a refused upload is told in no other way.
Where it can't be reached the rows go to files in <runs>/wandb, under the same id. A run's files
are always whole: those of an attempt that was stopped are written anew by the next. `wandb sync`
adds all rows of a file, so it is kept from those of a run that has been online: `push` is for them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import Any

from experiments import scores
from experiments.described import described, score_row, score_rows, summary
from experiments.record import Run, UserError, hold_file, write_atomically
from experiments.tracking import BUSY, Place, known, stopped, wandb_id
from experiments.wandb_client import (
    Unreachable,
    confirm,
    files_of,
    leave_to_push,
    masked,
    opened,
    settle,
    tidy,
)

SCHEMA = 1
LOOK_SECONDS = 2.0  # between looks at what training wrote
TRIES = 3  # wandb's own process may die so often
AXES = ("train", "val", "optim", "perf")
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


# --- one run -------------------------------------------------------------------------------------


class Rows:
    """The rows of a run's metrics.jsonl as they come, with what timing.jsonl says of their step."""

    def __init__(self, run: Run) -> None:
        self.metrics, self.timing = Lines(run / "metrics.jsonl"), Lines(run / "timing.jsonl")
        self.speeds: dict[int, dict[str, Any]] = {}

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) of those written since the last call, or all again if the file was cut."""
        rows = list(self.metrics.new())  # first: a row's timing is written before it
        self.speeds.update((row["step"], row) for _, row in self.timing.new())
        for number, row in rows:
            speed = self.speeds.pop(row["step"], {}) if "train/loss" in row else {}
            yield number, {**speed, **row}


class Lines:
    """A .jsonl file that somebody else writes."""

    def __init__(self, path: Path) -> None:
        self.path, self.place, self.count = path, 0, 0

    def new(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number, row) of each whole line since the last call.

        Raises:
            UserError: a line is damaged.
        """
        try:
            with open(self.path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self.place:
                    self.place = self.count = 0
                file.seek(self.place)
                text = file.read()
        except FileNotFoundError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                row = json.loads(line)
                row["step"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{self.path}:{self.count + 1}: not a JSON row") from None
            self.count += 1
            yield self.count - 1, row
        self.place += len(whole)


class Mirroring:
    """One run on its way into wandb."""

    def __init__(self, run: Run, place: Place, sweep: str | None = None) -> None:
        self.run = run
        try:
            self.id, self.described = wandb_id(run), described(run, sweep)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{run.folder}: a record is damaged ({error!r})") from error
        before = known(run)
        self.record: dict[str, Any] = {
            "schema": SCHEMA,
            "id": self.id,
            "project": place.project,
            "entity": place.entity,
            "group": self.described.group,
            "mode": place.mode,
            "url": None,
            "folder": None,
            "rows": 0,
            "state": "live",
            "why": None,
            "online": bool(before.get("online")),  # whether it ever was
        }

    def note(self, **changes: Any) -> None:
        """Refreshes tracking.json."""
        self.record |= changes
        text = json.dumps(self.record, indent=1) + "\n"
        write_atomically(self.run / "tracking.json", text, durable=False)

    def copy(
        self,
        place: Place,
        facts: Mapping[str, Any],
        pid: int | None = None,
        wait: Callable[[], str | None] = lambda: "pushed",
    ) -> int:
        """Logs what wandb lacks until `wait` gives the word that ends it; returns how many rows.

        Raises:
            Unreachable: wandb failed on the way, or has fewer rows than it was given.
        """
        shown, sent = self.described, 0
        offline, files = place.mode == "offline", files_of(self.run.root)
        with opened(
            place,
            id=self.id,
            name=shown.name,
            job_type="train",
            group=shown.group,
            tags=shown.tags,
            config={**shown.config, **facts},
            notes=shown.notes,
            folder=self.run.root,
            patient=pid is None,
            pid=pid,
        ) as session:
            folder = str(session.settings.sync_dir) if offline else None
            self.record["online"] |= not offline
            self.note(mode=place.mode, url=session.url, entity=session.entity, folder=folder)
            leave_to_push(files, session, self.record["online"])
            for kind in AXES:
                session.define_metric(f"{kind}/*", step_metric="tokens")
            first = 0 if offline else session.starting_step
            rows, word = Rows(self.run), None
            self.record["rows"] = first
            while word is None:
                word = wait()
                for number, row in rows.new():
                    if number >= first:
                        session.log(row, step=number, commit=True)  # or the summary loses to it
                        sent, first = sent + 1, number + 1
                if self.record["rows"] != first:
                    self.note(rows=first)
            status = self.run.state
            if status == "running" and word != "pushed":  # who trained it is about to let go
                status = "interrupted"
            session.summary.update({"status": status, **summary(self.run)})
            if word == "interrupted" or (word == "pushed" and status == "interrupted"):
                session.mark_preempting()  # it is to go on
            session.finish(exit_code=0 if status in ("done", "running") else 1)
        confirm(place, session, first)
        if status == "done" and first > rows.metrics.count:
            raise UserError(
                f"{self.id} has {first} rows in wandb, and our record {rows.metrics.count}: some "
                "are of others, or of an attempt that logged more; delete it there and push again"
            )
        settle(files, session)
        return sent


def held(run: Run, wait: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """The right to mirror a run, which one process has at a time."""
    return hold_file(run / "tracking.lock", wait)


def push(run: Run, place: Place, sweep: str | None = None) -> int:
    """Brings a run to wandb as it is now; returns how many rows were added.

    Raises:
        Unreachable: wandb can't be reached, or did not take all of it.
        UserError: a record is damaged, or the run is mirrored as it is trained.
    """

    def busy() -> None:
        raise UserError(f"{run.id} is brought to wandb by another process right now")

    with held(run, busy):
        work = Mirroring(run, place, sweep)
        try:
            sent = work.copy(place, {})
            sent += copy_scores(run, place, work)
        except Unreachable as error:
            if work.record["url"]:  # else what is known of it stands
                work.note(state="stopped", why=str(error), rows=None)
            raise
        work.note(state="complete", why=None)
        return sent


def copy_scores(run: Run, place: Place, work: Mirroring, patient: bool = True) -> int:
    """A run's scores at each step, as a run of type `eval`; returns how many rows were added."""
    found = [
        (step, name, record)
        for step in scores.steps(run)
        for name, record in scores.of_step(run, step).items()
    ]
    if not found:
        return 0
    shown, last, offline = work.described, scores.steps(run)[-1], place.mode == "offline"
    keys = [f"{step}/{name}@{digest(record)}" for step, name, record in found]
    with opened(
        place,
        id=f"{work.id}-eval",
        name=f"{shown.name} eval",
        job_type="eval",
        group=shown.group,
        tags=shown.tags,
        config={**shown.config, "records": scores.of_step(run, last)},
        folder=run.root,
        patient=patient,
    ) as session:
        session.define_metric("score/*", step_metric="tokens")
        files = files_of(run.root)
        leave_to_push(files, session, work.record["online"])
        there = [] if offline else session.config.get("logged") or []
        first = rows = 0 if offline else session.starting_step
        for key, (step, name, record) in zip(keys, found, strict=True):
            if key not in there:
                row = {"step": step, "tokens": record["tokens"]} | score_row(name, record)
                session.log(row, step=rows, commit=True)
                rows += 1
        session.config.update({"logged": keys}, allow_val_change=True)
        session.summary.update(score_rows(run, last))
    confirm(place, session, rows)
    settle(files, session)
    return rows - first


def digest(record: Mapping[str, Any]) -> str:
    """Another one where a task was scored anew, with another outcome."""
    text = json.dumps(record["metrics"], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


# --- the process beside training -----------------------------------------------------------------


def follow(run: Run, place: Place, facts: Mapping[str, Any], pid: int, words: FileIO) -> None:
    """Mirrors a run until training says that it has ended, or has ended without a word."""
    ended: list[str] = []

    def wait() -> str | None:
        if not ended and select.select([words], [], [], LOOK_SECONDS)[0]:
            ended.append(words.readline().decode().strip())
        return ended[0] if ended else None

    def wait_for_another() -> None:
        if wait() is not None:
            os._exit(BUSY)

    with held(run, wait_for_another):
        why, where = None, place
        try:
            work = Mirroring(run, place)
        except UserError as error:
            stopped(run, str(error))
            return
        try:
            for _ in range(TRIES):
                try:
                    work.copy(where, facts, pid, wait)
                    copy_scores(run, where, work, patient=False)
                    work.note(state="complete", why=why if where != place else None)
                    return
                except Unreachable as error:
                    why = str(error)
                    if place.mode == "online" and not work.record["url"]:
                        where = replace(place, mode="offline")
                    elif not error.again:
                        break
        except Exception as error:  # a mistake of ours, or a full disk
            why = masked(error)
        work.note(state="stopped", why=why, rows=None)


def main() -> None:
    """What training starts; stdin says what to mirror, and then how it ended."""
    for number in IGNORED:  # training has them too, and says what they mean
        signal.signal(number, signal.SIG_IGN)
    words = FileIO(0, closefd=False)  # unbuffered, as `select` looks at the pipe alone
    start = json.loads(words.readline())
    folder = Path(start["folder"])
    run = Run(folder.parent, folder.name)
    code = 1
    with contextlib.suppress(Exception):
        follow(run, Place(**start["place"]), start["facts"], start["pid"], words)
        code = 0
    tidy()
    os._exit(code)  # whatever of wandb is left might wait for its server for ever


if __name__ == "__main__":
    main()
