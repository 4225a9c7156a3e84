"""The tables of a report: the sweep's own, and what else there is to say of its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from analysis import table as tables
from analysis import task_items
from analysis.comparison import Comparison
from analysis.factorial import Factorial, short_names
from analysis.statistics import detectable
from analysis.table import Cell, Column, Table, TableRow
from analysis.task_items import TaskItems
from analysis.wording import CUT, difference_decimals, difference_text, p_text, percent

SECOND = ("flops_per_token", "mismatch", "tokens_per_s", "peak_memory", "val_bpb")  # see costs


def first(comparison: Comparison) -> Table:
    """The sweep's table without what stands in `costs`."""
    keys = [column.key for column in tables.table(comparison).columns]
    return tables.table(comparison, [key for key in keys if not _second(key)])


def _second(key: str) -> bool:
    return key in SECOND or key.startswith("val_loss@")


def costs(comparison: Comparison) -> Table | None:
    """The sizes and costs of the rows, and their loss in other units and at other lengths."""
    keys = [column.key for column in tables.table(comparison).columns]
    lengths = [key for key in keys if key.startswith("val_loss@")]
    matched = comparison.manifest.match is not None
    return _chosen(
        comparison,
        [*(key for key in SECOND if key in keys or (matched and key == "mismatch")), *lengths],
        "What a row costs, on the hardware that each run ran on (medians over finished runs), and"
        " its loss in bits per byte of text" + " and over windows of other lengths" * bool(lengths),
    )


def budgets(comparison: Comparison) -> Table | None:
    """The differences at equal FLOPs and time; None where no curve was read."""
    if not any(row.readings for row in comparison.rows[1:]):
        return None
    return _chosen(
        comparison,
        ("delta_val_loss", "delta_at_flops", "delta_at_time", "gain"),
        f"Differences at the end, and with both sides read off their curves at equal cost ({CUT}"
        " marks curves read before their schedule ends, which flatters the other side); compute"
        " gain: training FLOPs of the baseline over the row's to the same loss",
    )


def tries(comparison: Comparison) -> Table | None:
    """What each row's tuning came to; None where nothing was tuned."""
    if not any(row.tuning for row in comparison.rows):
        return None
    return _chosen(
        comparison,
        ("lr", "tries", "sensitivity", "expected_best", "val_loss"),
        "Each row at its own best value, how many were tried, its sensitivity over them (Wortsman"
        " et al. 2023), and the expected best loss of as many tries as every row had (Dodge et al."
        " 2019)",
    )


def tests(comparison: Comparison) -> Table | None:
    """The tests behind the verdicts; None where nothing was tested."""
    if not any(row.adjusted for row in comparison.rows):
        return None
    columns = ("delta_adjusted", "p", "p_sign", "wins", "pairing")
    return _chosen(comparison, columns, "What the verdicts rest on")


def _chosen(comparison: Comparison, columns: Sequence[str], caption: str) -> Table | None:
    """A second table: those of `columns` that have something to say; None where none has."""
    whole = tables.table(comparison, columns)
    kept = [
        i
        for i, column in enumerate(whole.columns)
        if column.key == "variant" or any(row.cells[i].value is not None for row in whole.rows)
    ]
    if len(kept) < 2:
        return None
    return replace(_kept(whole, kept), caption=f"{caption}.", footnotes=())


def _kept(table: Table, kept: Sequence[int]) -> Table:
    """The table with only those of its columns."""
    return replace(
        table,
        columns=tuple(table.columns[i] for i in kept),
        rows=tuple(replace(row, cells=tuple(row.cells[i] for i in kept)) for row in table.rows),
    )


