"""Scoring beside lm-eval's own HFLM: CPU seconds for the same requests, the same weights.

    python benchmarks/score.py              text of the documentation inside this Python
    python benchmarks/score.py --data DIR   real tasks and GPT-2's tokenizer

DIR holds folders of JSONL, arc_easy, lambada_openai, piqa, winogrande, wikitext2_raw, and gpt2_bpe.

Both are given lm-eval's request objects (texts) and do all that follows: tokenizing, batching, the
model, the answers' order. HFLM runs at the batch size that was fastest for the shape. All
contenders take turns in one process, on one thread; what is measured is the process's CPU time,
each ratio is taken within a round, and its median and quartiles over rounds are printed. The
answers are compared in each round: log-probabilities within 1e-4 and greedy flags the same in fp32.

The model has GPT-2's architecture and vocabulary, 4 layers of 256, and random weights: speed does
not depend on what they have learnt, except that a trained model's texts end at different lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

CONTEXT, VOCABULARY = 512, 50257
BATCH_SIZES = {"loglikelihood": (4, 16, 64), "generate_until": (16, 64, 256)}
GENERATED = 64  # new tokens at most
Pair = tuple[str, Any]


class Text:
    """Sentences and paragraphs of real English, in their order."""

    def __init__(self, documents: Sequence[str], seed: int = 0) -> None:
        self.draw = random.Random(seed)
        paragraphs = (" ".join(p.split()) for d in documents for p in re.split(r"\n\s*\n", d))
        self.paragraphs = [p for p in paragraphs if 300 <= len(p) <= 1200 and ". " in p]
        self.draw.shuffle(self.paragraphs)
        cut = (re.split(r"(?<=[.!?]) ", p) for p in self.paragraphs)
        self.sentences = [s for some in cut for s in some if 5 <= len(s.split()) <= 60]
        self.words = [w for s in self.sentences for w in s.split() if w.isalpha() and len(w) > 3]

    def passage(self, low: int, high: int) -> str:
        """The beginning of a paragraph, so many words long."""
        while True:
            words = self.draw.choice(self.paragraphs).split()
            if len(words) >= low:
                return " ".join(words[: self.draw.randint(low, high)])

    def sentence(self, low: int, high: int) -> list[str]:
        """The words of a sentence, or of its beginning."""
        while True:
            words = self.draw.choice(self.sentences).split()
            if len(words) >= low:
                return words[: self.draw.randint(low, high)]


def short_answers(text: Text, items: int, real: dict[str, list[Any]]) -> Iterator[Pair]:
    """sciq: a passage and a question, four answers of one or two words."""
    short = [d for d in real.get("arc_easy", []) if all(len(a.split()) < 3 for a in choices(d))]
    for i in range(items):
        question, answers = " ".join(text.sentence(8, 14)), two_words(text)
        if short:
            question, answers = short[i % len(short)]["question"], choices(short[i % len(short)])
        passage = text.passage(60, 90)
        yield from ((f"{passage}\nQuestion: {question}\nAnswer:", f" {a}") for a in answers)


def questions(text: Text, items: int, real: dict[str, list[Any]]) -> Iterator[Pair]:
    """arc_easy: a question, four answers of a few words."""
    for i in range(items):
        question = " ".join(text.sentence(12, 24))
        answers = [" ".join(text.sentence(5, 6)[:5]) for _ in range(4)]
        if real:
            question, answers = real["arc_easy"][i]["question"], choices(real["arc_easy"][i])
        yield from ((f"Question: {question}\nAnswer:", f" {a}") for a in answers)


def last_words(text: Text, items: int, real: dict[str, list[Any]]) -> Iterator[Pair]:
    """lambada: the last word of a passage."""
    for i in range(items):
        passage = real["lambada_openai"][i]["text"] if real else text.passage(50, 85)
        context, _, word = passage.rpartition(" ")
        yield context, f" {word}"


def endings(text: Text, items: int, real: dict[str, list[Any]]) -> Iterator[Pair]:
    """hellaswag: the beginning of a passage, four sentences that may follow."""
    for _ in range(items):
        context = text.passage(30, 45)
        yield from ((context, " " + " ".join(text.sentence(16, 26))) for _ in range(4))


def solutions(text: Text, items: int, real: dict[str, list[Any]]) -> Iterator[Pair]:
    """piqa: a goal, two ways to reach it."""
    for d in real["piqa"][:items]:
        yield from ((f"Question: {d['goal']}\nAnswer:", f" {d[s]}") for s in ("sol1", "sol2"))


def blanks(text: Text, items: int, real: dict[str, list[Any]]) -> Iterator[Pair]:
    """winogrande: what follows a blank, filled in two ways."""
    for d in real["winogrande"][:items]:
        before, _, after = d["sentence"].partition("_")
        yield from ((before + d[option], f" {after.strip()}") for option in ("option1", "option2"))


def minimal_pairs(text: Text, items: int, real: dict[str, list[Any]]) -> Iterator[Pair]:
    """blimp: two sentences that differ in a word or two, without a context."""
    for _ in range(items):
        words = text.sentence(6, 9)
        at = text.draw.randrange(1, len(words))
        other = [*words[:at], text.draw.choice(text.words), *words[at + 1 :]]
        yield from (("", " " + " ".join(sentence)) for sentence in (words, other))


def prompts(text: Text, items: int, real: dict[str, list[Any]]) -> Iterator[Pair]:
    """generate_until: passages of many lengths."""
    how = {"until": ["\n\n"], "max_gen_toks": GENERATED, "do_sample": False}
    yield from ((text.passage(20, 90), dict(how)) for _ in range(items))


# Items of each shape: what takes HFLM some ten seconds.
SHAPES: dict[str, tuple[Callable[[Text, int, Any], Iterator[Pair]], int]] = {
    "sciq-like": (short_answers, 40),
    "arc_easy": (questions, 100),
    "lambada": (last_words, 120),
    "hellaswag-like": (endings, 40),
    "piqa": (solutions, 80),
    "winogrande": (blanks, 80),
    "minimal pairs": (minimal_pairs, 300),
    "answers": (prompts, 128),
    "to the end": (prompts, 128),
}
NEEDS_DATA = ("piqa", "winogrande")


def two_words(text: Text) -> list[str]:
    return [" ".join(text.draw.sample(text.words, 2)) for _ in range(4)]


def choices(doc: dict[str, Any]) -> list[str]:
    return doc["choices"]["text"]


def material(data: Path | None) -> tuple[Text, dict[str, list[Any]], Any]:
    """Text, the real items, and a tokenizer of 50,257 ids."""
    from components import registry

    def lines(name: str) -> list[Any]:
        assert data is not None
        return [json.loads(line) for line in (data / name).read_text("utf-8").splitlines()]

    if data is None:
        documents = list(registry.build("corpus", "python_docs").documents())
        tokenizer = registry.build("tokenizer", {"name": "bpe", "vocab_size": VOCABULARY})
        tokenizer.train(lambda: iter(documents))
        return Text(documents), {}, tokenizer
    spec = {"name": "huggingface", "path": str(data / "gpt2_bpe")}
    pages = [
        line["page"].replace(" \n", "\n\n") for line in lines("wikitext2_raw/validation.jsonl")
    ]
    real = {
        "arc_easy": lines("arc_easy/validation.jsonl"),
        "lambada_openai": lines("lambada_openai/test.jsonl"),
        "piqa": lines("piqa/validation.jsonl"),
        "winogrande": lines("winogrande/validation.jsonl"),
    }
    return Text(pages), real, registry.build("tokenizer", spec)


def instances(pairs: list[Pair], kind: str) -> list[Any]:
    """lm-eval's request objects."""
    from lm_eval.api.instance import Instance

    return [
        Instance(kind, doc={}, arguments=pair, idx=0, metadata=("benchmark", i, 1))
        for i, pair in enumerate(pairs)
    ]


