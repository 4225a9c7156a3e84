"""Fractions of a factorial: as many cells as said, balanced, of the highest resolution there is."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest

from sweeps.fraction import GENERATORS, SHARES, Fraction

DESIGNS = sorted(GENERATORS)


def made(k: int, p: int) -> Fraction:
    share = next(word for word, number in SHARES.items() if number == p)
    return Fraction(tuple("ABCDEFGH"[:k]), share)


def lengths(generators: tuple[frozenset[int], ...], first: int) -> list[int]:
    """How many words of the defining relation have 1, 2, 3, … letters."""
    own = [g | {first + i} for i, g in enumerate(generators)]
    counts: Counter[int] = Counter()
    for chosen in itertools.product([0, 1], repeat=len(own)):
        word: frozenset[int] = frozenset()
        for one, taken in zip(own, chosen, strict=True):
            word ^= one if taken else frozenset()
        counts[len(word)] += any(chosen)
    return [counts[n] for n in range(1, first + len(own) + 1)]


@pytest.mark.parametrize(("k", "p"), DESIGNS)
def test_cells_are_a_balanced_share_with_the_baselines_among_them(k: int, p: int):
    fraction = made(k, p)
    cells = [c for c in itertools.product([False, True], repeat=k) if fraction.has(c)]
    assert len(cells) == 2 ** (k - p)
    assert cells[0] == (False,) * k
    for factor in range(k):
        assert sum(cell[factor] for cell in cells) == len(cells) / 2


@pytest.mark.parametrize(("k", "p"), DESIGNS)
def test_no_other_generators_have_fewer_short_words(k: int, p: int):
    """Highest resolution, and least aberration: the counts of short words are lowest in order."""
    first = k - p
    possible = [
        frozenset(word)
        for size in range(2, first + 1)
        for word in itertools.combinations(range(first), size)
    ]
    best = min(lengths(some, first) for some in itertools.combinations(possible, p))
    assert lengths(made(k, p).generators, first) == best


@pytest.mark.parametrize(("k", "p"), DESIGNS)
def test_aliases_are_the_effects_whose_contrasts_agree_in_every_cell(k: int, p: int):
    fraction = made(k, p)
    cells = [c for c in itertools.product([False, True], repeat=k) if fraction.has(c)]
    columns: dict[tuple[int, ...], set[str]] = {}
    for size in (1, 2):
        for effect in itertools.combinations(range(k), size):
            column = [1 - 2 * (sum(cell[f] for f in effect) % 2) for cell in cells]
            name = " × ".join("ABCDEFGH"[f] for f in effect)
            columns.setdefault(tuple(column), set()).add(name)
    seen = {frozenset(group) for group in columns.values() if len(group) > 1}
    assert {frozenset(group) for group in fraction.aliases} == seen
    assert bool(seen) == (fraction.resolution < 5)
    with_main = any(" × " not in effect for group in seen for effect in group)
    assert with_main == (fraction.resolution == 3)


def test_lines_say_cells_resolution_and_aliases():
    assert Fraction(("norm", "block", "ffn"), "1/2").lines == (
        "fraction 1/2: 4 of 8 cells, resolution III: main effects are aliased with pairs",
        "  aliased: norm = block × ffn",
        "  aliased: block = norm × ffn",
        "  aliased: ffn = norm × block",
    )
    assert made(5, 1).lines == (
        "fraction 1/2: 16 of 32 cells, resolution V: main effects and pairs are clear of each "
        "other",
    )
