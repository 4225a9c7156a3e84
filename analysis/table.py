"""One table of a sweep: a row per variant, every number with its spread, every gap with its mark.

A `Table` is what to print and the raw numbers behind it; `render` prints it. `ablation_table`
fills it from a manifest and its runs. What is missing, diverged or unfairly matched is marked in
the cell and named in a footnote; a variant that diverged in any seed gets no mean at all, since
the seeds that survived are not a fair sample of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from analysis import scored
from analysis.results import Manifest, Row, Run, in_state, numbers
from analysis.statistics import Difference, Summary, paired_difference, summarise, t_quantile

NOT_RUN, DIVERGED, MISMATCH = "—", "†", "≈"
TOLERANCE = 0.01  # a row that misses the matched quantity by more than this is marked
FIGURE_SPACE = "\u2007"  # as wide as a digit
MOST_LISTED = 12


@dataclass(frozen=True)
class Cell:
    """What is printed, and the raw numbers behind it: `value`, and `details` by the column's names.

    `mark` is printed after the text; a cell of only a mark has no text.
    """

    text: str
    value: str | int | float | None = None
    details: Mapping[str, float | int | None] = field(default_factory=dict)
    mark: str = ""
    bold: bool = False


@dataclass(frozen=True)
class Column:
    """`key` is the machine's name, `title` the reader's; `details` are the names in its cells.

    Columns of `priority` > 0 give way on a narrow terminal, the highest first.
    """

    key: str
    title: str
    align: Literal["left", "right"] = "right"
    details: tuple[str, ...] = ()
    priority: int = 0


@dataclass(frozen=True)
class TableRow:
    """Cells in the order of the columns. A change of group between rows is drawn as a rule."""

    group: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """What every renderer takes. Text is plain Unicode; escaping is the renderer's work."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    caption: str
    footnotes: tuple[str, ...]


@dataclass(frozen=True)
class _Numbers:
    """One variant's seeds as numbers, before they are rounded."""

    row: Row
    diverged: dict[int, Run]
    waiting: dict[int, Run]  # planned, without a result
    losses: dict[int, float]
    loss: Summary | None
    bpb: Summary | None
    difference: Difference | None
    speeds: list[float]


COLUMNS = (
    Column("variant", "Variant", "left"),
    Column("seeds", "Seeds", "left", ("planned", "diverged")),
    Column("parameters", "Params", "right", ("mismatch",), 1),
    Column("flops_per_token", "FLOPs/token", "right", ("mismatch",), 3),
    Column("tokens_per_s", "Tokens/s", priority=2),
    Column("val_loss", "Val loss", "left", ("sd", "n")),
    Column("val_bpb", "Val bpb", "left", ("sd", "n"), 4),
    Column("delta_val_loss", "Δ val loss [95% CI]", "left", ("low", "high", "n")),
)


def ablation_table(manifest: Manifest, runs: Mapping[str, Run]) -> Table:
    """The sweep's table. `runs` is what `results.read_runs` found; rows keep the manifest's order.

    Δ is against the baseline, paired over the seeds that are done in both (see `statistics`);
    it is bold only where its interval excludes zero.
    """
    baseline_losses = numbers(manifest.rows[0], runs, "val/loss")
    rows = [_numbers(row, runs, baseline_losses) for row in manifest.rows]
    decimals = decimals_for(r.loss.sd for r in rows if r.loss)
    bpb_decimals = decimals_for(r.bpb.sd for r in rows if r.bpb)
    delta_decimals = difference_decimals(r.difference for r in rows[1:])
    scores = scored.columns(manifest, runs)
    score_decimals = [min(4, decimals_for(score.spreads)) for score in scores]
    columns = COLUMNS + tuple(
        Column(score.key, score.title, "left", ("sd", "n", "item_stderr"), 1) for score in scores
    )
    cells = [
        (
            Cell(r.row.label, r.row.label),
            _seeds_cell(r),
            _count_cell(r.row, r.row.parameters, manifest.match == "params"),
            _count_cell(r.row, r.row.flops_per_token, manifest.match == "flops"),
            _speed_cell(r),
            _mean_cell(r, r.loss, decimals),
            _mean_cell(r, r.bpb, bpb_decimals),
            Cell("baseline", None) if i == 0 else _difference_cell(r, delta_decimals),
            *(_score_cell(r, *each, i) for each in zip(scores, score_decimals, strict=True)),
        )
        for i, r in enumerate(rows)
    ]
    aligned = [
        _align(line) if column.align == "left" else line
        for column, line in zip(columns, zip(*cells, strict=True), strict=True)
    ]
    return Table(
        title=manifest.name,
        columns=columns,
        rows=tuple(
            TableRow(row.group, line)
            for row, line in zip(manifest.rows, zip(*aligned, strict=True), strict=True)
        ),
        caption=_caption(manifest, rows),
        footnotes=(*_footnotes(manifest, rows), *scored.footnotes(manifest, scores)),
    )