def models(tokenizer: Any) -> dict[str, Any]:
    """HFLM, and ours in each precision, on the same weights."""
    from benchmarks.peers import export, hflm
    from experiments import loader
    from experiments.lm import CeterisLM
    from experiments.model import build

    sizes = ["model.d_model=256", "model.n_layers=4", "model.n_heads=4"]
    lengths = [f"model.max_seq_len={CONTEXT}", f"training.seq_len={CONTEXT}"]
    model = build(loader.load("gpt2", [*sizes, *lengths]), VOCABULARY, 0).eval()
    for parameter in model.parameters():
        parameter.data *= 2  # initial values alone hardly prefer any word: near-ties would decide
    exact, rough = (
        CeterisLM(model, tokenizer, max_length=CONTEXT, precision=precision)
        for precision in ("fp32", "bf16")
    )
    ours = {"ceteris fp32": exact, "ceteris bf16": rough}
    return {"HFLM": hflm(export(model, tokenizer.end_of_text), tokenizer, CONTEXT), **ours}


def timed(answer: Callable[..., Any], requests: list[Any]) -> tuple[float, Any]:
    """CPU seconds of the process, and what came out."""
    began = time.process_time()
    answers = answer(requests, disable_tqdm=True)
    return time.process_time() - began, answers


def usual_stop(lm: Any, pairs: list[Pair]) -> str:
    """The letter at which texts from random weights end, at a quarter of the most on average.

    A trained model's answers end at different lengths; a batch of HFLM's goes on until all have.
    """
    texts = lm.generate_until(instances(pairs[:32], "generate_until"))
    letters = {a for t in texts for a in t if a.isalpha()}
    share = {a: sum((t + a).index(a) / max(1, len(t)) for t in texts) / len(texts) for a in letters}
    return min(sorted(share), key=lambda a: abs(share[a] - 0.25))


