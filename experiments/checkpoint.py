"""Checkpoints: written beside, checked, renamed; a damaged newest one falls back to the one before.

    checkpoints/step-00000400/
        model.safetensors   weights by name
        optimizer.pt        optimizer and gradient scaler, loaded with weights_only
        state.json          step, sizes of the records at that moment, and a digest of each file

A folder without this name, or whose digests do not hold, is no checkpoint. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from experiments.record import UserError, disk_error, read_json

KEPT = 2


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints in a folder, oldest first."""
    found = (p.name.removeprefix("step-") for p in folder.glob("step-*"))
    return sorted(int(name) for name in found if name.isdigit())


def save(
    folder: Path,
    weights: dict[str, torch.Tensor],
    optimizer: dict[str, Any] | None,
    state: dict[str, Any],
) -> Path:
    """Writes the checkpoint of `state["step"]` and lets go of all but the newest two.

    Raises:
        UserError: the disk is full; the older checkpoints are still there.
    """
    target = path_of(folder, state["step"])
    temporary = folder / f".{target.name}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sweep_temporaries(folder)
        temporary.mkdir()
        save_file(weights, temporary / "model.safetensors")
        (temporary / "model.safetensors").chmod(0o644)  # safetensors leaves it to its owner alone
        if optimizer is not None:
            torch.save(optimizer, temporary / "optimizer.pt")
        digests = {p.name: digest(p) for p in sorted(temporary.iterdir())}
        with open(temporary / "state.json", "w", encoding="utf-8") as file:
            json.dump({**state, "files": digests}, file, indent=1)
        for path in temporary.iterdir():
            _sync(path)
        if target.exists():  # a damaged one of the same step, which was passed over
            shutil.rmtree(target)
        temporary.replace(target)
        _sync(folder)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise disk_error(error, target) from error
        raise UserError(f"{target}: can't be written (is the disk full?): {error}") from error
    for old in steps(folder)[:-KEPT]:
        shutil.rmtree(path_of(folder, old), ignore_errors=True)
    return target


def sweep_temporaries(folder: Path) -> None:
    """Removes what a process killed in the middle of writing left behind."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check(path: Path) -> dict[str, Any]:
    """The state of a checkpoint all of whose files are as they were written.

    Raises:
        UserError: a file is missing, cut off or altered; says which.
    """
    state = read_json(path / "state.json")
    files = state.get("files")
    if not isinstance(files, dict) or "model.safetensors" not in files:
        raise UserError(f"{path}/state.json: names no files")
    for name, expected in files.items():
        with contextlib.suppress(OSError):
            if digest(path / name) == expected:
                continue
        raise UserError(f"{path / name}: is missing, cut off or altered")
    return state


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole, and its state; says aloud which ones are not."""
    for step in reversed(steps(folder)):
        path = path_of(folder, step)
        try:
            return path, check(path)
        except UserError as error:
            warn(f"checkpoint passed over: {error}; trying the one before")
    return None


def load_weights(path: Path) -> dict[str, torch.Tensor]:
    """Weights by name, on the CPU."""
    return load_file(path / "model.safetensors")


def load_optimizer(path: Path, mmap: bool = False) -> dict[str, Any]:
    """What `save` got as `optimizer`; only tensors and plain data are let in.

    `mmap` leaves the numbers in the file, for one who takes only parts of them and at once.
    """
    return torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True, mmap=mmap)


def finish(folder: Path) -> None:
    """Once a run is done only its last weights are kept."""
    done = steps(folder)
    for old in done[:-1]:
        shutil.rmtree(path_of(folder, old), ignore_errors=True)
