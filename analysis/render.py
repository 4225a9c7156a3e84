"""Print a `Table`: Markdown, LaTeX, HTML, CSV, JSON or the terminal, from the same cells.

Labels are a person's own words, so each renderer escapes whatever its format would act on.
CSV and JSON carry the raw numbers at full precision; the others carry the rounded text.
"""

from __future__ import annotations

import csv
import html as escapes
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.table import Cell, Table, TableRow
from experiments.record import write_atomically

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

SCHEMA = 1
GAP = 3  # letters between two columns of a terminal
PLAIN_GROUPS = ("baseline", "rows")  # groups that need no heading
# Points that LaTeX's article class has for a line, and for both columns of a two-column page.
TEXT_WIDTH, PAGE_WIDTH = 345.0, 469.0
SIZES = (("footnotesize", 4.6, 4), ("scriptsize", 4.1, 3))  # points of a letter; of \\tabcolsep

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
        "‖": r"\|", "¶": r"\P", "½": r"\frac12", "¼": r"\frac14", "∈": r"\in", "ℓ": r"\ell",
        "⁰": "^{0}", "¹": "^{1}", "²": "^{2}", "³": "^{3}", "⁴": "^{4}", "Δ": r"\Delta",
        "α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon",
        "η": r"\eta", "θ": r"\theta", "λ": r"\lambda", "μ": r"\mu", "µ": r"\mu", "σ": r"\sigma",
        "τ": r"\tau", "φ": r"\varphi", "κ": r"\kappa", "π": r"\pi", "ρ": r"\rho", "ω": r"\omega",
        "Γ": r"\Gamma", "Λ": r"\Lambda", "Σ": r"\Sigma", "Φ": r"\Phi", "Ω": r"\Omega",
    }.items()
}  # fmt: skip


_ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0307": ".",
    "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
_LATEX |= {"ß": r"{\ss}", "ø": r"{\o}", "Ø": r"{\O}", "ł": r"{\l}", "Ł": r"{\L}", "æ": r"{\ae}",
           "Æ": r"{\AE}", "œ": r"{\oe}", "’": "'", "‘": "`", "“": "``", "”": "''", "…": r"\dots{}",
           "\u00a0": "~"}  # fmt: skip


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


def latex(table: Table, *, wide: bool = False, scale: bool = False) -> str:
    """A `table` environment that needs only booktabs: `\\input` it, or paste it.

    Where it is too wide for a line even in small letters, columns that matter least are left out;
    a comment names them. LaTeX itself warns where the line at hand is narrower than the table.

    Args:
        wide: `table*`, over both columns of a two-column page.
        scale: keep all columns, made smaller by graphicx as far as they must be.
    """

    def text(cell: Cell) -> str:
        body = escape_latex(cell.text)
        body = rf"\textbf{{\boldmath {body}}}" if cell.bold and body else body
        return f"{body} {escape_latex(cell.mark)}".strip(" ")

    def line(cells: list[str]) -> str:
        # The row before ends in \\, which would take a leading [ or * for its own argument.
        guard = "{}" if cells[0].startswith(("[", "*", "(")) else ""
        return f"    {guard}{' & '.join(cells)} \\\\"

    size, gap, kept, left_out = _latex_layout(table, wide, scale)
    name = "table*" if wide else "table"
    columns = [table.columns[i] for i in kept]
    comment = [f"% Left out for want of width: {escape_latex(', '.join(left_out))}."]
    width = len(columns)
    body = [line([escape_latex(column.title) for column in columns]), r"    \midrule"]
    for heading, rule, row in _grouped(table):
        if rule:
            body.append(r"    \midrule")
        if heading:
            body.append(rf"    \multicolumn{{{width}}}{{l}}{{\emph{{{escape_latex(heading)}}}}} \\")
        body.append(line([text(row.cells[i]) for i in kept]))
    slug = re.sub(r"[^A-Za-z0-9]+", "-", table.title).strip("-")
    notes = [f"    {escape_latex(note)} \\par" for note in table.notes(kept)]
    return "\n".join(
        [
            r"% Needs \usepackage{booktabs}." + r" And \usepackage{graphicx}." * scale,
            *comment * bool(left_out),
            rf"\begin{{{name}}}[t]",
            rf"  \centering\{size}\setlength{{\tabcolsep}}{{{gap}pt}}",
            rf"  \caption{{{escape_latex(table.caption)}}}",
            rf"  \label{{tab:{slug}}}\smallskip",
            rf"  \sbox0{{\begin{{tabular}}"
            rf"{{{''.join(column.align[0] for column in columns)}}}",
            r"    \toprule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}}%",
            *_latex_box(slug, _droppable(table, kept), scale),
            *([r"  \par\medskip", r"  \begin{minipage}{\linewidth}\raggedright"] if notes else []),
            *notes,
            *([r"  \end{minipage}"] if notes else []),
            rf"\end{{{name}}}",
            "",
        ]
    )


