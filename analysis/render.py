"""Print a `Table`: Markdown, LaTeX, CSV, JSON or the terminal, from the same cells.

Labels are a person's own words, so each renderer escapes whatever its format would act on.
CSV and JSON carry the raw numbers at full precision; the others carry the rounded text.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from analysis.table import Cell, Table, TableRow

if TYPE_CHECKING:
    from rich.console import Group

SCHEMA = 1
PLAIN_GROUPS = ("baseline", "rows")  # groups that need no heading

_LATEX = {
    "\\": r"\textbackslash{}",
    **{c: "\\" + c for c in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': "''",
    "—": "---",
    "–": "--",
    "\u2007": r"\phantom{0}",
}
_LATEX |= {
    character: f"${command}$"
    for character, command in {
        "±": r"\pm", "−": "-", "×": r"\times", "≈": r"\approx", "≤": r"\leq", "≥": r"\geq",
        "→": r"\rightarrow", "√": r"\surd", "∞": r"\infty", "†": r"^{\dagger}", "·": r"\cdot",
        "‡": r"^{\ddagger}", "§": r"\S", "↑": r"\uparrow", "↓": r"\downarrow",
        "⁰": "^{0}", "¹": "^{1}", "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "Δ": r"\Delta",
        "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon",
        "η": r"\eta", "θ": r"\theta", "λ": r"\lambda", "μ": r"\mu", "µ": r"\mu", "σ": r"\sigma",
        "τ": r"\tau", "φ": r"\varphi",
    }.items()
}  # fmt: skip


def markdown(table: Table) -> str:
    """A GitHub-flavoured table, aligned in its source too, with caption and footnotes below."""

    def text(cell: Cell) -> str:
        body = escape_markdown(cell.text)
        body = f"**{body}**" if cell.bold and body else body
        return f"{body} {escape_markdown(cell.mark)}".strip(" ")

    lines = [[escape_markdown(column.title) for column in table.columns]]
    for heading, _, row in _grouped(table):
        if heading:
            lines.append([f"*{escape_markdown(heading)}*"] + [""] * (len(table.columns) - 1))
        lines.append([text(cell) for cell in row.cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rights = [column.align == "right" for column in table.columns]
    lines.insert(1, ["-" * (w - r) + ":" * r for w, r in zip(widths, rights, strict=True)])
    out = [
        "| "
        + " | ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, rights, strict=True)
        )
        + " |"
        for line in lines
    ]
    out += ["", f"**{escape_markdown(table.title)}.** {escape_markdown(table.caption)}"]
    if table.footnotes:
        out += ["", *(f"- {escape_markdown(note)}" for note in table.footnotes)]
    return "\n".join(out) + "\n"


def latex(table: Table) -> str:
    """A `table` environment that needs only booktabs: `\\input` it, or paste it."""

    def text(cell: Cell) -> str:
        body = escape_latex(cell.text)
        body = rf"\textbf{{\boldmath {body}}}" if cell.bold and body else body
        return f"{body} {escape_latex(cell.mark)}".strip(" ")

    def line(cells: list[str]) -> str:
        # The row before ends in \\, which would take a leading [ or * for its own argument.
        guard = "{}" if cells[0].startswith(("[", "*", "(")) else ""
        return f"    {guard}{' & '.join(cells)} \\\\"

    width = len(table.columns)
    body = [line([escape_latex(column.title) for column in table.columns]), r"    \midrule"]
    for heading, rule, row in _grouped(table):
        if rule:
            body.append(r"    \midrule")
        if heading:
            body.append(rf"    \multicolumn{{{width}}}{{l}}{{\emph{{{escape_latex(heading)}}}}} \\")
        body.append(line([text(cell) for cell in row.cells]))
    slug = re.sub(r"[^A-Za-z0-9]+", "-", table.title).strip("-")
    notes = [f"    {escape_latex(note)} \\par" for note in table.footnotes]
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}.",
            r"\begin{table}[t]",
            r"  \centering\footnotesize\setlength{\tabcolsep}{4pt}",
            rf"  \caption{{{escape_latex(table.caption)}}}",
            rf"  \label{{tab:{slug}}}",
            rf"  \begin{{tabular}}{{{''.join(column.align[0] for column in table.columns)}}}",
            r"    \toprule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            *([r"  \par\medskip", r"  \begin{minipage}{\linewidth}\raggedright"] if notes else []),
            *notes,
            *([r"  \end{minipage}"] if notes else []),
            r"\end{table}",
            "",
        ]
    )


def csv_text(table: Table) -> str:
    """Raw numbers at full precision: a column per value and per detail, and the row's marks."""
    header = ["group"]
    for column in table.columns:
        header += [column.key, *(f"{column.key}_{name}" for name in column.details)]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*header, "marks"])
    for row in table.rows:
        values: list[object] = [row.group]
        for column, cell in zip(table.columns, row.cells, strict=True):
            values += [cell.value, *(cell.details.get(name) for name in column.details)]
        marks = dict.fromkeys(mark for cell in row.cells for mark in cell.mark.split()[:1])
        writer.writerow([*values, " ".join(marks)])
    return out.getvalue()


