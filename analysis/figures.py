"""Draw a sweep: its learning curves, and beside them what is left at the end, paired by seed.

Curves of one sweep often lie closer together than their own spread over seeds, so the left panel
shows how training went and the right one decides: it is the table's Δ column, drawn.
Drawn twice, the files are the same byte for byte.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.results import Manifest, Row, Run, in_state, numbers, read_curve, read_runs
from analysis.statistics import Difference, paired_difference
from analysis.table import DIVERGED, difference_decimals, difference_text
from experiments.record import UserError

# Okabe and Ito 2008, Color Universal Design. Black is the baseline's; yellow is lost on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1.2)))  # the palette again, for more than 6 variants
INK, GREY, RULE = "#000000", "#666666", "#E6E6E6"
EARLY = 0.3  # the share of training whose steep fall may leave the panel at the top
STYLE: dict[str, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.hashsalt": "ceteris",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.05,
}


@dataclass(frozen=True)
class _Line:
    """One variant's curves by seed, and how it is drawn."""

    row: Row
    done: dict[int, dict[int, float]]  # seed -> tokens -> validation loss
    diverged: dict[int, dict[int, float]]
    difference: Difference | None
    color: str
    dash: Any

    @property
    def label(self) -> str:
        if not self.diverged:
            return self.row.label
        return f"{self.row.label} {DIVERGED} {len(self.diverged)}/{len(self.row.runs)}"

    def shared(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Tokens (P,) that every finished seed was evaluated at, and losses (seeds, P)."""
        curves = list(self.done.values())
        tokens = sorted(set(curves[0]).intersection(*curves[1:])) if curves else []
        losses = [[curve[t] for t in tokens] for curve in curves]
        shape = len(curves), len(tokens)
        return np.array(tokens, dtype=float), np.array(losses, dtype=float).reshape(shape)


def loss_curves(manifest: Manifest, runs_root: Path, out_stem: Path) -> list[Path]:
    """Draw validation loss against training tokens, and the paired differences at the end.

    Left: mean over finished seeds, band from the lowest to the highest seed. A variant with a
    diverged seed is drawn seed by seed, × where one ended. Right: Δ with its 95% t interval, filled
    where that excludes zero. Writes and returns `out_stem` + .svg, .png and .csv (the numbers).
    Raises UserError when no run has anything to draw, or the files can't be written.
    """
    runs = read_runs(manifest, runs_root)
    lines = _lines(manifest, runs, runs_root)
    if not any(line.done or line.diverged for line in lines):
        raise UserError(f"sweep {manifest.name!r} has no finished run to draw; see `status`")
    paths = [out_stem.with_name(out_stem.name + suffix) for suffix in (".svg", ".png", ".csv")]
    try:
        out_stem.parent.mkdir(parents=True, exist_ok=True)
        _draw(manifest, lines, paths[0], paths[1])
        _write_csv(lines, paths[2])
    except OSError as error:
        raise UserError(f"{out_stem}: the figure can't be written: {error.strerror}") from error
    return paths


def mean_curves(manifest: Manifest, runs_root: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Label -> training tokens and the mean loss over finished seeds, as `loss_curves` draws them.

    A variant with a diverged seed has none.
    """
    means = {}
    for line in _lines(manifest, read_runs(manifest, runs_root), runs_root):
        tokens, losses = line.shared()
        if tokens.size and not line.diverged:
            means[line.row.label] = tokens.tolist(), losses.mean(axis=0).tolist()
    return means


def _lines(manifest: Manifest, runs: Mapping[str, Run], runs_root: Path) -> list[_Line]:
    losses = [numbers(row, runs, "val/loss") for row in manifest.rows]
    lines = []
    for i, row in enumerate(manifest.rows):
        diverged = in_state(row, runs, "diverged")
        curves = {s: read_curve(runs_root / r.id) for s, r in in_state(row, runs, "done").items()}
        lines.append(
            _Line(
                row=row,
                done={seed: curve for seed, curve in curves.items() if curve},
                diverged={s: read_curve(runs_root / run.id) for s, run in diverged.items()},
                difference=None if diverged or i == 0 else paired_difference(losses[i], losses[0]),
                color=PALETTE[(i - 1) % len(PALETTE)] if i else INK,
                dash=DASHES[(i - 1) // len(PALETTE) % len(DASHES)] if i else "-",
            )
        )
    return lines


def _draw(manifest: Manifest, lines: Sequence[_Line], svg: Path, png: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(dict(matplotlib.rcParamsDefault) | STYLE):  # type: ignore[arg-type]
        # Inches: the names between the panels and the numbers at the right take what they need.
        names = 0.06 * max(len(line.label) for line in lines)
        margin, between, numbers_width = 0.6, 2 * names + 0.55, 2.1
        panels = max(7.5 - margin - between - numbers_width, 3.6)
        width = margin + panels + between + numbers_width
        height = max(2.9, 1.1 + 0.2 * len(lines))
        figure = Figure(figsize=(width, height))
        bottom, tall = 0.75 / height, 1 - 0.85 / height
        left = figure.add_axes((margin / width, bottom, 0.58 * panels / width, tall))
        start = (margin + 0.58 * panels + between) / width
        right = figure.add_axes((start, bottom, 0.42 * panels / width, tall))
        _draw_curves(left, lines)
        _draw_differences(right, manifest, lines)
        figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png, dpi=200, metadata={"Software": None})


def _draw_curves(axes: Any, lines: Sequence[_Line]) -> None:
    from matplotlib.ticker import EngFormatter

    low, high = _loss_range(lines)
    ends = []  # (loss, tokens, line) where each variant's drawing ends
    for depth, line in enumerate(lines):
        style = {"color": line.color, "linestyle": line.dash, "zorder": 3 - depth / len(lines)}
        tokens, losses = line.shared()
        if line.diverged:
            for curve in (*line.done.values(), *line.diverged.values()):
                axes.plot(list(curve), list(curve.values()), linewidth=0.7, **style)
            tails = [list(curve.items())[-1] for curve in line.diverged.values() if curve]
            for x, loss in tails:
                axes.plot(x, min(loss, high), "x", color=line.color, ms=5, clip_on=False)
            if not line.done and tails:
                ends.append((tails[0][1], float(tails[0][0]), line))
        elif tokens.size:
            band = losses.min(axis=0), losses.max(axis=0)
            axes.fill_between(tokens, *band, color=line.color, alpha=0.15, linewidth=0)
            axes.plot(tokens, losses.mean(axis=0), linewidth=1.3, **style)
        if tokens.size:
            ends.append((float(losses[:, -1].mean()), float(tokens[-1]), line))
    last = max((x for _, x, _ in ends), default=1.0)
    axes.set(xlim=(0, last), ylim=(low, high), xlabel="Training tokens", ylabel="Validation loss")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.locator_params(axis="x", nbins=5)
    # Names at the ends, moved apart to a line's height, each with a thin leader from its curve.
    ends.sort(key=lambda end: end[0])
    inches = axes.get_position().height * axes.figure.get_figheight()
    heights = [min((loss - low) / (high - low), 1.0) for loss, _, _ in ends]
    for (_, tokens_end, line), end, y in zip(
        ends, heights, _spread(heights, 0.135 / inches), strict=True
    ):
        place = {"color": line.color, "transform": axes.transAxes, "clip_on": False}
        axes.plot([tokens_end / last + 0.01, 1.055], [end, y], linewidth=0.5, **place)
        axes.text(1.07, y, line.label, va="center", parse_math=False, **place)


def _draw_differences(axes: Any, manifest: Manifest, lines: Sequence[_Line]) -> None:
    shown = lines[1:]
    decimals = difference_decimals(line.difference for line in shown)
    limit = _difference_limit([line.difference for line in shown if line.difference])
    axes.axvline(0, color=INK, linewidth=0.8, zorder=1)
    for y, line in enumerate(shown):
        d = line.difference
        note = f"diverged {len(line.diverged)}/{len(line.row.runs)}" if line.diverged else "no pair"
        axes.annotate(
            difference_text(d, len(line.row.runs), decimals) if d else note, (1.06, y),
            color=GREY, va="center", xycoords=("axes fraction", "data"), fontsize=6.5,
        )  # fmt: skip
        axes.axhline(y, color=RULE, linewidth=0.6, zorder=0)
        if d is None:
            continue
        if d.low is not None and d.high is not None:
            axes.plot(
                [max(d.low, -limit), min(d.high, limit)], [y, y], color=line.color, linewidth=1.3
            )
            for end, edge, marker in ((d.low, -limit, "<"), (d.high, limit, ">")):
                if abs(end) > limit and end * edge > 0:  # the interval goes on beyond the panel
                    axes.plot(edge, y, marker, color=line.color, ms=3.5, clip_on=False)
        axes.plot(
            d.mean, y, "o", ms=5, mew=1.1, color=line.color, clip_on=False, zorder=4,
            mfc=line.color if d.excludes_zero else "white",
        )  # fmt: skip
    axes.set(xlim=(-limit, limit), ylim=(max(len(shown), 1) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [line.row.label for line in shown], parse_math=False)
    for tick, line in zip(axes.get_yticklabels(), shown, strict=True):
        tick.set_color(line.color)
    axes.set_xlabel(
        f"Δ validation loss from {manifest.rows[0].label}\n"
        "paired by seed, 95% t interval\nfilled where it excludes 0",
        parse_math=False,
    )
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=4)


def _loss_range(lines: Sequence[_Line]) -> tuple[float, float]:
    """The losses after the early fall, with a margin: where the variants can be told apart."""
    curves = [c for line in lines for c in line.done.values()] or [
        c for line in lines for c in line.diverged.values()
    ]
    last = max((max(c) for c in curves if c), default=1)
    late = [loss for c in curves for tokens, loss in c.items() if tokens >= EARLY * last]
    if not late:
        return 0.0, 1.0
    margin = 0.04 * (max(late) - min(late)) or 0.05
    return min(late) - margin, max(late) + margin


def _difference_limit(differences: Sequence[Difference]) -> float:
    """Half the panel's width: room for every mean; an interval far wider than most is cut."""
    means = [abs(d.mean) for d in differences]
    halves = [d.half_width for d in differences if d.half_width is not None]
    reach = [abs(d.mean) + (d.half_width or 0.0) for d in differences]
    typical = 2.5 * max([*means, float(np.median(halves)) if halves else 0.0], default=0.0)
    return 1.08 * min(max(reach, default=0.0), typical) or 0.01


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move sorted heights apart to at least `gap`, each block kept about its own mean.

    The least-squares answer (pool adjacent violators); nothing goes below 0.
    """
    blocks: list[list[float]] = []  # [sum of (height - position·gap), count]
    for i, height in enumerate(heights):
        blocks.append([height - i * gap, 1])
        while len(blocks) > 1 and blocks[-2][0] / blocks[-2][1] > blocks[-1][0] / blocks[-1][1]:
            total, count = blocks.pop()
            blocks[-1][0] += total
            blocks[-1][1] += count
    starts = [max(total / count, 0.0) for total, count in blocks for _ in range(int(count))]
    return [start + i * gap for i, start in enumerate(starts)]


def _write_csv(lines: Sequence[_Line], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["panel", "label", "seed", "tokens", "value", "low", "high", "state"])
        for line in lines:
            for state, curves in (("done", line.done), ("diverged", line.diverged)):
                for seed, curve in curves.items():
                    for tokens, loss in curve.items():
                        writer.writerow(
                            ["curve", line.row.label, seed, tokens, loss, "", "", state]
                        )
        for line in lines:
            if d := line.difference:
                writer.writerow(
                    ["difference", line.row.label, "", "", d.mean, d.low, d.high, f"n={d.n}"]
                )
