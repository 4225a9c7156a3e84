"""A command given a file, preset or run of another kind says what it is and who takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import run
from analysis.published import PaperFile
from components.registry import Closed, UserError
from experiments import hints
from experiments.loader import load
from experiments.schema import Experiment
from experiments.yaml_text import ConfigError
from sweeps import cluster, design, targets
from sweeps.cluster import Cluster
from sweeps.grammar import SweepFile

ID = "0123456789-s0"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CETERIS_RUNS", raising=False)
    (tmp_path / "x.yaml").write_text("base: gpt2-tiny\ntraining: {tokens: 10e3}\n")
    (tmp_path / "s.yaml").write_text("base: x.yaml\nseeds: [0, 1]\nrows: []\n")
    (tmp_path / "c.yaml").write_text("partition: gpu\n")
    (tmp_path / "own.py").write_text("x = 1\n")
    (tmp_path / "notes.txt").write_text("words\n")
    made = tmp_path / "runs" / ID
    made.mkdir(parents=True)
    for name in ("experiment.yaml", "provenance.json", "result.json"):
        (made / name).write_text("{}\n")
    manifest: dict[str, Any] = {
        "schema": 1,
        "name": "norms7",
        "file": "/a/norms7.yaml",
        "baseline": "A",
    }
    manifest |= {"seeds": [0], "match": None, "tokens": 1, "overrides": [], "description": ""}
    row: dict[str, Any] = {
        "label": "A",
        "group": "rows",
        "changes": {},
        "runs": {"0": ID},
        "experiment": {},
    }
    row |= {"parameters": 1, "flops_per_token": 1, "mismatch": None, "differences": []}
    sweeps = tmp_path / "runs" / "sweeps"
    sweeps.mkdir()
    (sweeps / "norms7.json").write_text(json.dumps(manifest | {"rows": [row]}))
    return tmp_path


WRONG = {
    "train s.yaml": "'s.yaml' is a sweep, and train takes an experiment: run it with: run.py sweep",
    "train norms": "'norms' is a sweep",
    "show s.yaml": "'s.yaml' is a sweep",
    "train c.yaml": "'c.yaml' is a cluster file",
    "train own.py": "'own.py' is a Python file",
    "train notes.txt": "'notes.txt' is a .txt file",
    "train runs": "'runs' is a folder of runs",
    f"train {ID}": f"'{ID}' is a run, and train takes an experiment: give its sweep: norms7",
    "plan x.yaml": "'x.yaml' is an experiment, and plan takes a sweep: train it with: run.py train",
    "sweep gpt2-tiny": "'gpt2-tiny' is an experiment",
    "submit x.yaml --cluster c.yaml": "'x.yaml' is an experiment",
    "plan norms7": "and plan takes a sweep: its file is /a/norms7.yaml",
    "generate x.yaml": "'x.yaml' is an experiment, and generate takes a run",
    "generate norms7": "'norms7' is a sweep that was run or submitted, and generate takes a run",
    "eval x.yaml": "'x.yaml' is an experiment, and eval takes a run or a sweep:",
    "compare norms": "'norms' is a sweep, and compare takes a run",
    "compare s.yaml": "'s.yaml' is a sweep",
    "reproduce s.yaml": "'s.yaml' is a sweep, and reproduce takes a published ablation",
    f"status {ID}": f"'{ID}' is a run, and status takes a sweep: give its sweep: norms7",
    f"logs {ID}": f"'{ID}' is a run",
    f"cancel {ID[:6]}": f"'{ID[:6]}' is a run",
    "retry x.yaml": "'x.yaml' is an experiment",
    "table x.yaml": "'x.yaml' is an experiment, and table takes a sweep:",
    "report gpt2-tiny": "'gpt2-tiny' is an experiment",
    "power x.yaml --detect 0.1": "'x.yaml' is an experiment",
    "sample gpt2-tiny": "'gpt2-tiny' is an experiment",
    f"table runs/{ID}/result.json": f"is a file of run {ID}, and table takes a sweep",
    "table runs/sweeps/norms7.json": "is a record of a sweep, and table takes a sweep: give",
}


@pytest.mark.parametrize(("words", "said"), WRONG.items(), ids=WRONG)
def test_a_thing_of_another_kind_is_named(folder: Path, words: str, said: str) -> None:
    result = CliRunner().invoke(run.cli, words.split())
    assert isinstance(result.exception, UserError)
    (line,) = str(result.exception).splitlines()
    assert said in line


@pytest.mark.parametrize("name", ["demo", "x.yaml", "nobody-knows", "x" * 5000, "a\0b", ""])
def test_what_may_be_an_experiment_passes(folder: Path, name: str) -> None:
    targets.expect(folder / "runs", name, [targets.EXPERIMENT], "train")


def test_a_run_is_known_by_its_first_letters(folder: Path) -> None:
    targets.expect(folder / "runs", ID[:5], [targets.RUN], "generate")
    with pytest.raises(UserError, match="is a run"):
        targets.expect(folder / "runs", ID[:5], [targets.SWEEP], "plan")


def test_files_read_by_other_commands_are_refused_too(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"s.yaml:1:1: this is a sweep, not an experiment"):
        load("s.yaml")
    with pytest.raises(ConfigError, match=r"c.yaml:1:1: this is a cluster file, not a sweep"):
        design.load("c.yaml")
    with pytest.raises(ConfigError, match=r"x.yaml:1:1: this is an experiment, not a cluster"):
        cluster.load("x.yaml")
    (folder / "on-sweep.yaml").write_text("base: s.yaml\ntraining: {lr: 1e-3}\n")
    with pytest.raises(ConfigError, match=r"s.yaml:1:1: this is a sweep, not an experiment"):
        load("on-sweep.yaml")


def test_settings_at_the_top_of_a_sweep_go_under_set(folder: Path) -> None:
    text = "base: x.yaml\nlr: 1e-3\nmodel.norm: rmsnorm\nrows: [{label: A, model.ffn: swiglu}]\n"
    (folder / "s.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        design.load("s.yaml")
    one, two, three = raised.value.lines
    assert (
        one == "s.yaml:2:1: lr: unknown key 'lr' — it is training.lr; in a sweep it goes under set"
    )
    assert "goes under set: {model.norm: …}" in two
    assert three.startswith("s.yaml:4:") and "goes under set: {model.ffn: …}" in three


def test_paths_of_a_sweep_are_pointed_to_their_place(folder: Path) -> None:
    (folder / "s.yaml").write_text(
        "base: x.yaml\nset: {training.warmup: 0.1}\ngrid: {training.weight_decay: [0, 0.1]}\n"
    )
    with pytest.raises(ConfigError) as raised:
        design.load("s.yaml")
    lines = raised.value.lines
    assert any(
        line.startswith("s.yaml:2:") and "schedule.warmup_fraction" in line for line in lines
    )
    assert any(line.startswith("s.yaml:3:") and "optimizer.weight_decay" in line for line in lines)


def test_the_words_of_each_file_are_those_of_its_schema() -> None:
    common = {"description", "name", "base"}
    schemas: tuple[type[Closed], ...] = (Experiment, SweepFile, Cluster, PaperFile)
    for (words, _), schema in zip(hints.FILES.values(), schemas, strict=True):
        assert words == set(schema.model_fields) - common
