"""What stands before the first step: devices, signals, the run's lock and its first records."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast_object_list

from components.memory_cpu import hold_freed_memory
from experiments import own_code, precheck, provenance
from experiments.data import Dataset
from experiments.loader import changed_defaults, code_by_name, to_yaml
from experiments.record import (
    SCHEMA,
    Run,
    UserError,
    read_json,
    write_atomically,
    write_json,
)
from experiments.schema import Experiment
from experiments.sharding import Sharding, accelerator_for
from experiments.yaml_text import read


def start_accelerator(experiment: Experiment, sharding: Sharding = "ddp") -> Accelerator:
    """Accelerate for training this experiment, on its device and in its precision.

    Raises:
        UserError: the machine does not have what the experiment asks for.
    """
    accelerator = accelerate_on(experiment, sharding)
    if experiment.training.global_batch_size % world(accelerator):
        raise UserError(
            f"training.global_batch_size: {world(accelerator)} processes can't share "
            f"{experiment.training.global_batch_size} sequences evenly"
        )
    return accelerator


def accelerate_on(experiment: Experiment, sharding: Sharding = "ddp") -> Accelerator:
    """Accelerate for this experiment's device and precision, whatever is done with it.

    Raises:
        UserError: the machine does not have what the experiment asks for.
    """
    device, precision = experiment.execution.device, experiment.training.precision
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if (device == "cuda" and not cuda) or (device == "mps" and not mps):
        raise UserError(f"execution.device: {device} is asked for, but torch finds none here")
    if precision == "fp16" and (device == "cpu" or not cuda):
        raise UserError("training.precision: fp16 needs a CUDA device; use bf16 or fp32 on a CPU")
    if not cuda or device == "cpu":
        hold_freed_memory()
    AcceleratorState._reset_state()  # a second run in one process may have another precision
    mixed = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]
    on_cpu = device == "cpu" or (device == "auto" and not cuda and not mps)
    kind = "cpu" if on_cpu else "cuda" if cuda else "mps"
    accelerator = accelerator_for(sharding, kind, precision, mixed_precision=mixed, cpu=on_cpu)
    # Last, since Accelerate sets them for several processes; MKL's, which have a variable, too.
    torch.set_num_threads(experiment.execution.threads or torch.get_num_threads())
    return accelerator


def world(accelerator: Accelerator) -> int:
    return int(accelerator.num_processes)


def micro_batch(experiment: Experiment, share: int) -> int:
    """Sequences at once on one device."""
    micro = experiment.execution.micro_batch_size or share
    if share % micro:
        raise UserError(
            f"execution.micro_batch_size: {micro} does not divide the {share} sequences of a device"
        )
    return micro


def check_directory(run: Run, experiment: Experiment) -> None:
    """A stored run of this id must mean what the experiment means now.

    Raises:
        UserError: it does not; shows both values.
    """
    if not (run / "experiment.yaml").exists():
        return
    changed = changed_defaults(experiment, read(run / "experiment.yaml").data)
    if changed:
        raise UserError(
            f"{run.folder}: a default has changed since this run began ({'; '.join(changed)}); "
            "write the value into the experiment, or use another --runs folder"
        )


def begin(
    run: Run, experiment: Experiment, seed: int, data: Dataset, accelerator: Accelerator
) -> None:
    """Writes what the run is before its first step, or checks that it still is the same."""
    path = run / "provenance.json"
    known: dict[str, Any] = {"schema": SCHEMA, "id": run.id, "attempts": []}
    if path.exists():
        known = read_json(path)
    before = known.get("data", {}).get("fingerprint")
    if before not in (None, data.fingerprint):
        raise UserError(
            f"{run.folder}: the data has changed since this run began (fingerprint {before}, "
            f"now {data.fingerprint}); restore it, or train from the start beside it: --redo"
        )
    threads = experiment.execution.threads
    if threads is None and known["attempts"]:  # the order of sums depends on it
        first = known["attempts"][0].get("threads") or torch.get_num_threads()
        torch.set_num_threads(min(first, os.cpu_count() or first))
    sharding = "fsdp2" if accelerator.is_fsdp2 else None
    processes = world(accelerator)
    own = code_by_name(experiment)
    attempt = provenance.describe(str(accelerator.device), processes, sharding, own)
    known |= {"seed": seed, "data": {**data.meta, "folder": data.folder.name}}
    known["imports"] = own_code.copies(experiment.imports, run.root)
    known["attempts"] = [*known["attempts"], attempt]
    write_json(path, known)
    write_atomically(run / "experiment.yaml", to_yaml(experiment))


@contextlib.contextmanager
def hold(
    run: Run, experiment: Experiment, seed: int, data: Dataset, accelerator: Accelerator
) -> Iterator[dict[str, Any] | None]:
    """Begins the run and holds it for these processes; gives its result if it has one already.

    The first process decides for all: another node may see new files later.

    Raises:
        UserError: on every process, if the first can't hold or begin it.
    """
    with contextlib.ExitStack() as stack:
        refused: UserError | None = None
        result: dict[str, Any] | None = None
        if accelerator.is_main_process:
            try:
                stack.enter_context(run.lock())
                if (run / "result.json").exists():
                    result = read_json(run / "result.json")
                else:
                    precheck.check_run(experiment, seed, data, run.folder)
                    begin(run, experiment, seed, data, accelerator)
            except UserError as error:
                refused = error
        if world(accelerator) > 1:
            refused, result = broadcast_object_list([refused, result])
        if refused is not None:
            raise refused
        yield result


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT only leave their number here; the loop saves at its next step."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: at once
        caught.append(number)

    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: whoever owns it decides
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
