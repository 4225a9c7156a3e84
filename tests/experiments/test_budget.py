"""What a run does otherwise than its numbers say is said, with both numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from experiments import budget, loader
from experiments.data import Dataset, prepare
from experiments.record import UserError
from experiments.trainer import train
from sweeps import design, plan

SPLIT = "evaluation.tokens=1e9"


@pytest.fixture
def data(tiny_yaml: Path, tmp_path: Path) -> Dataset:
    return prepare(loader.load(tiny_yaml).data, tmp_path / "runs" / "data", progress=False)


def said(yaml: Path, data: Dataset | None, *overrides: str) -> list[str]:
    return list(budget.warnings(loader.load(yaml, overrides), data))


def test_a_run_within_its_text_has_no_warning(tiny_yaml: Path, data: Dataset) -> None:
    assert said(tiny_yaml, data) == []


def test_more_validation_than_there_is_names_both_numbers(tiny_yaml: Path, data: Dataset) -> None:
    cut, tuning = said(tiny_yaml, data, SPLIT)
    used = (len(data.val) - 1) // 32 * 32
    assert cut == (
        f"evaluation.tokens: 1,000,000,000 are asked for and the validation split has "
        f"{len(data.val):,}, so val/loss is over {used:,}"
    )
    assert tuning.startswith("tuning/loss: will be null")


def test_many_epochs_name_budget_split_and_source(tiny_yaml: Path, data: Dataset) -> None:
    least = 5 * len(data.train)
    (line,) = said(tiny_yaml, data, f"training.tokens={-(-least // 256) * 256}")
    assert f"are 5 epochs of the training split's {len(data.train):,} tokens" in line
    assert "arXiv 2305.16264" in line
    assert said(tiny_yaml, data, f"training.tokens={4 * len(data.train) // 256 * 256}") == []


def test_a_budget_cut_to_whole_steps_is_said(tiny_yaml: Path) -> None:
    (line,) = said(tiny_yaml, None, "training.tokens=700", "evaluation.every_tokens=null")
    assert line == "training.tokens: 512 of 700 are trained, 2 whole steps of 256"
    assert said(tiny_yaml, None, "training.tokens=10250") == []  # less than a hundredth


def test_an_interval_beyond_the_budget_is_said(tiny_yaml: Path) -> None:
    (line,) = said(tiny_yaml, None, "evaluation.every_tokens=20000")
    assert line.startswith("evaluation.every_tokens: 20,000 is more than the 10,240 tokens")
    assert said(tiny_yaml, None, "evaluation.every=20000") == []  # without tasks it says nothing


def test_the_result_counts_epochs_and_the_run_prints_warnings(
    tiny_yaml: Path, data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train(loader.load(tiny_yaml, [SPLIT]), 0, tmp_path / "runs", progress="log")
    assert result["epochs"] == 10240 / len(data.train)
    assert result["tuning/loss"] is None
    assert "the validation split has" in capsys.readouterr().err


def test_a_dry_run_counts_epochs_once_the_text_is_prepared(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["train", str(tiny_yaml), SPLIT, "-n", "--json", "--runs", str(tmp_path / "runs")]
    before = json.loads(CliRunner().invoke(run.cli, words).stdout)
    assert before["epochs"] is None and before["warnings"] == []
    data = prepare(loader.load(tiny_yaml).data, tmp_path / "runs" / "data", progress=False)
    after = json.loads(CliRunner().invoke(run.cli, words).stdout)
    assert after["epochs"] == 10240 / len(data.train)
    assert after["warnings"] == said(tiny_yaml, data, SPLIT)


def test_a_dry_run_looks_for_the_files(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["train", str(tiny_yaml), "data.corpus.files=no/such.txt", "-n", "--runs"]
    result = CliRunner().invoke(run.cli, [*words, str(tmp_path / "runs")])
    assert isinstance(result.exception, UserError)
    assert "no/such.txt" in str(result.exception)


def test_a_finished_run_says_that_nothing_was_trained(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["train", str(tiny_yaml), "--runs", str(tmp_path / "runs")]
    first, second = (CliRunner().invoke(run.cli, words) for _ in range(2))
    assert first.exit_code == second.exit_code == 0
    assert "finished before" not in first.stderr
    assert "finished before, on " in second.stderr and "result as stored" in second.stderr
    assert first.stdout == second.stdout


def test_a_plan_has_epochs_and_warns_once_for_all_rows(tiny_yaml: Path, tmp_path: Path) -> None:
    file = tmp_path / "two.yaml"
    file.write_text(
        f"base: {tiny_yaml}\nset: {{evaluation.tokens: 1e9}}\n"
        "rows: [{label: RMS, set: {model.norm: rmsnorm}}]\n"
    )
    unknown = plan.plan(design.load(file), tmp_path / "runs")
    assert [row.epochs for row in unknown.rows] == [None, None]
    data = prepare(loader.load(tiny_yaml).data, tmp_path / "runs" / "data", progress=False)
    known = plan.plan(design.load(file), tmp_path / "runs")
    assert [row.epochs for row in known.rows] == [10240 / len(data.train)] * 2
    assert known.as_json()["rows"][0]["epochs"] == known.rows[0].epochs
    (line,) = [line for line in known.notes if line.startswith("evaluation.tokens: 1,000,000,000")]
    assert line.endswith("(baseline and 1 more)")
