"""Each renderer's output, whole, against a stored copy. UPDATE_GOLDEN=1 writes the copies anew."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.cells import cell_len

from analysis.render import RENDERERS, escape_latex, escape_markdown, html, latex, terminal
from analysis.results import read_manifest, read_runs
from analysis.table import Table, ablation_table

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def table(manifest_path: Path) -> Table:
    manifest = read_manifest(manifest_path)
    return ablation_table(manifest, read_runs(manifest, manifest_path.parents[1]))


def rendered(table: Table, name: str) -> str:
    if name in RENDERERS:
        return RENDERERS[name](table)
    from rich.console import Console

    width = int(name.removeprefix("terminal-"))
    console = Console(width=width, file=io.StringIO(), color_system=None, _environ={})
    with console.capture() as capture:
        console.print(terminal(table, width))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


@pytest.mark.parametrize("name", [*RENDERERS, "terminal-150", "terminal-80"])
def test_output_is_as_stored(table: Table, name: str) -> None:
    path = GOLDEN / f"{name}.txt"
    text = rendered(table, name)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    stored = path.read_text(encoding="utf-8")
    if name in ("csv", "json"):
        assert numbers(text) == pytest.approx(numbers(stored), rel=1e-9, abs=1e-14)
        text, stored = NUMBER.sub("#", text), NUMBER.sub("#", stored)
    assert text == stored


NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


def numbers(text: str) -> list[float]:
    """Those of full precision: whether a processor rounds once or twice in x·y + z decides their
    last digits."""
    return [float(number) for number in NUMBER.findall(text)]


def test_latex_is_balanced_and_escaped(table: Table) -> None:
    tex = latex(table)
    opened: list[str] = []
    for verb, name in re.findall(r"\\(begin|end)\{(\w+)\}", tex):
        if verb == "begin":
            opened.append(name)
        else:
            assert opened.pop() == name
    assert not opened and tex.count(r"\begin{table}") == 1
    # Take away what is escaped, the comments and the arguments: nothing that TeX acts on is left.
    box = re.compile(r"%\n  \\ifdim.*?\\usebox0", re.DOTALL)  # ours, and commands throughout
    bare = re.sub(r"\\[&%$#_{}]", "", box.sub("", tex.split("\n", 2)[2]))
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    outside_math = re.sub(r"\$[^$]*\$", "", bare)
    assert not set("%#~^_<>|").intersection(outside_math)
    body = tex[tex.index(r"\toprule") : tex.index(r"\bottomrule")]
    lines = [line for line in body.splitlines() if line.endswith(r"\\")]
    full = [line for line in lines if r"\multicolumn" not in line]
    assert len(full) == 7 and len(lines) == 9
    assert {len(re.findall(r"(?<!\\)&", line)) for line in full} == {5}
    assert (
        tex.splitlines()[1]
        == "% Left out for want of width: Params, FLOPs/token, Tokens/s, Val bpb."
    )
    # Each row follows \\ or a rule, both of which would take [ for an optional argument.
    assert not any(line.lstrip().startswith(("[", "*")) for line in lines)
    assert tex.isascii()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a&b_c%$#{}", r"a\&b\_c\%\$\#\{\}"),
        ("\\~^<>|", r"\textbackslash{}\textasciitilde{}\textasciicircum{}"
                    r"\textless{}\textgreater{}\textbar{}"),
        ("ReLU² ± −1 --x", r"ReLU$^{2}$ $\pm$ $-$1 -{}-x"),
        ("a --- b", "a -{}-{}- b"),
        ("naïve Ångström ł § ¶", r"na\"{\i }ve \r{A}ngstr\"{o}m {\l} $\S$ $\P$"),
        ("注 🎉", "[U+6CE8] [U+1F389]"),
    ],
)  # fmt: skip
def test_latex_prints_the_text_as_it_stands(text: str, expected: str) -> None:
    assert escape_latex(text) == expected


def test_markdown_labels_cannot_break_the_table_or_act() -> None:
    assert escape_markdown("a|b *c* <i> $x$ [t](u)") == r"a\|b \*c\* &lt;i&gt; \$x\$ [t]\(u)"


def test_csv_and_json_carry_the_raw_numbers(table: Table) -> None:
    rows = list(csv.DictReader(io.StringIO(RENDERERS["csv"](table))))
    data = json.loads(RENDERERS["json"](table))
    delta = data["rows"][1]["cells"]["delta_val_loss"]
    assert data["schema"] == 1
    assert delta["value"] == pytest.approx((3.95 - 4.00 + 3.973 - 4.02 + 3.962 - 4.013) / 3)
    assert float(rows[1]["delta_val_loss_low"]) == delta["low"] < delta["value"] < delta["high"]
    assert rows[1]["variant"] == r"A&B_50% $x|<y>\^~{#}"
    assert (rows[3]["val_loss"], rows[3]["seeds_diverged"], rows[3]["marks"]) == ("", "1", "†")


def test_json_holds_the_runs_behind_each_number(table: Table) -> None:
    rows = json.loads(RENDERERS["json"](table))["rows"]
    assert len(rows) == len(table.rows)
    for row in rows:
        runs, cells = row["seeds"], row["cells"]
        assert [run["seed"] for run in runs] == sorted(run["seed"] for run in runs)
        assert len(runs) == cells["seeds"]["planned"]
        assert len({run["run"] for run in runs}) == len(runs)
        losses = [run["val_loss"] for run in runs if run["val_loss"] is not None]
        deltas = [run["delta_val_loss"] for run in runs if run["delta_val_loss"] is not None]
        assert len(losses) == cells["seeds"]["value"]
        if (mean := cells["val_loss"]["value"]) is not None:
            assert sum(losses) / len(losses) == pytest.approx(mean, rel=1e-12)
        if (mean := cells["delta_val_loss"]["value"]) is not None:
            assert sum(deltas) / len(deltas) == pytest.approx(mean, rel=1e-9)
        else:
            assert not deltas
    states = {run["state"] for row in rows for run in row["seeds"]}
    assert {"done", "diverged", "failed", "missing"} <= states


def test_html_shows_every_text_as_it_stands(table: Table) -> None:
    fragment = html(table)
    seen = Seen()
    seen.feed(fragment)
    cells = [cell.text for row in table.rows for cell in row.cells if cell.text]
    text = "".join(seen.texts)
    assert all(part in text for part in (*cells, table.caption, *table.footnotes))
    # A label's own <y> is no element.
    assert set(seen.tags) == {
        *("table", "caption", "strong", "thead", "tbody", "tr", "th", "td", "span", "ul", "li"),
    }
    assert seen.open == []
    assert 'data-verdict="better"' in fragment


def test_an_html_page_stands_alone(table: Table) -> None:
    page = RENDERERS["html"](table)
    assert page.startswith("<!doctype html>") and html(table) in page
    assert not re.search(r"(src|href)=|url\(|@import|<script", page)


class Seen(HTMLParser):
    """Elements and texts of a document, and which elements are left open."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attributes: object) -> None:
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_columns_beyond_the_width_stand_in_blocks_that_lose_nothing(manifest_path: Path) -> None:
    manifest = read_manifest(manifest_path)
    runs = read_runs(manifest, manifest_path.parents[1])
    whole = ablation_table(manifest, runs, manifest_path.parents[1], ["all"])
    text = rendered(whole, "terminal-100")
    body = text[: text.index(whole.caption[:40])]
    assert max(map(len, body.splitlines())) <= 100
    blocks = body.split("  Variant ")[1:]
    assert len(blocks) > 1
    for index, column in enumerate(whole.columns[1:], 1):
        (block,) = (b for b in blocks if f"  {column.title}" in b.splitlines()[0])
        for row in whole.rows:
            (line,) = (ln for ln in block.splitlines() if ln.startswith(f"  {row.cells[0].text} "))
            assert row.cells[index].text in line and row.cells[index].mark in line


