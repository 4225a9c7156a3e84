"""`run.py table`: what it prints, and what it leaves on disk."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click import UsageError
from click.testing import CliRunner, Result

import run
from experiments.record import UserError
from tests import PATIENCE, rich_sweep
from tests.conftest import ROOT


def table(root: Path, *words: str) -> Result:
    done = CliRunner().invoke(run.cli, ["table", "recipe", "--runs", str(root), *words])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rich_sweep.rows_sweep(tmp_path)
    return tmp_path


def test_columns_and_formats_go_together(root: Path) -> None:
    found = json.loads(table(root, "--columns", "verdict, gain", "--json").stdout)
    assert [column["key"] for column in found["columns"]] == ["variant", "verdict", "gain"]
    assert found["rows"][2]["cells"]["verdict"]["value"] == "better"
    assert found["rows"][2]["cells"]["gain"]["low"] > 1


def test_an_unknown_column_is_an_error_of_one_line(root: Path) -> None:
    with pytest.raises(UserError, match="no column 'pvalue'"):
        table(root, "--columns", "pvalue")


def test_the_ending_of_the_file_decides_the_format(root: Path) -> None:
    for ending, start in (("html", "<!doctype html>"), ("tex", "% Needs"), ("csv", "group,")):
        target = root / f"table.{ending}"
        table(root, "--out", str(target))
        assert target.read_text("utf-8").startswith(start)


def test_a_look_at_other_columns_leaves_the_files_alone(root: Path) -> None:
    before = sorted((root / "sweeps").iterdir())
    shown = table(root, "--columns", "verdict").stdout
    assert "better" in shown and "Val loss" not in shown
    assert sorted((root / "sweeps").iterdir()) == before


def test_what_is_missing_is_said_beside_the_table(root: Path) -> None:
    said = table(root, "--format", "md").stderr
    assert "still missing: 5 of 32 runs (" in said and "Post-LN s2" in said


def test_a_terminal_without_the_letters_shows_their_numbers(root: Path) -> None:
    words = [sys.executable, "run.py", "table", "recipe", "--runs", str(root)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert b"\\u22120.0397" in done.stdout


OUTS = {
    "table x --out t.xlsx": "no table is written as .xlsx (known endings: .md, .markdown, .tex",
    "table x --out t.XLSX --format csv": "no table is written as .xlsx",
    "table x --out t.pdf": "no table is written as .pdf",
    "table x --out notes.txt": "no table is written as .txt",
    "table x --out t.csv --format md": "--out t.csv is csv by its ending, and --format says md",
    "table x --out t.tex --format html": "--out t.tex is latex by its ending",
    "table x --json --out t.csv": "use --format json",
    "table x --json --format md": "use --format json",
    "reproduce press2021 --no-run --out t.xlsx": "no table is written as .xlsx",
    "reproduce press2021 --no-run --json --out t.json": "use --format json",
    "ledger --out t.xlsx": "no table is written as .xlsx",
    "ledger --json --out t.json": "use --format json",
    "wandb pull team/x --group g --out t.xlsx": "no table is written as .xlsx",
    "report x --out page.html": "several files are written; give a folder, such as page",
    "compare x y --out figure.svg": "several files are written; give a folder, such as figure",
}


@pytest.mark.parametrize(("words", "said"), OUTS.items(), ids=OUTS)
def test_an_out_file_of_no_or_another_format_is_refused(words: str, said: str) -> None:
    result = CliRunner().invoke(run.cli, words.split(), standalone_mode=False)
    assert isinstance(result.exception, UsageError)
    assert said in result.exception.format_message()


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *[("t.md", None), ("t.CSV", None), ("t.htm", None), ("t", None), ("/dev/stdout", None)],
        *[("notes.txt", "md"), ("t.tex", "latex"), ("t.v2", "csv")],
    ],
)
def test_an_ending_that_fits_or_says_nothing_passes(name: str, form: str | None) -> None:
    run.check_ending(Path(name), form)


def test_wide_and_scaled_tables_are_of_latex(root: Path) -> None:
    wide = table(root, "--format", "latex", "--wide")
    assert r"\begin{table*}[t]" in wide.stdout and "left out for want of width" in wide.stderr
    scaled = table(root, "--format", "latex", "--scale")
    assert r"\resizebox{\linewidth}" in scaled.stdout and "left out" not in scaled.stderr
    assert "are of LaTeX" in table(root, "--scale").stderr