def _latex_box(slug: str, droppable: str, scale: bool) -> list[str]:
    """Prints box 0, which holds the tabular; a box that only looks as wide as the line would hide
    that it is not."""
    if scale:
        fitted = r"\resizebox{\linewidth}{!}{\usebox0}"
        return [rf"  \ifdim\wd0>\linewidth{fitted}\else\usebox0\fi"]
    return [
        r"  \ifdim\wd0>\linewidth",
        rf"    \GenericWarning{{}}{{LaTeX Warning: table {slug} is wider than the line: write it",
        rf"      with --wide or --scale, or leave out columns: {droppable}}}%",
        r"  \fi",
        r"  \usebox0",
    ]


def _droppable(table: Table, kept: Sequence[int]) -> str:
    """Keys of the columns that would go first: those that matter least, then the widest."""
    letters = _letters(table)
    order = sorted(kept[1:], key=lambda i: (-table.columns[i].priority, -letters[i]))
    keys = (re.sub(r"[^A-Za-z0-9_:,./@-]", "?", table.columns[i].key) for i in order[:3])
    return " ".join(keys)


def _latex_layout(
    table: Table, wide: bool = False, scale: bool = False
) -> tuple[str, int, list[int], list[str]]:
    """Size of letters, gap between columns (points), the columns that fit and those that don't:
    the largest letters in which all fit, or else the smallest."""
    (large, letter, gap), (small, small_letter, small_gap) = SIZES
    room = PAGE_WIDTH if wide else TEXT_WIDTH
    if scale or sum(_letters(table)) * letter + 2 * gap * len(table.columns) <= room:
        return large, gap, [*range(len(table.columns))], []
    return small, small_gap, *_fitting(table, room / small_letter, 2 * small_gap / small_letter)


def left_out_of_latex(table: Table, *, wide: bool = False, scale: bool = False) -> list[str]:
    """Titles of the columns for which `latex` has no room."""
    return _latex_layout(table, wide, scale)[3]


def html(table: Table) -> str:
    """A fragment: `<table class="ablation">` with its caption, and `<ul class="notes">`.

    Each row carries its verdict where that is a column: `<tr data-verdict="better">`.
    """
    columns = table.columns
    keys = [column.key for column in columns]
    verdict = keys.index("verdict") if "verdict" in keys else None
    style = {column.key: ' class="number"' * (column.align == "right") for column in columns}
    heads = "".join(f'<th scope="col"{style[c.key]}>{escape_html(c.title)}</th>' for c in columns)
    body: list[str] = []
    for heading, rule, row in _grouped(table):
        if rule:
            body.append("</tbody><tbody>")
        if heading:
            cell = f'<th scope="rowgroup" colspan="{len(columns)}">{escape_html(heading)}</th>'
            body.append(f'<tr class="group">{cell}</tr>')
        value = row.cells[verdict].value if verdict is not None else None
        said = f' data-verdict="{escape_html(str(value))}"' if value else ""
        first, *others = zip(columns, row.cells, strict=True)
        cells = f'<th scope="row">{_html_cell(first[1])}</th>'
        cells += "".join(f"<td{style[c.key]}>{_html_cell(cell)}</td>" for c, cell in others)
        body.append(f"<tr{said}>{cells}</tr>")
    notes = "\n".join(f"<li>{escape_html(note)}</li>" for note in table.footnotes)
    return "\n".join(
        [
            '<table class="ablation">',
            f"<caption><strong>{escape_html(table.title)}.</strong> {escape_html(table.caption)}"
            "</caption>",
            f"<thead><tr>{heads}</tr></thead>",
            "<tbody>",
            *body,
            "</tbody>",
            "</table>",
            *([f'<ul class="notes">\n{notes}\n</ul>'] if notes else []),
            "",
        ]
    )


