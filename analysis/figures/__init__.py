"""Figures of a sweep: each a picture, its numbers, and a caption written from them.

`draw` makes all that apply to the sweep: curves against tokens, FLOPs and time, a forest of the
paired differences, a ladder as a waterfall, sensitivity to a tuned setting, quality against cost,
interactions, loss by length. `drawing.write` puts one on disk as SVG, PDF, PNG and CSV.
`loss_curves` is the one picture that `sweep` and `table` leave behind.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.figures.overview import loss_curves, mean_curves

if TYPE_CHECKING:
    from analysis.comparison import Comparison
    from analysis.figures.drawing import Drawing

__all__ = ["draw", "loss_curves", "mean_curves"]

MOST_ROWS = 60  # that are drawn, besides the baseline


def draw(comparison: Comparison, root: Path) -> list[Drawing]:
    """Every figure that the sweep has something for, what decides first.

    Of more than MOST_ROWS rows those are drawn that differ most; the captions say so.

    Raises:
        UserError: a record of a run is damaged.
    """
    from analysis.factorial import factorial
    from analysis.figures import cost, curves, effects, interactions, ladder, lengths, tuning

    shown = comparison.largest(MOST_ROWS)
    lines = curves.histories(shown, root)
    measured = lengths.measured(shown, root)
    crossed = factorial(comparison)
    left_out = (
        f" Of the {len(comparison.rows) - 1:,} rows beside the baseline those {MOST_ROWS} that"
        " differ most from it."
    )

    def of_shown(drawing: Drawing | None) -> Drawing | None:
        if drawing is None or shown is comparison:
            return drawing
        return replace(drawing, caption=drawing.caption + left_out)

    found = [
        of_shown(effects.forest(shown)),
        *(of_shown(curves.draw(lines, by)) for by in curves.AXES),
        ladder.waterfall(comparison),
        interactions.effects(crossed) if crossed else None,
        interactions.interactions(crossed) if crossed else None,
        of_shown(tuning.sensitivity(shown)),
        of_shown(lengths.by_length(shown, measured)),
        of_shown(lengths.by_position(shown, measured)),
        of_shown(cost.pareto(shown)),
    ]
    return [drawing for drawing in found if drawing is not None]
