"""Runs on this machine: as many at a time as pay, each in a process of its own.

    manifest ─ jobs that have no result ─ server.py, forking ─ worker.py, each a run directory

Nothing is kept here that is not on disk too: killed at any moment and started again, it finds what
is finished and goes on with the rest.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from components import registry
from components.registry import UserError
from experiments.record import FINISHED, Run
from sweeps import manifest, worker
from sweeps.machine import Slots, plan_slots
from sweeps.manifest import Job
from sweeps.server import Server

TICK_SECONDS = 0.25
RECHECK_SECONDS = 1.0  # between looks at runs that other processes work on
TARGET = "sweeps.worker:train_run"
# What every run imports, dynamo by torch itself: 1.3 CPU seconds a run were it not loaded before.
PRELOAD = (
    *("experiments.trainer", "torch._dynamo", "einops._torch_specific"),
    *(f"components.{kind}" for kind in registry.BUILTIN),
)
# And what scoring imports, where tasks are wanted.
SCORING = ("experiments.lm", "lm_eval.evaluator", "datasets.load", "pyarrow.parquet", "scipy.io")


class Watcher(Protocol):
    """Who looks on: sweeps/live.py, or nobody."""

    def begin(self, jobs: Sequence[Job], finished: int, slots: Slots) -> None: ...
    def started(self, job: Job, pid: int) -> None: ...
    def waiting(self, job: Job) -> None: ...
    def ended(self, job: Job, state: str) -> None: ...
    def say(self, text: str) -> None: ...
    def tick(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How each run stands now: its state by id, and whether somebody stopped the sweep."""

    states: Mapping[str, str] = field(default_factory=dict)
    stopped: bool = False

    @property
    def failed(self) -> list[str]:
        return [id for id, state in self.states.items() if state in ("failed", "unscored")]

    @property
    def interrupted(self) -> bool:
        return self.stopped or "interrupted" in self.states.values()


def run_manifest(
    record: Mapping[str, Any],
    root: Path,
    *,
    workers: int | None = None,
    workers_per_gpu: int = 1,
    leave: Collection[str] = (),
) -> Outcome:
    """Runs what a sweep still lacks, failed runs among it; shows how it goes on stderr.

    Args:
        leave: runs that are left to others.

    Raises:
        UserError: the record of a run is damaged, or no run can be started here.
    """
    from sweeps import live

    marker = manifest.cancel_marker(root, record["name"])
    marker.unlink(missing_ok=True)
    watcher = live.watcher(root)
    try:
        return execute(
            [job for job in manifest.jobs(record) if job.id not in leave],
            root,
            workers=workers,
            allotment={"workers_per_gpu": workers_per_gpu},
            watcher=watcher,
            cancelled=marker,
        )
    finally:
        watcher.close()


def execute(
    jobs: Sequence[Job],
    root: Path,
    *,
    workers: int | None = None,
    watcher: Watcher | None = None,
    cancelled: Path | None = None,
    allotment: Mapping[str, Any] | None = None,
    asked: list[int] | None = None,
    waits_for: Callable[[Job], bool] = lambda job: True,
    target: str = TARGET,
    preload: Sequence[str] = PRELOAD,
) -> Outcome:
    """Runs every job without a result; a failing one stops no other.

    Ctrl-C (or SIGTERM, or the file `cancelled`) stops it: running runs save a checkpoint and end.
    A second Ctrl-C kills them.

    Args:
        allotment: more for `plan_slots`: cores granted, runs on one GPU.
        asked: signals caught by the caller, who then handles them; none of them kills.
        waits_for: whether to wait for a run that another process works on, or to leave it alone.
    """
    states = {job.id: manifest.state(root, job) for job in jobs}
    missing = [job for job in jobs if states[job.id] not in FINISHED]
    if not missing:
        return Outcome(states)
    slots = plan_slots(missing, workers, **(allotment or {}))
    if watcher is not None:
        watcher.begin(missing, len(jobs) - len(missing), slots)
    scored = any((job.experiment.get("evaluation") or {}).get("tasks") for job in missing)
    modules = (*preload, *(SCORING if scored else ()))
    settings = worker.Settings(str(root.resolve()), target, modules)
    own = stop_requests() if asked is None else contextlib.nullcontext(asked)
    with own as heard, Server(settings) as server:
        execution = Execution(root, missing, slots, server, watcher, states, waits_for)
        execution.gently = asked is not None
        while execution.unfinished:
            execution.stop(len(heard) or int(cancelled is not None and cancelled.exists()))
            execution.recheck()
            execution.fill()
            try:
                execution.listen(TICK_SECONDS)
            except UserError:
                if not heard:
                    raise
                execution.abandon()  # the signal that was heard has ended the server too
    return Outcome(states, execution.stops > 0)


