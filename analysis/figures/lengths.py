"""Beyond the training length: loss by the length of the window, and by position within it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from analysis.comparison import Comparison
from analysis.curves import Array
from analysis.figures.drawing import (
    GREY,
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
from experiments.record import UserError, read_json

BINS = 24  # of positions, of about equal width on a logarithmic axis


@dataclass(frozen=True)
class Measured:
    """One row over windows of several lengths. Loss is in nats per token.

    Attributes:
        losses: length -> seed -> mean loss; without the lengths that the row can't read.
        positions: length -> (seeds, length) loss at each position of the window.
    """

    label: str
    look: Look
    losses: Mapping[int, Mapping[int, float]]
    positions: Mapping[int, Array]


def measured(comparison: Comparison, root: Path) -> list[Measured]:
    """Each row's lengths.json; rows without one, or of which a seed diverged, are left out.

    Raises:
        UserError: a record is damaged.
    """
    found = []
    for row, look in zip(comparison.rows, looks(len(comparison.rows)), strict=True):
        losses: dict[int, dict[int, float]] = {}
        positions: dict[int, list[list[float]]] = {}
        for seed in row.losses if row.loss is not None else ():
            run = row.runs[seed]
            path = root / run.id / "lengths.json"
            for length, (loss, by_position) in _read(path).items():
                told, mean = run.number(f"val/loss@{length}"), float(np.mean(by_position))
                if told is None or not np.allclose((told, mean), loss, rtol=1e-6):
                    raise UserError(
                        f"{path}: does not fit the run's result at length {length}: it was changed"
                        " after the run ended; remove it, or train the run again"
                    )
                losses.setdefault(length, {})[seed] = loss
                positions.setdefault(length, []).append(by_position)
        if losses:
            stacked = {length: np.array(each) for length, each in sorted(positions.items())}
            found.append(Measured(row.label, look, dict(sorted(losses.items())), stacked))
    return found


def _read(path: Path) -> dict[int, tuple[float, list[float]]]:
    if not path.exists():
        return {}
    found = {}
    try:
        for length, measure in read_json(path).items():
            if isinstance(measure, Mapping) and measure.get("loss") is not None:
                by_position = [float(loss) for loss in measure["by_position"]]
                if len(by_position) != int(length):
                    raise ValueError(f"{len(by_position)} positions of {length}")
                found[int(length)] = float(measure["loss"]), by_position
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it, or train the run again") from None
    return found


def by_length(comparison: Comparison, rows: Sequence[Measured]) -> Drawing | None:
    """Loss over the length of the window; None for fewer than two lengths."""
    lengths = sorted({length for row in rows for length in row.losses})
    if len(lengths) < 2:
        return None
    with style():
        figure, axes = _axes(rows)
        _trained(axes, comparison)
        ends = []
        for row in rows:
            spans = [(min(by_seed.values()), max(by_seed.values()))
                     for by_seed in row.losses.values()]  # fmt: skip
            means = [sum(by_seed.values()) / len(by_seed) for by_seed in row.losses.values()]
            x = list(row.losses)
            axes.fill_between(x, *zip(*spans, strict=True), color=row.look.color, alpha=0.15,
                              linewidth=0)  # fmt: skip
            axes.plot(x, means, color=row.look.color, linestyle=row.look.dash, linewidth=1.3)
            axes.plot(x, means, "o", color=row.look.color, ms=3)
            ends.append(End(x[-1], means[-1], row.label, row.look.color))
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set(xlabel="Length of the window, tokens", ylabel="Validation loss")
        name_ends(axes, ends)
    return Drawing(
        name="lengths",
        title="Loss by length",
        caption=(
            "Validation loss over windows of each length, the same text cut up differently: mean"
            " over seeds, band from the lowest to the highest. The dotted line is the training"
            " length. A row ends where its positions do."
        ),
        columns=("variant", "length", "seed", "val_loss"),
        rows=[
            (row.label, length, seed, loss)
            for row in rows
            for length, by_seed in row.losses.items()
            for seed, loss in by_seed.items()
        ],
        figure=figure,
    )


def by_position(comparison: Comparison, rows: Sequence[Measured]) -> Drawing | None:
    """Loss at each position of the longest window that each row could read."""
    shown = [row for row in rows if max(row.positions) > 1]
    if not shown:
        return None
    with style():
        figure, axes = _axes(shown)
        _trained(axes, comparison)
        ends = []
        for row in shown:
            x, means, lows, highs = binned(row.positions[max(row.positions)])
            axes.fill_between(x, lows, highs, color=row.look.color, alpha=0.15, linewidth=0)
            axes.plot(x, means, color=row.look.color, linestyle=row.look.dash, linewidth=1.3)
            ends.append(End(float(x[-1]), float(means[-1]), row.label, row.look.color))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(xlabel="Position in the window, tokens", ylabel="Validation loss")
        name_ends(axes, ends)
    return Drawing(
        name="positions",
        title="Loss by position",
        caption=(
            "Validation loss at each position of the longest window that a row can read, averaged"
            " within bins of equal width on the axis: mean over seeds, band from the lowest to the"
            " highest. The dotted line is the training length."
        ),
        columns=("variant", "length", "position", "val_loss", "low", "high"),
        rows=list(_position_numbers(shown)),
        figure=figure,
    )


def binned(losses: Array) -> tuple[Array, Array, Array, Array]:
    """(seeds, positions) in bins of equal width in log position.

    Returns:
        the bins' mean position, counted from 1, and over seeds the mean, lowest and highest loss
        there, each (bins,).
    """
    count = losses.shape[1]
    positions = np.arange(1, count + 1)
    edges = np.unique(np.geomspace(1, count + 1, BINS + 1).astype(int))
    bins = np.searchsorted(edges, positions, side="right") - 1
    sizes = np.bincount(bins)
    sums = np.array([np.bincount(bins, weights=row) for row in losses])
    means = sums / sizes
    x = np.bincount(bins, weights=positions) / sizes
    return x, means.mean(axis=0), means.min(axis=0), means.max(axis=0)


def _axes(rows: Sequence[Measured]) -> tuple[Any, Any]:
    high = max(2.5, 0.5 + 0.15 * len(rows))
    figure = blank(0.55 + 3.5 + 0.3 + name_width([row.label for row in rows]), high + 0.6)
    axes = panel(figure, 0.55, 0.45, 3.5, high)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    return figure, axes


def _trained(axes: Any, comparison: Comparison) -> None:
    length = comparison.baseline.read.setting("training.seq_len")
    if isinstance(length, int):
        axes.axvline(length, color=GREY, linewidth=0.8, linestyle=(0, (1, 1.5)), zorder=0)
        axes.annotate("trained", (length, 1.0), xycoords=("data", "axes fraction"), ha="center",
                      va="bottom", fontsize=SMALL, color=GREY)  # fmt: skip


def _position_numbers(rows: Sequence[Measured]) -> Iterator[tuple[object, ...]]:
    for row in rows:
        length = max(row.positions)
        for x, mean, low, high in zip(*binned(row.positions[length]), strict=True):
            yield row.label, length, float(x), float(mean), float(low), float(high)
