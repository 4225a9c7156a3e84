"""One table of a sweep: a row per variant, every number with its spread, every gap with its mark.

A `Table` is what to print and the raw numbers behind it; `render` prints it. `table` fills it from
a comparison, with the columns that are asked for. What is missing, diverged, edited or not
comparable is marked in the cell and named in a footnote; a variant that diverged in any seed gets
no mean at all, since the seeds that survived are not a fair sample of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from analysis import notes, scored, task_items
from analysis.budgets import BUDGETS
from analysis.comparison import INCOMPARABLE, Compared, Comparison, compare
from analysis.curves import Budget
from analysis.results import Manifest, Run
from analysis.statistics import Summary, summarise
from analysis.wording import (
    CUT,
    DIVERGED,
    EDITED,
    MISMATCH,
    NOT_RUN,
    UNLIKE,
    decimals_for,
    difference_decimals,
    difference_text,
    interval_text,
    p_text,
    percent,
    short,
    signed,
)
from components.registry import UserError, did_you_mean

FIGURE_SPACE = "\u2007"  # as wide as a digit
Align = Literal["left", "right"]
NO_SUCH = "n/a"  # it ran, and has no such number
ITEMS = "items"  # stands for a column of each task, item by item
ITEM_DETAILS = (
    *("low", "high", "p", "p_adjusted", "error", "error_items", "error_seeds"),
    *("items", "clusters", "seeds", "share_seeds", "share_items", "share_both"),
)
AT_LENGTH = re.compile(r"val/loss@(\d+)")


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

    Columns of `priority` > 0 give way where there is little width, the highest first.
    """

    key: str
    title: str
    align: Align = "right"
    details: tuple[str, ...] = ()
    priority: int = 0


@dataclass(frozen=True)
class SeedValues:
    """One run of a row: what the row's means and differences are made of.

    Attributes:
        seed: the sweep's, by which runs are paired; `own` is the run's, the same unless the row has
            seeds of its own.
        state: done, diverged, failed, unfinished, missing or edited.
        val_loss, val_bpb: nats per token and bits per byte; None where the run does not count.
        delta_val_loss: from the baseline's loss at this seed, nats per token; None without a pair.
        note: why it diverged, failed or does not count.
    """

    seed: int
    own: int
    run: str
    state: str
    val_loss: float | None
    val_bpb: float | None
    delta_val_loss: float | None
    note: str


@dataclass(frozen=True)
class TableRow:
    """Cells in the order of the columns. A change of group between rows is drawn as a rule.

    `seeds` are the runs behind the cells, in the order of seeds; empty where rows are no variants.
    """

    group: str
    cells: tuple[Cell, ...]
    seeds: tuple[SeedValues, ...] = ()


