"""A factorial sweep drawn: its effects with their intervals, and how two factors go together."""

from __future__ import annotations

import itertools
import math

import numpy as np

from analysis.curves import Array
from analysis.factorial import Effect, Factorial, short_names
from analysis.figures.drawing import (
    GREY,
    Drawing,
    End,
    blank,
    looks,
    name_ends,
    name_width,
    panel,
    style,
)
from analysis.figures.effects import (
    COLORS,
    COLUMNS,
    Line,
    caption,
    plotted,
)

MOST_PAIRS = 3  # pairs of factors that are drawn, the strongest interactions first


def effects(found: Factorial) -> Drawing | None:
    """Main effects and interactions, one line each; None where the cells allow none."""
    if not found.effects:
        return None
    lines = [_line(effect) for effect in found.effects]
    return Drawing(
        name="effects",
        title="Main effects and interactions",
        caption=caption(
            "A factor's effect is the mean difference in validation loss between its two levels"
            " over all settings of the others, within each seed; an interaction (×) is half of how"
            " much one factor's effect depends on the other. A + or − joins effects that this"
            " design can't tell apart.",
            lines,
            len(lines),
        ),
        columns=("effect", *COLUMNS),
        rows=[(line.label, *line.numbers()) for line in lines],
        figure=plotted(lines, "Effect on validation loss, nats per token"),
    )


def _line(effect: Effect) -> Line:
    adjusted = effect.adjusted
    verdict = "cannot tell"
    if adjusted is not None and adjusted.rejected:
        verdict = "better" if effect.difference.mean < 0 else "worse"
    color = COLORS.get(verdict, GREY)
    group = "main effects" if effect.order == 1 else "interactions"
    if effect.order > 1 and verdict in COLORS:
        verdict = "interact"
    return Line(effect.label, effect.difference, adjusted, verdict, color, effect.difference.n,
                group)  # fmt: skip


def interactions(found: Factorial) -> Drawing | None:
    """Mean loss over one factor's levels, a line for each level of another; None for one factor or
    where a combination of the two has no cell that counts.
    """
    names = list(found.levels)
    short = dict(zip(names, short_names(names), strict=True))
    tables = {
        pair: table
        for pair in itertools.combinations(names, 2)
        if (table := _means(found, *pair)) is not None
    }
    if not tables or not found.seeds:
        return None
    pairs = sorted(tables, key=lambda pair: -_strength(found, *pair))[:MOST_PAIRS]
    values = np.concatenate([tables[pair].ravel() for pair in pairs])
    margin = 0.08 * np.ptp(values) or 0.05
    wide, high = 1.7, 2.2
    rights = [0.45 + name_width([f"{short[b]}: {x}" for x in found.levels[b]]) for _, b in pairs]
    with style():
        figure = blank(0.55 + len(pairs) * wide + sum(rights), high + 0.65)
        left = 0.55
        for i, (pair, right) in enumerate(zip(pairs, rights, strict=True)):
            a, b = pair
            axes = panel(figure, left, 0.45, wide, high)
            left += wide + right
            x = np.arange(len(found.levels[a]))
            axes.set(xlim=(-0.3, x[-1] + 0.3), ylim=(values.min() - margin, values.max() + margin))
            axes.set_xticks(x, found.levels[a], parse_math=False)
            axes.set_xlabel(short[a], parse_math=False)
            ends = []
            for j, (level, look) in enumerate(
                zip(found.levels[b], looks(len(found.levels[b])), strict=True)
            ):
                losses = tables[pair][:, j]  # (levels of a, seeds)
                axes.plot(x, losses, color=look.color, linewidth=0.5, alpha=0.35)
                axes.plot(x, losses.mean(axis=1), "o-", color=look.color, ms=3.5, linewidth=1.3)
                end = float(losses[-1].mean())
                ends.append(End(float(x[-1]), end, f"{short[b]}: {level}", look.color))
            name_ends(axes, ends)
            if i == 0:
                axes.set_ylabel("Validation loss")
    return Drawing(
        name="interactions",
        title="How the factors go together",
        caption=(
            "Mean validation loss at each combination of two factors, averaged over the others; the"
            " thin lines are the seeds. Parallel lines: the one factor does the same whatever the"
            " other is."
            + (f" The {MOST_PAIRS} strongest of {len(tables)} pairs."
               if len(tables) > MOST_PAIRS else "")
        ),
        columns=("factor", "level", "other", "other_level", "seed", "val_loss"),
        rows=[
            (a, x, b, y, seed, float(table[i, j, k]))
            for (a, b), table in tables.items()
            for i, x in enumerate(found.levels[a])
            for j, y in enumerate(found.levels[b])
            for k, seed in enumerate(found.seeds)
        ],
        figure=figure,
    )  # fmt: skip


def _means(found: Factorial, a: str, b: str) -> Array | None:
    """(levels of a, levels of b, seeds) mean over the cells; None where there is none."""
    names = list(found.levels)
    i, j = names.index(a), names.index(b)
    out = []
    for x, y in itertools.product(found.levels[a], found.levels[b]):
        cells = [losses for cell, losses in found.cells.items() if (cell[i], cell[j]) == (x, y)]
        if not cells:
            return None
        out.append([math.fsum(c[seed] for c in cells) / len(cells) for seed in found.seeds])
    return np.array(out).reshape(len(found.levels[a]), len(found.levels[b]), len(found.seeds))


def _strength(found: Factorial, a: str, b: str) -> float:
    """The largest interaction of the two that was measured."""
    return max((abs(e.difference.mean) for e in found.effects if set(e.factors) == {a, b}),
               default=0.0)  # fmt: skip
