"""Quality against cost: each row's final loss over what a token of its training costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from analysis.comparison import Compared, Comparison
from analysis.figures.drawing import (
    FAINT,
    GREY,
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

NEAR = 1e-3  # costs that differ by less than this share are one and the same


class Point(NamedTuple):
    """A row: its mean loss and the seeds' lowest and highest, over its cost."""

    row: Compared
    look: Look
    cost: float
    loss: float
    low: float
    high: float


def seconds_per_token(row: Compared) -> float | None:
    """Median over the row's runs, as measured where each ran; None where none says."""
    speeds = [speed for run in row.runs.values() if (speed := run.number("tokens_per_s"))]
    return 1 / float(np.median(speeds)) if speeds else None


def pareto(comparison: Comparison) -> Drawing | None:
    """Two panels, FLOPs and measured time per token; None for fewer than three rows to show."""
    by_flops = _points(comparison, lambda row: row.read.flops_per_token)
    by_time = _points(comparison, seconds_per_token)
    panels = [
        (title, points)
        for title, points in (("FLOPs per token", by_flops), ("Measured time per token", by_time))
        if len(points) > 2
    ]
    if not panels:
        return None
    names = name_width([point.row.label for point in panels[-1][1]])
    wide, gap = 2.6, 0.3
    high = max(2.5, 0.4 + 0.14 * len(panels[-1][1]))
    everything = [point for _, points in panels for point in points]
    bottom, top = min(p.low for p in everything), max(p.high for p in everything)
    margin = 0.06 * (top - bottom) or 0.05
    with style():
        figure = blank(0.55 + len(panels) * (wide + gap) + 0.2 + names, high + 0.6)
        for i, (title, points) in enumerate(panels):
            axes = panel(figure, 0.55 + i * (wide + gap), 0.45, wide, high)
            _scatter(axes, points, "s" * (points is by_time))
            axes.set(ylim=(bottom - margin, top + margin), xlabel=title)
            if i == 0:
                axes.set_ylabel("Validation loss")
            else:
                axes.tick_params(labelleft=False)
            if i == len(panels) - 1:
                name_ends(axes, [End(p.cost, p.loss, p.row.label, p.look.color) for p in points])
    return Drawing(
        name="cost",
        title="Quality against cost",
        caption=(
            "Final validation loss (mean; whiskers from the lowest to the highest seed) over the"
            " cost of a token of training: FLOPs by torch's counter, and time as measured where"
            " each run ran. The dashed line joins the rows that no other undercuts in both."
        ),
        columns=("variant", "flops_per_token", "seconds_per_token", "val_loss", "low", "high",
                 "on_frontier_flops", "on_frontier_time"),
        rows=_numbers(by_flops, by_time),
        figure=figure,
    )  # fmt: skip


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other is at least as cheap and as good as, and better in one; by cost."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not best or point.loss < best[-1].loss:
            best.append(point)
    return best


def _points(comparison: Comparison, cost: Any) -> list[Point]:
    rows = zip(comparison.rows, looks(len(comparison.rows)), strict=True)
    return [
        Point(row, look, float(spent), row.loss.mean, min(losses), max(losses))
        for row, look in rows
        if row.loss is not None
        and (losses := list(row.losses.values()))
        and (spent := cost(row)) is not None
    ]


def _scatter(axes: Any, points: Sequence[Point], unit: str) -> None:
    from matplotlib.ticker import EngFormatter

    best = frontier(points)
    axes.plot(
        [p.cost for p in best], [p.loss for p in best],
        color=GREY, linewidth=0.8, linestyle=(0, (4, 2)), zorder=1, drawstyle="steps-post",
    )  # fmt: skip
    for point in points:
        axes.plot([point.cost] * 2, [point.low, point.high], color=point.look.color, linewidth=0.9)
        axes.plot(point.cost, point.loss, "o", color=point.look.color, ms=5, zorder=3)
    costs = [p.cost for p in points]
    spread = max(costs) - min(costs)
    if spread < NEAR * max(costs):  # matched: show that they are alike, not how rounding differs
        axes.set_xlim(0.9 * min(costs), 1.1 * max(costs))
    else:
        axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(EngFormatter(unit, sep="\u2009" if unit else ""))
    axes.locator_params(axis="x", nbins=4)
    axes.grid(axis="y", color=FAINT, linewidth=0.3, alpha=0.5)
    axes.set_axisbelow(True)


def _numbers(by_flops: Sequence[Point], by_time: Sequence[Point]) -> list[tuple[object, ...]]:
    timed = {point.row.label: point for point in by_time}
    counted = {point.row.label: point for point in by_flops}
    fronts = [{p.row.label for p in frontier(points)} for points in (by_flops, by_time)]
    return [
        (
            label,
            counted[label].cost if label in counted else None,
            timed[label].cost if label in timed else None,
            point.loss, point.low, point.high,
            *(label in front for front in fronts),
        )
        for label, point in {**timed, **counted}.items()
    ]  # fmt: skip
