"""How long `python run.py table` takes over many run directories.

    python -m benchmarks.table [--runs 1000] [--runs 10000]

Makes a sweep of four seeds whose runs have all that real ones leave (a sealed result, the resolved
experiment, 100 rows of metrics and of timing, 11 evaluations), then asks for its table in a new
process, several times, and says the median, the processor time of it (what a busy machine does not
stretch so much), and the number of directories per second. The files
have just been written, so they are read from memory: on a disk that has not seen them for a while
the first time takes as long as reading them does.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments import record

ROOT = Path(__file__).parent.parent
SEEDS = 4
ROWS = 100  # of metrics.jsonl and timing.jsonl
TOKENS_PER_ROW = 10_000
FORMS: tuple[tuple[str, ...], ...] = ((), ("--format", "md"), ("--columns", "all"))


def make(root: Path, count: int) -> None:
    """A finished sweep called `many` of `count` runs below `root`."""
    rows = []
    settings: dict[str, object] = {
        f"section_{i}": {f"setting_{j}": j * 0.1 for j in range(12)} for i in range(6)
    }
    settings["training"] = {"lr": 0.003, "tokens": ROWS * TOKENS_PER_ROW, "seq_len": 64}
    for index in range(count // SEEDS):
        runs = {str(seed): f"{index:010x}-s{seed}" for seed in range(SEEDS)}
        for seed, run in runs.items():
            make_run(root / run, int(seed), index, settings)
        rows.append(
            {
                "label": f"variant {index}" if index else "baseline",
                "group": "rows",
                "changes": {},
                "differences": [f"a.b: {index}"],
                "parameters": 10**6,
                "flops_per_token": 6e6,
                "mismatch": 0.0,
                "solved": {},
                "levels": None,
                "tuned": None,
                "seeds": {},
                "runs": runs,
                "experiment": settings,
            }
        )
    manifest = {
        "schema": 1,
        "name": "many",
        "file": "many.yaml",
        "description": "",
        "baseline": "baseline",
        "match": "params",
        "tune": None,
        "overrides": [],
        "seeds": list(range(SEEDS)),
        "tokens": ROWS * TOKENS_PER_ROW,
        "rows": rows,
    }
    record.write_json(root / "sweeps" / "many.json", manifest)


def make_run(folder: Path, seed: int, index: int, settings: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    noise = random.Random(f"{index}/{seed}")
    final = 2 + 0.01 * noise.gauss(0, 1) + 0.02 * random.Random(seed).gauss(0, 1)
    metrics, timing = [], []
    for k in range(ROWS + 1):
        at = {"step": 10 * k, "tokens": k * TOKENS_PER_ROW}
        if k:
            more = {"train/loss": final + 3 / k, "optim/lr": 0.003, "optim/grad_norm": 0.5}
            metrics.append({**at, **more})
            timing.append({**at, "seconds": 0.4 * k, "perf/tokens_per_s": 25_000.0})
        if k % 10 == 0:
            loss = final + 3 * (1 / (k + 1) - 1 / (ROWS + 1))
            metrics.append({**at, "val/loss": loss, "val/bpb": loss / 2})
    record.append_rows(folder / "metrics.jsonl", *metrics)
    record.append_rows(folder / "timing.jsonl", *timing)
    (folder / "experiment.yaml").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    result = {
        "schema": 1,
        "id": folder.name,
        "status": "done",
        "reason": None,
        "diverged_step": None,
        "seed": seed,
        "step": 10 * ROWS,
        "tokens": ROWS * TOKENS_PER_ROW,
        "val/loss": final,
        "val/bpb": final / 2,
        "tuning/loss": final + 0.01,
        "init/loss": 5.5,
        "floor/loss": None,
        "parameters": 10**6,
        "flops_per_token": 6e6,
        "tokens_per_s": 25_000.0,
        "seconds": 40.0,
        "peak_memory_bytes": 5 * 10**8,
        "data": "0" * 32,
        "code": {"commit": "0" * 40, "dirty": False, "source": "0" * 32},
        "versions": {"torch": "2.13.0"},
    }
    result["seal"] = record.seal(folder, result)
    record.write_json(folder / "result.json", result)


def seconds(root: Path, words: tuple[str, ...]) -> tuple[float, float]:
    """By the clock, and of processor time."""
    began, spent = time.perf_counter(), _processor()
    command = [sys.executable, "run.py", "table", "many", "--runs", str(root), *words]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - began, _processor() - spent


def _processor() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, action="append", help="directories; may be repeated")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}")
    for count in arguments.runs or (1000, 10_000):
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count)
            for words in FORMS:
                times = [seconds(Path(folder), words) for _ in range(arguments.repeats)]
                took, cpu = map(statistics.median, zip(*times, strict=True))
                shown = " ".join(("table", *words))
                print(
                    f"{count} runs, {shown}: {took:.2f} s ({cpu:.2f} s of processor time),"
                    f" {count / took:.0f} runs/s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