def json_text(table: Table) -> str:
    """The whole table for another program; `schema` changes when the shape does."""
    columns = table.columns
    data = {
        "schema": SCHEMA,
        "title": table.title,
        "caption": table.caption,
        "footnotes": table.footnotes,
        "columns": [{"key": column.key, "title": column.title} for column in columns],
        "rows": [
            {
                "group": row.group,
                "cells": {
                    column.key: {
                        "value": cell.value,
                        **{name: cell.details.get(name) for name in column.details},
                        "text": cell.text.strip(),
                        "mark": cell.mark,
                        "bold": cell.bold,
                    }
                    for column, cell in zip(columns, row.cells, strict=True)
                },
            }
            for row in table.rows
        ],
    }
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def terminal(table: Table, width: int = 120) -> Group:
    """A rich renderable for `width` columns: `console.print(terminal(table, console.width))`.

    Where it is too narrow the least needed columns are left out, and named below.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table as RichTable
    from rich.text import Text

    def text(cell: Cell) -> Text:
        gap = " " if cell.text and cell.mark else ""
        return Text(cell.text, "bold" if cell.bold else "").append(gap + cell.mark, "yellow")

    columns = dict(enumerate(table.columns))
    needs = {
        i: 3 + max(len(column.title), *(text(row.cells[i]).cell_len for row in table.rows))
        for i, column in columns.items()
    }
    while sum(needs[i] for i in columns) + 1 > width and any(c.priority for c in columns.values()):
        del columns[max(columns, key=lambda i: columns[i].priority)]
    left_out = [column.title for i, column in enumerate(table.columns) if i not in columns]

    out = RichTable(title=Text(table.title, "bold"), title_justify="left", box=box.SIMPLE_HEAD)
    for column in columns.values():
        out.add_column(Text(column.title), justify=column.align, overflow="fold")
    for heading, rule, row in _grouped(table):
        if rule:
            out.add_section()
        if heading:
            out.add_row(Text(heading, "italic"))
        out.add_row(*(text(row.cells[i]) for i in columns))
    notes = [table.caption, *(f"• {note}" for note in table.footnotes)]
    if left_out:
        notes.append(f"• Left out at this width: {', '.join(left_out)}.")
    return Group(out, *(Text(note, "dim") for note in notes))


RENDERERS: dict[str, Callable[[Table], str]] = {
    "markdown": markdown,
    "latex": latex,
    "csv": csv_text,
    "json": json_text,
}


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands, in any mode that takes text."""
    escaped = "".join(_LATEX.get(character, character) for character in text.replace("--", "-\0-"))
    return escaped.replace("\0", "{}")


def escape_markdown(text: str) -> str:
    """Text that GitHub's Markdown prints as it stands, in a table's cell too."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|~$])", r"\\\1", text).replace("](", r"]\(")


def _grouped(table: Table) -> Iterator[tuple[str, bool, TableRow]]:
    """Each row with the heading to print above it, if any, and whether a rule comes first."""
    before: str | None = None
    for row in table.rows:
        new = row.group != before
        named = new and row.group not in PLAIN_GROUPS
        heading = row.group.replace("_", " ").capitalize() if named else ""
        yield heading, new and before is not None, row
        before = row.group
