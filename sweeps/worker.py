"""One run in a process of its own, from the fork to its exit.

What it prints goes to the run's log.txt. How it ended is its exit code, and failure.json where it
failed; a process that is killed can say neither, and the scheduler (local.py) says it for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from components import faults
from experiments.record import (
    SCHEMA,
    Interrupted,
    Locked,
    Run,
    UserError,
    whereabouts,
    write_json,
)
from experiments.scores import ScoringFailed
from sweeps import manifest

DONE, FAILED, INTERRUPTED, ELSEWHERE = 0, 1, 75, 76  # exit codes of a run's process
CAUGHT = (signal.SIGCHLD, signal.SIGTERM)  # what the server handles and a run must not
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Settings:
    """What all runs of one server share.

    Attributes:
        target: `module:function` that is called with (job, root) and runs one run.
        preload: modules to import before the first fork.
    """

    root: str
    target: str
    preload: tuple[str, ...]


def train_run(job: manifest.Job, root: Path, **how: Any) -> None:
    """Trains a job's run to its end, or goes on with it; `how` is for `trainer.train`."""
    experiment = manifest.experiment(job)
    manifest.check_id(job, experiment)
    from experiments.trainer import train

    train(experiment, job.seed, root, progress="log", run=Run(root, job.id), **how)


def work(
    job: manifest.Job, settings: Settings, threads: int, device: str | None, server: int
) -> NoReturn:
    """One run from fork to exit; says by its exit code and failure.json how it ended."""
    run = Run(Path(settings.root), job.id)

    def carry_out() -> None:
        prepare(run, threads, device, server)
        module, _, function = settings.target.partition(":")
        getattr(importlib.import_module(module), function)(job, run.root)

    leave(attempt(run, carry_out))


def attempt(run: Run, carry_out: Callable[[], None]) -> int:
    """Calls it and says how it ended: an exit code, and failure.json where it failed."""
    try:
        carry_out()
    except Locked:
        return ELSEWHERE
    except Interrupted as error:
        print(error, file=sys.stderr)
        return INTERRUPTED
    except ScoringFailed as error:  # which is in the run's scores/; the run itself is done
        print(f"error: scoring failed: {error}", file=sys.stderr)
        return FAILED
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return fail(run, str(error))
    except BaseException as error:
        traceback.print_exc()
        return fail(run, faults.attribute(error) or f"{type(error).__name__}: {error}")
    return DONE


def leave(code: int) -> NoReturn:
    """Ends this process without waiting for threads or other processes."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def prepare(run: Run, threads: int, device: str | None, server: int) -> None:
    """Log, signals, threads and device of this process."""
    signal.set_wakeup_fd(-1)
    for number in CAUGHT:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != server:  # it went in between
            os._exit(INTERRUPTED)
    log_to(run, f"threads {threads}" + (f", GPU {device}" if device else ""))
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(threads)


def log_to(run: Run, what: str) -> None:
    """Sends all that this process prints to the run's log.txt, under a line that says who it is."""
    run.folder.mkdir(parents=True, exist_ok=True)
    log = os.open(run / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    faulthandler.enable(2)
    began, here = time.strftime("%Y-%m-%d %H:%M:%S"), whereabouts()
    job = f" of job {here['job']} on {here.get('node', here['host'])}" if here["job"] else ""
    print(f"── {began}  process {os.getpid()}{job}, {what}", flush=True)


def fail(run: Run, error: str) -> int:
    """Records why an attempt at a run ended without a result; returns the exit code."""
    line = " ".join(error.split())
    line = line if len(line) <= 500 else line[:499] + "…"
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with contextlib.suppress(UserError):  # a full disk: the log may still tell
        write_json(run / "failure.json", {"schema": SCHEMA, "error": line, "time": now})
    return FAILED


def cause(code: int) -> str:
    """A process's end without a word, in words."""
    if code >= 0:
        return f"its process ended with code {code} and no result; see log.txt"
    guess = ": out of memory?" if code == -signal.SIGKILL else "; see log.txt"
    with contextlib.suppress(ValueError):
        return f"killed by signal {-code} ({signal.Signals(-code).name}){guess}"
    return f"killed by signal {-code}{guess}"
