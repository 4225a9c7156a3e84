"""Scores in the table: means over seeds, what can't tell, what is missing, what is not alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis import render, results, table
from components.registry import UserError
from tests.analysis.conftest import write_sweep

ACC = {"value": 0.5, "stderr": 0.02, "higher_is_better": True, "chance": 0.25}
BPB = {"value": 2.0, "stderr": 0.1, "higher_is_better": False, "chance": None}


def record(value: float, **more: Any) -> dict[str, Any]:
    metrics = {"acc": {**ACC, "value": value}, "answer_bpb": {**BPB, "value": 3 * value}}
    plain = {"schema": 2, "kind": "task", "children": [], "lm_eval": "0.4.13", "version": 1,
             "items": 400, "of": 400, "fingerprint": "a", "primary": "acc",
             "truncated": 0, "unknown": 0, "metrics": metrics}  # fmt: skip
    return {**plain, **more}


def write_score(root: Path, row: int, seed: int, name: str, score: dict[str, Any]) -> None:
    folder = root / f"{row:010x}-s{seed}" / "scores" / "step-00000000"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(score))


def made(root: Path) -> table.Table:
    manifest = results.read_manifest(root / "sweeps" / "odd_names.json")
    return table.ablation_table(manifest, results.read_runs(manifest, root))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_sweep(tmp_path)
    return tmp_path


def column(found: table.Table, start: str) -> list[table.Cell]:
    (index,) = (i for i, c in enumerate(found.columns) if c.title.startswith(start))
    return [row.cells[index] for row in found.rows]


def test_a_score_is_a_mean_over_seeds_with_the_items_error_beside_it(root: Path) -> None:
    for row, values in enumerate(((0.50, 0.52, 0.54), (0.60, 0.61, 0.62), (0.55, 0.55))):
        for seed, value in enumerate(values):
            write_score(root, row, seed, "quiz,5shot", record(value))
    found = made(root)
    cells = column(found, "quiz, 5shot acc ↑")
    assert cells[0].value == pytest.approx(0.52)
    assert cells[0].details["sd"] == pytest.approx(0.02)
    assert cells[0].details["item_stderr"] == pytest.approx(0.02)
    assert cells[0].text == "0.520 ± 0.020 (0.020)"
    assert (cells[2].details["n"], cells[2].text) == (2, "0.550 ± 0.000 (0.020), n = 2")
    assert (cells[3].value, cells[3].mark) == (None, "† 1/3")  # it diverged in a seed
    assert cells[5].mark == "—"
    note = " ".join(found.footnotes)
    assert "lm-eval 0.4.13; ± is the sd over seeds, in brackets the" in note
    assert "quiz, 5shot version 1, 400 items, items' standard error 0.0200" in note
    assert "‡" not in note and "§" not in note


def test_a_task_on_which_the_baseline_guesses_is_marked_with_what_can_tell(root: Path) -> None:
    for row in range(2):
        for seed in range(3):
            write_score(root, row, seed, "hard", record(0.26 + 0.2 * row))
    found = made(root)
    titles = [c.title for c in found.columns if c.title.startswith("hard")]
    assert titles == ["hard acc ↑ ‡", "hard answer bits/byte ↓"]
    assert any("GPT-2 is within the items' noise of guessing: hard" in n for n in found.footnotes)
    text = render.latex(found)
    assert r"$\uparrow$" in text and r"$^{\ddagger}$" in text and "↓" not in text


def test_a_group_speaks_for_its_tasks_and_one_without_a_score_lets_them_speak(root: Path) -> None:
    for name, more in (
        ("sum", {"kind": "group", "children": ["first", "second"]}),
        ("tag", {"kind": "tag", "children": ["third"], "primary": None, "metrics": {}}),
        ("first", {}), ("second", {}), ("third", {}),
    ):  # fmt: skip
        write_score(root, 0, 0, name, record(0.5, **more))
    titles = [c.title for c in made(root).columns]
    assert titles[-2:] == ["sum acc ↑", "third acc ↑"]


@pytest.mark.parametrize("change", [{"lm_eval": "0.4.9"}, {"fingerprint": "b"}, {"items": 100}])
def test_scores_that_are_not_alike_are_marked(change: dict[str, Any], root: Path) -> None:
    write_score(root, 0, 0, "quiz", record(0.5))
    write_score(root, 1, 0, "quiz", record(0.5, **change))
    found = made(root)
    assert any(c.title == "quiz acc ↑ §" for c in found.columns)
    ((key, value),) = change.items()
    assert any("§ not scored alike in all runs" in n and f"{key} " in n and str(value) in n
               for n in found.footnotes)  # fmt: skip


def test_cut_contexts_are_said(root: Path) -> None:
    write_score(root, 0, 0, "quiz", record(0.5, truncated=17))
    assert any("cut to what the model sees: quiz 17" in n for n in made(root).footnotes)


def test_scores_of_another_step_are_no_scores_of_the_run(root: Path) -> None:
    write_score(root, 0, 0, "quiz", record(0.5))
    folder = root / "0000000000-s0" / "scores"
    (folder / "step-00000000").rename(folder / "step-00000007")
    assert not any(c.title.startswith("quiz") for c in made(root).columns)


@pytest.mark.parametrize(
    "damage",
    [
        {"metrics": []},
        {"metrics": {"acc": 0.5}},
        {"metrics": {"acc": {**ACC, "value": "high"}}},
        {"metrics": {"acc": {"value": 0.5}}},
        {"primary": "f1"},
        {"primary": []},
        {"items": None},
        {"children": None},
        {"kind": None},
    ],
)
def test_a_score_that_is_no_record_is_one_line(root: Path, damage: dict[str, Any]) -> None:
    write_score(root, 0, 0, "quiz", {**record(0.5), **damage})
    with pytest.raises(UserError, match="scores: quiz: not the record of a score"):
        made(root)
