"""What wandb costs a run: before its first step, on each step, and after its last.

    python benchmarks/tracking.py [--steps 1000] [--rounds 5]

The same training of a small model with a row of metrics at every step, in a process of its own each
time, in turns: without wandb; with our mirror, to files and to a server; and with wandb called in
the loop, as trainers do and as Accelerate's tracker does (`wandb.init` with its defaults, then
`log` on each row, then `finish`). The server is the tests' stand-in on the loopback, so the way to
a real one is not in it; or one that is gone. Seconds are wall-clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

CONTENDERS = {  # name: (who calls wandb, its mode, whether the server is there)
    "no wandb": ("nobody", "disabled", True),
    "mirror, offline": ("mirror", "offline", True),
    "mirror, online": ("mirror", "online", True),
    "mirror, server gone": ("mirror", "online", False),
    "in the loop, offline": ("loop", "offline", True),
    "in the loop, online": ("loop", "online", True),
}
EXPERIMENT = """\
model: {d_model: 64, n_layers: 2, n_heads: 2}
training: {tokens: TOKENS, seq_len: 64, global_batch_size: 8, lr: 3e-3}
evaluation: {tokens: 4096}
execution: {threads: 1, log_every: 1, checkpoint_minutes: 60}
"""


def contend(who: str, folder: Path, seed: int) -> None:
    """One training in this process; prints its seconds as JSON."""
    from experiments import loader, trainer

    experiment = loader.load(folder / "experiment.yaml")
    began: list[float] = []
    steps = trainer.Training.run_all

    def run_all(self: Any, stop: list[int]) -> Any:
        began.append(time.perf_counter())
        if who != "loop":
            return steps(self, stop)
        import wandb

        run = wandb.init(project="bench", dir=str(folder), config=loader.resolved(experiment))
        append = trainer.append_rows

        def both(path: Path, *rows: dict[str, Any]) -> None:
            append(path, *rows)
            for row in rows if path.name == "metrics.jsonl" else ():
                run.log({key: value for key, value in row.items() if value is not None})

        trainer.append_rows = both
        result = steps(self, stop)
        run.finish()
        return result

    trainer.Training.run_all = run_all  # type: ignore[method-assign]
    start = trainer.Training.train_step

    def first(self: Any) -> Any:
        if len(began) == 1:
            began.append(time.perf_counter())
        return start(self)

    trainer.Training.train_step = first  # type: ignore[method-assign]
    entered = time.perf_counter()
    result = trainer.train(experiment, seed, folder / "runs", progress="none")
    whole = time.perf_counter() - entered
    before = began[1] - entered
    print(json.dumps({"before": before, "loop": result["seconds"], "whole": whole}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contend", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        who, folder, seed = options.contend
        contend(who, Path(folder), int(seed))
        return
    from tests.wandb_server import WandbServer

    with tempfile.TemporaryDirectory() as folder, WandbServer(Path(folder) / "server") as server:
        here = Path(folder)
        text = EXPERIMENT.replace("TOKENS", str(options.steps * 64 * 8))
        (here / "experiment.yaml").write_text(text, encoding="utf-8")
        found: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for turn in range(-1, options.rounds):  # the first fills caches and is not counted
            for number, (name, (who, mode, there)) in enumerate(CONTENDERS.items()):
                server.stop()
                if there:
                    server.start()
                seed = str((turn + 1) * len(CONTENDERS) + number)
                words = [sys.executable, __file__, "--contend", who, folder, seed]
                env = {**server.env, "WANDB_MODE": mode, "OMP_NUM_THREADS": "1"}
                done = subprocess.run(
                    words, env=env, capture_output=True, text=True, check=True, encoding="utf-8"
                )
                if turn >= 0:
                    found[name].append(json.loads(done.stdout.splitlines()[-1]))
        report(found, options)


def report(found: dict[str, list[dict[str, float]]], options: argparse.Namespace) -> None:
    def told(values: list[float], digits: int) -> str:
        spread = f"{min(values):.{digits}f} to {max(values):.{digits}f}"
        return f"{statistics.median(values):.{digits}f} ({spread})"

    load = os.getloadavg()[0]
    print(
        f"{options.steps} steps, {options.rounds} rounds, {os.cpu_count()} cores, load {load:.1f}"
    )
    print(
        f"{'median (range)':22}{'s to first step':>22}{'ms per step':>24}{'s after the last':>22}"
    )
    for name, runs in found.items():
        before = told([run["before"] for run in runs], 2)
        step = told([1000 * run["loop"] / options.steps for run in runs], 2)
        after = told([run["whole"] - run["before"] - run["loop"] for run in runs], 2)
        print(f"{name:22}{before:>22}{step:>24}{after:>22}")


if __name__ == "__main__":
    main()