def html_page(table: Table) -> str:
    """`html` as a page of its own; nothing is loaded from anywhere."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape_html(table.title)}</title>\n<style>\n{PAGE_STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{html(table)}</main>\n</body>\n</html>\n"
    )


def _html_cell(cell: Cell) -> str:
    text = escape_html(cell.text)
    text = f"<strong>{text}</strong>" if cell.bold and text else text
    mark = f'<span class="mark">{escape_html(cell.mark)}</span>' if cell.mark else ""
    return " ".join(filter(None, (text, mark)))


PAGE_STYLE = """\
:root { color-scheme: light dark; }
body { margin: 2rem 1rem; font: 15px/1.45 Georgia, "Times New Roman", serif; }
main { max-width: max-content; margin: 0 auto; overflow-x: auto; }
table { border-collapse: collapse; border-block: 2px solid; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding-top: 0.8rem; }
caption, .notes { contain: inline-size; max-width: min(62rem, 100vw - 3.5rem); }
thead, tbody + tbody { border-top: 1px solid; }
tbody { border-top: 1px solid; }
th, td { padding: 0.2rem 0.7rem; text-align: left; font-weight: normal; white-space: nowrap; }
.number { text-align: right; }
.group th { font-style: italic; }
.notes { padding-left: 1.1rem; opacity: 0.8; }
"""


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
                **({"seeds": [asdict(run) for run in row.seeds]} if row.seeds else {}),
            }
            for row in table.rows
        ],
    }
    return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def terminal(table: Table, width: int = 120) -> Group:
    """A rich renderable for `width` columns: `console.print(terminal(table, console.width))`.

    Where it is too narrow the least needed columns are left out, and named below; then cells are
    folded; and if words themselves would not fit, the columns stand in blocks one below another.
    """
    from rich.console import Group
    from rich.text import Text

    kept, left_out = _fitting(table, width - 1, GAP)
    blocks = [_lines(table, widths) for widths in _blocks(table, kept, width - 1)]
    notes = [table.caption, *(f"• {note}" for note in table.notes(kept))]
    if left_out:
        notes.append(f"• Left out at this width: {', '.join(left_out)}.")
    title = Text(f"{table.title}\n", "bold")
    return Group(title, *blocks, *(Text(note, "dim") for note in notes))


def _blocks(table: Table, kept: Sequence[int], room: int) -> list[dict[int, int]]:
    """Which columns stand side by side, and how wide: index -> letters. The first is in each."""
    letters, words = _letters(table), _letters(table, of_words=True)
    if GAP * len(kept) + sum(words[i] for i in kept) <= room:
        return [_shrunk({i: letters[i] for i in kept}, words, room)]
    first, *others = kept
    blocks = [[first]]
    for i in others:
        if len(blocks[-1]) > 1 and sum(letters[j] + GAP for j in (*blocks[-1], i)) > room:
            blocks.append([first])
        blocks[-1].append(i)
    return [_shrunk({i: letters[i] for i in block}, [1] * len(letters), room) for block in blocks]


def _shrunk(widths: dict[int, int], least: Sequence[int], room: int) -> dict[int, int]:
    """The widest give way, one letter at a time, until all fit or are at their least."""
    while sum(widths.values()) + GAP * len(widths) > room:
        wide = [i for i in widths if widths[i] > least[i]]
        if not wide:
            break
        widths[max(wide, key=widths.__getitem__)] -= 1
    return widths


def _lines(table: Table, widths: Mapping[int, int]) -> Text:
    """Columns of the table as text. Rich's own tables take many times as long to lay out."""
    from rich.text import Span, Text

    pieces: list[str] = []
    spans: list[Span] = []
    at = 0

    def put(text: str, style: str = "") -> None:
        nonlocal at
        if style and text:
            spans.append(Span(at, at + len(text), style))
        pieces.append(text)
        at += len(text)

    def put_row(cells: Sequence[Cell], style: str = "") -> None:
        folded = [_folded(cell, width) for cell, width in zip(cells, widths.values(), strict=True)]
        for parts in zip_longest(*folded, fillvalue=("", "", 0)):
            owed = 1  # spaces before the next text: none are left at the end of a line
            for (body, mark, taken), i, cell in zip(parts, widths, cells, strict=True):
                space = widths[i] - taken
                right = table.columns[i].align == "right"
                if taken:
                    put(" " * (owed + 1 + space * right))
                    put(body, style or "bold" * cell.bold)
                    put(mark, "yellow")
                    owed = GAP - 1 + space * (not right)
                else:
                    owed += widths[i] + GAP
            put("\n")

    put_row([Cell(table.columns[i].title) for i in widths], "bold")
    put(" " + "─" * (sum(widths.values()) + GAP * len(widths) - 1) + "\n")
    for heading, rule, row in _grouped(table):
        put("\n" * rule)
        if heading:
            put("  ")
            put(heading, "italic")
            put("\n")
        put_row([row.cells[i] for i in widths])
    return Text("".join(pieces), spans=spans, no_wrap=True, overflow="fold")