def _numbers(row: Row, runs: Mapping[str, Run], baseline_losses: Mapping[int, float]) -> _Numbers:
    diverged = in_state(row, runs, "diverged")
    losses = numbers(row, runs, "val/loss")
    kept = {} if diverged else losses
    return _Numbers(
        row=row,
        diverged=diverged,
        waiting=in_state(row, runs, "missing", "unfinished", "failed"),
        losses=losses,
        loss=summarise(kept.values()),
        bpb=None if diverged else summarise(numbers(row, runs, "val/bpb").values()),
        difference=paired_difference(kept, baseline_losses),
        speeds=list(numbers(row, runs, "tokens_per_s").values()),
    )


def _mark(r: _Numbers) -> str:
    return f"{DIVERGED} {len(r.diverged)}/{len(r.row.runs)}" if r.diverged else NOT_RUN


def _seeds_cell(r: _Numbers) -> Cell:
    marks = [DIVERGED] * bool(r.diverged) + [NOT_RUN] * bool(r.waiting)
    done, planned = len(r.losses), len(r.row.runs)
    details = {"planned": planned, "diverged": len(r.diverged)}
    return Cell(f"{done}/{planned}", done, details, " ".join(marks))


def _count_cell(row: Row, count: float | None, matched: bool) -> Cell:
    if count is None:
        return Cell("", None, {"mismatch": None}, NOT_RUN)
    mismatch = row.mismatch if matched else None
    return Cell(_short(count), count, {"mismatch": mismatch}, MISMATCH if _unfair(mismatch) else "")


def _speed_cell(r: _Numbers) -> Cell:
    if not r.speeds:
        return Cell("", mark=NOT_RUN)
    median = float(np.median(r.speeds))
    return Cell(_short(median), median)


def _mean_cell(r: _Numbers, summary: Summary | None, decimals: int) -> Cell:
    if summary is None:
        return Cell("", None, {"sd": None, "n": 0}, _mark(r))
    spread = "" if summary.sd is None else f" ± {summary.sd:.{decimals}f}"
    details = {"sd": summary.sd, "n": summary.n}
    return Cell(f"{summary.mean:.{decimals}f}{spread}", summary.mean, details)


def _score_cell(r: _Numbers, score: scored.ScoreColumn, decimals: int, index: int) -> Cell:
    summary = None if r.diverged else score.summary(index)
    if summary is None:
        return Cell("", None, {"sd": None, "n": 0, "item_stderr": None}, _mark(r))
    stderr = score.stderr(index)
    cell = _mean_cell(r, summary, decimals)
    short = f" ({summary.n})" if summary.n < len(r.losses) else ""
    details = {**cell.details, "item_stderr": stderr}
    return replace(cell, text=cell.text + short, details=details)


def _difference_cell(r: _Numbers, decimals: int) -> Cell:
    d = r.difference
    if d is None:
        return Cell("", None, {"low": None, "high": None, "n": 0}, _mark(r))
    return Cell(
        difference_text(d, len(r.row.runs), decimals),
        d.mean,
        {"low": d.low, "high": d.high, "n": d.n},
        bold=d.excludes_zero,
    )


def difference_text(d: Difference, planned: int, decimals: int = 4) -> str:
    """`−0.0103 [−0.0150, −0.0056]`, saying so where pairs or the interval are missing."""
    text = _signed(d.mean, decimals)
    if d.low is not None and d.high is not None:
        text += f" [{_signed(d.low, decimals)}, {_signed(d.high, decimals)}]"
    elif d.n == 1:
        return f"{text} (1 pair: no interval)"
    return text if d.n == planned else f"{text} ({d.n} pairs)"


def _signed(value: float, decimals: int) -> str:
    text = f"{value:+.{decimals}f}"
    return text[1:] if value == 0 else text.replace("-", "−")


def decimals_for(spreads: Iterable[float | None]) -> int:
    """Enough to show the typical spread with two digits, 3 to 5; 4 where none is known."""
    known = [spread for spread in spreads if spread]
    return min(5, max(3, 1 - math.floor(math.log10(float(np.median(known)))))) if known else 4


def difference_decimals(differences: Iterable[Difference | None]) -> int:
    """`decimals_for` the intervals of one table's differences."""
    return decimals_for(d.half_width for d in differences if d)


