"""Tasks from an experiment's own held-out text: what its models should have learnt, asked by rules.

    data.val -> documents -> places where a rule applies -> items -> tasks-1/held_out_*.jsonl

No annotator and no download: the right answer is what the text says, the wrong one is made from it.

    held_out_order      two neighbouring words, or the same two swapped
    held_out_agreement  a/an, is/are, has/have, ...: the one that stands there, or its partner
    held_out_brackets   a closing bracket or quotation mark, or one of another kind
    held_out_passage    a continuation, and four passages of which one leads up to it

and where the corpus is made, what it teaches (experiments/made.py):

    held_out_copy_100   strings as long as the longest of training, to be copied; _110 … _200:
                        longer ones, in percent of that
    held_out_recall     the value of a key that was given before

Each is an ordinary lm-eval task; presets/tasks/ says how it is scored. A model that only knows
which words are common scores at chance, 1/2 and 1/4: swapped words are the same words, `a` is right
as often as `an`, a bracket as often as the one put in its place, and each passage of four in one of
four items, whose continuation is the same after all of them.

Items come from documents of the validation split only, and depend on their text alone: they are
the same for every tokenizer that gives text back as it was. Where there are more than needed, a
hash of the text chooses. Each item names the document that it is from, and the section of a long
one (`cluster`), since such items are not independent, and the place in it (`start`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from filelock import FileLock

from components.registry import UserError
from experiments import made
from experiments.record import disk_error, write_atomically

if TYPE_CHECKING:
    from experiments.data import Dataset

VERSION = 1  # of the rules: as in the YAMLs' metadata, raised whenever the same text gives others
MOST, FEWEST = 300, 50  # items of a task
CONTEXT = 120  # characters at most: as telling as 200 for a small model, at half the cost
CONTINUATION = 40  # characters at most, so that models of 64 bytes can be asked
APART = 2000  # characters between passages of one document
SECTION = 10_000  # characters after which a long document counts as another
DOCUMENT, TEXT = 100_000, 500_000  # characters read of one document, and of the split


class Document(NamedTuple):
    name: str  # hash of the text
    text: str


@dataclass(frozen=True)
class Place:
    """Where an item may be made: a place in a document, with the text before and after it."""

    document: str
    start: int
    context: str
    continuation: str

    @cached_property
    def key(self) -> str:
        """A random number that the text decides: what items are chosen and sorted by."""
        return _digest(self.context + "\0" + self.continuation)

    def row(self, gold: int, **columns: Any) -> dict[str, Any]:
        cluster = f"{self.document}.{self.start // SECTION}"
        return {**columns, "gold": gold, "cluster": cluster, "start": self.start}


Row = dict[str, Any]
Pair = tuple[Place, str]  # a place, and a continuation made from its own that is wrong


def build(data: Dataset, tasks: Sequence[str] | None = None) -> Path:
    """The folder of the tasks' items, made now if they are not there yet.

    Any number of processes may ask at once; a file appears whole or not at all. Takes about 0.1 s
    for each 100,000 characters, and reads `TEXT` of them from the start of the split.

    Args:
        tasks: which of `TASKS` and `made.TASKS` to make; all of the first by default.

    Raises:
        UserError: the text gives too few items for a task, or the disk is full.
    """
    folder = data.folder / f"tasks-{VERSION}"
    wanted = {name: folder / f"{name}.jsonl" for name in (TASKS if tasks is None else tasks)}
    made.check(data, [name for name in wanted if name in made.TASKS])
    if all(path.is_file() for path in wanted.values()):
        return folder
    try:
        folder.mkdir(exist_ok=True)
        with FileLock(folder / "lock"):
            missing = {name: path for name, path in wanted.items() if not path.is_file()}
            documents = list(_documents(data)) if missing.keys() & TASKS.keys() else []
            items = {
                name: TASKS[name](documents) if name in TASKS else made.items(data, name)
                for name in missing
            }
            for name, rows in items.items():
                if len(rows) >= FEWEST:
                    lines = [json.dumps(row) + "\n" for row in rows]
                    write_atomically(missing[name], "".join(lines))
    except OSError as error:
        raise disk_error(error, folder) from error
    if few := [f"{name} ({len(rows)})" for name, rows in items.items() if len(rows) < FEWEST]:
        raise UserError(
            f"data.corpus: the validation split of '{data.meta['corpus']['name']}' gives too few "
            f"items, fewer than {FEWEST}, for {', '.join(few)}; raise data.validation_fraction, "
            "take more text, or leave the task out"
        )
    return folder


def _documents(data: Dataset) -> Iterator[Document]:
    """Held-out documents in order; of a long one the beginning."""
    end, longest = data.tokenizer.end_of_text, 4 * DOCUMENT  # ids: no character has more than 4
    ids = np.asarray(data.val[: 5 * TEXT + longest])
    total = 0
    for part in np.split(ids, np.flatnonzero(ids == end) + 1):
        if total >= TEXT:
            return
        if text := data.tokenizer.decode(part[part != end][:longest].tolist())[:DOCUMENT]:
            total += len(text)
            yield Document(_digest(text), text)


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# ── places ─────────────────────────────────────────────────────────────────────────────────────


def _place(document: Document, start: int) -> Place | None:
    """The place at `start`, if it has enough context; both sides begin and end with words.

    The text at `start` is a space, as lm-eval wants it: no tokenizer joins what is on its sides.
    """
    text = document.text
    first = max(0, start - CONTEXT)
    context = text[first:start]
    if first > 0 and not text[first - 1].isspace():
        context = context[_first_space(context) :]
    context = context.lstrip()
    continuation = text[start : start + CONTINUATION + 1]
    if start + CONTINUATION < len(text):  # back to where the last word ends
        continuation = re.sub(r"\s\S*\Z", "", continuation)
    continuation = continuation.rstrip()
    if len(context) < CONTEXT // 2 or "\ufffd" in context + continuation:
        return None
    return Place(document.name, start, context, continuation)


def _first_space(text: str) -> int:
    found = re.search(r"\s", text)
    return found.start() if found else len(text)


def _chosen(places: Iterable[Place]) -> list[Place]:
    """In the order of their keys, no continuation twice: documentation repeats itself."""
    chosen: dict[str, Place] = {}
    for place in sorted(places, key=lambda place: (place.key, place.document, place.start)):
        chosen.setdefault(place.continuation, place)
    return list(chosen.values())


# ── minimal pairs ──────────────────────────────────────────────────────────────────────────────


def _pairs(pairs: Iterable[Pair]) -> list[Row]:
    """Right and wrong continuation of a context; the right one is first in every other item."""
    rows = []
    for number, (place, wrong) in enumerate(sorted(pairs, key=lambda pair: pair[0].key)):
        choices = [place.continuation, wrong]
        rows.append(
            place.row(number % 2, context=place.context, choices=choices[:: 1 - 2 * (number % 2)])
        )
    return rows


_TWO_WORDS = re.compile(r"(?<=[\w,])(?= ([^\W\d_]+) ([^\W\d_]+)[\s.,;:!?)])")


def _order(documents: Sequence[Document]) -> list[Row]:
    """Two words in lower case, between a word and more text, swapped."""
    wrong = {}
    for document in documents:
        for match in _TWO_WORDS.finditer(document.text):
            one, other = match.groups()
            if one == other or not (one + other).islower():
                continue
            place = _place(document, match.start())
            if place and place.continuation.startswith(f" {one} {other}"):
                rest = place.continuation[len(f" {one} {other}") :]
                wrong[place] = f" {other} {one}{rest}"
    return _pairs((place, wrong[place]) for place in _chosen(wrong)[:MOST])


_PARTNERS = (("a", "an"), ("is", "are"), ("was", "were"), ("has", "have"), ("does", "do"),
             ("this", "these"))  # fmt: skip
_AGREEING = re.compile(rf"(?<=[a-z,])(?= ({'|'.join(itertools.chain(*_PARTNERS))}) [a-z])")


def _agreement(documents: Sequence[Document]) -> list[Row]:
    """A word whose form another word decides, replaced by its other form."""
    found: dict[str, list[Place]] = defaultdict(list)
    for document in documents:
        for match in _AGREEING.finditer(document.text):
            if place := _place(document, match.start()):
                found[match[1]].append(place)

    def replaced(place: Place, word: str, other: str) -> str:
        return f" {other}{place.continuation[len(word) + 1 :]}"

    return _balanced(found, _PARTNERS, replaced)


_INSIDE = r"[^()\[\]{}]{1,80}"
_SPANS = [
    re.compile(pattern)
    for pattern in (
        rf"\({_INSIDE}\)", rf"\[{_INSIDE}\]", rf"\{{{_INSIDE}\}}", r"“[^“”\n]{1,80}”",
        r'(?<![\w"])"(?=\S)[^"\n]{1,80}(?<=\S)"(?![\w"])', r"‘[^‘’\n]{1,80}’(?!\w)",
        r"(?<![\w'])'(?=\S)[^'\n]{1,80}(?<=\S)'(?![\w'])",
    )
]  # fmt: skip
_FAMILIES = (")]}", "\"'", "”’")
_CLOSING = [  # what stands for what: brackets for brackets first, then whatever is left
    *(pair for family in _FAMILIES for pair in itertools.combinations(family, 2)),
    *(pair for two in itertools.combinations(_FAMILIES, 2) for pair in itertools.product(*two)),
]


def _brackets(documents: Sequence[Document]) -> list[Row]:
    """The end of an innermost bracket or quotation; the continuation begins a word before it."""
    found: dict[str, list[Place]] = defaultdict(list)
    closes: dict[Place, int] = {}
    for document in documents:
        for match in itertools.chain(*(span.finditer(document.text) for span in _SPANS)):
            last = match.end() - 1
            start = document.text.rfind(" ", 0, last)
            if start < 1 or document.text[start - 1].isspace():
                continue
            place = _place(document, start)
            if place and last - start < len(place.continuation) and place not in closes:
                closes[place] = last - start
                found[document.text[last]].append(place)

    def replaced(place: Place, mark: str, other: str) -> str:
        at = closes[place]
        return place.continuation[:at] + other + place.continuation[at + 1 :]

    return _balanced(found, _CLOSING, replaced)


def _balanced(
    found: dict[str, list[Place]],
    partners: Iterable[tuple[str, str]],
    replaced: Callable[[Place, str, str], str],
) -> list[Row]:
    """As many items in which `x` is right and `y` wrong as the other way round, for each x and y.

    Without that, a model that only knows which is the commoner would look as if it could tell.
    """
    left = {word: _chosen(places) for word, places in found.items()}
    twins: list[list[Pair]] = []
    for one, other in partners:
        ones, others = left.get(one, []), left.get(other, [])
        for place, opposite in zip(ones, others, strict=False):
            swapped = replaced(place, one, other), replaced(opposite, other, one)
            twins.append([(place, swapped[0]), (opposite, swapped[1])])
        both = min(len(ones), len(others))
        left |= {one: ones[both:], other: others[both:]}
    twins.sort(key=lambda twin: min(place.key for place, _ in twin))
    return _pairs(itertools.chain(*twins[: MOST // 2]))


# ── passages ───────────────────────────────────────────────────────────────────────────────────

_WITHIN_A_SENTENCE = re.compile(r"(?<=[\w,])(?= [^\W\d_])")


def _passage(documents: Sequence[Document]) -> list[Row]:
    """Fours of places, far from each other: whose continuation is it?

    The four contexts are the choices and one continuation is scored after each, as winogrande has
    it. The other way round, with four continuations of one context, the demo's models score 0.27:
    how common the words of a continuation are outweighs what the context makes of them.
    """
    fours: list[list[Place]] = []
    unfilled: list[list[Place]] = []
    for place in {place.context: place for place in _chosen(_spread(documents))}.values():
        if len(fours) == MOST // 4:
            break
        four = next((some for some in unfilled if all(_apart(place, each) for each in some)), None)
        if four is None:
            unfilled.append(four := [])
        four.append(place)
        if len(four) == 4:
            unfilled.remove(four)
            fours.append(four)
    return [
        place.row(gold, contexts=[each.context for each in four], continuation=place.continuation)
        for four in fours
        for gold, place in enumerate(four)
    ]


def _apart(one: Place, other: Place) -> bool:
    return one.document != other.document or abs(one.start - other.start) >= APART


def _spread(documents: Sequence[Document]) -> Iterator[Place]:
    """Places within sentences, with a whole context, that overlap by half of one at most."""
    for document in documents:
        free = CONTEXT
        for match in _WITHIN_A_SENTENCE.finditer(document.text):
            if match.start() < free:
                continue
            place = _place(document, match.start())
            if place and len(place.continuation) > CONTINUATION // 2:
                free = match.start() + CONTEXT // 2 + CONTINUATION
                yield place


TASKS: dict[str, Callable[[Sequence[Document]], list[Row]]] = {
    "held_out_order": _order,
    "held_out_agreement": _agreement,
    "held_out_brackets": _brackets,
    "held_out_passage": _passage,
}
