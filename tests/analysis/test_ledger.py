"""The ledger leaves nothing out: all sweeps, lone runs, what diverged, failed or was edited."""

from __future__ import annotations

import json
import os
from pathlib import Path

from analysis import ledger, render
from tests.analysis.conftest import write_run, write_sweep


def add_experiment(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "experiment.yaml").write_text("model: {}\n")


def written_at(directory: Path, seconds: float) -> None:
    for path in directory.iterdir():
        os.utime(path, (seconds, seconds))


def test_every_variant_that_was_run_is_there_with_what_failed(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    entries, wrong = ledger.read(tmp_path)
    assert wrong == []
    found = {entry.variant: entry for entry in entries}
    assert set(found) == {
        "GPT-2", r"A&B_50% $x|<y>\^~{#}", "[SwiGLU] -- *gated*", "LSTM", "NoPE",
    }  # QK-norm was planned and never run  # fmt: skip
    better = found[r"A&B_50% $x|<y>\^~{#}"]
    assert better.sweep == "odd_names"
    assert better.effect is not None and round(better.effect, 4) == -0.0493
    assert better.low is not None and better.high is not None
    assert better.low < better.effect < better.high < 0
    assert better.p is not None
    assert (better.seeds, better.planned, better.tries) == (3, 3, 1)
    lstm, nope = found["LSTM"], found["NoPE"]
    assert (lstm.verdict, lstm.diverged, lstm.effect, lstm.loss) == ("diverged", 1, None, None)
    assert (nope.failed, nope.seeds, nope.planned) == (1, 1, 3)
    assert found["GPT-2"].verdict == "baseline"


def test_runs_of_no_sweep_are_listed_by_their_ids(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    for name, outcome in (("aaaa-s0", 3.5), ("bbbb-s1", "diverged"), ("cccc-s0", "failed")):
        write_run(tmp_path / name, int(name[-1]), outcome)
        add_experiment(tmp_path / name)
    add_experiment(tmp_path / "dddd-s0")
    lone = {e.variant: e for e in ledger.read(tmp_path)[0] if e.sweep is None}
    assert {name: entry.verdict for name, entry in lone.items()} == {
        "aaaa-s0": "one run", "bbbb-s1": "diverged", "cccc-s0": "failed", "dddd-s0": "unfinished",
    }  # fmt: skip
    assert lone["aaaa-s0"].loss == 3.5


def test_the_newest_is_last(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    directories = sorted(
        path for path in tmp_path.iterdir() if path.name.endswith(("-s0", "-s1", "-s2"))
    )
    for age, directory in enumerate(reversed(directories)):
        written_at(directory, 1_700_000_000 + age)
    entries, _ = ledger.read(tmp_path)
    assert [entry.time for entry in entries] == sorted(entry.time for entry in entries)
    assert entries[-1].variant == "GPT-2"
    assert entries[-1].time.startswith("2023-11-14T22:13")


def test_a_damaged_manifest_or_run_is_named_and_hides_no_other(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    (tmp_path / "sweeps" / "broken.json").write_text("{")
    add_experiment(tmp_path / "eeee-s0")
    (tmp_path / "eeee-s0" / "result.json").write_text("[]")
    entries, wrong = ledger.read(tmp_path)
    assert len(entries) == 5
    assert len(wrong) == 2
    assert "broken.json" in wrong[0] and "eeee-s0" in wrong[1]


def test_it_is_a_table_in_every_format_and_plain_json(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    entries, _ = ledger.read(tmp_path)
    table = ledger.table(entries, tmp_path)
    for name in ("markdown", "latex", "html", "csv", "json"):
        text = render.RENDERERS[name](table)
        assert "diverged" in text and "LSTM" in text
    plain = json.loads(json.dumps([ledger.as_json(e) for e in entries], allow_nan=False))
    assert {e["variant"] for e in plain} == {e.variant for e in entries}


def test_nothing_run_is_an_empty_ledger(tmp_path: Path) -> None:
    assert ledger.read(tmp_path / "none") == ([], [])
