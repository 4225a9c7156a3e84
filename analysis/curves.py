"""A run's validation loss along its training, against tokens, FLOPs or seconds.

Two variants that trained on the same tokens spent different compute on them. Their curves say what
either had reached at equal compute, or at equal time, without another run. Between evaluations a
curve is taken to be straight.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from analysis.results import finite, read_curve, rows_with
from components.registry import UserError

Budget = Literal["tokens", "flops", "time"]
MOST_TIMES = 20  # rows of timing.jsonl that are read: seconds grow almost evenly

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """The P evaluations of one run, in the order of training.

    Attributes:
        tokens: trained on until each evaluation; (P,).
        losses: nats per token; (P,).
        seconds: of training until each, evaluations themselves left out; (P,), None if unknown.
    """

    tokens: Array
    losses: Array
    seconds: Array | None

    def axis(self, by: Budget, flops_per_token: float | None) -> Array | None:
        """(P,) what had been spent until each evaluation: tokens, training FLOPs or seconds."""
        if by == "tokens":
            return self.tokens
        if by == "flops":
            return None if flops_per_token is None else self.tokens * flops_per_token
        return self.seconds

    def tokens_to(self, loss: float) -> float | None:
        """The tokens after which the curve first is at `loss` or below; None if it never is, or
        is from its first evaluation on, so that nothing says since when."""
        reached = np.flatnonzero(self.losses <= loss)
        if not reached.size or reached[0] == 0:
            return None
        after = int(reached[0])
        high, low = self.losses[after - 1], self.losses[after]
        share = (high - loss) / (high - low)
        step = self.tokens[after] - self.tokens[after - 1]
        return float(self.tokens[after - 1] + share * step)


def read(directory: Path, times: bool = True) -> Curve | None:
    """The curve of the run in `directory`; None where it was never evaluated.

    Args:
        times: read timing.jsonl too.

    Raises:
        UserError: metrics.jsonl or timing.jsonl is damaged.
    """
    found = read_curve(directory)
    if not found:
        return None
    tokens = np.array(list(found), dtype=np.float64)
    losses = np.array(list(found.values()), dtype=np.float64)
    return Curve(tokens, losses, _seconds(directory / "timing.jsonl", tokens) if times else None)


def at(axis: Array, losses: Array, budget: float) -> float | None:
    """The loss where `axis` is `budget`, on the straight line between two evaluations.

    None outside of the curve.
    """
    if not axis[0] <= budget <= axis[-1]:
        return None
    return float(np.interp(budget, axis, losses))


def _seconds(path: Path, tokens: Array) -> Array | None:
    """Seconds of training after so many tokens; None where the record does not go that far."""
    rows: list[tuple[float, float]] = [(0, 0.0)]
    for row in rows_with(path, "seconds", MOST_TIMES):
        after, taken = finite(row.get("tokens")), finite(row.get("seconds"))
        if after is None or taken is None or min(after, taken) < 0:
            raise UserError(f"{path}: damaged ({json.dumps(row)}); remove it: no time is read then")
        rows.append((after, taken))
    spent, seconds = (np.array(column, dtype=np.float64) for column in zip(*rows, strict=True))
    if spent[-1] < tokens[-1]:
        return None
    order = np.argsort(spent, kind="stable")
    return np.interp(tokens, spent[order], seconds[order])