def power(comparison: Comparison) -> Table | None:
    """What each row's seeds could have found."""
    rows = []
    for row in comparison.rows[1:]:
        d = row.difference
        if d is None or d.sd is None or d.sd_unpaired is None:
            continue
        alone, family = (detectable(d.n, d.sd, m) for m in (1, max(1, comparison.family)))
        numbers = (d.sd, d.sd_unpaired, alone, family)
        cells = [Cell("" if x is None else f"{x:.4f}", x) for x in numbers]
        rows.append(TableRow("rows", (Cell(row.label, row.label), Cell(str(d.n), d.n), *cells)))
    if not rows:
        return None
    titles = (
        "Variant",
        "n",
        "sd paired",
        "sd unpaired",
        "Detectable alone",
        "Detectable in the family",
    )
    return _plain(
        titles,
        rows,
        "The noise of the differences, and the least true difference (nats) that these seeds find"
        " in 80% of such sweeps: were the row the only one, and after Holm's correction.",
    )


def items(comparison: Comparison, found: Sequence[TaskItems]) -> Table | None:
    """Each row's differences on each task, item by item; None where there are none."""
    rows = [
        TableRow(("baseline", "rows")[i % 2], tuple(cells))  # a rule between two tasks
        for i, task in enumerate(found)
        for cells in _item_rows(comparison, task)
    ]
    if not rows:
        return None
    titles = ("Task", "Metric", "Variant", "Items", "Difference [95% CI]", "SE", "p (Holm)")
    sources = ("From seeds", "From items", "From both")
    return _plain(
        (*titles, *sources),
        rows,
        f"{task_items.method(comparison)}. Items: in brackets the clusters that they come in. SE:"
        " over new seeds answering new items; and how much of its square more seeds would lower,"
        " more items would, and either would.",
        left=3,
    )


def _item_rows(comparison: Comparison, task: TaskItems) -> Iterator[list[Cell]]:
    known = [(r.label, d) for r in comparison.rows if (d := task.rows.get(r.label))]
    for i, (label, d) in enumerate(known):
        bold, p = task.told_apart(label), task.p.get(label)
        clusters = f" ({d.clusters:,})" if d.clusters < d.items else ""
        shares = d.shares or {}
        yield [
            Cell("" if i else task.task.replace(",", ", ")),
            Cell("" if i else task.measure),
            Cell(label),
            Cell(f"{d.items:,}{clusters}"),
            Cell(task_items.text(d, task.decimals), bold=bold),
            Cell(f"{d.error:.{task.decimals}f}"),
            Cell("n/a" if p is None else p_text(p), bold=bold),
            *(
                Cell(percent(shares[key], 0).lstrip("+") if key in shares else "n/a")
                for key in ("seeds", "items", "both")
            ),
        ]


def shares(found: Factorial | None) -> Table | None:
    """Shapley shares of a factorial; None where not all subsets of its factors were run."""
    if found is None or not found.shares:
        return None
    names = dict(zip(found.levels, short_names(list(found.levels)), strict=True))
    decimals = difference_decimals([*(s.difference for s in found.shares), found.total])
    rows = []
    for share in found.shares:
        part = ""
        if share.share is not None and share.low is not None and share.high is not None:
            mean, low, high = (
                percent(x, 0).lstrip("+") for x in (share.share, share.low, share.high)
            )
            part = f"{mean} [{low}, {high}]"
        d = share.difference
        cells = (Cell(names[share.factor]), Cell(difference_text(d, d.n, decimals)), Cell(part))
        rows.append(TableRow("rows", cells))
    if found.total is not None:
        text = difference_text(found.total, found.total.n, decimals)
        rows.append(TableRow("baseline", (Cell("All together"), Cell(text), Cell(""))))
    return _plain(
        ("Factor", "Adds, nats [95% CI]", "Share of the total [95% CI]"),
        rows,
        "Shapley shares: what changing each factor adds, averaged over all orders in which they"
        " could be changed one after the other.",
    )


def _plain(titles: Sequence[str], rows: Sequence[TableRow], caption: str, left: int = 1) -> Table:
    """`left`: how many columns are words, and not numbers."""
    columns = tuple(
        Column(title, title, "right" if i >= left else "left") for i, title in enumerate(titles)
    )
    return Table("", columns, tuple(rows), caption, ())