class Execution:
    """Which runs wait, run, and have ended."""

    def __init__(
        self,
        root: Path,
        jobs: Sequence[Job],
        slots: Slots,
        server: Server,
        watcher: Watcher | None,
        states: dict[str, str],
        waits_for: Callable[[Job], bool],
    ) -> None:
        self.root, self.server, self.watcher, self.states = root, server, watcher, states
        self.waits_for = waits_for
        self.threads = slots.threads
        self.todo = deque(jobs)
        self.free = deque(slots.devices)
        self.running: dict[str, tuple[Job, str | None]] = {}
        self.elsewhere: list[Job] = []  # other processes work on these
        self.recheck_at = 0.0
        self.stops = 0
        self.gently = False  # however often it is asked to stop, runs save first

    @property
    def unfinished(self) -> bool:
        return bool(self.todo or self.running or self.elsewhere)

    def stop(self, asked: int) -> None:
        """Asked once: no new runs, and the running ones save and end. Asked again: at once."""
        asked = min(asked, 1) if self.gently else asked
        self.todo, self.elsewhere = (deque(), []) if asked else (self.todo, self.elsewhere)
        if asked <= self.stops or self.stops >= 2:
            return
        self.server.signal(signal.SIGTERM if asked == 1 else signal.SIGKILL)
        self.stops = asked
        if self.watcher and self.running and asked == 1:
            count = len(self.running)
            what = "the running run saves" if count == 1 else f"{count} running runs save"
            again = "" if self.gently else " (again: at once)"
            self.watcher.say(f"stopping: {what} a checkpoint first{again}")

    def fill(self) -> None:
        """Starts runs in the free slots."""
        while self.free and self.todo:
            job = self.todo.popleft()
            run = Run(self.root, job.id)
            if run.locked:
                self.wait_for(job)
                continue
            state = manifest.state(self.root, job)
            if state in FINISHED:  # another sweep was quicker
                self.settle(job, state)
                continue
            (run / "failure.json").unlink(missing_ok=True)
            device = self.free.popleft()
            self.running[job.id] = job, device
            plain = {**dataclasses.asdict(job), "experiment": dict(job.experiment)}
            self.server.send(do="start", job=plain, threads=self.threads, device=device)

    def listen(self, seconds: float) -> None:
        """Takes in what the runs' processes did within that time."""
        for message in self.server.messages(seconds):
            if message["said"] == "started" and self.watcher:
                self.watcher.started(self.running[message["id"]][0], message["pid"])
            elif message["said"] == "ended":
                job, device = self.running.pop(message["id"])
                self.free.append(device)
                self.verdict(job, message["code"])
        if self.watcher:
            self.watcher.tick()

    def verdict(self, job: Job, code: int) -> None:
        """What the end of a run's process means."""
        run = Run(self.root, job.id)
        if (run / "result.json").exists():
            self.settle(job, manifest.state(self.root, job))
        elif code == worker.ELSEWHERE and not self.stops:
            self.wait_for(job)
        elif code in (worker.INTERRUPTED, worker.ELSEWHERE, -signal.SIGTERM) or (
            self.stops > 1 and code == -signal.SIGKILL
        ):
            self.settle(job, "interrupted")
        else:
            if not (run / "failure.json").exists():
                worker.fail(run, worker.cause(code))
            self.settle(job, "failed")

    def abandon(self) -> None:
        """The server is gone, and has let its runs save first, or the kernel has told them to."""
        for job, _ in self.running.values():
            while Run(self.root, job.id).locked:
                time.sleep(TICK_SECONDS)
            self.settle(job, manifest.state(self.root, job))
        self.running, self.stops = {}, max(self.stops, 1)
        self.stop(1)

    def settle(self, job: Job, state: str) -> None:
        self.states[job.id] = state
        if self.watcher:
            self.watcher.ended(job, state)

    def wait_for(self, job: Job) -> None:
        if not self.waits_for(job):
            self.settle(job, "running")
            return
        self.elsewhere.append(job)
        if self.watcher:
            self.watcher.waiting(job)

    def recheck(self) -> None:
        """Takes runs back that other processes have finished or let go."""
        now = time.monotonic()
        if not self.elsewhere or now < self.recheck_at:
            return
        self.recheck_at = now + RECHECK_SECONDS
        waiting, self.elsewhere = self.elsewhere, []
        for job in waiting:
            if Run(self.root, job.id).locked:
                self.elsewhere.append(job)
            else:
                self.todo.append(job)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM only leave their number here."""
    asked: list[int] = []
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread: whoever owns it decides
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) != signal.SIG_IGN:  # as in the background of a shell
                before[number] = signal.signal(number, lambda n, _: asked.append(n))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
