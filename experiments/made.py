"""Tasks that a made corpus brings with it: exact match, on documents that were not trained on.

    held_out_copy_100 … _200    copy a string, as long as the longest of training up to twice that
    held_out_recall             the value of a key that was given before

A continuation counts where each of its tokens is the likeliest one after those before it: what
greedy decoding would have written. experiments/held_out.py keeps the items beside the data; no
item is a document of the training split.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from components.corpus import Copy, Corpus, Recall
from components.registry import UserError, build
from experiments.data import is_held_out

if TYPE_CHECKING:
    from experiments.data import Dataset

ITEMS = 300
TRIES = 100_000  # documents looked at, at most: of a small language nearly all may be in training
COPY = "held_out_copy_"  # and the length in percent of the longest in training
PERCENT = (100, 110, 120, 140, 160, 200)
RECALL = "held_out_recall"
TASKS = {**{f"{COPY}{percent}": "copy" for percent in PERCENT}, RECALL: "recall"}
GROUP = "held_out_copy"  # of all lengths


def mismatch(task: str, corpus: str) -> str | None:
    """What is wrong where `task`, of `TASKS` or their group, is asked of a model of `corpus`."""
    needed = {**TASKS, GROUP: "copy"}.get(task, corpus)
    if needed == corpus:
        return None
    return (
        f"{task} asks what the corpus '{needed}' teaches, and the experiment's is '{corpus}'; "
        "leave the task out"
    )


def check(data: Dataset, tasks: Sequence[str]) -> None:
    """The corpus behind prepared data must be the one that `tasks`, of `TASKS`, ask about.

    Raises:
        UserError: it is another; says which one is needed.
    """
    name = data.meta["corpus"]["name"]
    for task in tasks:
        if message := mismatch(task, name):
            raise UserError(f"evaluation.tasks: {message}")


def items(data: Dataset, task: str) -> list[dict[str, Any]]:
    """Up to `ITEMS` different items, `context` and `continuation`, of one of `TASKS`."""
    corpus, split = build("corpus", data.meta["corpus"]), data.meta["split"]
    rows: dict[str, dict[str, Any]] = {}
    for document, context, continuation in itertools.islice(_asked(corpus, task), TRIES):
        if document is None or is_held_out(
            document.encode(), split["split_seed"], split["validation_fraction"]
        ):
            rows.setdefault(context, {"context": context, "continuation": continuation})
        if len(rows) == ITEMS:
            break
    return list(rows.values())


def _asked(corpus: Corpus, task: str) -> Iterator[tuple[str | None, str, str]]:
    """(document, or None for one that is longer than any of training; context; continuation)."""
    if isinstance(corpus, Copy):
        percent = int(task.removeprefix(COPY))
        longest = corpus.lengths[1]
        length = max(longest + (percent > 100), longest * percent // 100)
        for text in corpus.strings(length):
            yield corpus.document(text) if length == longest else None, f"{text}>", text
    elif isinstance(corpus, Recall):
        for number, document in enumerate(corpus.others()):
            asked = 2 * (corpus.pairs + number % corpus.pairs) + 1  # each query in its turn
            yield document, document[:asked], document[asked]
