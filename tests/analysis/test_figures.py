"""Figures hold the runs' own numbers, are drawn where they apply, and again byte for byte."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis import figures
from analysis.comparison import Comparison, compare
from analysis.figures import cost, curves, drawing, effects, lengths, tuning
from analysis.figures import ladder as steps_of
from analysis.results import read_manifest, read_runs
from experiments.record import UserError
from tests import rich_sweep


def comparison(path: Path) -> tuple[Comparison, Path]:
    manifest, root = read_manifest(path), path.parents[1]
    return compare(manifest, read_runs(manifest, root), root), root


@pytest.fixture(scope="module")
def sweeps(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Comparison, Path]]:
    """`sweeps("rows")` -> comparison and root of one of the made-up sweeps."""
    made: dict[str, tuple[Comparison, Path]] = {}

    def get(name: str) -> tuple[Comparison, Path]:
        if name not in made:
            make = getattr(rich_sweep, f"{name}_sweep")
            made[name] = comparison(make(tmp_path_factory.mktemp(name)))
        return made[name]

    return get


def table(found: drawing.Drawing) -> list[dict[str, str]]:
    return list(csv.DictReader(drawing.csv_text(found).splitlines()))


@pytest.mark.parametrize(
    ("name", "drawn"),
    [
        ("rows", "differences curves-tokens curves-flops curves-time lengths positions cost"),
        ("ladder", "differences curves-tokens curves-flops curves-time ladder cost"),
        ("tuned", "differences curves-tokens curves-flops curves-time sensitivity"),
        ("factorial", "differences curves-tokens curves-flops curves-time effects interactions "
                      "cost"),
    ],
)  # fmt: skip
def test_a_sweep_gets_the_figures_that_apply_to_it(sweeps: Any, name: str, drawn: str) -> None:
    assert [each.name for each in figures.draw(*sweeps(name))] == drawn.split()


def test_each_figure_is_four_files_and_byte_identical_on_rerun(sweeps: Any, tmp_path: Path) -> None:
    once, again = (figures.draw(*sweeps("rows")) for _ in range(2))
    for a, b in zip(once[:1], again[:1], strict=True):
        first, second = (drawing.write(x, tmp_path / folder) for x, folder in ((a, "a"), (b, "b")))
        assert [path.suffix for path in first] == [".svg", ".pdf", ".png", ".csv"]
        assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
        assert drawing.inline(a) == drawing.inline(b)


def test_the_picture_that_table_leaves_holds_every_point(
    manifest_path: Path, tmp_path: Path
) -> None:
    found, root = comparison(manifest_path)
    first = figures.loss_curves(found, root, tmp_path / "a" / "odd.v1")
    again = figures.loss_curves(found, root, tmp_path / "b" / "odd.v1")
    assert [path.name for path in first] == ["odd.v1.svg", "odd.v1.png", "odd.v1.csv"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    rows = list(csv.DictReader(first[2].read_text().splitlines()))
    points = [row for row in rows if row["panel"] == "curve"]
    assert len(points) == 12 * 10 + 3  # 12 finished runs, and the diverged one up to its end
    assert {row["label"] for row in points if row["state"] == "diverged"} == {"LSTM"}
    differences = [row for row in rows if row["panel"] == "difference"]
    assert [row["state"] for row in differences] == ["n=3", "n=3", "n=1"]  # LSTM has none


def test_a_sweep_of_which_nothing_ran_has_no_figure(tmp_path: Path) -> None:
    rows = [rich_sweep.Variant(label, missing=[0]) for label in "ab"]
    found, root = comparison(rich_sweep.make(tmp_path, "none", rows, seeds=1))
    assert figures.draw(found, root) == []
    with pytest.raises(UserError, match="no finished run to draw"):
        figures.loss_curves(found, root, tmp_path / "figure")


@pytest.mark.parametrize(("seeds", "diverged"), [(1, ()), (2, (0, 1))])
def test_one_seed_and_all_diverged_are_drawn(
    seeds: int, diverged: tuple[int, ...], tmp_path: Path
) -> None:
    rows = [rich_sweep.Variant(label, diverged=diverged) for label in "ab"]
    found, root = comparison(rich_sweep.make(tmp_path, "poor", rows, seeds=seeds))
    drawn = figures.draw(found, root)
    assert "curves-tokens" in [each.name for each in drawn]
    for each in drawn:
        drawing.save(each, tmp_path / each.name, (".svg", ".csv"))


def test_a_place_that_cannot_be_written_is_an_error_of_one_line(manifest_path: Path) -> None:
    with pytest.raises(UserError, match="can't be written"):
        figures.loss_curves(*comparison(manifest_path), manifest_path / "figure")


def test_curves_against_flops_and_time_are_the_same_losses_over_what_was_spent(
    sweeps: Any,
) -> None:
    found, root = sweeps("rows")
    lines = curves.histories(found, root)
    by_tokens, by_flops, by_time = (
        [row for row in table(made) if "LSTM" not in row["variant"]]  # diverged: tokens alone
        for by in curves.AXES
        if (made := curves.draw(lines, by))
    )
    assert [row["val_loss"] for row in by_tokens] == [row["val_loss"] for row in by_flops]
    for row in by_flops:
        cost_of = {r.label: r.read.flops_per_token for r in found.rows}[row["variant"]]
        assert float(row["flops"]) == pytest.approx(int(row["tokens"]) * cost_of)
    last = {row["variant"]: float(row["time"]) for row in by_time}
    assert last["ALiBi"] == pytest.approx(last["GPT-2"] / 0.82, rel=0.02)  # it trains slower


def test_the_forest_draws_what_the_comparison_decided(sweeps: Any) -> None:
    found, _ = sweeps("rows")
    forest = effects.forest(found)
    assert forest is not None
    for row, drawn in zip(found.rows[1:], table(forest), strict=True):
        assert drawn["variant"] == row.label
        if row.difference is None:
            assert drawn["difference"] == "" and drawn["n"] == "0"
        else:
            assert float(drawn["difference"]) == row.difference.mean
            assert float(drawn["p_holm"]) == row.adjusted.p
    verdicts = [row["verdict"] for row in table(forest)]
    assert verdicts[-2:] == ["diverged 1/4", "not run"]


def test_ladder_steps_add_up_to_the_whole(sweeps: Any) -> None:
    ladder = steps_of.waterfall(sweeps("ladder")[0])
    assert ladder is not None
    base, *steps, total = table(ladder)
    assert base["difference"] == "" and [row["n"] for row in steps] == ["5"] * 4
    assert sum(float(row["difference"]) for row in steps) == pytest.approx(
        float(total["difference"])
    )


def test_a_step_after_one_that_diverged_has_no_difference(tmp_path: Path) -> None:
    rows = [rich_sweep.Variant("base")]
    rows += [rich_sweep.Variant(f"step {i}", -0.1 * i, "ladder", diverged=[0] * (i == 2))
             for i in (1, 2, 3, 4)]  # fmt: skip
    found, _ = comparison(rich_sweep.make(tmp_path, "broken", rows))
    ladder = steps_of.waterfall(found)
    assert ladder is not None
    assert [row["n"] for row in table(ladder)] == ["4", "4", "0", "0", "4", "4"]


def test_sensitivity_holds_every_try_and_the_one_chosen(sweeps: Any) -> None:
    found, _ = sweeps("tuned")
    made = tuning.sensitivity(found)
    assert made is not None
    rows = table(made)
    assert len(rows) == 2 * 4 * 4  # rows × values × seeds
    chosen = {row["variant"]: float(row["value"]) for row in rows if row["chosen"] == "True"}
    assert chosen == {"pre-LN": 1e-3, "pre-LN + QK-norm": 3e-3}
    assert sum(row["state"] == "diverged" for row in rows) == 2
    assert "×" in made.caption


def test_the_frontier_is_what_nothing_undercuts() -> None:
    def point(spent: float, loss: float) -> cost.Point:
        return cost.Point(None, None, spent, loss, loss, loss)  # type: ignore[arg-type]

    points = [point(2, 3.0), point(1, 3.5), point(3, 3.0), point(4, 2.0), point(1, 3.6)]
    assert [(p.cost, p.loss) for p in cost.frontier(points)] == [(1, 3.5), (2, 3.0), (4, 2.0)]


def test_lengths_end_where_positions_do(sweeps: Any) -> None:
    found, root = sweeps("rows")
    measured = {row.label: row for row in lengths.measured(found, root)}
    assert set(measured["GPT-2"].losses) == {64}
    assert set(measured["Rotary"].losses) == {64, 128, 512}
    assert "LSTM" not in " ".join(measured)  # it diverged


def test_bins_of_positions_keep_the_mean_and_cover_all() -> None:
    losses = np.arange(1, 129, dtype=float)[None].repeat(2, axis=0)
    x, means, lows, highs = lengths.binned(losses)
    assert means == pytest.approx(x) and np.all(np.diff(x) > 0)
    assert lows.tolist() == highs.tolist() == means.tolist()
    assert x[0] == 1.0 and len(x) <= lengths.BINS


def test_a_damaged_lengths_record_is_an_error_of_one_line(tmp_path: Path) -> None:
    found, root = comparison(rich_sweep.rows_sweep(tmp_path))
    path = next(root.glob("*/lengths.json"))
    path.write_text('{"64": {"loss": 1.0, "by_position": [1.0]}}')
    with pytest.raises(UserError, match="damaged"):
        lengths.measured(found, root)


def test_lengths_that_do_not_fit_the_sealed_result_are_an_error_of_one_line(
    tmp_path: Path,
) -> None:
    found, root = comparison(rich_sweep.rows_sweep(tmp_path))
    path = next(path for path in root.glob("*/lengths.json") if "-s0" in str(path))
    whole = path.read_text()
    for key in ("loss", "by_position"):
        record = json.loads(whole)
        record["64"][key] = np.add(record["64"][key], 0.1).tolist()
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match="does not fit the run's result at length 64"):
            lengths.measured(found, root)
    path.write_text(whole)
    assert lengths.measured(found, root)


@pytest.mark.filterwarnings("error")
def test_a_label_that_no_font_has_is_drawn_without_a_word(tmp_path: Path) -> None:
    rows = [rich_sweep.Variant("a"), rich_sweep.Variant("\N{ROCKET} \u65e5\u672c")]
    found, _ = comparison(rich_sweep.make(tmp_path, "odd", rows, seeds=2))
    forest = effects.forest(found)
    assert forest is not None
    assert len(drawing.write(forest, tmp_path)) == 4
    assert "\N{ROCKET}" in drawing.inline(forest)


def test_inline_svgs_share_no_id_and_carry_no_letters_or_colours_of_their_own(
    sweeps: Any,
) -> None:
    svgs = [drawing.inline(each) for each in figures.draw(*sweeps("rows"))]
    ids = [found for svg in svgs for found in set(re.findall(r' id="([^"]+)"', svg))]
    assert len(ids) == len(set(ids))
    for svg in svgs:
        root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns="x" ', 1))
        assert root.tag.endswith("svg")
        for pointed in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg):
            assert f'id="{"".join(pointed)}"' in svg
        assert "font-family" not in svg and "<b>" not in svg
        colours = re.findall(r": (#[0-9a-f]{6})", svg)
        assert not [colour for colour in colours if colour.upper() in drawing.VARIABLES]


def test_many_rows_are_grey_but_for_the_largest_differences(tmp_path: Path) -> None:
    rows = [rich_sweep.Variant("base")]
    rows += [rich_sweep.Variant(f"v{i}", -0.01 * i) for i in range(1, 30)]
    found, root = comparison(rich_sweep.make(tmp_path, "many", rows, seeds=2))
    lines = curves.histories(found, root)
    told = [line.row.label for line in curves.emphasised(lines)]
    assert len(told) == drawing.NAMED_AT_MOST and told[0] == "base" and "v29" in told
    made = curves.draw(lines, "tokens")
    assert made is not None and "30 rows" in made.caption


def test_names_are_spread_to_a_gap_and_stay_in_order() -> None:
    spread = drawing.spread([0.0, 0.5, 0.5, 0.51, 0.9], 0.1)
    assert np.diff(spread).min() == pytest.approx(0.1)
    assert spread[0] == 0.0 and spread[-1] == 0.9  # names with room stay where they are
    assert drawing.spread([-1.0, -1.0], 0.1) == pytest.approx([0.0, 0.1])
