"""Differences with their intervals: of the rows from the baseline, or of any other lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.comparison import Compared, Comparison
from analysis.figures.drawing import (
    BETTER,
    GREY,
    INK,
    PAPER,
    RULE,
    SMALL,
    WORSE,
    Drawing,
    blank,
    name_width,
    panel,
    shortened,
    style,
)
from analysis.statistics import Adjusted, Difference
from analysis.wording import difference_decimals, difference_text, p_text

ROW = 0.21  # inches from one line to the next
P_WIDTH, VERDICT_WIDTH = 0.6, 0.75  # inches, of the columns of numbers
COLORS = {"better": BETTER, "worse": WORSE}
PLAIN_GROUPS = ("baseline", "rows")  # groups that need no heading
ABOVE: dict[str, Any] = {
    "va": "bottom", "xycoords": "axes fraction", "fontsize": SMALL, "color": GREY,
    "annotation_clip": False,
}  # fmt: skip
COLUMNS = ("group", "n", "difference", "low", "high", "p", "p_holm", "adjusted_low",
           "adjusted_high", "verdict")  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One line of a plot of differences; `planned` pairs, `note` where there is no difference."""

    label: str
    difference: Difference | None
    adjusted: Adjusted | None
    verdict: str
    color: str
    planned: int
    group: str = PLAIN_GROUPS[0]

    def numbers(self) -> tuple[object, ...]:
        """Under COLUMNS."""
        d, a = self.difference, self.adjusted
        measured = (d.n, d.mean, d.low, d.high, d.p) if d else (0, None, None, None, None)
        adjusted = (a.p, a.low, a.high) if a else (None, None, None)
        return self.group, *measured, *adjusted, self.verdict


def verdict_text(row: Compared) -> str:
    """The verdict, and how many runs diverged where that is it."""
    if row.verdict == "diverged":
        return f"diverged {len(row.diverged)}/{row.planned}"
    return row.verdict


def lines_of(comparison: Comparison, colors: Sequence[str] | None = None) -> list[Line]:
    """A line for each row but the baseline, in the colour of its verdict or in `colors`."""
    rows = comparison.rows[1:]
    colors = colors or [COLORS.get(row.verdict, GREY) for row in rows]
    return [
        Line(row.label, row.difference, row.adjusted, verdict_text(row), color, row.planned,
             row.row.group)
        for row, color in zip(rows, colors, strict=True)
    ]  # fmt: skip


def forest(comparison: Comparison) -> Drawing | None:
    """The paired differences from the baseline, one line a row; None without any to draw."""
    lines = lines_of(comparison)
    if not any(line.difference for line in lines):
        return None
    base = comparison.baseline.label
    return Drawing(
        name="differences",
        title=f"Paired differences from {base}",
        caption=caption(
            f"Mean difference in validation loss from {base}, paired by seed.",
            lines,
            comparison.family,
        ),
        columns=("variant", *COLUMNS),
        rows=[(line.label, *line.numbers()) for line in lines],
        figure=plotted(lines, f"Δ validation loss from {shortened(base)}, nats per token"),
    )


def plotted(lines: Sequence[Line], xlabel: str) -> Any:
    """A figure of the lines, with what was decided in columns beside them."""
    with style():
        names = max(name_width([line.label for line in lines]), 0.6)
        texts = text_width(lines)
        wide, high = 2.7, ROW * lines_needed(lines)
        figure = blank(names + wide + texts + P_WIDTH + VERDICT_WIDTH, high + 0.75)
        axes = panel(figure, names, 0.45, wide, high)
        plot(axes, lines, xlabel)
        decisions(axes, lines)
    return figure


def plot(axes: Any, lines: Sequence[Line], xlabel: str) -> None:
    """Each difference and its intervals into `axes`, its name at the left, its numbers right."""
    decimals = difference_decimals(line.difference for line in lines)
    limit = half_width(lines)
    places = _places(lines)
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    for at, line in zip(places, lines, strict=True):
        axes.axhline(at, color=RULE, linewidth=0.6, zorder=0)
        d = line.difference
        text = difference_text(d, line.planned, decimals) if d else line.verdict
        beside(axes, at, text, color=INK if d else GREY)
        if d is not None:
            _interval(axes, at, line, d, limit)
        if at - 1 not in places and line.group not in PLAIN_GROUPS:
            heading = line.group.replace("_", " ").capitalize()
            axes.text(-0.02, at - 1, heading, transform=axes.get_yaxis_transform(), color=GREY,
                      fontsize=SMALL, va="center", ha="right", parse_math=False)  # fmt: skip
    axes.set(xlim=(-limit, limit), ylim=(lines_needed(lines) - 0.4, -0.6))
    axes.set_yticks(places, [shortened(line.label) for line in lines], parse_math=False)
    axes.set_xlabel(xlabel, parse_math=False)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    for x, text in ((0.25, "← better"), (0.75, "worse →")):
        axes.annotate(text, (x, 1.0), ha="center", **ABOVE)
    above(axes, "Δ [95% CI]")