@dataclass(frozen=True)
class Table:
    """What every renderer takes. Text is plain Unicode; escaping is the renderer's work.

    `of_column`: footnote -> key of the column without which it says nothing.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[TableRow, ...]
    caption: str
    footnotes: tuple[str, ...]
    of_column: Mapping[str, str] = field(default_factory=dict)

    def notes(self, kept: Iterable[int]) -> list[str]:
        """The footnotes where only these columns, by index, are shown."""
        keys = {self.columns[i].key for i in kept}
        return [note for note in self.footnotes if self.of_column.get(note) in (None, *keys)]


@dataclass(frozen=True)
class _Source:
    """A column and how its cells come from a comparison. `shown`: where no columns are named."""

    column: Column
    cells: Callable[[Comparison], Iterable[Cell]]
    shown: bool = False


def ablation_table(
    manifest: Manifest,
    runs: Mapping[str, Run],
    root: Path | None = None,
    columns: Sequence[str] | None = None,
) -> Table:
    """`table` of `comparison.compare`, in one call."""
    return table(compare(manifest, runs, root), columns, root)


def table(
    comparison: Comparison, columns: Sequence[str] | None = None, root: Path | None = None
) -> Table:
    """The sweep's table; rows keep the manifest's order, the baseline first.

    Args:
        columns: keys of the columns, in their order, after the variant's name; `all` stands for
            all that have something to say, and `items` for the tasks compared item by item, which
            are read from `root` only then. By default those that a reader needs.
        root: where the runs lie.

    Raises:
        UserError: there is no such column; says which there are.
    """
    tasks = scored.columns(comparison)
    by_item = _by_item(comparison, columns or (), root)
    sources = {source.column.key: source for source in _sources(comparison, tasks, by_item)}
    chosen = _chosen(sources, columns)
    filled = [(source.column, list(source.cells(comparison))) for source in chosen]
    if columns is not None:
        filled = [(replace(column, priority=0), cells) for column, cells in filled]
        if "all" in columns:
            filled = [pair for pair in filled if any(cell.value is not None for cell in pair[1])]
    cells = zip(*(_align(line) if c.align == "left" else line for c, line in filled), strict=True)
    keys = {column.key for column, _ in filled}
    return Table(
        title=comparison.manifest.name,
        columns=tuple(column for column, _ in filled),
        rows=tuple(
            TableRow(r.row.group, line, tuple(_by_seed(r, comparison.baseline)))
            for r, line in zip(comparison.rows, cells, strict=True)
        ),
        caption=notes.caption(comparison),
        footnotes=(
            *notes.footnotes(comparison, keys),
            *scored.footnotes(
                comparison.baseline.label, [task for task in tasks if task.key in keys]
            ),
            *_item_notes(comparison, [task for task in by_item if task.key in keys]),
        ),
        of_column=notes.of_one_column(),
    )


def _by_seed(r: Compared, baseline: Compared) -> Iterable[SeedValues]:
    found = {**r.runs, **r.diverged, **r.waiting}
    losses, bpb = r.losses, r.by_seed("val/bpb")
    paired = baseline.losses if r.difference is not None else {}
    for seed, run_id in sorted(r.read.runs.items()):
        run = found.get(seed)
        pair = seed in losses and seed in paired
        yield SeedValues(
            seed,
            r.read.seeds.get(seed, seed),
            run_id,
            run.state if run is not None else "edited",
            losses.get(seed),
            bpb.get(seed),
            losses[seed] - paired[seed] if pair else None,
            r.excluded.get(seed) or (run.reason if run is not None else ""),
        )


def _chosen(sources: Mapping[str, _Source], columns: Sequence[str] | None) -> list[_Source]:
    if columns is None:
        return [source for source in sources.values() if source.shown]
    wanted = ["variant"]
    for key in columns:
        several = {"all": sources, ITEMS: [k for k in sources if k.startswith(f"{ITEMS}:")]}
        if key not in several and key not in sources:
            raise UserError(f"no column '{key}'{did_you_mean(key, [*sources, *several])}")
        wanted += several.get(key, [key])
    return [sources[key] for key in dict.fromkeys(wanted)]


def _by_item(
    comparison: Comparison, columns: Sequence[str], root: Path | None
) -> list[task_items.TaskItems]:
    """The tasks that `columns` ask for item by item."""
    if root is None or not any(key.partition(":")[0] == ITEMS for key in columns):
        return []
    names = task_items.tasks(comparison)
    if not names:
        raise UserError(
            f"no column '{ITEMS}': there is no task that {comparison.baseline.label} and another"
            " row were both scored on"
        )
    return task_items.read(comparison, root, names)


def _item_notes(comparison: Comparison, found: Sequence[task_items.TaskItems]) -> Iterable[str]:
    if found:
        yield f"{task_items.method(comparison)}."
        yield from task_items.unread(found)


def _sources(
    comparison: Comparison,
    tasks: Sequence[scored.ScoreColumn],
    by_item: Sequence[task_items.TaskItems],
) -> Iterable[_Source]:
    """Every column that this sweep could have, in the order of the table."""
    rows, match = comparison.rows, comparison.manifest.match
    several = any(r.difference and r.difference.n > 1 for r in rows)
    tuned = any(r.tuning for r in rows)
    left: Align = "left"
    ends, spread = ("low", "high", "n"), ("sd", "n")

    yield _Source(Column("variant", "Variant", left), _each(_variant_cell), True)
    yield _Source(Column("seeds", "Seeds", left, ("planned", "diverged")), _each(_seeds_cell), True)
    yield _Source(
        Column("parameters", "Params", "right", ("mismatch",), 2),
        _each(lambda r: _count_cell(r, r.read.parameters, match == "params")),
        True,
    )
    yield _Source(
        Column("flops_per_token", "FLOPs/token", "right", ("mismatch",), 4),
        _each(lambda r: _count_cell(r, r.read.flops_per_token, match == "flops")),
        True,
    )
    yield _Source(Column("mismatch", "Mismatch"), _each(_mismatch_cell))
    yield _Source(
        Column("tokens_per_s", "Tokens/s", "right", ("mismatch",), 3),
        _each(lambda r: _median_cell(r, "tokens_per_s", "", match == "time")),
        True,
    )
    yield _Source(
        Column("peak_memory", "Peak mem", priority=6),
        _each(lambda r: _median_cell(r, "peak_memory_bytes", "B")),
        any(r.by_seed("peak_memory_bytes") for r in rows),
    )
    yield _Source(Column("lr", "LR", priority=1), _each(_lr_cell), tuned)
    yield _Source(Column("tries", "Tries", left, ("diverged",), 1), _each(_tries_cell), tuned)
    yield _Source(
        Column("sensitivity", "LR sensitivity", priority=1),
        _each(lambda r: _number_cell(r, r.tuning.sensitivity if r.tuning else None, "{:.4f}")),
    )
    yield _Source(Column("expected_best", "Expected best", "right", ("tries",)), _best_cells)
    yield _mean_source("val_loss", "Val loss", "val/loss", True)
    yield _mean_source("val_bpb", "Val bpb", "val/bpb", True, 5)
    yield _Source(
        Column("above_floor", "Above floor", left, spread, 1),
        partial(_mean_cells, each=_above_floor),
        any(r.by_seed("floor/loss") for r in rows),
    )
    lengths = {
        int(found[1])
        for r in rows
        for run in r.runs.values()
        for key in run.result
        if (found := AT_LENGTH.fullmatch(key))
    }
    for length in sorted(lengths):
        key = f"val/loss@{length}"
        yield _mean_source(f"val_loss@{length}", f"Loss at {length}", key, True, 3)
    yield _Source(
        Column("delta_val_loss", "Δ val loss [95% CI]", left, (*ends, "sd", "p")),
        _delta_cells,
        True,
    )
    yield _Source(
        Column("delta_adjusted", "Δ [Holm's CI]", left, ("low", "high", "level")), _adjusted_cells
    )
    yield _Source(Column("p", "p (Holm)", "right", ("unadjusted",)), _each(_p_cell), several)
    yield _Source(Column("p_sign", "p (sign flip)", "right", ("smallest",)), _each(_p_sign_cell))
    yield _Source(Column("verdict", "Verdict", left), _each(_verdict_cell), True)
    yield _Source(
        Column("pairing", "sd paired/unpaired", "right", ("paired", "unpaired")),
        _each(_pairing_cell),
    )
    yield _Source(
        Column("wins", "P(lower)"),
        _each(lambda r: _number_cell(r, r.difference.wins if r.difference else None, "{:.2f}")),
    )
    for by in BUDGETS:
        yield _Source(
            Column(
                f"delta_at_{by}",
                f"Δ at equal {'FLOPs' if by == 'flops' else by}",
                left,
                (*ends, "budget"),
            ),
            partial(_reading_cells, by=by),
        )
    yield _Source(Column("gain", "Compute gain", left, (*ends, "at_least")), _each(_gain_cell))
    for task in tasks:
        details = ("sd", "n", "item_stderr")
        yield _Source(
            Column(task.key, task.title, left, details, 1), partial(_score_cells, task=task), True
        )
    for items in by_item:
        yield _Source(
            Column(items.key, f"Δ {items.title}", left, ITEM_DETAILS),
            partial(_item_cells, task=items),
        )


# --- cells ---------------------------------------------------------------------------------------


def _each(cell: Callable[[Compared], Cell]) -> Callable[[Comparison], Iterable[Cell]]:
    return lambda comparison: map(cell, comparison.rows)


def _mark(r: Compared) -> str:
    """Why a row has no number."""
    if r.diverged:
        return f"{DIVERGED} {len(r.diverged)}/{r.planned}"
    return EDITED if r.excluded and not r.waiting else NOT_RUN


def _absent(r: Compared, **details: float | int | None) -> Cell:
    """The cell of a row without such a number: because it has not run, or has none."""
    if r.losses and not r.diverged:
        return Cell(NO_SUCH, None, details)
    return Cell("", None, details, _mark(r))


def _number_cell(r: Compared, value: float | None, form: str) -> Cell:
    """A number that only variants have."""
    if value is not None:
        return Cell(form.format(value), value)
    return Cell("") if r.verdict == "baseline" else _absent(r)


def _variant_cell(r: Compared) -> Cell:
    return Cell(r.label, r.label)


def _seeds_cell(r: Compared) -> Cell:
    lacking = (DIVERGED, r.diverged), (NOT_RUN, r.waiting), (EDITED, r.excluded)
    marks = [mark for mark, runs in lacking if runs]
    marks += [UNLIKE] * any(key not in (*INCOMPARABLE, "lm_eval") for key in r.mixed)
    details = {"planned": r.planned, "diverged": len(r.diverged)}
    return Cell(f"{len(r.losses)}/{r.planned}", len(r.losses), details, " ".join(marks))


def _count_cell(r: Compared, count: float | None, matched: bool) -> Cell:
    if count is None:
        return Cell("", None, {"mismatch": None}, NOT_RUN)
    mismatch = r.read.mismatch if matched else None
    mark = MISMATCH if notes.unfair(mismatch) else ""
    return Cell(short(count), count, {"mismatch": mismatch}, mark)


def _mismatch_cell(r: Compared) -> Cell:
    if (off := r.read.mismatch) is None:
        return Cell("", mark=NOT_RUN)
    return Cell(percent(off, 2), off, mark=MISMATCH if notes.unfair(off) else "")


def _median_cell(r: Compared, key: str, unit: str, matched: bool = False) -> Cell:
    mismatch = r.read.mismatch if matched else None
    details = {"mismatch": mismatch} if key == "tokens_per_s" else {}
    values = [*r.by_seed(key).values()]
    if not values:
        return Cell("", None, details, _mark(r)) if not r.losses else Cell(NO_SUCH, None, details)
    median = float(np.median(values))
    mark = MISMATCH if notes.unfair(mismatch) else ""
    return Cell(f"{short(median)}{unit}", median, details, mark)


def _lr_cell(r: Compared) -> Cell:
    return Cell("", mark=NOT_RUN) if r.lr is None else Cell(f"{r.lr:g}", r.lr)


def _tries_cell(r: Compared) -> Cell:
    tries = r.tuning.tries if r.tuning else ()
    edge = f", {r.tuning.edge} edge" if r.tuning and r.tuning.edge else ""
    count = max(1, len(tries))
    return Cell(f"{count}{edge}", count, {"diverged": sum(bool(t.diverged) for t in tries)})


def _best_cells(comparison: Comparison) -> Iterable[Cell]:
    """The expected best of as many tries in each row as the row with the fewest has."""
    counts = [len(r.tuning.expected_best) for r in comparison.rows if r.tuning]
    k = min((count for count in counts if count), default=0)
    for r in comparison.rows:
        known = r.tuning.expected_best[k - 1] if k and r.tuning and r.tuning.expected_best else None
        finite = known is not None and np.isfinite(known)
        yield replace(
            _number_cell(r, known if finite else None, "{:.4f}"), details={"tries": k or None}
        )


def _mean_source(key: str, title: str, result: str, shown: bool, priority: int = 0) -> _Source:
    def values(r: Compared) -> dict[int, float]:
        return r.by_seed(result)

    column = Column(key, title, "left", ("sd", "n"), priority)
    return _Source(column, partial(_mean_cells, each=values), shown)


def _above_floor(r: Compared) -> dict[int, float]:
    floors = r.by_seed("floor/loss")
    return {seed: loss - floors[seed] for seed, loss in r.losses.items() if seed in floors}


def _mean_cells(
    comparison: Comparison, each: Callable[[Compared], Mapping[int, float]]
) -> Iterable[Cell]:
    found = [None if r.diverged else summarise(each(r).values()) for r in comparison.rows]
    decimals = decimals_for(s.sd for s in found if s)
    for r, summary in zip(comparison.rows, found, strict=True):
        mark = UNLIKE if set(r.mixed) & set(INCOMPARABLE) else ""
        yield _mean_cell(r, summary, decimals, mark)


def _mean_cell(r: Compared, summary: Summary | None, decimals: int, mark: str) -> Cell:
    if summary is None:
        return _absent(r, sd=None, n=0)
    spread = "" if summary.sd is None else f" ± {summary.sd:.{decimals}f}"
    fewer = f", n = {summary.n}" if summary.n < len(r.losses) else ""
    details = {"sd": summary.sd, "n": summary.n}
    text = f"{summary.mean:.{decimals}f}{spread}{fewer}"
    return Cell(text, summary.mean, details, mark)


def _score_cells(comparison: Comparison, task: scored.ScoreColumn) -> Iterable[Cell]:
    decimals = min(4, decimals_for(task.spreads))
    for i, r in enumerate(comparison.rows):
        summary, stderr = None if r.diverged else task.summary(i), task.stderr(i)
        if summary is None:
            yield Cell("", None, {"sd": None, "n": 0, "item_stderr": None}, _mark(r))
            continue
        cell = _mean_cell(r, summary, decimals, "")
        error = "" if stderr is None else f" ({stderr:.{decimals}f})"
        details = {**cell.details, "item_stderr": stderr}
        before, comma, fewer = cell.text.partition(",")
        yield replace(cell, text=f"{before}{error}{comma}{fewer}", details=details)


def _item_cells(comparison: Comparison, task: task_items.TaskItems) -> Iterable[Cell]:
    for r in comparison.rows:
        if (d := task.rows.get(r.label)) is None:
            yield _no_difference(r, **dict.fromkeys(ITEM_DETAILS))
            continue
        shares = d.shares or {}
        numbers = (
            *(d.low, d.high, d.p, task.p.get(r.label), d.error, d.error_items, d.error_seeds),
            *(d.items, d.clusters, d.seeds),
            *(shares.get(source) for source in ("seeds", "items", "both")),
        )
        details = dict(zip(ITEM_DETAILS, numbers, strict=True))
        text = task_items.text(d, task.decimals)
        yield Cell(text, d.mean, details, _unlike(r), task.told_apart(r.label))


def _delta_cells(comparison: Comparison) -> Iterable[Cell]:
    decimals = difference_decimals(r.difference for r in comparison.rows)
    for r in comparison.rows:
        d = r.difference
        if d is None:
            yield _no_difference(r, low=None, high=None, n=0, sd=None, p=None)
            continue
        details = {"low": d.low, "high": d.high, "n": d.n, "sd": d.sd, "p": d.p}
        mark = DIVERGED if comparison.baseline.diverged else _unlike(r)
        yield Cell(difference_text(d, r.planned, decimals), d.mean, details, mark, _decided(r))


def _adjusted_cells(comparison: Comparison) -> Iterable[Cell]:
    decimals = difference_decimals(r.difference for r in comparison.rows)
    for r in comparison.rows:
        d, a = r.difference, r.adjusted
        if d is None or a is None:
            cell = _no_difference(r, low=None, high=None, level=None)
            yield replace(cell, mark=cell.mark or _unlike(r))
            continue
        text = signed(d.mean, decimals) + interval_text(a.low, a.high, decimals)
        details = {"low": a.low, "high": a.high, "level": a.level}
        yield Cell(text, d.mean, details, _unlike(r), a.rejected)


def _reading_cells(comparison: Comparison, by: Budget) -> Iterable[Cell]:
    known = {r.label: r.readings[by] for r in comparison.rows if by in r.readings}
    decimals = difference_decimals(reading.difference for reading in known.values())
    for r in comparison.rows:
        reading = known.get(r.label)
        budget = reading.budget if reading else None
        if reading is None or (d := reading.difference) is None:
            yield _no_difference(r, low=None, high=None, n=0, budget=budget)
            continue
        marks = [CUT] * reading.cut + [UNLIKE] * ("data" in r.mixed)
        details = {"low": d.low, "high": d.high, "n": d.n, "budget": budget}
        yield Cell(difference_text(d, r.planned, decimals), d.mean, details, " ".join(marks))


def _no_difference(r: Compared, **details: float | int | None) -> Cell:
    if r.verdict == "baseline":
        return Cell("baseline", None, details)
    return _absent(r, **details)


def _unlike(r: Compared) -> str:
    return UNLIKE if set(r.mixed) & set(INCOMPARABLE) else ""


def _decided(r: Compared) -> bool:
    return r.adjusted is not None and r.adjusted.rejected


def _p_cell(r: Compared) -> Cell:
    details = {"unadjusted": r.difference.p if r.difference else None}
    if r.adjusted is None:
        cell = _number_cell(r, None, "")
        return replace(cell, details=details, mark=cell.mark or _unlike(r))
    return Cell(p_text(r.adjusted.p), r.adjusted.p, details, bold=r.adjusted.rejected)


def _p_sign_cell(r: Compared) -> Cell:
    d = r.difference
    details = {"smallest": d.smallest_p if d else None}
    if d is None or d.p_sign is None:
        return replace(_number_cell(r, None, ""), details=details)
    return Cell(p_text(d.p_sign), d.p_sign, details, _unlike(r))


def _verdict_cell(r: Compared) -> Cell:
    if r.verdict == "diverged":
        return Cell(f"diverged {len(r.diverged)}/{r.planned}", r.verdict)
    return Cell(r.verdict, r.verdict, {}, _unlike(r), r.verdict in ("better", "worse"))


def _pairing_cell(r: Compared) -> Cell:
    d = r.difference
    cell = _number_cell(r, d.pairing if d else None, "{:.2f}")
    return replace(
        cell, details={"paired": d.sd if d else None, "unpaired": d.sd_unpaired if d else None}
    )


def _gain_cell(r: Compared) -> Cell:
    g = r.gain
    if g is None or g.ratio is None:
        return _no_difference(r, low=None, high=None, n=0, at_least=g.at_least if g else None)
    text = f"{g.ratio:.2f}×"
    if g.low is not None and g.high is not None:
        text += f" [{g.low:.2f}, {g.high:.2f}]"
    text += ", not reached" if g.beyond else ""
    return Cell(text, g.ratio, {"low": g.low, "high": g.high, "n": g.n, "at_least": g.at_least})


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
