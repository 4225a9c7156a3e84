"""How many runs at a time pay on this machine, and what each of them gets.

Small models on a CPU gain more from runs side by side, one thread each, than from threads: as many
places as usable cores. With GPUs, one place each. Asked without importing torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sweeps.manifest import Job


@dataclass(frozen=True)
class Slots:
    """Places for runs: how many at a time, threads of each, and the GPU of each (None: CPU)."""

    devices: tuple[str | None, ...]
    threads: int

    @property
    def workers(self) -> int:
        return len(self.devices)


def plan_slots(
    jobs: Sequence[Job],
    workers: int | None = None,
    workers_per_gpu: int = 1,
    cores: int | None = None,
) -> Slots:
    """One place per GPU, or per core where there is none; cores are divided among the places.

    Experiments that set `execution.threads` get as few places as have that many cores. `cores` is
    what an allocation grants, which a process can't always see.
    """
    cores = cores or usable_cores()
    settings = [job.experiment.get("execution", {}) for job in jobs]
    gpus = visible_gpus() if any(s.get("device") != "cpu" for s in settings) else []
    own = max((s.get("threads") or 1 for s in settings), default=1)
    count = workers or (len(gpus) * workers_per_gpu if gpus else max(1, cores // own))
    count = max(1, min(count, len(jobs)))
    devices = [gpus[i % len(gpus)] if gpus else None for i in range(count)]
    return Slots(tuple(devices), max(1, cores // count))


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: its affinity, and a container's share of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        share, period = quota.read_text(encoding="utf-8").split()[:2]
        cores = min(cores, max(1, int(share) // int(period)))  # "max" is no number: no limit
    return cores


def visible_gpus() -> list[str]:
    """CUDA devices as CUDA_VISIBLE_DEVICES would name them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        words = [word.strip() for word in chosen.split(",")]
        return [] if words[0] in ("", "-1") else [word for word in words if word]
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(
                ["nvidia-smi", "-L"],
                capture_output=True,
                timeout=30,
                encoding="utf-8",
                errors="replace",
            )
            found = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
            return [str(i) for i in range(len(found))]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