def decisions(axes: Any, lines: Sequence[Line]) -> None:
    """What Holm's procedure decided, in two columns beside the differences."""
    first = text_width(lines)
    above(axes, "p (Holm)", first)
    above(axes, "verdict", first + P_WIDTH)
    for at, line in zip(_places(lines), lines, strict=True):
        if line.adjusted is not None:
            beside(axes, at, p_text(line.adjusted.p), first)
        if line.difference is not None:
            color = INK if line.adjusted and line.adjusted.rejected else GREY
            beside(axes, at, line.verdict, first + P_WIDTH, color)


def text_width(lines: Sequence[Line]) -> float:
    """Inches of the column of differences."""
    decimals = difference_decimals(line.difference for line in lines)
    texts = [difference_text(d, line.planned, decimals) for line in lines
             if (d := line.difference)]  # fmt: skip
    return 0.1 + 0.9 * 0.062 * max(map(len, texts), default=0)


def beside(axes: Any, y: float, text: str, inches: float = 0.0, color: str = INK) -> None:
    """A note so far right of the axes, at a height in data."""
    axes.annotate(text, (1, y), xycoords=("axes fraction", "data"), fontsize=SMALL, color=color,
                  xytext=(72 * (0.12 + inches), 0), textcoords="offset points", va="center",
                  annotation_clip=False, parse_math=False)  # fmt: skip


def above(axes: Any, text: str, inches: float = 0.0) -> None:
    """The heading of a column of notes."""
    axes.annotate(text, (1, 1), xytext=(72 * (0.12 + inches), 0), textcoords="offset points",
                  **ABOVE)  # fmt: skip


def lines_needed(lines: Sequence[Line]) -> int:
    """Lines of the plot: one a row, and one for the heading of each group."""
    return _places(lines)[-1] + 1 if lines else 1


def _places(lines: Sequence[Line]) -> list[int]:
    places, at, before = [], 0, PLAIN_GROUPS[0]
    for line in lines:
        at += line.group != before and line.group not in PLAIN_GROUPS
        places.append(at)
        at, before = at + 1, line.group
    return places


def half_width(lines: Iterable[Line]) -> float:
    """Half the panel's width: room for every mean; an interval far wider than most is cut."""
    known = [(line.difference, line.adjusted) for line in lines if line.difference]
    means = [abs(d.mean) for d, _ in known]
    halves = [d.half_width for d, _ in known if d.half_width is not None]
    ends = [(d.mean, d.low, d.high, *((a.low, a.high) if a else ())) for d, a in known]
    reach = max((abs(end) for each in ends for end in each if end is not None), default=0.0)
    typical = 2.5 * max([*means, float(np.median(halves)) if halves else 0.0], default=0.0)
    return 1.08 * min(reach, typical) or 0.01


def _interval(axes: Any, y: float, line: Line, d: Difference, limit: float) -> None:
    adjusted, color = line.adjusted, line.color
    spans = [(adjusted.low, adjusted.high, 0.9)] if adjusted is not None else []
    spans += [(d.low, d.high, 2.6)] if d.low is not None and d.high is not None else []
    for low, high, thick in spans:
        axes.plot(
            [max(low, -limit), min(high, limit)], [y, y], color=color, linewidth=thick, zorder=2,
            solid_capstyle="butt",
        )  # fmt: skip
        for end, edge, marker in ((low, -limit, "<"), (high, limit, ">")):
            if abs(end) > limit and end * edge > 0:  # the interval goes on beyond the panel
                axes.plot(edge, y, marker, color=color, ms=3.5, clip_on=False)
    filled = adjusted is not None and adjusted.rejected
    axes.plot(d.mean, y, "o", ms=5, mew=1.1, color=color, clip_on=False, zorder=4,
              mfc=color if filled else PAPER)  # fmt: skip


def caption(first: str, lines: Sequence[Line], family: int) -> str:
    """`first`, and how the lines are to be read."""
    if not any(line.difference and line.difference.low is not None for line in lines):
        return f"{first} One pair has no interval."
    if family == 1:
        return f"{first} With its 95% t interval; filled where that excludes zero, open where not."
    text = f"{first} Thick: the 95% t interval."
    if any(line.adjusted for line in lines):
        text += (
            " Thin: the interval at the level at which Holm's procedure tests the line among"
            f" {family} comparisons; filled where that excludes zero, open where the runs cannot"
            " tell."
        )
    return text
