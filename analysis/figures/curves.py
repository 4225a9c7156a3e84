"""Validation loss while training went on: against tokens, training FLOPs and measured time.

Mean over the seeds that count, in a band from the lowest to the highest of them. A row of which a
seed diverged has no mean: its runs are drawn one by one, × where one ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis import curves
from analysis.comparison import Compared, Comparison
from analysis.curves import Array, Budget, Curve
from analysis.figures.drawing import (
    FAINT,
    NAMED_AT_MOST,
    Drawing,
    End,
    Look,
    blank,
    looks,
    name_ends,
    name_width,
    panel,
    style,
)
from analysis.wording import DIVERGED

EARLY = 0.3  # the share of training whose steep fall may leave the panel at the top
AXES: dict[Budget, str] = {
    "tokens": "Training tokens",
    "flops": "Training FLOPs",
    "time": "Training time, seconds",
}


@dataclass(frozen=True)
class History:
    """One row's curves.

    Attributes:
        runs: those that count together, by seed.
        alone: each run of a row of which one diverged, by seed; `diverged` says which did.
        tokens: (P,), at which all of `runs` were evaluated.
        losses: (runs, P), validation loss there, nats per token.
    """

    row: Compared
    look: Look
    runs: Mapping[int, Curve]
    alone: Mapping[int, Curve]
    diverged: frozenset[int]
    tokens: Array
    losses: Array

    @property
    def name(self) -> str:
        if not self.diverged:
            return self.row.label
        return f"{self.row.label} {DIVERGED} {len(self.diverged)}/{self.row.planned}"

    def spent(self, curve: Curve, by: Budget) -> Array | None:
        """What one run had used at each of its evaluations; None if not known."""
        return curve.axis(by, self.row.read.flops_per_token)

    def x(self, by: Budget) -> Array | None:
        """(P,) what the runs had used at `tokens`, their mean; None if not known."""
        found = []
        for curve in self.runs.values():
            axis = self.spent(curve, by)
            if axis is None:
                return None
            found.append(np.interp(self.tokens, curve.tokens, axis))
        return np.mean(found, axis=0) if found and self.tokens.size else None


def histories(comparison: Comparison, root: Path) -> list[History]:
    """Each row's curves, from the directories of its runs below `root`; empty where none ran.

    Raises:
        UserError: a record is damaged.
    """
    return [
        _history(row, look, root)
        for row, look in zip(comparison.rows, looks(len(comparison.rows)), strict=True)
    ]


def _history(row: Compared, look: Look, root: Path) -> History:
    counted = {seed: row.runs[seed] for seed in row.losses}
    found = {seed: curves.read(root / run.id) for seed, run in {**counted, **row.diverged}.items()}
    known = {seed: curve for seed, curve in found.items() if curve is not None}
    runs = {} if row.diverged else known
    grids = [set(curve.tokens.tolist()) for curve in runs.values()]
    tokens = np.array(sorted(set.intersection(*grids)) if grids else [], dtype=np.float64)
    losses = [np.interp(tokens, curve.tokens, curve.losses) for curve in runs.values()]
    return History(
        row=row,
        look=look,
        runs=runs,
        alone=known if row.diverged else {},
        diverged=frozenset(row.diverged),
        tokens=tokens,
        losses=np.array(losses).reshape(len(losses), tokens.size),
    )


def draw(lines: Sequence[History], by: Budget) -> Drawing | None:
    """Loss against `by`; None where no row has it (time of old runs), or nothing has run."""
    shown = [line for line in lines if line.x(by) is not None or (line.alone and by == "tokens")]
    if not shown:
        return None
    names = [line.name for line in shown]
    wide, high = 3.5, max(2.5, 0.5 + 0.15 * min(len(shown), NAMED_AT_MOST))
    with style():
        figure = blank(0.55 + wide + 0.3 + name_width(names), high + 0.6)
        axes = panel(figure, 0.55, 0.45, wide, high)
        told_apart = plot(axes, shown, by)
    return Drawing(
        name=f"curves-{by}",
        title="Validation loss against " + AXES[by].split(",")[0].replace("T", "t", 1),
        caption=_caption(shown, by, told_apart),
        columns=("variant", "seed", "tokens", *((by,) if by != "tokens" else ()), "val_loss",
                 "state"),
        rows=list(numbers(shown, by)),
        figure=figure,
    )  # fmt: skip


def plot(axes: Any, lines: Sequence[History], by: Budget) -> bool:
    """The curves into `axes`, names at their ends; whether every one of them is told apart."""
    from matplotlib.ticker import EngFormatter

    low, high = loss_range(lines)
    told = emphasised(lines)
    ends, reach = [], 0.0
    for depth, line in enumerate(lines):
        color = line.look.color if line in told else FAINT
        order = (3.0 if line in told else 2.0) - depth / len(lines)
        drawn = {"color": color, "linestyle": line.look.dash, "zorder": order}
        tails = []
        for seed, curve in line.alone.items():
            axis = line.spent(curve, by)
            if axis is None:
                continue
            axes.plot(axis, curve.losses, linewidth=0.7, **drawn)
            tails.append((float(axis[-1]), float(curve.losses[-1])))
            if seed in line.diverged:
                end, loss = tails[-1]
                axes.plot(end, min(loss, high), "x", color=color, ms=5, clip_on=False)
        if (x := line.x(by)) is not None:
            lowest, highest = line.losses.min(axis=0), line.losses.max(axis=0)
            axes.fill_between(x, lowest, highest, color=color, alpha=0.15, linewidth=0)
            axes.plot(x, line.losses.mean(axis=0), linewidth=1.3, **drawn)
            tails.append((float(x[-1]), float(line.losses[:, -1].mean())))
        if tails:
            end, loss = max(tails)
            reach = max(reach, end)
            ends += [End(end, loss, line.name, color)] if line in told else []
    axes.set(xlim=(0, reach), ylim=(low, high), xlabel=AXES[by], ylabel="Validation loss")
    axes.xaxis.set_major_formatter("{x:g}" if by == "time" else EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=5)
    name_ends(axes, ends)
    return len(told) == len(lines)


def emphasised(lines: Sequence[History]) -> list[History]:
    """Those that a reader can tell apart: the baseline and the largest differences."""
    if len(lines) <= NAMED_AT_MOST:
        return list(lines)

    def size(line: History) -> tuple[bool, float]:
        difference = line.row.difference
        decided = line.row.verdict in ("better", "worse")
        return decided, abs(difference.mean) if difference else 0.0

    others = [line for line in lines if line.row.verdict != "baseline"]
    chosen = sorted(others, key=size, reverse=True)[: NAMED_AT_MOST - 1]
    return [line for line in lines if line.row.verdict == "baseline" or line in chosen]


def loss_range(lines: Sequence[History]) -> tuple[float, float]:
    """Where the variants can be told apart: every row's end, and the late fall of most of them."""
    whole = [
        curve
        for line in lines
        for seed, curve in {**line.runs, **line.alone}.items()
        if seed not in line.diverged
    ]
    shown = whole or [curve for line in lines for curve in line.alone.values()]
    if not shown:
        return 0.0, 1.0
    early = EARLY * max(curve.tokens[-1] for curve in shown)
    late = [curve.losses[curve.tokens >= early] for curve in shown if curve.tokens[-1] >= early]
    low = min(losses.min() for losses in late)
    high = max(float(np.median([x[0] for x in late])), *(float(c.losses[-1]) for c in shown), low)
    margin = 0.05 * (high - low) or 0.05
    return float(low - margin), float(high + margin)