def best_batch_size(hflm: Any, kind: str, requests: list[Any]) -> int:
    seconds = {}
    for size in BATCH_SIZES[kind]:
        hflm.batch_size_per_gpu = size
        seconds[size] = timed(getattr(hflm, kind), requests)[0]
    hflm.batch_size_per_gpu = min(seconds, key=seconds.__getitem__)
    return hflm.batch_size_per_gpu


def compare(theirs: list[Any], ours: list[Any], kind: str) -> float:
    """The largest difference: of log-probabilities in nats, or the share of texts that differ."""
    pairs = list(zip(theirs, ours, strict=True))
    if kind == "generate_until":
        return sum(a != b for a, b in pairs) / len(pairs)
    return max(abs(a[0] - b[0]) / max(1.0, abs(a[0])) for a, b in pairs)


def measure(name: str, lms: dict[str, Any], text: Text, real: Any, args: Any) -> dict[str, Any]:
    """One shape: CPU seconds of each contender in each round, and how far answers differ."""
    make, items = SHAPES[name]
    pairs = list(make(text, max(1, round(items * args.scale)), real))
    kind = "generate_until" if make is prompts else "loglikelihood"
    if name == "answers":
        stop = usual_stop(lms["ceteris fp32"], pairs)
        pairs = [(prompt, {**how, "until": [stop]}) for prompt, how in pairs]
    requests = instances(pairs, kind)
    size = best_batch_size(lms["HFLM"], kind, requests)
    seconds: dict[str, list[float]] = {key: [] for key in lms}
    differ = dict.fromkeys(lms, 0.0)
    for _ in range(args.rounds):
        theirs: list[Any] = []
        for key, lm in lms.items():
            spent, answers = timed(getattr(lm, kind), requests)
            seconds[key].append(spent)
            theirs = theirs or answers
            differ[key] = max(differ[key], compare(theirs, answers, kind))
            if key.endswith("fp32"):
                assert differ[key] <= (0.05 if kind == "generate_until" else 1e-4), differ[key]
                assert kind == "generate_until" or [a[1] for a in answers] == [b[1] for b in theirs]
    return {
        "shape": name, "requests": len(requests), "batch_size": size, "seconds": seconds,
        "differ": differ,
    }  # fmt: skip


def ratio(row: dict[str, Any], key: str) -> str:
    """How many times faster than HFLM: median (quartiles)."""
    pairs = zip(row["seconds"]["HFLM"], row["seconds"][key], strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    return f"{middle:.1f}× ({low:.1f}–{high:.1f}) | {row['differ'][key]:.0e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, help="a folder with arc_easy, piqa, gpt2_bpe, …")
    parser.add_argument("--shape", choices=SHAPES, action="append")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="times as many items")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the rows here")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(args.threads)
    text, real, tokenizer = material(args.data)
    lms = models(tokenizer)
    peers = ", ".join(f"{p} {version(p)}" for p in ("lm_eval", "transformers", "torch"))
    print(f"\n{peers}; {args.threads} thread(s), CPU time, {args.rounds} rounds\n")
    ours = [key for key in lms if key != "HFLM"]
    print("| shape | requests | HFLM s (batch) |", *(f"{key} | differs |" for key in ours))
    print("|---" * (3 + 2 * len(ours)) + "|")
    rows = []
    for name in args.shape or [n for n in SHAPES if real or n not in NEEDS_DATA]:
        row = measure(name, lms, text, real, args)
        rows.append(row)
        theirs = f"{statistics.median(row['seconds']['HFLM']):.1f} ({row['batch_size']})"
        cells = [name, str(row["requests"]), theirs, *(ratio(row, key) for key in ours)]
        print("|", " | ".join(cells), "|", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
