"""Texts that begin alike as rows of tokens in which what they share stands once.

    sorted     the cat sat | the cat sat on a mat | the cat slept | the dog
    a row      the  cat  sat  on   a    mat  slept  dog
    ends       8    7    6    6    6    6    7      8       where each token's descendants end

Written in the order of a walk through the tree, a token's descendants follow it without a gap:
token i sees token j where `j <= i < ends[j]`. A text is added to a row where the work that it
shares is more than what attending over a longer row costs. What so many texts share that each of
many rows would repeat it, a few-shot prompt for instance, becomes a trunk: run once by itself, and
seen by its rows through a cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

Request = tuple[list[int], list[int]]

ROW = 256
"""Tokens of a row to which texts are added that share little; longer ones see too many keys."""

SHARE = 32
"""New tokens for each shared one, up to which a text is added to such a row."""

TRUNK = 64
"""Tokens that texts must share for it to be worth running them alone, before the rest."""


@dataclass
class Row:
    """A prefix tree: each token once, in the order of a walk that visits the texts as sorted.

    Attributes:
        trunk: tokens that come before this row, in a cache.
        depths: of each token, its place in its texts.
        ends: of each token, where its descendants end: it is seen by those before `ends[i]`.
        path: indexes of the latest text's tokens.
        targets: (index that predicts, predicted token, number of the request).
    """

    trunk: int = 0
    tokens: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    path: list[int] = field(default_factory=list)
    targets: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, text: list[int], shared: int) -> None:
        """A text whose first `shared` tokens are those of the text before it."""
        kept = max(0, min(shared - self.trunk, len(self.path)))
        for index in self.path[kept:]:
            self.ends[index] = len(self.tokens)
        new = text[self.trunk + kept :]
        self.path[kept:] = range(len(self.tokens), len(self.tokens) + len(new))
        self.tokens += new
        self.depths += range(self.trunk + kept, len(text))
        self.ends += [0] * len(new)

    def close(self) -> Row:
        """Ends the tree after its last text."""
        for index in self.path:
            self.ends[index] = len(self.tokens)
        return self

    @property
    def single(self) -> bool:
        """Whether it is one text, seen from its beginning."""
        return not self.trunk and len(self.path) == len(self.tokens)


@dataclass
class Section:
    """Rows that follow the same trunk, or none."""

    trunk: Row | None
    rows: list[Row]


class Plan:
    """Requests as rows: what they share once, and what is read from each."""

    def __init__(self, requests: Sequence[Request], max_length: int, share: bool) -> None:
        self.requests, self.share = requests, share
        self.texts = [(before + after)[-(max_length + 1) : -1] for before, after in requests]
        order = sorted(range(len(requests)), key=self.texts.__getitem__)
        pairs = itertools.pairwise(order)
        shared = [0, *(common(self.texts[a], self.texts[b]) for a, b in pairs)]
        self.sections = list(self._sections(order, shared))

    def _sections(self, order: list[int], shared: list[int]) -> Iterator[Section]:
        rest: list[int] = []
        rest_shared: list[int] = []
        start = 0
        while start < len(order):
            stop = start + 1
            while stop < len(order) and shared[stop] >= TRUNK:
                stop += 1
            members, inside = order[start:stop], [0, *shared[start + 1 : stop]]
            trunk = self._trunk(members, inside) if self.share else 0
            if trunk:
                yield self._after(members, inside, trunk)
            else:
                follows = rest and rest[-1] == order[start - 1]
                rest += members
                rest_shared += [shared[start] if follows else 0, *inside[1:]]
            start = stop
        yield Section(None, self._rows(rest, rest_shared))

    def _trunk(self, members: list[int], shared: list[int]) -> int:
        """Tokens to run before the rest of these texts; 0 where rows may as well repeat them."""
        if len(members) < 3:
            return 0
        trunk = min(shared[1:])
        tree = sum(len(self.texts[i]) for i in members) - sum(shared) - trunk
        longest = max(len(self.texts[i]) for i in members) - trunk
        return trunk if trunk * (tree // max(ROW, longest) - 1) > tree // 8 else 0

    def _after(self, members: list[int], shared: list[int], length: int) -> Section:
        trunk = Row()
        trunk.add(self.texts[members[0]][:length], 0)
        rows = self._rows(members, shared, trunk)
        return Section(trunk.close(), rows)

    def _rows(self, members: list[int], shared: list[int], trunk: Row | None = None) -> list[Row]:
        before = len(trunk.tokens) if trunk is not None else 0
        rows: list[Row] = []
        for i, common_ in zip(members, shared, strict=True):
            text = self.texts[i]
            if not rows or not self._fits(rows[-1], text, common_):
                rows.append(Row(before))
                common_ = before
            row = rows[-1]
            row.add(text, common_)
            after = self.requests[i][1]
            first = len(text) - len(after)
            for depth, token in enumerate(after, first):
                if trunk is not None and depth < before:
                    trunk.targets.append((trunk.path[depth], token, i))
                else:
                    row.targets.append((row.path[depth - before], token, i))
        return [row.close() for row in rows if row.tokens]

    def _fits(self, row: Row, text: list[int], shared: int) -> bool:
        new = len(text) - max(shared, row.trunk)
        if not self.share:
            return shared == len(row.path)  # which it continues
        size = len(row.tokens) + new
        kept = shared - row.trunk
        return (size <= ROW and new <= SHARE * kept) or (new <= kept and size <= 2 * len(text))


def common(one: list[int], other: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def batches(rows: list[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows of like length, longest first, padded to about `tokens` at most (one row at least)."""
    rows = sorted(rows, key=lambda row: -len(row.tokens))
    start = 0
    while start < len(rows):
        size = max(1, tokens // len(rows[start].tokens))
        yield rows[start : start + size]
        start += size
