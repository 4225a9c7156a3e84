"""The tries of a tuned row, and which of them stands for it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from analysis.results import Row, Run, finite, in_state, numbers
from analysis.statistics import expected_best, sensitivity


@dataclass(frozen=True)
class Try:
    """One value of the tuned setting, over seeds. The lowest mean tuning loss is chosen."""

    value: float
    label: str
    losses: Mapping[int, float]  # val/loss, by seed
    tuning: Mapping[int, float]  # tuning/loss, by seed
    diverged: int
    planned: int
    initial: float | None = None  # mean loss before the first step, Wortsman's ℓ₀


@dataclass(frozen=True)
class Tuning:
    """A row's tries, from the lowest value to the highest, and which of them stands for it.

    Attributes:
        path: of the tuned setting.
        chosen: index into `tries`: the lowest mean tuning loss over the seeds that all have;
            tries that diverged in a seed come last.
        edge: the chosen value is the lowest or the highest tried.
        on_reported: there is no tuning loss on record: chosen on the reported loss, optimistic.
        sensitivity: S of Wortsman et al. 2023 (arXiv 2309.14322, section 2.2) over the tries;
            None until all have run, and where one diverged and the loss before training is not
            on record.
        expected_best: expected lowest loss of 1, 2, … of the tries (Dodge et al. 2019, arXiv
            1909.03004); a diverged one counts as its loss before training, or as infinite.
    """

    path: str
    tries: tuple[Try, ...]
    chosen: int
    edge: Literal["low", "high"] | None
    on_reported: bool
    sensitivity: float | None
    expected_best: tuple[float, ...]


def tuned(row: Row, others: Sequence[Row], runs: Mapping[str, Run]) -> tuple[Row, Tuning | None]:
    """The row that stands for `row`, and its tries if it has any besides itself."""
    if not others:
        return row, None
    path = str(others[0].tuned["path"]) if others[0].tuned else ""
    own = finite(row.setting(path))
    rows = {float(other.tuned["value"]): other for other in others if other.tuned}
    if own is not None:
        rows[own] = row
    tries = tuple(_try(value, rows[value], runs) for value in sorted(rows))
    chosen, on_reported = _chosen(tries)
    if chosen is None:  # nothing to choose by
        values = sorted(rows)
        chosen = values.index(own) if own is not None else 0
        edge: Literal["low", "high"] | None = None
    else:
        edge = "low" if chosen == 0 else "high" if chosen == len(tries) - 1 else None
    spread, best = _over_tries(tries)
    tuning = Tuning(path, tries, chosen, edge, on_reported, spread, best)
    return rows[tries[chosen].value], tuning


def _try(value: float, row: Row, runs: Mapping[str, Run]) -> Try:
    diverged = in_state(row, runs, "diverged")
    done = in_state(row, runs, "done")
    before = [run.number("init/loss") for run in (*done.values(), *diverged.values())]
    known = [loss for loss in before if loss is not None]
    return Try(
        value=value,
        label=row.label,
        losses=numbers(row, runs, "val/loss"),
        tuning=numbers(row, runs, "tuning/loss"),
        diverged=len(diverged),
        planned=len(row.runs),
        initial=float(np.mean(known)) if known else None,
    )


def _chosen(tries: Sequence[Try]) -> tuple[int | None, bool]:
    """The index of the best try, None where none has a result, and whether it was chosen on the
    reported loss for want of another."""
    for fair in (True, False):  # a try that diverged in a seed is only chosen if all did
        known = [i for i, t in enumerate(tries) if t.losses and not (fair and t.diverged)]
        if not known:
            continue
        on_reported = any(tries[i].losses.keys() != tries[i].tuning.keys() for i in known)
        losses = {i: tries[i].losses if on_reported else tries[i].tuning for i in known}
        shared = set.intersection(*(set(by_seed) for by_seed in losses.values()))
        means = {
            i: float(np.mean([by_seed[s] for s in shared or by_seed]))
            for i, by_seed in losses.items()
        }
        return min(means, key=means.__getitem__), on_reported
    return None, False


def _over_tries(tries: Sequence[Try]) -> tuple[float | None, tuple[float, ...]]:
    """Wortsman's S over the tries, and the expected best of each number of them."""
    before = [t.initial for t in tries if t.initial is not None]
    initial = float(np.mean(before)) if before else math.inf
    seen = [t for t in tries if t.diverged or t.losses]
    losses = [math.inf if t.diverged else float(np.mean([*t.losses.values()])) for t in seen]
    spread = None
    if len(seen) == len(tries) and (math.isfinite(initial) or not any(t.diverged for t in tries)):
        spread = sensitivity(losses, initial)
    capped = [min(loss, initial) for loss in losses]
    return spread, tuple(expected_best(capped, k) for k in range(1, len(capped) + 1))
