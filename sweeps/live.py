"""Looking on while a sweep runs, on stderr: a table on a terminal, else a line for each change."""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sweeps.manifest import Job
from sweeps.status import STYLES, Row, duration, loss, progress, read

if TYPE_CHECKING:
    from rich.console import RenderableType

    from sweeps.machine import Slots

DRAW_SECONDS = 0.5
LEAST_ROWS = 5


def watcher(root: Path) -> Lines:
    """A table that redraws itself, or lines where stderr is no terminal."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Board(root)
    return Lines(root)


class Lines:
    """One plain line for each change of a run's state; also what a `Board` counts by."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows: dict[str, Row] = {}
        self.jobs: dict[str, Job] = {}
        self.began: dict[str, float] = {}
        self.pids: dict[str, int] = {}
        self.took: list[float] = []
        self.workers, self.ended_count = 1, 0

    def begin(self, jobs: Sequence[Job], finished: int, slots: Slots) -> None:
        self.jobs = {job.id: job for job in jobs}
        self.rows = {job.id: Row(job.id, "pending", job.label, job.seed) for job in jobs}
        self.workers = slots.workers
        before = f", {finished} finished before" if finished else ""
        own = {(job.experiment.get("execution") or {}).get("threads") for job in jobs}
        threads = sorted({given or slots.threads for given in own})
        count = " or ".join(map(str, threads))
        where = "one thread each" if threads == [1] else f"{count} threads each"
        gpus = len({d for d in slots.devices if d is not None})
        where = f"on {gpus} GPU{'s' * (gpus > 1)}" if gpus else where
        runs = f"{len(jobs)} run{'s' * (len(jobs) > 1)}"
        self.say(f"{runs} to do{before}; {slots.workers} at a time, {where}")

    def started(self, job: Job, pid: int) -> None:
        self.began[job.id], self.pids[job.id] = time.monotonic(), pid
        self.change(job, "running", "started")

    def waiting(self, job: Job) -> None:
        if self.rows[job.id].state != "elsewhere":
            self.change(job, "elsewhere", "runs in another process: waiting for it")

    def ended(self, job: Job, state: str) -> None:
        self.ended_count += 1
        row = read(self.root, job, None)
        began = self.began.pop(job.id, None)
        spent = None if began is None else time.monotonic() - began
        if spent is not None and state == "done":
            self.took.append(spent)
        self.rows[job.id] = dataclasses.replace(row, state=state, seconds_left=None)
        what = {"done": loss(row).replace("val", "val/loss"), "interrupted": progress(row)}
        words = [state, what.get(state, row.note), duration(spent)]
        self.tell(job, "  ".join(word for word in words if word))

    def change(self, job: Job, state: str, words: str) -> None:
        self.rows[job.id] = dataclasses.replace(self.rows[job.id], state=state)
        self.tell(job, words)

    def tell(self, job: Job, words: str) -> None:
        self.say(f"[{self.ended_count}/{len(self.jobs)}] {job.label} s{job.seed} {words}")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def tick(self) -> None: ...

    def close(self) -> None: ...


class Board(Lines):
    """A table of the runs that redraws itself, and a line for the whole."""

    def __init__(self, root: Path) -> None:
        from rich.console import Console
        from rich.live import Live

        super().__init__(root)
        self.console = Console(stderr=True)
        self.live: Live | None = None
        self.drawn = 0.0

    def begin(self, jobs: Sequence[Job], finished: int, slots: Slots) -> None:
        from rich.live import Live

        super().begin(jobs, finished, slots)
        self.live = Live(console=self.console, auto_refresh=False, redirect_stdout=False)
        self.live.start()

    def tell(self, job: Job, words: str) -> None:
        if self.rows[job.id].state == "failed":  # stays when the table has scrolled away
            super().tell(job, words)

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def tick(self) -> None:
        now = time.monotonic()
        if self.live is not None and now - self.drawn >= DRAW_SECONDS:
            self.drawn = now
            self.look()
            self.live.update(self.draw(), refresh=True)

    def close(self) -> None:
        if self.live is not None:
            self.live.update(self.draw(), refresh=True)
            self.live.stop()

    def look(self) -> None:
        """Takes in what the running runs say of themselves; locks are left alone."""
        from experiments.record import Run
        from sweeps.status import running

        for id, row in self.rows.items():
            if row.state != "running":
                continue
            live = Run(self.root, id).live()
            if live.get("pid") == self.pids.get(id):  # else an earlier attempt's
                self.rows[id] = dataclasses.replace(row, **running(live))

    def seconds_left(self) -> float | None:
        """Until all have ended: what is known of the running ones, the mean for the others."""
        rows = self.rows.values()
        known = [
            r.seconds_left for r in rows if r.state == "running" and r.seconds_left is not None
        ]
        now = time.monotonic()
        whole = [
            now - self.began[r.id] + r.seconds_left
            for r in rows
            if r.id in self.began and r.seconds_left is not None
        ]
        typical = self.took or whole
        if not typical:
            return None
        waiting = sum(r.state in ("pending", "elsewhere") for r in rows)
        work = waiting * sum(typical) / len(typical) + sum(known)
        return max([work / self.workers, *known])

    def draw(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column("run", max_width=40, overflow="ellipsis", no_wrap=True)
        table.add_column("seed", justify="right")
        table.add_column("state", no_wrap=True)
        table.add_column("", width=16)
        for name in ("step", "loss", "tokens/s", "left"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = self.visible()
        for row in rows:
            bar: Any = ""
            if row.steps and row.state != "pending":
                bar = ProgressBar(total=row.steps, completed=row.step or 0, width=16)
            table.add_row(
                Text(row.label or row.id),
                str(row.seed),
                Text(row.state, STYLES.get(row.state, "dim")),
                bar,
                progress(row),
                loss(row),
                f"{row.tokens_per_s:,.0f}" if row.tokens_per_s else "",
                duration(row.seconds_left),
            )
        hidden = len(self.rows) - len(rows)
        more = [Text(f"… and {hidden} more", "dim")] if hidden else []
        left = duration(self.seconds_left()) if self.ended_count < len(self.jobs) else ""
        total = f"{self.ended_count} of {len(self.jobs)} ended" + (
            f", about {left} left" * bool(left)
        )
        return Group(table, *more, Text(total, "bold"))

    def visible(self) -> list[Row]:
        """What fits on the screen, the running and the failed first."""
        rows = list(self.rows.values())
        room = max(LEAST_ROWS, self.console.height - 4)
        order = ("running", "failed", "elsewhere", "interrupted", "pending", "diverged", "done")
        if len(rows) > room:
            chosen = sorted(rows, key=lambda r: order.index(r.state))[: room - 1]
            keep = {r.id for r in chosen}
            rows = [r for r in rows if r.id in keep]
        return rows
