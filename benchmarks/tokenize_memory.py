"""How much memory and time tokenizing takes: N MB of text through `prepare`.

    python benchmarks/tokenize_memory.py --megabytes 1000 --tokenizer bpe

The text is this Python's documentation again and again, its lines shuffled and salted with new
words each time, so that nothing is learnt by heart. Memory should not grow with `--megabytes`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def write_text(path: Path, megabytes: int) -> None:
    """About that much text, in documents that an `<|endoftext|>` separates."""
    from components.corpus import PythonDocs

    documents = [document.splitlines() for document in PythonDocs().documents()]
    draw = random.Random(0)
    left = megabytes * 1_000_000
    with path.open("wb") as file:
        while left > 0:
            for lines in documents:
                salted = [
                    f"{line} {draw.getrandbits(32):x}" if draw.random() < 0.05 else line
                    for line in draw.sample(lines, len(lines))
                ]
                raw = ("\n".join(salted) + "\n<|endoftext|>\n").encode()
                file.write(raw)
                left -= len(raw)


def measure(path: Path, tokenizer: str, cache: Path) -> None:
    """Prepares the text and prints what it took as one line of JSON."""
    from components.registry import spec
    from experiments.data import prepare

    data = SimpleNamespace(
        corpus=spec("corpus", {"name": "text", "files": str(path), "separator": "<|endoftext|>"}),
        filters=(),
        tokenizer=spec("tokenizer", tokenizer),
        validation_fraction=0.01,
        split_seed=0,
    )
    before = _peak_megabytes()
    started = time.perf_counter()
    dataset = prepare(data, cache, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - started
    size = path.stat().st_size / 1e6
    print(
        json.dumps(
            {
                "tokenizer": tokenizer,
                "text_MB": round(size),
                "tokens": len(dataset.train) + len(dataset.val),
                "seconds": round(seconds, 1),
                "MB_per_s": round(size / seconds, 2),
                "peak_RSS_MB_before": round(before),
                "peak_RSS_MB": round(_peak_megabytes()),
            }
        )
    )


def _peak_megabytes() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--tokenizer", default="bpe")
    options = parser.parse_args()
    # Each in a process of its own: peak memory is a process's, and inherited when it starts.
    fresh = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="tokenize_memory-") as folder:
        path = Path(folder) / "text.txt"
        for function, arguments in (
            (write_text, (path, options.megabytes)),
            (measure, (path, options.tokenizer, Path(folder) / "cache")),
        ):
            process = fresh.Process(target=function, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                sys.exit(process.exitcode)


if __name__ == "__main__":
    main()
