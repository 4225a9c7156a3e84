"""One picture of a sweep: its learning curves, and beside them what is left at the end.

Curves of one sweep often lie closer together than their own spread over seeds, so the left panel
shows how training went and the right one decides: it is the table's Δ column, drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis.comparison import Comparison
from analysis.figures import curves, effects
from analysis.figures.curves import History
from analysis.figures.drawing import Drawing, blank, name_width, panel, save, shortened, style
from experiments.record import UserError

HOW = "\nthick: 95% interval, thin: Holm's,\nfilled where that excludes 0"
COLUMNS = ("panel", "label", "seed", "tokens", "value", "low", "high", "state")


def loss_curves(comparison: Comparison, root: Path, out_stem: Path) -> list[Path]:
    """Draw validation loss against training tokens, and the paired differences at the end.

    Left: mean over the seeds that count, band from the lowest to the highest. A variant with a
    diverged seed is drawn seed by seed, × where one ended. Right: Δ with its 95% interval, and
    thinner the one at Holm's level, filled where that excludes zero. Writes and returns `out_stem`
    + .svg, .png and .csv (the numbers).

    Raises:
        UserError: no run has anything to draw, or the files can't be written.
    """
    lines = curves.histories(comparison, root)
    if not any(line.runs or line.alone for line in lines):
        name = comparison.manifest.name
        raise UserError(f"sweep {name!r} has no finished run to draw; see `status`")
    return save(_draw(comparison, lines), out_stem, (".svg", ".png", ".csv"))


def mean_curves(comparison: Comparison, root: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> training tokens and the mean loss over the seeds that count, as `loss_curves` draws
    them. A variant with a diverged seed has none.
    """
    return {
        line.row.label: (line.tokens.tolist(), line.losses.mean(axis=0).tolist())
        for line in curves.histories(comparison, root)
        if line.tokens.size
    }


def _draw(comparison: Comparison, lines: Sequence[History]) -> Drawing:
    shown = [line for line in lines if line.runs or line.alone]
    rows = effects.lines_of(comparison, [line.look.color for line in lines[1:]])
    base = comparison.baseline.label
    with style():
        ends = name_width([line.name for line in shown])
        names = name_width([line.label for line in rows])
        left, right = 2.3, 1.9
        high = max(2.1, effects.ROW * effects.lines_needed(rows))
        figure = blank(0.8 + left + ends + names + right + effects.text_width(rows), high + 1.0)
        first = panel(figure, 0.55, 0.75, left, high)
        second = panel(figure, 0.8 + left + ends + names, 0.75, right, high)
        curves.plot(first, shown, "tokens")
        effects.plot(second, rows, f"Δ validation loss from {shortened(base)}{HOW}")
        for tick, line in zip(second.get_yticklabels(), rows, strict=True):
            tick.set_color(line.color)
    points = curves.numbers(shown, "tokens")
    return Drawing(
        name="overview",
        title=comparison.manifest.name,
        caption="Validation loss against training tokens, and the paired differences at the end.",
        columns=COLUMNS,
        rows=[
            *(("curve", label, seed, tokens, loss, "", "", state)
              for label, seed, tokens, loss, state in points),
            *(("difference", line.label, "", "", d.mean, d.low, d.high, f"n={d.n}")
              for line in rows if (d := line.difference)),
        ],
        figure=figure,
    )  # fmt: skip
