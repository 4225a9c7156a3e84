"""A table never says more than its runs do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import compare
from analysis.results import read_manifest, read_runs
from analysis.table import Cell, Table, ablation_table, table
from experiments.record import UserError
from tests import rich_sweep


def cell(table: Table, row: int, key: str) -> Cell:
    return table.rows[row].cells[[column.key for column in table.columns].index(key)]


@pytest.fixture
def odd(manifest_path: Path) -> Table:
    manifest = read_manifest(manifest_path)
    return ablation_table(manifest, read_runs(manifest, manifest_path.parents[1]))


def test_a_variant_that_diverged_has_no_mean_and_no_difference(odd: Table) -> None:
    for key in ("val_loss", "val_bpb", "delta_val_loss"):
        assert (cell(odd, 3, key).value, cell(odd, 3, key).mark) == (None, "† 1/3")
    assert "LSTM 1/3 (seed 1 at step 37; finished: seed 0 4.4000, seed 2 4.5000)" in "".join(
        odd.footnotes
    )


def test_missing_and_failed_seeds_are_counted_marked_and_named(odd: Table) -> None:
    seeds = cell(odd, 4, "seeds")
    assert (seeds.text, seeds.mark) == ("1/3", "—")
    assert cell(odd, 4, "delta_val_loss").text == "+0.100 (1 pair)"
    assert cell(odd, 5, "val_loss") == Cell("", None, {"sd": None, "n": 0}, "—")
    notes = "\n".join(odd.footnotes)
    assert "— rows without any result: QK-norm." in notes
    assert "— runs without a result: NoPE seeds 1, 2." in notes
    assert "Failed in the last attempt: NoPE seed 2 (disk full)." in notes


def test_bold_is_what_holm_rejects_and_nothing_else(odd: Table) -> None:
    bold = [
        (i, column.key)
        for i, row in enumerate(odd.rows)
        for column, c in zip(odd.columns, row.cells, strict=True)
        if c.bold
    ]
    assert bold == [(1, "delta_val_loss"), (1, "p"), (1, "verdict")]
    assert cell(odd, 1, "verdict").text == "better"
    low, high = (cell(odd, 2, "delta_val_loss").details[key] for key in ("low", "high"))
    assert low is not None and high is not None and low < 0 < high


def test_an_interval_that_excludes_zero_alone_is_not_bold_among_many(make_sweep: Any) -> None:
    rows = {"base": [4.0, 4.1, 4.2], "new": [3.98, 4.06, 4.17]}
    alone = cell(ablation_table(*make_sweep(rows)), 1, "delta_val_loss")
    assert alone.bold and alone.details["high"] is not None and alone.details["high"] < 0
    rows |= {f"row {i}": [4.0, 4.2, 4.1] for i in range(10)}
    among = cell(ablation_table(*make_sweep(rows)), 1, "delta_val_loss")
    assert among.details == alone.details and not among.bold


def test_a_mismatch_over_one_percent_is_marked_in_the_matched_column_only(odd: Table) -> None:
    assert [cell(odd, i, "parameters").mark for i in range(6)] == ["", "", "≈", "", "", "≈"]
    assert not any(cell(odd, i, "flops_per_token").mark for i in range(6))
    assert "[SwiGLU] -- *gated* +6.6%, QK-norm −2.0%" in "".join(odd.footnotes)


def test_tokens_per_second_is_a_median(odd: Table) -> None:
    assert cell(odd, 0, "tokens_per_s").value == 15100.0  # of 15000, 15100 and 15400


def test_a_difference_is_paired_over_seeds_done_in_both(make_sweep: Any) -> None:
    sweep = {"base": [4.0, None, 4.4, 4.5], "new": [3.9, 3.0, 4.2, None]}
    delta = cell(ablation_table(*make_sweep(sweep)), 1, "delta_val_loss")
    assert delta.value == pytest.approx(-0.15) and delta.details["n"] == 2
    assert delta.text.endswith("(2 pairs)")


def test_seeds_of_a_diverged_baseline_are_not_paired(make_sweep: Any) -> None:
    sweep = {"base": [4.0, "diverged", 4.2], "new": [3.9, 3.0, 4.0]}
    delta = cell(ablation_table(*make_sweep(sweep)), 1, "delta_val_loss")
    assert (delta.details["n"], delta.mark, delta.bold) == (2, "†", False)


def test_a_change_that_does_nothing_is_called_out(make_sweep: Any) -> None:
    made = ablation_table(*make_sweep({"base": [4.0, 4.1, 4.3], "dead flag": [4.0, 4.1, 4.3]}))
    delta = cell(made, 1, "delta_val_loss")
    assert delta.text == "0.0000 [0.0000, 0.0000]" and not delta.bold
    assert cell(made, 1, "p").text == "1.000"
    assert any("may do nothing: dead flag" in note for note in made.footnotes)


def test_decimal_points_stand_below_one_another(make_sweep: Any) -> None:
    made = ablation_table(*make_sweep({"base": [9.95, 10.0], "new": [10.4, 10.6]}))
    assert [cell(made, i, "val_loss").text.index(".") for i in (0, 1)] == [2, 2]
    assert cell(made, 0, "val_loss").text[0] == "\u2007"


# --- columns -------------------------------------------------------------------------------------


@pytest.fixture
def rich(tmp_path: Path) -> Any:
    """`rich(name, columns)` -> the table of one of the made-up sweeps, its curves read."""

    def made(name: str, columns: tuple[str, ...] | None = None) -> Table:
        manifest = read_manifest(getattr(rich_sweep, f"{name}_sweep")(tmp_path))
        return table(compare(manifest, read_runs(manifest, tmp_path), tmp_path), columns)

    return made


def test_columns_come_in_the_order_asked_for_after_the_name(rich: Any) -> None:
    keys = [column.key for column in rich("rows", ("p_sign", "gain", "val_loss")).columns]
    assert keys == ["variant", "p_sign", "gain", "val_loss"]


def test_an_unknown_column_is_one_line_with_a_guess(rich: Any) -> None:
    with pytest.raises(UserError, match="no column 'verdit' — did you mean 'verdict'") as error:
        rich("rows", ("verdit",))
    assert "delta_at_time" in str(error.value) and "\n" not in str(error.value)


def test_all_columns_are_those_that_have_something_to_say(rich: Any) -> None:
    made = rich("rows", ("all",))
    keys = [column.key for column in made.columns]
    wanted = {
        *("variant", "seeds", "parameters", "flops_per_token", "mismatch", "tokens_per_s"),
        *("peak_memory", "lr", "val_loss", "val_bpb", "val_loss@64", "val_loss@512"),
        *("delta_val_loss", "delta_adjusted", "p", "p_sign", "verdict", "pairing", "wins"),
        *("delta_at_tokens", "delta_at_flops", "delta_at_time", "gain"),
    }
    assert wanted <= set(keys) and len(keys) == len(set(keys))
    assert "above_floor" not in keys and "sensitivity" not in keys  # nobody has one
    assert not any(column.priority for column in made.columns)  # none gives way


def test_a_metric_that_some_rows_lack_is_marked_so_in_theirs_alone(rich: Any) -> None:
    made = rich("rows", ("val_loss@512",))
    texts = {row.cells[0].text: cell(made, i, "val_loss@512") for i, row in enumerate(made.rows)}
    assert texts["GPT-2"] == Cell("n/a", None, {"sd": None, "n": 0})
    assert isinstance(texts["Rotary"].value, float)
    assert texts["NoPE"].mark == "—"


def test_a_tuned_row_shows_its_rate_its_tries_and_its_edge(rich: Any) -> None:
    made = rich("tuned", ("lr", "tries", "sensitivity", "expected_best"))
    rates = [cell(made, i, "lr").value for i in range(len(made.rows))]
    assert set(rates) <= set(rich_sweep.VALUES)
    assert all(cell(made, i, "tries").value == 4 for i in range(len(made.rows)))
    assert all(isinstance(cell(made, i, "sensitivity").value, float) for i in range(2))
    assert any("best training.lr of 4 tried" in note for note in made.footnotes)
    assert not any("@" in row.cells[0].text for row in made.rows)  # tries are no rows


def test_equal_budgets_say_which_and_that_a_schedule_was_cut(rich: Any) -> None:
    made = rich("rows", ("delta_at_time",))
    assert any(cell(made, i, "delta_at_time").mark == "‖" for i in range(1, 6))
    notes = "\n".join(made.footnotes)
    assert "‖ read from the curves more than 5% before the end" in notes
    assert "At equal training time (" in notes


def test_the_caption_and_notes_say_what_was_done(rich: Any) -> None:
    made = rich("rows")
    assert "Holm's correction over the sweep's 7 comparisons" in made.caption
    assert "n = 4 planned per row" in made.caption and "1,000,000 training tokens" in made.caption
    notes = "\n".join(made.footnotes)
    assert "the sd of GPT-2's loss is 0.0" in notes and "of what it would be unpaired" in notes
    assert "27 runs started, 1 diverged; code 0123abc." in notes
    assert "no exact sign-flip test gives a p below 0.125" in notes


def test_one_seed_is_shown_without_p_and_with_a_plain_warning(make_sweep: Any) -> None:
    made = ablation_table(*make_sweep({"base": [4.0], "new": [3.0]}))
    assert "p" not in [column.key for column in made.columns]
    assert cell(made, 1, "delta_val_loss").text == "−1.0000 (1 pair)"
    assert cell(made, 1, "verdict").text == "cannot tell"
    assert any(note.startswith("One seed per row: differences may be all noise") for note in
               made.footnotes)  # fmt: skip
    manifest, runs = make_sweep({"base": [4.0], "new": [3.0]})
    asked = ablation_table(manifest, runs, columns=("p", "p_sign"))
    assert [cell(asked, 1, key).text for key in ("p", "p_sign")] == ["n/a", "n/a"]


def test_a_sweep_in_which_all_diverged_or_nothing_ran_has_a_table(make_sweep: Any) -> None:
    for outcome, verdict in (("diverged", "diverged 2/2"), (None, "not run")):
        made = ablation_table(*make_sweep({"base": [outcome] * 2, "new": [outcome] * 2}))
        assert cell(made, 1, "verdict").text == verdict
        assert cell(made, 1, "val_loss").value is None


def test_a_row_with_fewer_seeds_says_so(make_sweep: Any) -> None:
    made = ablation_table(*make_sweep({"base": [4.0, 4.1, 4.2], "new": [3.9, 4.0]}))
    assert cell(made, 1, "seeds").text == "2/2" and "n = 2 to 3" in made.caption
    assert cell(made, 1, "delta_val_loss").details["n"] == 2


def test_a_baseline_alone_is_a_table_of_its_noise(make_sweep: Any) -> None:
    made = ablation_table(*make_sweep({"base": [4.0, 4.1, 4.2]}))
    assert any("the sd of base's loss is 0.1000 over 3 seeds." in note for note in made.footnotes)
    assert "Δ" not in made.caption


def test_an_edited_run_is_marked_and_left_out(tmp_path: Path) -> None:
    manifest = read_manifest(rich_sweep.rows_sweep(tmp_path))
    (tmp_path / manifest.rows[2].runs[1] / "metrics.jsonl").write_text("")
    made = ablation_table(manifest, read_runs(manifest, tmp_path), tmp_path)
    assert (cell(made, 2, "seeds").text, cell(made, 2, "seeds").mark) == ("3/4", "¶")
    assert any(note.startswith("¶ ") and "SwiGLU seed 1" in note for note in made.footnotes)


def test_rows_of_other_data_are_marked_and_get_no_verdict(tmp_path: Path) -> None:
    manifest = read_manifest(rich_sweep.rows_sweep(tmp_path))
    runs = read_runs(manifest, tmp_path)
    for run in manifest.rows[2].runs.values():
        runs[run].result["data"] = "beef"  # type: ignore[index]
    made = ablation_table(manifest, runs, tmp_path, ("all",))
    for key in ("val_loss", "delta_val_loss", "p", "verdict"):
        assert cell(made, 2, key).mark == "§" and not cell(made, 2, key).bold, key
    assert (cell(made, 2, "verdict").text, cell(made, 2, "p").value) == ("cannot tell", None)
    assert any("§ not the same data (fingerprint), so no verdict: f00d" in note
               and "beef: SwiGLU" in note for note in made.footnotes)  # fmt: skip
