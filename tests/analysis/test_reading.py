"""What a sweep's sentences say follows from its numbers, in the cases where that is not plain."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis import reading
from analysis.comparison import Comparison, compare
from analysis.results import read_manifest, read_runs
from experiments.record import read_json, seal, write_json
from tests import rich_sweep
from tests.rich_sweep import Variant


def compared(path: Path) -> Comparison:
    manifest, root = read_manifest(path), path.parents[1]
    return compare(manifest, read_runs(manifest, root), root)


def said(found: Comparison, label: str) -> str:
    (row,) = (row for row in found.rows if row.label == label)
    return " ".join(reading.sentences(found, row))


def rewrite(root: Path, run: str, **changes: object) -> None:
    result = {**read_json(root / run / "result.json"), **changes}
    write_json(root / run / "result.json", {**result, "seal": seal(root / run, result)})


@pytest.mark.parametrize(
    ("effect", "cost", "start"),
    [
        (-0.05, 0.9, "new reaches GPT-2's final loss with "),
        (-0.05, 3.0, "new reaches GPT-2's final loss with "),  # at a multiple of its FLOPs
        (0.05, 1.0, "GPT-2 reaches new's final loss with "),
        (0.05, 0.3, "GPT-2 reaches new's final loss with "),
    ],
)
def test_who_ended_lower_reaches_the_others_loss_and_never_the_other_way(
    effect: float, cost: float, start: str, tmp_path: Path
) -> None:
    rows = [Variant("GPT-2"), Variant("new", effect, cost=cost)]
    found = compared(rich_sweep.make(tmp_path, "gain", rows))
    text = said(found, "new")
    gain = found.rows[1].gain
    assert gain is not None and gain.ratio is not None
    share = 1 / gain.ratio if effect < 0 else gain.ratio
    assert f"{start}{share:.0%} [" in text
    assert text.count("final loss") == 1


def test_rows_on_other_data_are_not_among_those_that_cannot_be_told_apart(tmp_path: Path) -> None:
    path = rich_sweep.make(tmp_path, "data", [Variant("a"), Variant("b"), Variant("c")], seeds=3)
    for run in read_json(path)["rows"][1]["runs"].values():
        rewrite(tmp_path, run, data="beef")
    headline = reading.headline(compared(path))
    assert "b cannot be compared with a" in headline
    assert "c cannot be told from a." in headline


def test_what_could_have_been_found_is_not_said_of_rows_that_were_not_tested(
    tmp_path: Path,
) -> None:
    path = rich_sweep.make(tmp_path, "data", [Variant("a"), Variant("b")], seeds=3)
    for run in read_json(path)["rows"][1]["runs"].values():
        rewrite(tmp_path, run, data="beef")
    assert reading.headline(compared(path)) == "b cannot be compared with a, see below."


def test_a_sweep_of_which_every_run_diverged_has_run(tmp_path: Path) -> None:
    rows = [Variant("a", diverged=[0, 1]), Variant("b", diverged=[0, 1])]
    headline = reading.headline(compared(rich_sweep.make(tmp_path, "all", rows, seeds=2)))
    assert headline.startswith("Every run that has ended diverged")


def test_a_baseline_whose_runs_were_all_edited_has_run_and_does_not_count(tmp_path: Path) -> None:
    path = rich_sweep.make(tmp_path, "edit", [Variant("a"), Variant("b")], seeds=2)
    for run in read_json(path)["rows"][0]["runs"].values():
        with (tmp_path / run / "metrics.jsonl").open("a") as file:
            file.write(" ")
    found = compared(path)
    assert "The baseline, a, has no run that counts" in reading.headline(found)
    assert "Without seeds 0, 1: its result, metrics or experiment" in said(found, "a")


def test_no_rate_is_the_best_where_each_diverged(tmp_path: Path) -> None:
    tuned = {"of": "b", "path": "training.lr", "value": 0.01}
    rows = [
        Variant("a"),
        Variant("b", diverged=[0]),
        Variant("b, lr 0.01", group="tune", tuned=tuned, lr=0.01, diverged=[1]),
    ]
    text = said(compared(rich_sweep.make(tmp_path, "tune", rows, seeds=2)), "b")
    assert "No value of training.lr worked for it: each of the 2 tried" in text
    assert "best" not in text


def test_pairs_that_share_no_seed_are_not_said_to_have_been_helped_by_pairing(
    tmp_path: Path,
) -> None:
    path = rich_sweep.make(tmp_path, "null", [Variant("a"), Variant("again")], seeds=3)
    manifest = read_json(path)
    row = manifest["rows"][1]
    row["seeds"] = {seed: 100 + int(seed) for seed in row["runs"]}
    write_json(path, manifest)
    for seed, run in row["runs"].items():
        rewrite(tmp_path, run, seed=100 + int(seed))
    text = said(compared(path), "again")
    assert "Its seeds are its own" in text and "Pairing by seed cut" not in text
