"""A ladder as a waterfall: what each step adds to the one before it."""

from __future__ import annotations

from typing import Any

from analysis.comparison import Compared, Comparison
from analysis.figures.drawing import (
    BETTER,
    FAINT,
    GREY,
    INK,
    WORSE,
    Drawing,
    blank,
    name_width,
    panel,
    shortened,
    style,
)
from analysis.figures.effects import above, beside, verdict_text
from analysis.statistics import Difference, Summary, paired_difference
from analysis.wording import decimals_for, difference_decimals, difference_text


def steps(comparison: Comparison) -> list[tuple[Compared, Difference | None]]:
    """Each rung of the ladder and its paired difference from the rung before (or the baseline).

    None where one of the two has no mean.
    """
    rungs = [row for row in comparison.rows[1:] if row.row.group == "ladder"]
    return [
        (row, paired_difference(row.losses, before.losses) if row.loss and before.loss else None)
        for before, row in zip([comparison.baseline, *rungs], rungs, strict=False)
    ]


def waterfall(comparison: Comparison) -> Drawing | None:
    """Where a ladder's total gain comes from; None without a ladder of two rungs or more."""
    rungs = steps(comparison)
    base = comparison.baseline
    if len(rungs) < 2 or base.loss is None or not any(d for _, d in rungs):
        return None
    last = rungs[-1][0]
    total = paired_difference(last.losses, base.losses) if last.loss else None
    decimals = difference_decimals([*(d for _, d in rungs), total])
    labels = [base.label, *(row.label for row, _ in rungs), "all together"]
    names, wide, high = name_width(labels), 3.4, 0.26 * (len(rungs) + 2)
    with style():
        figure = blank(names + wide + 1.8, high + 0.75)
        axes = panel(figure, names, 0.5, wide, high)
        axes.plot([base.loss.mean] * 2, [-0.34, 0.34], color=INK, linewidth=2)
        beside(axes, 0, f"{base.loss.mean:.{decimals_for([base.loss.sd])}f}")
        at = base.loss.mean
        for y, (row, d) in enumerate(rungs, 1):
            if row.loss is None or d is None:
                beside(axes, y, verdict_text(row) if row.loss is None else "no step before it",
                       color=GREY)  # fmt: skip
            else:
                _joined(axes, y, at)
                _bar(axes, y, row.loss.mean - d.mean, d)
                beside(axes, y, difference_text(d, row.planned, decimals))
            at = row.loss.mean if row.loss else at
        y = len(rungs) + 1
        if total is not None:
            _joined(axes, y, at)
            _bar(axes, y, base.loss.mean, total, height=0.36)
            beside(axes, y, difference_text(total, last.planned, decimals))
        else:
            beside(axes, y, "not known", color=GREY)
        axes.axhline(y - 0.5, color=GREY, linewidth=0.6)
        axes.set(ylim=(y + 0.55, -0.55), xlabel="Validation loss, nats per token")
        axes.set_yticks(range(y + 1), [shortened(label) for label in labels], parse_math=False)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        axes.locator_params(axis="x", nbins=5)
        above(axes, "Δ from the step before [95% CI]")
    return Drawing(
        name="ladder",
        title="The ladder, step by step",
        caption=(
            f"From {base.label} to {last.label}, each step keeping those above. A bar is the mean"
            " difference from the step before, paired by seed, the whisker its 95% t interval; blue"
            " where the interval lies below zero, orange above, grey where it holds zero (not"
            " corrected for the number of steps). What a step is worth depends on those before it."
        ),
        columns=("step", "n", "difference", "low", "high", "val_loss"),
        rows=[
            (base.label, base.loss.n, None, None, None, base.loss.mean),
            *(_step_numbers(row.label, d, row.loss) for row, d in rungs),
            _step_numbers("all together", total, last.loss),
        ],
        figure=figure,
    )


def _joined(axes: Any, y: float, at: float) -> None:
    axes.plot([at, at], [y - 0.72, y + 0.28], color=FAINT, linewidth=0.6, zorder=0)


def _bar(axes: Any, y: float, start: float, d: Difference, height: float = 0.56) -> None:
    color = (BETTER if d.mean < 0 else WORSE) if d.excludes_zero else GREY
    axes.barh(y, d.mean, left=start, height=height, color=color, alpha=0.35, linewidth=0)
    axes.plot([start + d.mean] * 2, [y - height / 2, y + height / 2], color=color, linewidth=1.6,
              solid_capstyle="butt")  # fmt: skip
    if d.low is not None and d.high is not None:
        axes.plot([start + d.low, start + d.high], [y, y], color=color, linewidth=1.1)


def _step_numbers(label: str, d: Difference | None, loss: Summary | None) -> tuple[object, ...]:
    found = (d.n, d.mean, d.low, d.high) if d else (0, None, None, None)
    return label, *found, loss.mean if loss else None
