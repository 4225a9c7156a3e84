"""What is asked of the output layer, without its logits in memory.

`Head` gives log-probabilities of single tokens: logits block by block of the vocabulary, in the
cache, of which only largest, sum of exponentials and targets are kept. `Likeliest` gives each
row's largest logit.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from components.products import bf16_instructions, product
from experiments.prefix_tree import Row


class Head:
    """The output layer: collects hidden states that predict, and what each is asked for.

    Args:
        weight: `(V, D)`.
        states: how many go through at once.
        words: of the vocabulary, whose logits exist at once.
    """

    def __init__(self, weight: Tensor, states: int, words: int) -> None:
        self.weight, self.states, self.words = weight, states, words
        self.exact = torch.promote_types(weight.dtype, torch.float32)
        self.waiting: list[Tensor] = []  # (n, D) each
        self.asked: list[np.ndarray] = []  # (state, target, request) of those
        self.held = 0
        self.values: list[Tensor] = []
        self.likeliest: list[Tensor] = []
        self.owners: list[np.ndarray] = []

    def read(self, hidden: Tensor, rows: Sequence[Row]) -> None:
        """Takes what rows are asked for from their hidden states `(B, T, D)`."""
        length = hidden.shape[1]
        asked = [(b * length + i, t, r) for b, row in enumerate(rows) for i, t, r in row.targets]
        if not asked:
            return
        table = np.array(asked, dtype=np.int64)
        states, table[:, 0] = np.unique(table[:, 0], return_inverse=True)
        table[:, 0] += self.held
        places = torch.from_numpy(states).to(hidden.device)
        self.waiting.append(hidden.flatten(0, 1)[places])
        self.asked.append(table)
        self.held += len(states)
        if self.held >= self.states:
            self._flush()

    def _flush(self) -> None:
        if not self.held:
            return
        hidden, table = torch.cat(self.waiting), np.concatenate(self.asked)
        table = table[table[:, 0].argsort(kind="stable")]
        pieces = math.ceil(self.held / self.states)
        cuts = [self.held * i // pieces for i in range(pieces + 1)]
        for start, stop in itertools.pairwise(cuts):
            low, high = np.searchsorted(table[:, 0], [start, stop])
            part = table[low:high]
            part = part[part[:, 1].argsort(kind="stable")]  # by target: each block has a slice
            self._score(hidden[start:stop], part[:, 0] - start, part[:, 1])
            self.owners.append(part[:, 2])
        self.waiting, self.asked, self.held = [], [], 0

    def _score(self, hidden: Tensor, states: np.ndarray, targets: np.ndarray) -> None:
        """Log-probabilities of `targets` (P,), sorted, each under its row of `hidden` (N, D)."""
        weight, count, device = self.weight, len(hidden), hidden.device
        starts = range(0, len(weight), self.words)
        cuts = [*np.searchsorted(targets, starts).tolist(), len(targets)]
        state, target = (torch.from_numpy(x).to(device) for x in (states, targets))
        largest, sums = hidden.new_empty(2, len(starts), count, dtype=self.exact)
        chosen = hidden.new_empty(len(targets), dtype=self.exact)
        first = torch.empty(len(targets), dtype=torch.bool, device=device)
        for block, start in enumerate(starts):
            logits = product(hidden, weight[start : start + self.words].T).to(self.exact)
            mine = slice(cuts[block], cuts[block + 1])
            if mine.stop > mine.start:
                own, column = logits[state[mine]], target[mine] - start
                chosen[mine] = own.gather(1, column[:, None])[:, 0]
                first[mine] = own.argmax(1) == column
            top = logits.amax(1, keepdim=True)
            largest[block] = top[:, 0]
            torch.sum(logits.sub_(top).exp_(), 1, out=sums[block])
        top, where = largest.max(0)
        normaliser = top + (sums * (largest - top).exp()).sum(0).log()
        if weight.dtype != self.exact:  # without the rounding of the product
            chosen = (hidden[state].to(self.exact) * weight[target].to(self.exact)).sum(1)
        self.values.append(chosen - normaliser[state])
        self.likeliest.append(first & (where[state] == target // self.words))

    def answers(self, count: int) -> list[tuple[float, bool]]:
        """(summed log-probability, all likeliest) of requests 0 to count - 1."""
        self._flush()
        owners = np.concatenate(self.owners)
        values = torch.cat(self.values).cpu().double().numpy()
        missed = (~torch.cat(self.likeliest)).cpu().numpy()
        totals = np.bincount(owners, values, minlength=count)
        misses = np.bincount(owners, missed, minlength=count)
        return list(zip(totals.tolist(), (misses == 0).tolist(), strict=True))


class Likeliest:
    """The index of each row's largest logit (of equals, the first), `(B, D) -> (B,)`.

    For few rows the product's cost is reading the matrix. Where a CPU multiplies in bf16, one in
    bf16 says which words may be the largest, and theirs alone are computed again: rounding moves
    a logit by less than 4 u |h| |w|, u = 2^-8, so that the largest one is within 8 u |h| |w| of
    the largest rounded one. Measured at 64 rows of 256, 50,257 words: 3 times faster.
    """

    MOST = 64  # words per row to be computed again; else whole logits are
    SPAN = 256  # words that are looked at together first

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.exact = torch.promote_types(weight.dtype, torch.float32)
        self.rough: Tensor | None = None
        if bf16_instructions() and weight.device.type == "cpu" and self.exact == torch.float32:
            again = weight[-1:].expand(-len(weight) % self.SPAN, -1)  # the last word fills the span
            self.rough = torch.cat([weight, again]).bfloat16()
            self.longest = weight.to(self.exact).norm(dim=1).max()

    def __call__(self, hidden: Tensor) -> Tensor:
        if self.rough is None:
            return (hidden @ self.weight.T).argmax(1)
        rough = (hidden.bfloat16() @ self.rough.T).unflatten(1, (-1, self.SPAN))
        tops = rough.amax(2)
        slack = hidden.to(self.exact).norm(dim=1, keepdim=True) * self.longest * 2**-5
        least = (tops.amax(1, keepdim=True) - slack).bfloat16()
        rows, spans = (tops >= least).nonzero(as_tuple=True)
        near, columns = (rough[rows, spans] >= least[rows]).nonzero(as_tuple=True)
        rows, words = rows[near], spans[near] * self.SPAN + columns
        rows, words = rows[words < len(self.weight)], words[words < len(self.weight)]
        if not 0 < len(rows) <= self.MOST * len(hidden):
            return (hidden.to(self.exact) @ self.weight.to(self.exact).T).argmax(1)
        logits = (hidden[rows].to(self.exact) * self.weight[words].to(self.exact)).sum(1)
        best = logits.new_full((len(hidden),), -torch.inf).scatter_reduce(0, rows, logits, "amax")
        first = logits == best[rows]
        last = torch.full((len(hidden),), len(self.weight) - 1, device=hidden.device)
        return last.scatter_reduce(0, rows[first], words[first], "amin")
