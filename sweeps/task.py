"""What runs inside a Slurm job: one element of an array, one run or a pack of them.

    sbatch ─ srun ─ submitit ─ Task() ┬ one process: sweeps/local.py, a forked process for each run
                                      └ several:     this process is a rank of one run

A `Task` holds what to run and no progress: Slurm starts a requeued job with the same pickle, and
how far its runs are stands in their directories. So it makes no difference whether a job was warned
and requeued itself, lost its node, or was submitted again.

Signals, which Slurm sends to every process of the job:

    SIGUSR2   the warning before the time limit, or before preemption where the site sends it: the
              runs save at their next step, the job requeues itself and waits to be ended
    SIGTERM   the end: scancel, preemption, the time limit. The runs save; a job that Slurm still
              counts as running (in the grace time before preemption) requeues itself, no other
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from experiments import environment, tracking
from experiments.record import Run, UserError, whereabouts
from sweeps import live, local, manifest, scheduler, worker
from sweeps.manifest import Job

WARNING = signal.SIGUSR2
TO_BE_ENDED_SECONDS = 150.0  # Slurm ends a job KillWait (30 s) after SIGTERM, unless told otherwise
SCONTROL_TRIES = 5
LOST_SECONDS = 900.0


@dataclass(frozen=True)
class Task:
    """One element of an array: a callable for submitit.

    Attributes:
        runs: one, or several that share the job.
        workers: runs at a time; as many as there are GPUs or cores by default.
        cores: that one task was granted.
        minutes: the job's time limit.
        sharding: of a run over several processes: `ddp` or `fsdp2`.
    """

    root: str
    sweep: str
    runs: tuple[Job, ...]
    workers: int | None
    workers_per_gpu: int
    cores: int
    minutes: int
    sharding: str

    def __call__(self) -> None:
        began = time.monotonic()
        environment.forget()
        with caught_signals() as caught:
            before = self.progress()
            several = int(os.environ.get("SLURM_NTASKS", "1")) > 1
            code = self.rank(caught) if several else self.pack(caught)
            if caught and not self.finished:
                late = time.monotonic() - began > 30 * self.minutes
                if late and self.progress() == before:  # another time as long would bring no more
                    self.give_up("a whole job came no step further; give it more time:")
                    worker.leave(worker.FAILED)
                self.go_back(caught)
        self.tell_of_the_end()
        if code != worker.DONE:
            worker.leave(code)

    def pack(self, caught: list[int]) -> int:
        """All runs through the local executor, as many at a time as fit."""
        outcome = local.execute(
            self.runs,
            Path(self.root),
            workers=self.workers,
            watcher=live.Lines(Path(self.root)),
            cancelled=self.marker,
            allotment={"workers_per_gpu": self.workers_per_gpu, "cores": self.cores},
            asked=caught,
            waits_for=lambda job: before_us(Run(Path(self.root), job.id)),
        )
        return worker.FAILED if outcome.failed else worker.DONE

    def rank(self, caught: list[int]) -> int:
        """This process's part of one run over all tasks of the job."""
        from submitit.helpers import TorchDistributedEnvironment

        (job,) = self.runs
        run = Run(Path(self.root), job.id)
        # Slurm's CUDA_VISIBLE_DEVICES stands: submitit's would name GPUs of other jobs.
        here = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if self.marker.exists():
            return worker.INTERRUPTED
        threading.Thread(target=self.watch, args=(caught,), daemon=True).start()
        if here.rank == 0:
            wait_for(lambda: not (run.locked and before_us(run)) or bool(caught), LOST_SECONDS)
            (run / "failure.json").unlink(missing_ok=True)
            worker.log_to(run, f"the first of {here.world_size}")
        os.environ.setdefault("OMP_NUM_THREADS", str(self.cores))

        def carry_out() -> None:
            import torch

            torch.set_num_threads(self.cores)
            worker.train_run(job, run.root, sharding=self.sharding, stop=caught)

        code = worker.attempt(run, carry_out)
        if code == worker.INTERRUPTED and not caught:  # the warning reached another rank first
            wait_for(lambda: bool(caught), 30.0)
        if code != worker.INTERRUPTED:
            worker.leave(code)  # not through the end of a process group whose other ranks may wait
        return code

    def tell_of_the_end(self) -> None:
        """The job that ends a sweep brings its table to wandb, where its runs are mirrored."""
        if int(os.environ.get("SLURM_PROCID", "0")) != 0:
            return
        with contextlib.suppress(UserError):
            record = manifest.load(Path(self.root), self.sweep)
            where = tracking.place(record["rows"][0]["experiment"].get("tracking"))
            jobs = manifest.jobs(record)
            if where is not None and all(manifest.finished(Path(self.root), j) for j in jobs):
                print(tracking.bring_table(Path(self.root), self.sweep), file=sys.stderr)

    @property
    def finished(self) -> bool:
        return all(manifest.finished(Path(self.root), job) for job in self.runs)

    @property
    def marker(self) -> Path:
        return manifest.cancel_marker(Path(self.root), self.sweep)

    def watch(self, caught: list[int]) -> None:
        """Takes the sweep's being cancelled for a request to end."""
        wait_for(self.marker.exists, float("inf"))
        caught.append(signal.SIGTERM)

    def progress(self) -> list[str]:
        """The newest checkpoint of each run, or its result, and how many scores it has."""
        runs = [Run(Path(self.root), job.id) for job in self.runs]
        return [
            max((p.name for p in (run / "checkpoints").glob("step-*")), default="")
            + str((run / "result.json").exists())
            + str(len(list((run / "scores").glob("step-*/*.json"))))
            for run in runs
        ]

    def give_up(self, why: str) -> None:
        for job in self.runs:
            run = Run(Path(self.root), job.id)
            if not (run / "result.json").exists():
                worker.fail(run, f"{why} job {this_job()}")

    def go_back(self, caught: list[int]) -> NoReturn:
        """Requeues this job if it is to go on, and waits for Slurm to end it."""
        requeued = False
        if int(os.environ.get("SLURM_PROCID", "0")) == 0 and not self.marker.exists():
            # Slurm ends the whole job, a child that is still speaking to it too: not this one.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                requeued = requeue()
            except RuntimeError as error:
                self.give_up(f"Slurm did not take it back into the queue ({error});")
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if requeued:  # were this process to end first, Slurm might take the job for ended
            wait_for(lambda: False, TO_BE_ENDED_SECONDS)
        worker.leave(worker.INTERRUPTED)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Warnings and requests to end only leave their number here."""
    caught: list[int] = []
    numbers = (WARNING, signal.SIGTERM, signal.SIGINT)
    before = {n: signal.signal(n, lambda number, _: caught.append(number)) for n in numbers}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requeue() -> bool:
    """Puts this job back into the queue; false if Slurm has done so itself, or is ending it.

    Raises:
        RuntimeError: Slurm refuses; carries its words.
    """
    words = ""
    for attempt in range(SCONTROL_TRIES):
        time.sleep(attempt)
        try:
            if job_state() != "RUNNING":
                return False
            scheduler.ask("scontrol", "requeue", this_job())
            return True
        except scheduler.NoSlurm as error:
            words = str(error)
            print(words, file=sys.stderr, flush=True)
    raise RuntimeError(words)


def job_state() -> str:
    """This job's state, in Slurm's word."""
    told = scheduler.ask("scontrol", "show", "job", "-o", this_job())
    words = dict(word.split("=", 1) for word in told.split() if "=" in word)
    return words.get("JobState", "")


def this_job() -> str:
    """The job's id as Slurm's commands take it: `12_3` in an array, else `12`.

    SLURM_JOB_ID won't do: that of the element last begun is the whole array's too.
    """
    return str(whereabouts()["job"])


def before_us(run: Run) -> bool:
    """Whether an earlier start of this job has the run: it may live on, on a node that Slurm has
    lost sight of."""
    return run.live().get("job") == this_job()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Looks until it holds, or the time is over."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.25)
