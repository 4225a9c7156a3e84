"""Where a run comes from: code, versions, hardware, data and command.

Queued jobs run from a snapshot of the source. Beside its rooms lies a snapshot.json with its id and
with what git said of the checkout that it was taken from; git is not asked again, since a snapshot
may lie inside another checkout.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from experiments import environment
from experiments.record import read_json, whereabouts

PACKAGES = (
    *("torch", "accelerate", "numpy", "pydantic", "tokenizers", "datasets", "safetensors"),
    "einops",
)
SOURCE = Path(__file__).parent.parent
LARGEST_PATCH = 1 << 20  # characters


def describe(
    device: str,
    processes: int,
    sharding: str | None = None,
    imports: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What an attempt at a run ran on and from; no variables but Slurm's ids and kernels'.

    `imports` are digests of the experiment's own components by file, `loader.code_by_name`.
    """
    import torch  # here, since `submit` asks only for `git`

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        **whereabouts(),
        **source(SOURCE),
        "source": code_digest(),
        "imports": imports,
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": torch.get_num_threads(),
        "environment": environment.recorded(),
        "device": device,
        "processes": processes,
        "sharding": sharding,
    }


def source(folder: Path) -> dict[str, Any]:
    """Which code lies in a folder: a snapshot's id and its checkout, or the checkout itself.

    Raises:
        UserError: the snapshot's own record is damaged.
    """
    path = folder / "snapshot.json"
    if not path.exists():
        return {"git": git(folder)}
    known = read_json(path)
    return {"snapshot": {"id": known.get("id")}, "git": known.get("git")}


@functools.cache  # as it was when the program began: later edits reach no run of this process
def code_digest() -> str:
    """A hash of the code that decides what a run finds: the .py of components and experiments."""
    rooms = ("components", "experiments")
    return digest(sorted(p for room in rooms for p in (SOURCE / room).rglob("[!.]*.py")))


def digest(files: Iterable[Path]) -> str:
    """A hash of names and contents; one of nothing stands for a file that can't be read."""
    whole = hashlib.blake2b(digest_size=8)
    for file in files:
        try:
            content = file.read_bytes()
        except OSError:  # an editor's, and gone since
            content = b""
        whole.update(f"{file.name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def code(attempt: dict[str, Any]) -> dict[str, Any]:
    """Of an attempt, as `describe` gives it: which code ran, in the few words of a result."""
    known = attempt.get("git") or {}
    return {
        "commit": known.get("commit"),
        "dirty": bool(known.get("patch")),
        "source": attempt.get("source"),
        "imports": attempt.get("imports"),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def cpu() -> str:
    """The processor's name as Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")


def git(folder: Path) -> dict[str, Any] | None:
    """Commit and uncommitted changes of a folder of source; None where it is no checkout."""

    def ask(*words: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.decode(errors="replace")

    commit = ask("rev-parse", "HEAD")
    if commit is None or ask("ls-files", "--error-unmatch", "run.py") is None:
        return None  # no checkout, or installed somewhere within another one
    patch = ask("diff", "HEAD") or ""
    return {
        "commit": commit.strip(),
        "patch": patch if len(patch) <= LARGEST_PATCH else f"{len(patch)} characters, not kept",
    }
