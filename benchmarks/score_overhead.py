"""What scoring costs outside the model: lm-eval by itself and through Ceteris, on the same tasks.

    python benchmarks/score_overhead.py
    python benchmarks/score_overhead.py --items 5000

Five tasks over local files, one of each kind of request and two of several choices, are scored by a
model that answers at once. Each contender is a process of its own, in turn; what is measured is its
CPU time beyond that of a process which only imports what both import. lm-eval builds its index of
tasks from all its YAML files at each start and compiles a template for every document.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NAMES = ("choice", "pairs", "last", "perplexity", "answer")
KINDS = {
    "choice": "output_type: multiple_choice\ndoc_to_text: 'Q: {{text}}\\nA:'\n"
    "doc_to_choice: '{{ends}}'\ndoc_to_target: 0\n",
    "pairs": "output_type: multiple_choice\ndoc_to_text: ''\ndoc_to_choice: '{{ends}}'\n"
    "doc_to_target: 0\n",
    "last": "output_type: loglikelihood\ndoc_to_text: \"{{text.split(' ')[:-1] | join(' ')}}\"\n"
    "doc_to_target: \"{{' ' + text.split(' ')[-1]}}\"\n",
    "perplexity": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    "doc_to_target: '{{text}}'\n",
    "answer": "output_type: generate_until\ndoc_to_text: 'Q: {{text}} A:'\n"
    "doc_to_target: '{{ends[0]}}'\n",
}
METRICS = {"perplexity": "bits_per_byte", "answer": "exact_match"}


def write_tasks(folder: Path, items: int) -> None:
    """Five tasks over `items` lines of Python's own topics each."""
    from pydoc_data.topics import topics

    words = " ".join(topics[key] for key in sorted(topics)).split()
    for name in NAMES:
        rows = []
        for i in range(items):
            some = [words[(31 * i + k) % len(words)] for k in range(20)]
            rows.append({"text": " ".join(some[:12]), "ends": [" ".join(some[12:16]), some[17]]})
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        metric = METRICS.get(name, "acc")
        aggregation = metric if metric == "bits_per_byte" else "mean"
        (folder / f"{name}.yaml").write_text(
            f"task: overhead_{name}\ndataset_path: json\ntest_split: test\n"
            f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n{KINDS[name]}"
            f"metric_list: [{{metric: {metric}, aggregation: {aggregation}, "
            "higher_is_better: true}]\nmetadata: {version: 1}\n",
            encoding="utf-8",
        )


def instant() -> Any:
    """A model that knows all answers before it is asked."""
    from lm_eval.api.model import LM

    class Instant(LM):
        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [(-float(len(r.args[1])), False) for r in requests]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [-float(len(r.args[0])) for r in requests]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return [r.args[0][:5] for r in requests]

    return Instant()


def contend(who: str, folder: Path) -> None:
    """One contender, in this process: prints its CPU seconds and its results."""
    import datasets.load
    import lm_eval.evaluator
    import torch

    assert datasets.load and torch
    names, results = [f"overhead_{name}" for name in NAMES], None
    if who == "lm-eval":
        found = lm_eval.evaluator.simple_evaluate(
            model=instant(),
            tasks=names,
            task_manager=lm_eval.tasks.TaskManager(include_path=str(folder)),
            bootstrap_iters=1000,
        )
        results = found["results"]
    elif who == "Ceteris":
        from experiments import tasks

        known = tasks.resolve(names, folder)
        with tasks.quiet(), tasks.fast_templates():
            loaded = tasks.load(known)
            found = lm_eval.evaluator.evaluate(instant(), loaded, bootstrap_iters=1000)
        results = found["results"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    values = {n: {k: v for k, v in r.items() if isinstance(v, float)}
              for n, r in (results or {}).items()}  # fmt: skip
    print(json.dumps({"seconds": used.ru_utime + used.ru_stime, "results": values}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=1000, help="of each task")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contend", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contend:
        contend(options.contend[0], Path(options.contend[1]))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "tasks"
        folder.mkdir()
        write_tasks(folder, options.items)
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        environment = {**os.environ, **offline, "HF_HOME": place}

        def once(who: str) -> tuple[float, Any]:
            command = [sys.executable, __file__, "--contend", who, str(folder)]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                check=True, text=True,
                encoding="utf-8",
            )  # fmt: skip
            said = json.loads(done.stdout.splitlines()[-1])
            return said["seconds"], said["results"]

        for who in ("imports", "Ceteris", "lm-eval"):  # file systems, data sets and index are warm
            once(who)
        seconds: dict[str, list[float]] = {"lm-eval": [], "Ceteris": []}
        for _ in range(options.rounds):
            bare, _ = once("imports")
            both = {who: once(who) for who in seconds}
            assert both["lm-eval"][1] == both["Ceteris"][1], "the results differ"
            for who, (total, _) in both.items():
                seconds[who].append(total - bare)
    print(
        f"five local tasks of {options.items:,} items: CPU seconds beyond imports, median (range)"
    )
    print(f"of {options.rounds}; lm-eval {version('lm_eval')}, one thread\n")
    for who, found in seconds.items():
        print(f"{who:<8} {statistics.median(found):6.2f} ({min(found):.2f} to {max(found):.2f})")


if __name__ == "__main__":
    main()
