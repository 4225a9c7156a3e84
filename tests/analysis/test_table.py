"""A table never says more than its runs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.results import read_manifest, read_runs
from analysis.table import Cell, Table, ablation_table


def cell(table: Table, row: int, key: str) -> Cell:
    return table.rows[row].cells[[column.key for column in table.columns].index(key)]


@pytest.fixture
def table(manifest_path: Path) -> Table:
    manifest = read_manifest(manifest_path)
    return ablation_table(manifest, read_runs(manifest, manifest_path.parents[1]))


def test_a_variant_that_diverged_has_no_mean_and_no_difference(table: Table) -> None:
    for key in ("val_loss", "val_bpb", "delta_val_loss"):
        assert (cell(table, 3, key).value, cell(table, 3, key).mark) == (None, "† 1/3")
    assert "LSTM 1/3 (seed 1 at step 37; finished: seed 0 4.4000, seed 2 4.5000)" in "".join(
        table.footnotes
    )


def test_missing_and_failed_seeds_are_counted_marked_and_named(table: Table) -> None:
    seeds = cell(table, 4, "seeds")
    assert (seeds.text, seeds.mark) == ("1/3", "—")
    assert cell(table, 4, "delta_val_loss").text.endswith("(1 pair: no interval)")
    assert cell(table, 5, "val_loss") == Cell("", None, {"sd": None, "n": 0}, "—")
    notes = "\n".join(table.footnotes)
    assert "— rows without any result: QK-norm." in notes
    assert "— runs without a result: NoPE seeds 1, 2." in notes
    assert "Failed in the last attempt: NoPE seed 2 (disk full)." in notes


def test_only_the_difference_whose_interval_excludes_zero_is_bold(table: Table) -> None:
    bold = [
        (i, column.key)
        for i, row in enumerate(table.rows)
        for column, c in zip(table.columns, row.cells, strict=True)
        if c.bold
    ]
    assert bold == [(1, "delta_val_loss")]
    low, high = (cell(table, 2, "delta_val_loss").details[key] for key in ("low", "high"))
    assert low is not None and high is not None and low < 0 < high


def test_a_mismatch_over_one_percent_is_marked_in_the_matched_column_only(table: Table) -> None:
    assert [cell(table, i, "parameters").mark for i in range(6)] == ["", "", "≈", "", "", "≈"]
    assert not any(cell(table, i, "flops_per_token").mark for i in range(6))
    assert "[SwiGLU] -- *gated* +6.6%, QK-norm −2.0%" in "".join(table.footnotes)


def test_tokens_per_second_is_a_median(table: Table) -> None:
    assert cell(table, 0, "tokens_per_s").value == 15100.0  # of 15000, 15100 and 15400


def test_a_difference_is_paired_over_seeds_done_in_both(make_sweep: Any) -> None:
    sweep = {"base": [4.0, None, 4.4, 4.5], "new": [3.9, 3.0, 4.2, None]}
    delta = cell(ablation_table(*make_sweep(sweep)), 1, "delta_val_loss")
    assert delta.value == pytest.approx(-0.15) and delta.details["n"] == 2
    assert delta.text.endswith("(2 pairs)")


def test_seeds_of_a_diverged_baseline_are_not_paired(make_sweep: Any) -> None:
    sweep = {"base": [4.0, "diverged", 4.2], "new": [3.9, 3.0, 4.0]}
    assert cell(ablation_table(*make_sweep(sweep)), 1, "delta_val_loss").details["n"] == 2


def test_a_change_that_does_nothing_is_called_out(make_sweep: Any) -> None:
    table = ablation_table(*make_sweep({"base": [4.0, 4.1, 4.3], "dead flag": [4.0, 4.1, 4.3]}))
    delta = cell(table, 1, "delta_val_loss")
    assert delta.text == "0.0000 [0.0000, 0.0000]" and not delta.bold
    assert any("may do nothing: dead flag" in note for note in table.footnotes)


def test_decimal_points_stand_below_one_another(make_sweep: Any) -> None:
    table = ablation_table(*make_sweep({"base": [9.95, 10.0], "new": [10.4, 10.6]}))
    assert [cell(table, i, "val_loss").text.index(".") for i in (0, 1)] == [2, 2]
    assert cell(table, 0, "val_loss").text[0] == "\u2007"
