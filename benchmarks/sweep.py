"""Runs per hour: a sweep of tiny models, against the same runs one after another.

    python benchmarks/sweep.py                    24 runs of 2 layers x 64, 30 steps
    python benchmarks/sweep.py --runs 48 --steps 300

First `run.py train`, a process for each run with `--threads` (as many as torch takes where that is
0); then the local executor, both into empty folders on the same machine. Start-up and preparing the
data count in both. Run it on an otherwise idle machine: threads that wait for a core spin.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENT = """\
model: {{d_model: {width}, n_layers: 2, n_heads: 2, mixer: attention}}
data:
  corpus: {{name: text, files: text.txt, separator: "<|doc|>"}}
  tokenizer: bytes
training: {{tokens: {tokens}, seq_len: 64, global_batch_size: 8, lr: 3e-3}}
evaluation: {{tokens: 4096}}
"""
SWEEP = """\
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from experiments import loader
from sweeps import live, local
from sweeps.manifest import Job
experiment, root = loader.load(sys.argv[2]), Path(sys.argv[3])
plain = loader.resolved(experiment)
jobs = [Job(loader.run_id(experiment, s), s, "tiny", plain) for s in range(int(sys.argv[4]))]
outcome = local.execute(jobs, root, watcher=live.Lines(root))
sys.exit(set(outcome.states.values()) != {"done"})
"""


def write_inputs(folder: Path, width: int, steps: int) -> Path:
    """A small text (Python's help topics) and the experiment on it."""
    from pydoc_data.topics import topics

    text = "\n<|doc|>\n".join(topics[name] for name in sorted(topics))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    path = folder / "tiny.yaml"
    path.write_text(EXPERIMENT.format(width=width, tokens=steps * 64 * 8), encoding="utf-8")
    return path


def one_after_another(experiment: Path, root: Path, runs: int, threads: int, quiet: Any) -> float:
    """Seconds for `run.py train` with each seed."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    began = time.perf_counter()
    for seed in range(runs):
        words = [sys.executable, str(ROOT / "run.py"), "train", experiment.name]
        words += ["--seed", str(seed), "--runs", str(root)]
        subprocess.run(
            words, cwd=experiment.parent, env=env, check=True, stdout=quiet, stderr=quiet
        )
    return time.perf_counter() - began


def side_by_side(experiment: Path, root: Path, runs: int, quiet: Any) -> float:
    """Seconds for the local executor, its own start-up included."""
    began = time.perf_counter()
    words = [sys.executable, "-c", SWEEP, str(ROOT), experiment.name, str(root), str(runs)]
    subprocess.run(words, cwd=experiment.parent, check=True, stdout=quiet, stderr=quiet)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=24)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0, help="of the runs one after another")
    parser.add_argument("--verbose", action="store_true", help="show what the runs print")
    options = parser.parse_args()
    quiet = None if options.verbose else subprocess.DEVNULL
    with tempfile.TemporaryDirectory(prefix="sweep-benchmark-") as name:
        folder = Path(name)
        experiment = write_inputs(folder, options.width, options.steps)
        alone = one_after_another(
            experiment, folder / "alone", options.runs, options.threads, quiet
        )
        sweep = side_by_side(experiment, folder / "sweep", options.runs, quiet)
    figures = {
        "runs": options.runs,
        "steps": options.steps,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load_average": round(os.getloadavg()[0], 1),
        "one_after_another": {
            "threads": options.threads or "as torch takes",
            "seconds": round(alone, 1),
            "runs_per_hour": round(3600 * options.runs / alone),
        },
        "local_executor": {
            "seconds": round(sweep, 1),
            "runs_per_hour": round(3600 * options.runs / sweep),
        },
        "ratio": round(alone / sweep, 2),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
