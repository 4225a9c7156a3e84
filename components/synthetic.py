"""Text that is made, not read: random numbers, characters, and documents of the made corpora.

Everything here depends on its seed alone, on every machine: numpy promises PCG64's raw stream for
ever, but not what its other methods make of it.
"""

import math
import string
from collections.abc import Iterator

import numpy as np

LETTERS = string.ascii_lowercase
SYMBOLS = string.ascii_letters + string.digits + string.punctuation  # no space among them
BLOCK = 4096  # numbers drawn at a time


class Draws:
    """Random numbers for one purpose, which `key` names."""

    def __init__(self, *key: int) -> None:
        self.raw = self._stream(np.random.PCG64(np.random.SeedSequence(key)))

    @staticmethod
    def _stream(source: np.random.PCG64) -> Iterator[int]:
        while True:
            yield from source.random_raw(BLOCK).tolist()

    def below(self, end: int) -> int:
        """A whole number from 0 to `end` - 1, each alike."""
        return next(self.raw) % end  # `end` is small: no number is favoured by 2^-50

    def unit(self) -> float:
        """A number in (0, 1)."""
        return ((next(self.raw) >> 11) + 0.5) * 2.0**-53

    def some(self, count: int, end: int) -> list[int]:
        """`count` different whole numbers below `end`, in random order."""
        left = list(range(end))
        return [left.pop(self.below(len(left))) for _ in range(count)]


def copied(text: str, width: int) -> str:
    """`abc` as `abc>abc`, filled up with dots to `width` characters."""
    return f"{text}>{text}".ljust(width, ".")


def copied_surprisal(document: str, alphabet: int, shortest: int, longest: int) -> list[float]:
    """Of `copied`, where the lengths are alike probable and the letters too."""
    nats = []
    letters = len(document.partition(">")[0])
    for before in range(min(letters + 1, len(document))):
        ends = 1 / (longest - before + 1) if before >= shortest else 0.0
        mark = before == letters
        nats.append(-math.log(ends) if mark else math.log(alphabet) - math.log1p(-ends))
    return nats + [0.0] * (len(document) + 1 - len(nats))


class Chain:
    """A Markov chain over letters: tables of next letters by the `order` letters before.

    Each row of probabilities is a draw from a flat Dirichlet distribution. A document begins as if
    `a`s stood before it, and ends after each letter with probability 1 / `length`.
    """

    def __init__(self, order: int, alphabet: int, length: int, seed: int) -> None:
        self.order, self.alphabet, self.length = order, alphabet, length
        draws = Draws(seed, 0)
        contexts = alphabet**order
        weights = [-math.log(draws.unit()) for _ in range(contexts * alphabet)]
        table = np.array(weights).reshape(contexts, alphabet)
        self.table: np.ndarray = table / table.sum(1, keepdims=True)  # (contexts, alphabet)

    def document(self, draws: Draws, reach: list[list[float]]) -> str:
        """One document; `reach` are the rows of the table, added up from left to right."""
        letters, context, contexts = [], 0, len(reach)
        while True:
            at, row = draws.unit(), reach[context]
            letter = next((i for i, sum_ in enumerate(row) if at < sum_), self.alphabet - 1)
            letters.append(LETTERS[letter])
            if draws.below(self.length) == 0:
                return "".join(letters)
            context = (context * self.alphabet + letter) % contexts

    def surprisal(self, document: str) -> list[float]:
        """Of each letter after those before it, then of the end."""
        nats, context, contexts = [], 0, len(self.table)
        goes_on = -math.log1p(-1 / self.length)
        for place, letter in enumerate(document):
            index = LETTERS.index(letter)
            nats.append(-math.log(self.table[context, index]) + (goes_on if place else 0.0))
            context = (context * self.alphabet + index) % contexts
        return [*nats, math.log(self.length)]