def _folded(cell: Cell, width: int) -> list[tuple[str, str, int]]:
    """The lines of a cell: text, mark and the letters that both take."""
    from rich.cells import cell_len, chop_cells

    whole = _text(cell)
    taken = cell_len(whole)
    if taken <= width:
        return [(whole[: len(whole) - len(cell.mark)], cell.mark, taken)]
    lines = [""]
    for word in whole.split(" "):
        joined = f"{lines[-1]} {word}" if lines[-1] else word
        if cell_len(joined) <= width:
            lines[-1] = joined
        else:
            lines = [*filter(None, lines), *chop_cells(word, width)]
    return [(line, "", cell_len(line)) for line in lines]


def _text(cell: Cell) -> str:
    return f"{cell.text} {cell.mark}" if cell.text and cell.mark else cell.text or cell.mark


RENDERERS: dict[str, Callable[[Table], str]] = {
    "markdown": markdown,
    "latex": latex,
    "html": html_page,
    "csv": csv_text,
    "json": json_text,
}


def write(table: Table, path: Path) -> list[Path]:
    """The table beside `path`, which gives its name, as .md, .tex and .csv; returns where.

    Raises:
        UserError: it can't be written there.
    """
    texts = {".md": markdown(table), ".tex": latex(table), ".csv": csv_text(table)}
    for ending, text in texts.items():
        write_atomically(path.with_suffix(ending), text, durable=False)
    return [path.with_suffix(ending) for ending in texts]


def escape_latex(text: str) -> str:
    """Text that LaTeX prints as it stands, in any mode that takes text; plain ASCII.

    A letter with an accent becomes TeX's own; what no font of pdflatex has is printed as its
    Unicode number.
    """
    text = re.sub("-(?=-)", "-\0", unicodedata.normalize("NFC", text))
    return _ascii("".join(_LATEX.get(character, character) for character in text)).replace(
        "\0", "{}"
    )


def _ascii(text: str) -> str:
    return "".join(c if c.isascii() else _accented(c) for c in text)


def _accented(character: str) -> str:
    parts = unicodedata.normalize("NFD", character)
    if len(parts) == 2 and parts[0].isascii() and parts[1] in _ACCENTS:
        letter = {"i": r"\i ", "j": r"\j "}.get(parts[0], parts[0])
        return f"\\{_ACCENTS[parts[1]]}{{{letter}}}"
    return f"[U+{ord(character):04X}]"


def escape_markdown(text: str) -> str:
    """Text that GitHub's Markdown prints as it stands, in a table's cell too."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_|~$])", r"\\\1", text).replace("](", r"]\(")


def escape_html(text: str) -> str:
    """Text that a browser shows as it stands, in an attribute too."""
    return escapes.escape(text, quote=True)


def _fitting(table: Table, width: float, gap: float) -> tuple[list[int], list[str]]:
    """Indexes of the columns that fit into `width` letters, and the titles of those left out.

    `gap` is what each column takes besides its text, in letters. Columns without a priority
    always stay.
    """
    needs = [gap + letters for letters in _letters(table)]
    kept = list(range(len(needs)))
    while sum(needs[i] for i in kept) > width and any(table.columns[i].priority for i in kept):
        kept.remove(max(kept, key=lambda i: table.columns[i].priority))
    return kept, [column.title for i, column in enumerate(table.columns) if i not in kept]


def _letters(table: Table, of_words: bool = False) -> list[int]:
    """The widest text of each column, its title's or a cell's with its mark; or the widest word."""
    from rich.cells import cell_len

    def width(text: str) -> int:
        return max(map(cell_len, text.split(" "))) if of_words else cell_len(text)

    columns = zip(*(row.cells for row in table.rows), strict=True)
    return [
        max(width(column.title), *(width(_text(cell)) for cell in cells))
        for column, cells in zip(table.columns, columns, strict=True)
    ]


def _grouped(table: Table) -> Iterator[tuple[str, bool, TableRow]]:
    """Each row with the heading to print above it, if any, and whether a rule comes first."""
    before: str | None = None
    for row in table.rows:
        new = row.group != before
        named = new and row.group not in PLAIN_GROUPS
        heading = row.group.replace("_", " ").capitalize() if named else ""
        yield heading, new and before is not None, row
        before = row.group
