"""What one of several processes does in a test: trainings one after another, as a plan says.

    python -m torch.distributed.run --nproc_per_node=2 -m tests.experiments.ranks plan.json

The test writes the plan (`together`), and each process writes beside it how its trainings ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.slurm import free_ports

TERM, USR2 = int(signal.SIGTERM), int(signal.SIGUSR2)


def together(folder: Path, *trainings: dict[str, Any], processes: int = 2) -> list[list[Any]]:
    """Carries out `trainings` in several processes; how each ended, by process.

    Of a training: `yaml`, `overrides` and `root`; `sharding`; `signals`, as [process, step, number]
    each, sent by the process to itself after that step; `catches`, numbers that the caller handles
    and not `train`; `look_seconds`; `environment`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / "plan.json"
    plan.write_text(json.dumps(trainings))
    port = next(free_ports())
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"),
            *("--master_addr=127.0.0.1", f"--master_port={port}"),
            *("-m", "tests.experiments.ranks", str(plan)),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


@contextlib.contextmanager
def fsdp2_on_a_cpu() -> Iterator[None]:
    """Makes Accelerate take up its FSDP plugin on a CPU, as it does by itself only on GPUs.

    Set by hand after the Accelerator is made: the distributed type, and the plugin in its state,
    which is all that Accelerate itself does with it on a GPU. Our own refusal of CPUs is lifted.
    """
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from experiments import sharding

    def made(fsdp_plugin: Any, **how: Any) -> Accelerator:
        accelerator = Accelerator(**how)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            accelerator.state.distributed_type = DistributedType.FSDP
            accelerator.state.fsdp_plugin = fsdp_plugin
        return accelerator

    devices, sharding.DEVICES = sharding.DEVICES, ("cpu",)
    sharding.Accelerator = made
    try:
        yield
    finally:
        sharding.Accelerator, sharding.DEVICES = Accelerator, devices
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU


def carry_out(rank: int, training: dict[str, Any]) -> dict[str, Any]:
    """One training on this process; how it ended."""
    os.environ.update(training.get("environment", {}))
    import torch

    from experiments import loader, trainer
    from experiments.record import Interrupted, UserError

    caught: list[int] | None = None
    if (catches := training.get("catches")) is not None:
        caught = []
        for number in catches:
            signal.signal(number, lambda n, _: caught.append(n))
    handlers = [signal.getsignal(n) for n in (TERM, USR2)]
    last = [0, 0]
    step_of = trainer.Training.train_step

    def stepping(self: trainer.Training) -> Any:
        result = step_of(self)
        last[0] = self.step
        for process, step, number in training.get("signals", []):
            if (process, step) == (rank, self.step):
                os.kill(os.getpid(), number)
        last[1] += [signal.getsignal(n) for n in (TERM, USR2)] == handlers
        return result

    trainer.Training.train_step = stepping  # type: ignore[method-assign]
    before, trainer.LOOK_SECONDS = trainer.LOOK_SECONDS, training.get("look_seconds", 10.0)
    sharding = training.get("sharding", "ddp")
    try:
        pretend = sharding == "fsdp2" and not torch.cuda.is_available()
        with fsdp2_on_a_cpu() if pretend else contextlib.nullcontext():
            trainer.train(
                loader.load(training["yaml"], training.get("overrides", [])),
                0,
                Path(training["root"]),
                progress="none",
                sharding=sharding,
                stop=caught,
            )
        ended: dict[str, Any] = {"status": "done"}
    except Interrupted as error:
        ended = {"status": "interrupted", "signal": error.signal}
    except UserError as error:
        ended = {"status": "refused", "error": str(error)}
    finally:
        trainer.Training.train_step = step_of  # type: ignore[method-assign]
        trainer.LOOK_SECONDS = before
    return {**ended, "step": last[0], "steps_under_them": last[1]}


def main(plan: Path) -> None:
    from torch.distributed import destroy_process_group

    rank = int(os.environ["RANK"])
    ended = [carry_out(rank, training) for training in json.loads(plan.read_text())]
    (plan.parent / f"{rank}.json").write_text(json.dumps(ended))
    destroy_process_group()  # or its threads may end the process with a signal


if __name__ == "__main__":
    main(Path(sys.argv[1]))
