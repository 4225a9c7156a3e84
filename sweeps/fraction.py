"""Regular fractions of a two-level factorial: fewer cells, at the price of aliases.

Of k factors the first k − p are crossed in full; each of the other p is the product of some of
those, its generator. Which products is read from the standard tables of highest resolution, and of
least aberration among them (Box, Hunter & Hunter 2005, Statistics for Experimenters, 2nd edition,
table 6.22; Montgomery, Design and Analysis of Experiments, appendix on fractional designs).

The baseline's cell is always in the fraction. Two effects are aliased where no cell tells them
apart: their product is a word of the defining relation. In a design of resolution III main effects
are aliased with pairs, in IV pairs with pairs, in V neither.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

# (k, p) -> generators of the last p factors, which are named A, B, C, … in the order of the file
GENERATORS = {
    (3, 1): ("AB",),
    (4, 1): ("ABC",),
    (5, 1): ("ABCD",),
    (5, 2): ("AB", "AC"),
    (6, 1): ("ABCDE",),
    (6, 2): ("ABC", "BCD"),
    (6, 3): ("AB", "AC", "BC"),
    (7, 1): ("ABCDEF",),
    (7, 2): ("ABCD", "ABDE"),
    (7, 3): ("ABC", "BCD", "ACD"),
    (8, 1): ("ABCDEFG",),
    (8, 2): ("ABCD", "ABEF"),
    (8, 3): ("ABC", "ABD", "BCDE"),
}
SHARES = {"1/2": 1, "1/4": 2, "1/8": 3}  # the word of a sweep file -> p
ROMAN = {3: "III", 4: "IV", 5: "V", 6: "VI", 7: "VII", 8: "VIII"}


@dataclass(frozen=True)
class Fraction:
    """A regular fraction of the cells of `names`, factors of two levels each, in their order.

    `share` is a word of SHARES; (number of names, its p) must be in GENERATORS.
    """

    names: tuple[str, ...]
    share: str

    @cached_property
    def generators(self) -> tuple[frozenset[int], ...]:
        """For each of the last p factors, the numbers of those whose product it is."""
        words = GENERATORS[len(self.names), SHARES[self.share]]
        return tuple(frozenset(ord(letter) - ord("A") for letter in word) for word in words)

    def has(self, levels: Sequence[bool]) -> bool:
        """Whether a cell is in it; a level is true where it is not the base's."""
        first = len(self.names) - len(self.generators)
        return all(
            levels[first + i] == sum(levels[f] for f in generator) % 2
            for i, generator in enumerate(self.generators)
        )

    @cached_property
    def words(self) -> tuple[frozenset[int], ...]:
        """The defining relation: every product of generators, each with its own factor."""
        first = len(self.names) - len(self.generators)
        own = [generator | {first + i} for i, generator in enumerate(self.generators)]
        found = []
        for count in range(1, len(own) + 1):
            for some in itertools.combinations(own, count):
                word: frozenset[int] = frozenset()
                for one in some:
                    word ^= one
                found.append(word)
        return tuple(found)

    @property
    def resolution(self) -> int:
        """The length of the shortest word."""
        return min(map(len, self.words))

    @property
    def aliases(self) -> tuple[tuple[str, ...], ...]:
        """Main effects and interactions of pairs that no cell tells apart: `norm`, `ffn × block`.

        Each group has two or more; effects of three factors and more are left out.
        """
        effects = [frozenset([i]) for i in range(len(self.names))]
        effects += [frozenset(pair) for pair in itertools.combinations(range(len(self.names)), 2)]
        groups: dict[frozenset[frozenset[int]], list[str]] = defaultdict(list)
        for effect in effects:
            same = frozenset([effect, *(effect ^ word for word in self.words)])
            groups[same].append(" × ".join(self.names[i] for i in sorted(effect)))
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    @property
    def lines(self) -> tuple[str, ...]:
        """What a plan says of it: the cells, the resolution, then a line for each alias."""
        cells, of = 2 ** (len(self.names) - len(self.generators)), 2 ** len(self.names)
        clear = {3: "main effects are aliased with pairs", 4: "pairs are aliased with pairs"}
        head = (
            f"fraction {self.share}: {cells} of {of} cells, resolution {ROMAN[self.resolution]}: "
            f"{clear.get(self.resolution, 'main effects and pairs are clear of each other')}"
        )
        return (head, *(f"  aliased: {' = '.join(group)}" for group in self.aliases))