def numbers(lines: Sequence[History], by: Budget) -> Iterator[tuple[object, ...]]:
    """Every point that is drawn: variant, seed, tokens, what was used until then, loss, state."""
    for line in lines:
        for seed, curve in {**line.runs, **line.alone}.items():
            axis = line.spent(curve, by)
            state = "diverged" if seed in line.diverged else "done"
            for tokens, x, loss in zip(
                curve.tokens, axis if axis is not None else [], curve.losses, strict=False
            ):
                x_too = () if by == "tokens" else (float(x),)
                yield line.row.label, seed, int(tokens), *x_too, float(loss), state


def _caption(lines: Sequence[History], by: Budget, told_apart: bool) -> str:
    seeds = sorted({len(line.runs) for line in lines if line.runs})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else "no"
    text = {
        "tokens": "Validation loss (nats per token) against training tokens",
        "flops": "The same runs against the FLOPs of their training",
        "time": "The same runs against seconds of training as measured on the hardware that each "
        "ran on (the mean over seeds; evaluation not counted)",
    }[by]
    plural = "s" * (count != "1")
    text += f": mean over {count} seed{plural}, in a band from the lowest to the highest."
    if any(line.alone for line in lines):
        text += f" {DIVERGED} A row of which a run diverged is drawn run by run, × where one ended."
    if not told_apart:
        text += (
            f" Of {len(lines)} rows the baseline and the {NAMED_AT_MOST - 1} largest differences"
            " are named, significant ones first; the others are grey."
        )
    if any(line.row.tuning for line in lines):
        text += " Each row at its own best setting."
    return text
