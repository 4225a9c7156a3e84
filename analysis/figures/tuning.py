"""How much a row's loss depends on the setting that was tuned for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from analysis.comparison import Comparison
from analysis.figures.drawing import (
    GREY,
    PAPER,
    RULE,
    SMALL,
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
from analysis.tuning import Try, Tuning

ABOVE = 1.05  # of the panel's height, where what diverged is marked
MOST_TICKS = 9
WORDS = {"training.lr": "Peak learning rate"}


def sensitivity(comparison: Comparison) -> Drawing | None:
    """Final loss against the tuned setting, one line a row; None where nothing was tuned."""
    tuned = [
        (row.label, row.tuning, look)
        for row, look in zip(comparison.rows, looks(len(comparison.rows)), strict=True)
        if row.tuning is not None and any(attempt.losses for attempt in row.tuning.tries)
    ]
    if not tuned:
        return None
    names = [_name(label, tuning) for label, tuning, _ in tuned]
    everything = [attempt for _, tuning, _ in tuned for attempt in tuning.tries]
    path = tuned[0][1].path
    low, high = _range(everything)
    with style():
        tall = max(2.7, 0.5 + 0.15 * len(names))
        figure = blank(0.55 + 3.5 + 0.3 + name_width(names), tall + 0.7)
        axes = panel(figure, 0.55, 0.45, 3.5, tall)
        axes.set_ylim(low, high)
        if min(attempt.value for attempt in everything) > 0:
            axes.set_xscale("log")
        ends = [
            _line(axes, name, tuning, look, high)
            for name, (_, tuning, look) in zip(names, tuned, strict=True)
        ]
        axes.margins(x=0.05)
        values = sorted({attempt.value for attempt in everything})
        if len(values) <= MOST_TICKS:
            axes.set_xticks(values, [f"{value:g}" for value in values])
            axes.minorticks_off()
        if any(attempt.diverged for attempt in everything):
            axes.axhline(high, color=RULE, linewidth=0.6, zorder=0)
            axes.text(1.02, ABOVE, "diverged", color=GREY, fontsize=SMALL, va="center",
                      transform=axes.transAxes)  # fmt: skip
        axes.set(xlabel=WORDS.get(path, path), ylabel="Validation loss")
        name_ends(axes, [end for end in ends if end is not None])
    return Drawing(
        name="sensitivity",
        title=f"Sensitivity to {WORDS.get(path, path).lower()}",
        caption=_caption([tuning for _, tuning, _ in tuned], path),
        columns=("variant", "value", "seed", "val_loss", "tuning_loss", "state", "chosen"),
        rows=[row for label, tuning, _ in tuned for row in _numbers(label, tuning)],
        figure=figure,
    )


def _name(label: str, tuning: Tuning) -> str:
    return label if tuning.sensitivity is None else f"{label} (S = {tuning.sensitivity:.3f})"


def _means(tuning: Tuning) -> list[tuple[Try, float]]:
    """The tries that have a mean: those of which no seed diverged."""
    return [
        (attempt, sum(attempt.losses.values()) / len(attempt.losses))
        for attempt in tuning.tries
        if attempt.losses and not attempt.diverged
    ]


def _range(tries: Sequence[Try]) -> tuple[float, float]:
    """The losses that there are, cut at the loss before training: what is above learned nothing."""
    losses = [loss for attempt in tries for loss in attempt.losses.values()]
    starts = [attempt.initial for attempt in tries if attempt.initial is not None]
    low, high = min(losses), min([max(losses), *starts[:1]])
    margin = 0.06 * (high - low) or 0.05
    return low - margin, max(high, low) + margin


def _line(axes: Any, name: str, tuning: Tuning, look: Look, high: float) -> End | None:
    drawn = {"color": look.color}
    means = _means(tuning)
    values = [attempt.value for attempt, _ in means]
    clipped = [min(mean, high) for _, mean in means]
    bands = [(min(a.losses.values()), min(max(a.losses.values()), high)) for a, _ in means]
    if bands:
        axes.fill_between(values, *zip(*bands, strict=True), alpha=0.15, linewidth=0, **drawn)
        axes.plot(values, clipped, linestyle=look.dash, linewidth=1.3, **drawn)
        axes.plot(values, clipped, "o", ms=2.5, **drawn)
    for attempt in tuning.tries:
        if attempt.diverged:  # above the panel: it has no loss
            axes.plot(attempt.value, ABOVE, "x", ms=5, clip_on=False, zorder=5,
                      transform=axes.get_xaxis_transform(), **drawn)  # fmt: skip
    chosen = tuning.tries[tuning.chosen]
    for (attempt, _), y in zip(means, clipped, strict=True):
        if attempt is chosen:
            axes.plot(attempt.value, y, "o", ms=7, mew=1.2, mfc=PAPER, mec=look.color, zorder=4)
            axes.plot(attempt.value, y, "o", ms=2.5, zorder=5, **drawn)
    return End(values[-1], clipped[-1], name, look.color) if means else None


def _numbers(label: str, tuning: Tuning) -> Iterator[tuple[object, ...]]:
    for i, attempt in enumerate(tuning.tries):
        for seed, loss in attempt.losses.items():
            said = attempt.tuning.get(seed)
            yield label, attempt.value, seed, loss, said, "done", i == tuning.chosen
        for _ in range(attempt.diverged):
            yield label, attempt.value, None, None, None, "diverged", i == tuning.chosen


def _caption(tuned: Sequence[Tuning], path: str) -> str:
    text = (
        f"Final validation loss of each row at each value of {path}: mean over seeds, band from the"
        " lowest to the highest. The ring marks the value that stands for the row, "
    )
    text += (
        "chosen on the reported loss itself for want of another, which flatters it."
        if any(tuning.on_reported for tuning in tuned)
        else "chosen on validation text that no reported loss is measured on."
    )
    if any(attempt.diverged for tuning in tuned for attempt in tuning.tries):
        text += " × above: a seed diverged there."
    if any(tuning.sensitivity is not None for tuning in tuned):
        text += (
            " S: mean excess over the row's best loss across the grid, diverged tries counted at"
            " the loss before training (Wortsman et al. 2023)."
        )
    return text
