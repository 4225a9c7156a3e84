"""Tasks item by item in tables and reports: which rows can be told apart, and what is left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import figures, report, table, task_items
from analysis.comparison import Comparison, compare
from analysis.items import compare as compare_items
from analysis.results import read_manifest, read_runs
from components.registry import UserError
from experiments.record import read_json
from tests import rich_sweep
from tests.analysis.test_scored import record
from tests.rich_sweep import Variant

ITEMS = 80
ACC, BPB = "items:quiz,5shot:acc", "items:quiz,5shot:answer_bpb"


def answer(root: Path, row: int, seed: int, right: float, bpb: float, **more: Any) -> None:
    """The record and the items of `quiz,5shot` of one run: acc and bits per byte."""
    (run,) = root.glob(f"quiz{row:06x}-s{seed}")
    step = read_json(run / "result.json")["step"]
    folder = run / "scores" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng([row, seed])
    hard = np.random.default_rng(0).normal(size=ITEMS)  # the items', common to all runs
    acc = (hard + 0.3 * draw.normal(size=ITEMS) < np.quantile(hard, right)).astype(float)
    columns = {"item": list(range(ITEMS)), "item_hash": [f"h{i}" for i in range(ITEMS)],
               "acc": acc, "answer_bpb": 2 + 0.3 * hard + 0.05 * draw.normal(size=ITEMS) + bpb,
               "cluster": [f"c{i // 2}" for i in range(ITEMS)]}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "quiz,5shot.parquet")
    score = record(float(acc.mean()), items=ITEMS, of=ITEMS, **more)
    (folder / "quiz,5shot.json").write_text(json.dumps(score))


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[[], Comparison]:
    """Four rows, scored: as good, better, diverged in a seed, never scored; a baseline that
    guesses."""
    rows = [Variant("base"), Variant("same"), Variant("better"), Variant("odd", diverged=[1]),
            Variant("later")]  # fmt: skip
    path = rich_sweep.make(tmp_path, "quiz", rows, seeds=3)
    for row, (right, bpb) in enumerate([(0.3, 0.0), (0.3, 0.0), (0.6, -0.2), (0.9, -0.9)]):
        for seed in range(3):
            if not (row == 3 and seed == 1):
                answer(tmp_path, row, seed, right, bpb)

    def read() -> Comparison:
        manifest = read_manifest(path)
        return compare(manifest, read_runs(manifest, tmp_path), tmp_path)

    return read


def test_rows_are_held_against_the_baseline_on_the_same_items(
    sweep: Callable[[], Comparison], tmp_path: Path
) -> None:
    comparison = sweep()
    assert task_items.tasks(comparison) == ["quiz,5shot"]
    acc, bpb = task_items.read(comparison, tmp_path, ["quiz,5shot"])
    assert (acc.key, bpb.key) == (ACC, BPB)  # it guesses: so the bits per byte too
    assert (acc.title, bpb.measure) == ("quiz, 5shot acc ↑", "answer bits/byte ↓")
    assert [*acc.rows] == ["same", "better"]  # the others diverged, and have no scores
    values = [
        pq.read_table(next(tmp_path.glob(f"quiz{row:06x}-s{seed}/scores/*/*.parquet")))["acc"]
        for row in (2, 0) for seed in range(3)
    ]  # fmt: skip
    d = np.array(values[:3]) - np.array(values[3:])
    expected = compare_items(d, [i // 2 for i in range(ITEMS)], "acc")
    assert acc.rows["better"] == expected and expected is not None
    assert acc.told_apart("better") and not acc.told_apart("same")
    assert expected.p is not None
    assert acc.p["better"] == pytest.approx(comparison.family * expected.p)  # of four, not of two
    (said,) = task_items.sentences(comparison, [acc, bpb])
    assert said.startswith("Told apart from base: better on quiz, 5shot acc ↑ (+0.2")
    assert "answer bits/byte ↓ (−0.19" in said and "same" not in said


def test_columns_are_there_when_asked_for(sweep: Callable[[], Comparison], tmp_path: Path) -> None:
    comparison = sweep()
    for columns in (None, ["all"]):
        found = table.table(comparison, columns, tmp_path)
        assert not [c for c in found.columns if c.key.startswith("items")]
    found = table.table(comparison, ["items"], tmp_path)
    assert [c.key for c in found.columns] == ["variant", ACC, BPB]
    base, same, better, odd, later = (row.cells[1] for row in found.rows)
    assert (base.text, odd.mark, later.text) == ("baseline", "† 1/3", "n/a")
    assert better.bold and not same.bold and better.text.startswith("+0.2")
    details = better.details
    assert (details["items"], details["clusters"], details["seeds"]) == (ITEMS, ITEMS // 2, 3)
    assert sum(details[f"share_{key}"] or 0 for key in ("seeds", "items", "both")) == (
        pytest.approx(1)
    )
    assert details["p_adjusted"] == pytest.approx(4 * (details["p"] or 0))
    assert [c.key for c in table.table(comparison, [BPB], tmp_path).columns] == ["variant", BPB]
    assert "Holm's correction over 4 comparisons within each task" in " ".join(found.footnotes)


def test_what_can_not_be_compared_is_said_and_stops_nothing(
    sweep: Callable[[], Comparison], tmp_path: Path
) -> None:
    answer(tmp_path, 1, 0, 0.3, 0.0, lm_eval="0.4.1")
    next(tmp_path.glob("quiz000002-s0/scores/*/*.parquet")).unlink()
    comparison = sweep()
    found = table.table(comparison, [ACC], tmp_path)
    assert [row.cells[1].text for row in found.rows[1:3]] == ["n/a", "n/a"]
    notes = " ".join(found.footnotes)
    assert "quiz,5shot, same: not scored alike (lm_eval 0.4.1, 0.4.13)" in notes
    assert "better: " in notes and "parquet: missing; delete " in notes
    path = tmp_path / "sweeps" / "quiz.json"
    html = report.html(comparison, read_json(path), tmp_path, figures.draw(comparison, tmp_path))
    assert "Not compared item by item: " in html


def test_rows_of_other_data_get_no_p(sweep: Callable[[], Comparison], tmp_path: Path) -> None:
    for seed in range(3):
        folder = tmp_path / f"quiz000002-s{seed}"
        result = {**read_json(folder / "result.json"), "data": "other"}
        result["seal"] = rich_sweep.seal(folder, result)
        (folder / "result.json").write_text(json.dumps(result))
    (acc, _) = task_items.read(sweep(), tmp_path, ["quiz,5shot"])
    assert acc.rows["better"] is not None and [*acc.p] == ["same"]
    assert not acc.told_apart("better")


def test_a_sweep_without_scores_has_no_such_column(tmp_path: Path) -> None:
    path = rich_sweep.rows_sweep(tmp_path)
    manifest = read_manifest(path)
    comparison = compare(manifest, read_runs(manifest, tmp_path))
    with pytest.raises(UserError, match="no column 'items': there is no task that GPT-2"):
        table.table(comparison, ["items"], tmp_path)
    with pytest.raises(UserError, match="did you mean 'items'"):
        table.table(comparison, ["itmes"], tmp_path)


def test_the_report_shows_the_tasks_and_their_method(
    sweep: Callable[[], Comparison], tmp_path: Path
) -> None:
    comparison = sweep()
    record = read_json(tmp_path / "sweeps" / "quiz.json")
    html = report.html(comparison, record, tmp_path, [])
    section = html.partition('id="tasks-item-by-item"')[2].partition('id="noise"')[0]
    assert "Told apart from base: better on quiz, 5shot acc ↑" in section
    assert section.count(f'<td class="number">{ITEMS} ({ITEMS // 2})</td>') == 4
    assert "<td>answer bits/byte ↓</td>" in section and "Miller 2024" in section
    assert "<dt>Items</dt>" in html
