"""Seconds that a person waits at a login node: to plan, submit and look at 1,000 runs.

    python benchmarks/submit.py [--rows 200] [--seeds 5] [--repeats 5]

On a private, real Slurm (tests/slurm.py) whose jobs are held, so that nothing runs beside. Each
figure is a whole command as typed, from the start of Python to its exit. Peers: `sbatch` called
once for each run, as launchers without arrays do, and submitit's own array of empty functions,
which is the least that any use of it can take.
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
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.slurm import PrivateSlurm, missing  # noqa: E402

LOOP = 50  # calls of sbatch that stand for all


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if reason := missing():
        sys.exit(f"no real Slurm here: {reason}")
    runs = options.rows * options.seeds
    with (
        tempfile.TemporaryDirectory() as folder,
        PrivateSlurm(nodes=2, config={"MaxJobCount": 10**5}) as slurm,
    ):
        here = Path(folder)
        write_sweep(here, options.rows, options.seeds)
        env = {**slurm.clean_environment(), "OMP_NUM_THREADS": "1"}

        def ceteris(*words: str) -> None:
            command = [sys.executable, str(ROOT / "run.py"), *words]
            subprocess.run(command, cwd=here, env=env, check=True, capture_output=True)

        def submit(root: str) -> None:
            ceteris("submit", "many.yaml", "--cluster", "cluster.yaml", "--runs", root)

        print(f"{runs} runs ({options.rows} rows x {options.seeds} seeds), {os.cpu_count()} cores")
        show("plan", options.repeats, lambda i: ceteris("plan", "many.yaml"))
        show("submit", options.repeats, lambda i: submit(f"runs{i}"))
        show(
            "status, all queued",
            options.repeats,
            lambda i: ceteris("status", "many", "--runs", "runs0"),
        )
        show("submit again: nothing to do", options.repeats, lambda i: submit("runs0"))
        finish(here / "runs0")
        show(
            "status, all done",
            options.repeats,
            lambda i: ceteris("status", "many", "--runs", "runs0"),
        )
        show(
            "table, all done",
            options.repeats,
            lambda i: ceteris("table", "many", "--runs", "runs0", "--format", "md"),
        )
        print("peers:")
        show(
            "submitit alone, one array",
            options.repeats,
            lambda i: array(here / f"bare{i}", runs, env),
        )
        seconds = measure(options.repeats, lambda i: loop(here, env))
        scaled = [s / LOOP * runs for s in seconds]
        print(line(f"sbatch for each run ({LOOP} measured)", scaled))
        slurm.clear()


def write_sweep(here: Path, rows: int, seeds: int) -> None:
    base = {
        "model": {"d_model": 32, "n_layers": 2, "n_heads": 2, "max_seq_len": 64},
        "data": {"corpus": "python_docs", "tokenizer": "bytes"},
        "training": {"tokens": 25600, "seq_len": 32, "global_batch_size": 8, "lr": 3e-3},
    }
    changes = [
        {
            "label": f"row {n}",
            "set": {"training.lr": 1e-3 + 1e-6 * n, "model.d_model": 32 + 2 * (n % 10)},
        }
        for n in range(1, rows)
    ]
    sweep = {"base": "base.yaml", "name": "many", "seeds": list(range(seeds)), "rows": changes}
    cluster = {"time": 60, "sbatch": {"hold": True}}
    for name, content in (
        ("base", base), ("many", {**sweep, "max_runs": rows * seeds}), ("cluster", cluster),
    ):  # fmt: skip
        (here / f"{name}.yaml").write_text(json.dumps(content), encoding="utf-8")


def finish(root: Path) -> None:
    """Results as runs write them, for what only reads."""
    record = json.loads((root / "sweeps" / "many.json").read_text(encoding="utf-8"))
    for row in record["rows"]:
        for seed, run in row["runs"].items():
            (root / run).mkdir()
            result = {
                "schema": 1, "id": run, "status": "done", "seed": int(seed), "step": 100,
                "tokens": 25600, "train/loss": 3.0, "val/loss": 3.0 + int(seed) / 100,
                "val/bpb": 4.0, "tokens_per_s": 1e4, "seconds": 2.0, "flops_per_token": 2e5,
            }  # fmt: skip
            (root / run / "result.json").write_text(json.dumps(result), encoding="utf-8")
            (root / run / "experiment.yaml").write_text("model: {}\n", encoding="utf-8")


def array(folder: Path, count: int, env: dict[str, str]) -> None:
    code = (
        "import submitit\n"
        f"executor = submitit.SlurmExecutor({str(folder)!r})\n"
        "executor.update_parameters(time=60, wckey=None, additional_parameters={'hold': True})\n"
        f"executor.map_array(abs, range({count}))\n"
    )
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)


def loop(here: Path, env: dict[str, str]) -> None:
    for _ in range(LOOP):
        words = ["sbatch", "--hold", "--time=60", "--wrap", "true"]
        subprocess.run(words, cwd=here, env=env, check=True, capture_output=True)


def measure(repeats: int, call: Callable[[int], None]) -> list[float]:
    seconds = []
    for number in range(repeats):
        began = time.perf_counter()
        call(number)
        seconds.append(time.perf_counter() - began)
    return seconds


def line(what: str, seconds: list[float]) -> str:
    spread = f"{min(seconds):.2f} to {max(seconds):.2f}"
    return f"  {what:<34} {statistics.median(seconds):6.2f} s  ({spread})"


def show(what: str, repeats: int, call: Callable[[int], None]) -> None:
    print(line(what, measure(repeats, call)), flush=True)


if __name__ == "__main__":
    main()