@pytest.mark.parametrize("width", [40, 24])
def test_a_narrow_terminal_folds_words_and_keeps_every_letter(table: Table, width: int) -> None:
    text = rendered(table, f"terminal-{width}")
    body = text[: text.index(table.caption[:20])]
    assert max(map(len, body.splitlines())) <= width
    kept = re.sub(r"\s", "", body)
    assert all(part in kept for part in ("baseline", "cannottell", "−0.049", "QK-norm"))


def test_letters_of_two_columns_keep_the_table_straight(table: Table) -> None:
    first, *others = table.rows
    wide = replace(first, cells=(replace(first.cells[0], text="変種🙂"), *first.cells[1:]))
    text = rendered(replace(table, rows=(wide, *others)), "terminal-150")
    lines = [line for line in text.splitlines() if "3/3" in line]
    assert len({cell_len(line[: line.index("3/3")]) for line in lines}) == 1


def compiled(tex: str, folder: Path, options: str = "") -> tuple[float, float, str]:
    """Width of what is printed and of the line (points), and what pdflatex said, on one line."""
    probe = r"\typeout{BOX=\the\wd0 LINE=\the\linewidth}"
    tex = tex.replace("\n  \\ifdim", f"\n  {probe}\\ifdim", 1)
    (folder / "x.tex").write_text(
        rf"\documentclass[{options}]{{article}}\usepackage{{booktabs,graphicx}}"
        rf"\begin{{document}}{tex}\end{{document}}"
    )
    environment = {**os.environ, "max_print_line": "10000"}
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = re.search(r"BOX=([\d.]+)pt\s*LINE=([\d.]+)pt", done.stdout)
    assert found is not None
    return float(found[1]), float(found[2]), done.stdout


needs_latex = pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")


@needs_latex
@pytest.mark.parametrize("options", ["", "twocolumn"])
@pytest.mark.parametrize("wide", [False, True])
def test_latex_fits_the_line_or_names_what_to_drop(
    table: Table, tmp_path: Path, options: str, wide: bool
) -> None:
    width, line, said = compiled(latex(table, wide=wide), tmp_path, options)
    warned = "Warning: table odd-names is wider than the line" in said
    assert warned == (width > line)
    assert ("Overfull" in said) == warned
    if warned:
        named = re.search(r"leave out columns: ([\w ]+) on input", said)
        keys = [column.key for column in table.columns[1:]]
        assert named is not None and set(named[1].split()) <= set(keys)


@needs_latex
@pytest.mark.parametrize("options", ["", "twocolumn"])
def test_latex_scaled_to_the_line_keeps_every_column(
    table: Table, tmp_path: Path, options: str
) -> None:
    tex = latex(table, scale=True)
    assert "Left out" not in tex
    width, line, said = compiled(tex, tmp_path, options)
    assert width > line and "Overfull" not in said


def test_notes_of_a_column_that_is_left_out_are_too(table: Table) -> None:
    def notes(tex: str) -> bool:
        return "Tokens/s: median" in tex

    narrow = latex(table)
    assert "Tokens/s" in narrow.split("\n")[1] and not notes(narrow)
    assert notes(latex(table, scale=True))
