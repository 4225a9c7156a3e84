"""Rows read off their curves at equal tokens, FLOPs and time, and the compute they are worth."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis import curves
from analysis.compared import Compared, Flip, Gain, Reading
from analysis.curves import Array, Budget, Curve
from analysis.results import Run
from analysis.statistics import Difference, paired_difference, t_interval, t_quantile

BUDGETS: tuple[Budget, ...] = ("tokens", "flops", "time")
CUT = 0.05  # of a curve: a decaying learning rate has all but ended there


def with_curves(rows: Sequence[Compared], root: Path) -> tuple[list[Compared], tuple[Flip, ...]]:
    """`rows` with their readings and gains, and the flips. See `comparison.compare`."""
    found = [
        {seed: curve for seed, run in r.runs.items() if (curve := _whole(root, run)) is not None}
        for r in rows
    ]
    by_budget = [(by, _readings(rows, found, by)) for by in BUDGETS]
    filled = [
        replace(
            r,
            readings={by: readings[i] for by, readings in by_budget if i in readings},
            gain=_gain(r, rows[0], found[i], found[0]) if i else None,
        )
        for i, r in enumerate(rows)
    ]
    flips = tuple(flip for by, _ in by_budget for flip in _flips(filled, by))
    return filled, flips


def _whole(root: Path, run: Run) -> Curve | None:
    """The run's curve; None where it was never evaluated, or where what is left of its record ends
    before the run did (unsealed runs of earlier versions): its last loss is not the final one."""
    curve = curves.read(root / run.id)
    ended = run.number("tokens")
    return None if curve is None or (ended and curve.tokens[-1] < ended) else curve


def _readings(
    rows: Sequence[Compared], found: Sequence[Mapping[int, Curve]], by: Budget
) -> dict[int, Reading]:
    """Readings by index of row, of those whose curves say what was spent. Empty without the
    baseline's."""
    axes = {}
    for i, r in enumerate(rows):
        each = {s: curve.axis(by, r.read.flops_per_token) for s, curve in found[i].items()}
        known = {seed: axis for seed, axis in each.items() if axis is not None}
        if known and len(known) == len(r.losses) and not r.diverged:
            axes[i] = known
    if 0 not in axes:
        return {}
    ends = {i: [axis[-1] for axis in each.values()] for i, each in axes.items()}
    budget = float(min(map(min, ends.values())))
    losses = {
        i: {
            seed: loss
            for seed, axis in each.items()
            if (loss := curves.at(axis, found[i][seed].losses, budget)) is not None
        }
        for i, each in axes.items()
    }

    def difference(i: int) -> Difference | None:
        if losses[i] == rows[i].losses and losses[0] == rows[0].losses:
            return rows[i].difference  # at the end of both: known already
        return paired_difference(losses[i], losses[0]) if i else None

    return {
        i: Reading(
            by=by,
            budget=budget,
            losses=losses[i],
            difference=difference(i),
            cut=bool(max(*ends[i], *ends[0]) > (1 + CUT) * budget),
        )
        for i in axes
    }


def _gain(
    r: Compared, baseline: Compared, mine: Mapping[int, Curve], theirs: Mapping[int, Curve]
) -> Gain | None:
    """None where the two can't be compared: no curves, no FLOPs, other data, or a divergence."""
    cost, base_cost = r.read.flops_per_token, baseline.read.flops_per_token
    pairs = sorted(mine.keys() & theirs.keys())
    if "data" in r.mixed or not (pairs and cost and base_cost and r.loss and baseline.loss):
        return None
    logs, ratios = [], []
    for seed in pairs:
        a, b = mine[seed], theirs[seed]
        loss = float(max(a.losses[-1], b.losses[-1]))
        needs, base_needs = a.tokens_to(loss), b.tokens_to(loss)
        if needs and base_needs:
            logs.append(math.log(base_needs * base_cost / (needs * cost)))
        ratios.append(b.tokens[-1] * base_cost / (a.tokens[-1] * cost))
    ends = [float(np.mean([side[seed].losses[-1] for seed in pairs])) for side in (mine, theirs)]
    beyond = ends[1] > ends[0]
    at_least = float(np.exp(np.mean(np.log(ratios)))) if beyond else None
    low = high = None
    if len(logs) > 1:
        _, low, high = (math.exp(float(value)) for value in t_interval(logs))
    ratio = math.exp(float(np.mean(logs))) if logs else None
    return Gain(ratio, low, high, len(logs), beyond, at_least)


def _flips(rows: Sequence[Compared], by: Budget) -> Iterator[Flip]:
    """Vectorised: among thousands of rows there are millions of pairs."""
    known = [r for r in rows if by in r.readings and r.readings[by].losses]
    if all(r.readings[by].losses == r.losses for r in known):
        return
    seeds = sorted({seed for r in known for seed in r.losses})
    ends = _by_seed([r.losses for r in known], seeds)
    reads = _by_seed([r.readings[by].losses for r in known], seeds)
    end_means, read_means = (np.nanmean(losses, axis=1) for losses in (ends, reads))
    for i in range(len(known) - 1):
        others = slice(i + 1, None)
        end, read = end_means[i] - end_means[others], read_means[i] - read_means[others]
        apart = _apart(ends[i] - ends[others]) | _apart(reads[i] - reads[others])
        for j in np.flatnonzero((end * read < 0) & apart) + i + 1:
            lower, higher = (i, j) if end_means[i] < end_means[j] else (j, i)
            yield Flip(by, known[lower].label, known[higher].label)


def _by_seed(losses: Sequence[Mapping[int, float]], seeds: Sequence[int]) -> Array:
    """(rows, seeds), NaN where a row lacks a seed."""
    found = [[each.get(seed, math.nan) for seed in seeds] for each in losses]
    return np.array(found, dtype=np.float64).reshape(len(losses), len(seeds))


def _apart(d: Array) -> NDArray[np.bool_]:
    """Whether the 95% t interval of each row's mean excludes zero; `d` is (rows, seeds)."""
    n = np.isfinite(d).sum(axis=1)
    mean = np.nansum(d, axis=1) / np.maximum(n, 1)
    spread = np.sqrt(np.nansum((d - mean[:, None]) ** 2, axis=1) / np.maximum(n - 1, 1))
    quantile = np.array([math.inf] * 2 + [t_quantile(0.975, k) for k in range(1, d.shape[1])])
    with np.errstate(invalid="ignore"):  # infinite times no spread, of a single pair
        return np.abs(mean) > quantile[n] * spread / np.sqrt(np.maximum(n, 1))
