"""What tests on a real Slurm sit at: a folder to type commands in, and runs that wait for a sign.

A `gated` schedule holds a run at one step until a file appears, so that a test can act while a run
is in the middle of its work, and needs no clock.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from experiments import loader
from experiments.record import Run, read_json
from experiments.trainer import train
from sweeps import scheduler
from tests import PATIENCE
from tests.command_line import Outcome, ceteris
from tests.slurm import PrivateSlurm

GATED = '''
import os
import time
from pathlib import Path
from components.registry import register

@register("schedule", "gated")
class Gated:
    """Constant, but step `at` waits until the file `gate` is there."""

    def __init__(self, *, gate: str, at: int = 12) -> None:
        self.gate, self.at = Path(gate), at

    def factor(self, step: int, steps: int) -> float:
        if step == self.at:
            while not self.gate.exists():
                self.gate.with_suffix(".reached").touch()
                self.gate.with_suffix(f".held-{os.getpid()}").touch()
                time.sleep(0.02)
        if self.gate.with_suffix(".broken").exists():
            raise RuntimeError("the sky fell")
        return 1.0
'''


class Desk:
    """A folder to type commands in, with a tiny experiment, a gated one, and a cluster file."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.folder, self.root = folder, folder / "runs"
        self.gate = folder / "gate"
        (folder / "gated.py").write_text(GATED)
        self.write(
            "gated.yaml",
            base=str(tiny),
            imports=["gated.py"],
            training={"schedule": {"name": "gated", "gate": str(self.gate)}},
            execution={"checkpoint_minutes": 0},
        )
        self.sweep("tiny", tiny)
        self.sweep("gated", "gated.yaml")
        self.cluster()

    def write(self, file: str, /, **content: Any) -> Path:
        path = self.folder / file
        path.write_text(json.dumps(content))  # which is YAML
        return path

    def sweep(
        self, name: str, base: str | Path, seeds: tuple[int, ...] = (0, 1), **more: Any
    ) -> None:
        rows = [{"label": "RMSNorm", "set": {"model.norm": "rmsnorm"}}]
        content = {"base": str(base), "name": name, "seeds": seeds, "rows": rows} | more
        self.write(f"{name}-sweep.yaml", **content)

    def cluster(self, **settings: Any) -> None:
        self.write("cluster.yaml", **{"time": 60, "cpus_per_task": 1, **settings})

    def submit(self, name: str, *words: str) -> Outcome:
        done = ceteris("submit", f"{name}-sweep.yaml", "--cluster", "cluster.yaml", *words)
        assert done.code == 0, done.err
        return done

    def status(self, name: str) -> dict[str, dict[str, Any]]:
        """Rows by `label-seed`."""
        rows = ceteris("status", name, "--json").json["runs"]
        return {f"{row['label']}-{row['seed']}": row for row in rows}

    def states(self, name: str) -> dict[str, str]:
        return {key: row["state"] for key, row in self.status(name).items()}

    def wait(self, name: str, condition: Callable[[dict[str, str]], bool]) -> dict[str, str]:
        states: dict[str, str] = {}

        def holds() -> bool:
            states.update(self.states(name))
            return condition(states)

        self.until(holds, lambda: f"{states}\n{self.told(name)}")
        return states

    def done(self, name: str) -> None:
        self.wait(name, lambda states: set(states.values()) == {"done"})

    def until(self, condition: Callable[[], Any], told: Callable[[], str] = lambda: "") -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > end:
                pytest.fail(f"it never came to that\n{told()}")
            time.sleep(0.1)

    def told(self, name: str) -> str:
        logs = [*self.root.glob("slurm/*/*.err"), *self.root.glob("*/log.txt")]
        return ceteris("status", name).out + "\n".join(
            f"{p}:\n{p.read_text()[-800:]}" for p in logs
        )

    def held(self, name: str) -> None:
        """Waits until every run of a sweep is held at the gate."""
        runs = len(self.status(name))
        self.until(lambda: len([*self.folder.glob("gate.held-*")]) == runs, lambda: self.told(name))

    @property
    def reached(self) -> Path:
        return self.gate.with_suffix(".reached")

    def job(self, name: str, key: str) -> str:
        return str(self.status(name)[key]["job"])

    def limit(self, job: str, minutes: int) -> None:
        """Gives a queued or running job another time limit."""
        scheduler.ask("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")

    def undisturbed(self, name: str, *overrides: str) -> None:
        """Every run of the sweep has the bytes of one that nobody disturbed."""
        record = read_json(self.root / "sweeps" / f"{name}.json")
        self.gate.touch()
        for row in record["rows"]:
            for seed, id in row["runs"].items():
                plain = {**row["experiment"], "imports": [str(self.folder / "gated.py")]}
                path = self.write(f"{id}.yaml", **plain)
                alone = train(loader.load(path), int(seed), self.folder / "alone", progress="none")
                assert alone["id"] == id
                ours, theirs = (Run(r, id) for r in (self.root, self.folder / "alone"))
                assert (ours / "metrics.jsonl").read_bytes() == (
                    theirs / "metrics.jsonl"
                ).read_bytes()
                weights = [
                    next((r / "checkpoints").glob("*/model.safetensors")) for r in (ours, theirs)
                ]
                assert weights[0].read_bytes() == weights[1].read_bytes()


def jobs_in_queue() -> list[str]:
    """Elements that are queued or run, each once."""
    return scheduler.ask("squeue", "-h", "-r", "-o", "%F_%K").split()


def processes_of(slurm: PrivateSlurm, job: str) -> list[int]:
    """The Python processes of a job's step."""
    array, _, index = job.partition("_")
    found = []
    for pid in slurm.jobs_pids():
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            there = process.environ()
            ours = there.get("SLURM_ARRAY_JOB_ID"), there.get("SLURM_ARRAY_TASK_ID")
            if ours == (array, index) and "python" in process.name():
                found.append(pid)
    return found