def _short(count: float) -> str:
    """Three digits and a suffix: 790k, 1.05M, 124M."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * size:
            scaled = count / size
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(scaled) + 0.0003))}f}{suffix}"
    return f"{count:.0f}"


def _align(cells: Sequence[Cell]) -> Sequence[Cell]:
    """Pad the whole part of each number, so that decimal points stand below one another."""

    def lead(cell: Cell) -> int:
        return cell.text.find(".") if isinstance(cell.value, float) else 0

    widest = max(map(lead, cells))
    return [
        replace(cell, text=FIGURE_SPACE * (widest - lead(cell)) + cell.text)
        if lead(cell) > 0
        else cell
        for cell in cells
    ]


def _unfair(mismatch: float | None) -> bool:
    return mismatch is not None and abs(mismatch) > TOLERANCE


def _caption(manifest: Manifest, rows: Sequence[_Numbers]) -> str:
    planned = sorted({len(r.row.runs) for r in rows})
    seeds = f"n = {planned[0]}" if len(planned) == 1 else f"n = {planned[0]} to {planned[-1]}"
    matched = {
        "params": "parameters matched to the baseline's",
        "flops": "FLOPs per token matched to the baseline's",
        None: "neither parameters nor FLOPs matched",
    }[manifest.match]
    after = f" after {manifest.tokens:,} training tokens" if manifest.tokens else ""
    return (
        f"Validation loss (nats per token) and bits per byte{after}: mean ± sd over seeds"
        f" ({seeds} planned per row), {matched}."
        f" Δ: mean difference from {manifest.rows[0].label}, paired by seed, with the 95% t"
        " interval of the paired difference; bold where it excludes zero. A lower loss is better."
    )


def _footnotes(manifest: Manifest, rows: Sequence[_Numbers]) -> Iterable[str]:
    diverged = [
        f"{r.row.label} {len(r.diverged)}/{len(r.row.runs)}"
        f" ({'; '.join(_divergence(seed, run) for seed, run in r.diverged.items())}{_survivors(r)})"
        for r in rows
        if r.diverged
    ]
    if diverged:
        yield f"{DIVERGED} diverged, so not averaged: {_listed(diverged)}."
    never = [r.row.label for r in rows if len(r.waiting) == len(r.row.runs)]
    if never:
        yield f"{NOT_RUN} rows without any result: {_listed(never)}."
    partly = [
        f"{r.row.label} {_seeds(r.waiting)}" for r in rows if 0 < len(r.waiting) < len(r.row.runs)
    ]
    if partly:
        yield f"{NOT_RUN} runs without a result: {_listed(partly)}."
    failed = [
        f"{r.row.label} seed {seed} ({run.reason or 'no reason recorded'})"
        for r in rows
        for seed, run in r.waiting.items()
        if run.state == "failed"
    ]
    if failed:
        yield f"Failed in the last attempt: {_listed(failed)}."
    unfair = [
        f"{r.row.label} {_signed(100 * r.row.mismatch, 1)}%"
        for r in rows
        if r.row.mismatch is not None and _unfair(r.row.mismatch)
    ]
    if unfair and manifest.match:
        what = "parameters" if manifest.match == "params" else "FLOPs per token"
        limit = f"{TOLERANCE:.0%}"
        yield f"{MISMATCH} {what} off the baseline's by more than {limit}: {_listed(unfair)}."
    first = rows[0].losses
    same = [
        r.row.label
        for r in rows[1:]
        if (both := r.losses.keys() & first) and all(r.losses[s] == first[s] for s in both)
    ]
    if same:
        yield f"Losses identical to the baseline's, so the change may do nothing: {_listed(same)}."
    pairs = [r.difference.n for r in rows[1:] if r.difference]
    if pairs and min(pairs) == 1:
        yield "A single pair of runs has no interval: its difference may be all noise."
    if 2 in pairs:
        factor = t_quantile(0.975, 1)
        yield f"Fewer than 3 seeds: intervals are wide (±{factor:.1f} standard errors at n = 2)."
    if len(pairs) > 1:
        yield f"Intervals hold row by row; they are not yet corrected for {len(pairs)} comparisons."
    if any(r.speeds for r in rows):
        yield "Tokens/s: median over finished runs, on the hardware that each ran on."


def _divergence(seed: int, run: Run) -> str:
    step = run.result.get("diverged_step")
    return f"seed {seed}" + (f" at step {step}" if step is not None else f": {run.reason}")


def _survivors(r: _Numbers) -> str:
    finished = ", ".join(f"seed {seed} {loss:.4f}" for seed, loss in r.losses.items())
    return f"; finished: {finished}" if finished else ""


def _seeds(by_seed: Mapping[int, Run]) -> str:
    return f"seed{'s' * (len(by_seed) > 1)} {', '.join(map(str, by_seed))}"


def _listed(items: Sequence[str]) -> str:
    more = len(items) - MOST_LISTED
    return ", ".join(items[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")
