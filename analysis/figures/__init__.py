"""Figures of a sweep: each a picture, its numbers, and a caption written from them.

`draw` makes all that apply to the sweep: curves against tokens, FLOPs and time, a forest of the
paired differences, a ladder as a waterfall, sensitivity to a tuned setting, quality against cost,
interactions, loss by length. `drawing.write` puts one on disk as SVG, PDF, PNG and CSV.
`loss_curves` is the one picture that `sweep` and `table` leave behind.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.figures.overview import loss_curves, mean_curves

if TYPE_CHECKING:
    from analysis.comparison import Comparison
    from analysis.figures.drawing import Drawing

__all__ = ["draw", "loss_curves", "mean_curves"]


def draw(comparison: Comparison, root: Path) -> list[Drawing]:
    """Every figure that the sweep has something for, what decides first.

    Raises:
        UserError: a record of a run is damaged.
    """
    from analysis.factorial import factorial
    from analysis.figures import cost, curves, effects, interactions, ladder, lengths, tuning

    lines = curves.histories(comparison, root)
    measured = lengths.measured(comparison, root)
    crossed = factorial(comparison)
    found = [
        effects.forest(comparison),
        *(curves.draw(lines, by) for by in curves.AXES),
        ladder.waterfall(comparison),
        interactions.effects(crossed) if crossed else None,
        interactions.interactions(crossed) if crossed else None,
        tuning.sensitivity(comparison),
        lengths.by_length(comparison, measured),
        lengths.by_position(comparison, measured),
        cost.pareto(comparison),
    ]
    return [drawing for drawing in found if drawing is not None]
