"""Runs that take no torch: what stands in for training in the tests of the local executor.

The experiment says what a run does: {"do": "finish" | "crash" | "refuse" | "exit" | "kill" |
"stop" | "linger", ...}. Each writes what a real run would, and how often it was begun.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

from components.registry import UserError
from experiments.record import Interrupted, Run, append_rows, write_json
from sweeps.manifest import Job


def train(job: Job, root: Path) -> None:
    """One fake run; `linger` waits for the file `root/go`, or a SIGTERM, in small steps."""
    run, do = Run(root, job.id), job.experiment["do"]
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    with run.lock():
        append_rows(root / "begun.jsonl", {"id": job.id, "pid": os.getpid()})
        (run / "experiment.yaml").write_text("{}\n")
        threads = {"OMP_NUM_THREADS": os.environ["OMP_NUM_THREADS"]}
        write_json(run / "seen.json", {**threads, "argv": sys.argv, "sid": os.getsid(0)})
        print(f"hello from {job.label}", flush=True)
        if do == "crash":
            raise RuntimeError("the sky\nfell")
        if do == "refuse":
            raise UserError("data.txt: no such file")
        if do == "exit":
            os._exit(job.experiment["code"])
        if do == "kill":
            os.kill(os.getpid(), job.experiment["signal"])
        if do == "stop":
            raise Interrupted(signal.SIGTERM)
        if do in ("linger", "stubborn"):
            run.heartbeat(started=time.time(), step=1, steps=4, tokens=8)
            while not (root / "go").exists():
                if stop and do == "linger":
                    (run / "saved").touch()
                    with contextlib.suppress(FileNotFoundError):
                        (run / "running.json").unlink()
                    raise Interrupted(signal.SIGTERM)
                time.sleep(0.01)
        write_json(run / "result.json", {"status": "done", "val/loss": 1.5, "step": 4})


def main() -> None:
    """A driver to send signals to: `python fake_runs.py root` runs what root/jobs.json says."""
    from sweeps import live, local

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    root = Path(sys.argv[1])
    jobs = [Job(**job) for job in json.loads((root / "jobs.json").read_text())]
    outcome = local.execute(
        jobs,
        root,
        workers=2,
        watcher=live.Lines(root),
        cancelled=root / "sweeps" / "fake.cancelled",
        target="fake_runs:train",
        preload=["fake_runs"],
    )
    sys.exit(130 if outcome.interrupted else bool(outcome.failed))


if __name__ == "__main__":
    main()
