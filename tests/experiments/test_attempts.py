"""Code and text are part of what a run is: what is reused, trained again, opened and refused."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import loader
from experiments.model import open_run
from experiments.record import Run, UserError, find
from tests.command_line import Outcome, ceteris, desk

WORDS = "the cat sat on a mat and saw the moon over green trees "
TINY = """\
base: gpt2-tiny
imports: [act.py]
model: {d_model: 16, n_layers: 1, n_heads: 2}
data:
  corpus: {name: text, files: [corpus/a.txt], separator: "\\n"}
  tokenizer: {name: bpe, vocab_size: 280}
training: {tokens: 512, seq_len: 16, global_batch_size: 4}
evaluation: {every_tokens: null, tokens: 64}
execution: {threads: 1, device: cpu}
"""
ACT = """\
from torch import nn
from components.registry import register
import slopes
@register("activation", "mine")
class Mine(nn.Module):
    def forward(self, x):
        return x.clamp(min=0) * slopes.SLOPE
"""
SWEEP = """\
base: tiny.yaml
baseline: {label: Base}
seeds: [0]
rows: [{label: Mine, set: {model.ffn.activation: mine}}]
"""


def project(folder: Path, words: str = WORDS) -> None:
    """An experiment, a component with a module beside it, a text and a sweep."""
    (folder / "corpus").mkdir(parents=True)
    lines = [f"{words}{n % 7} {n * 31 % 101}" for n in range(80)]
    (folder / "corpus" / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    for name, text in (("tiny", TINY), ("sweep", SWEEP)):
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    (folder / "act.py").write_text(ACT, encoding="utf-8")
    (folder / "slopes.py").write_text("SLOPE = 1.0\n", encoding="utf-8")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    project(tmp_path / "one")
    with desk(tmp_path / "one", monkeypatch) as folder:
        yield folder


def trained(*words: str, root: str = "runs") -> Run:
    """The run that `train` has made or found; `--json` gives its result."""
    done = ceteris("train", "tiny.yaml", "--json", "--runs", root, *words)
    assert done.code == 0, done.err
    return find(Path(root), done.json["id"])


def ids() -> list[str]:
    return sorted(path.parent.name for path in Path("runs").glob("*/result.json"))


def grow() -> None:
    with open("corpus/a.txt", "a", encoding="utf-8") as file:
        file.write("\nsomething else stands here now, in letters that were rare: qzqzqz xyxy")


def one_line(outcome: Outcome, *parts: str) -> None:
    assert outcome.code == 2, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("error:")]
    assert all(part in line for part in parts), line


# --- text -----------------------------------------------------------------------------------------


def test_a_run_is_opened_with_its_own_text_and_tokenizer(here: Path) -> None:
    run = trained()
    before, data = open_run(run)
    ids_ = data.tokenizer.encode(WORDS)
    weights = {name: value.clone() for name, value in before.model.state_dict().items()}
    grow()
    after, data = open_run(run)
    assert data.tokenizer.encode(WORDS) == ids_
    assert all(value.equal(weights[name]) for name, value in after.model.state_dict().items())
    shutil.rmtree("corpus")
    assert ceteris("generate", run.id, "--max-tokens", "3").code == 0


def test_changed_text_is_another_attempt_beside_the_old(here: Path) -> None:
    first = trained()
    result = (first / "result.json").read_bytes()
    assert trained().id == first.id
    grow()
    second = trained()
    assert second.id == f"{first.id}.2"
    assert (first / "result.json").read_bytes() == result
    assert trained().id == second.id
    fingerprints = {
        json.loads((run / "result.json").read_text())["data"] for run in (first, second)
    }
    assert len(fingerprints) == 2


def test_two_projects_with_one_text_of_the_same_name_do_not_share_it(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(root="../runs")
    project(here.parent / "two", "quite another text about boats and rivers and old mills ")
    project(here.parent / "copy")
    losses = {}
    for name in ("two", "copy"):
        monkeypatch.chdir(here.parent / name)
        done = ceteris("train", "tiny.yaml", "--json", "--runs", "../runs")
        losses[name] = done.json["id"]
    assert losses == {"two": f"{first.id}.2", "copy": first.id}


def test_paths_are_relative_to_the_file_that_names_them(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained()
    monkeypatch.chdir(here.parent)
    done = ceteris("train", "one/tiny.yaml", "--json", "--runs", str(here / "runs"))
    assert done.json["id"] == first.id
    here_ = ceteris("train", "one/tiny.yaml", "data.corpus.files=[corpus/a.txt]", "--runs", "r")
    one_line(here_, "corpus/a.txt")  # the command line's are relative to where we are
    again = loader.load(here / "runs" / first.id / "experiment.yaml")
    assert loader.run_id(again, 0) == first.id


def test_missing_text_contradicts_no_finished_run(here: Path) -> None:
    run = trained()
    shutil.rmtree("corpus")
    assert trained().id == run.id


def test_prepared_data_that_is_gone_is_said_and_not_made_again(here: Path) -> None:
    run = trained()
    grow()
    shutil.rmtree("runs/data")
    one_line(ceteris("generate", run.id), "prepared data", "train")
    assert not Path("runs/data").exists()


def test_a_changed_tokenizer_file_is_refused(here: Path) -> None:
    run = trained()
    (path,) = Path("runs/data").glob("*/tokenizer.json")
    path.write_text(path.read_text(encoding="utf-8").replace("Ġthe", "Ġteh"), encoding="utf-8")
    one_line(ceteris("generate", run.id, "--prompt", "the"), "tokenizer.json", "changed")


def test_the_same_shards_read_by_other_code_are_the_same_run(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained()
    monkeypatch.setattr("experiments.data._own_code", lambda module: "another reader")
    assert trained().id == run.id
    assert len(list(Path("runs/data").glob("*/meta.json"))) == 2


# --- code -----------------------------------------------------------------------------------------


def mine() -> Run:
    return trained("model.ffn.activation=mine")


@pytest.mark.parametrize("file", ["act.py", "slopes.py"])
def test_edited_code_is_another_run_and_comments_are_not(here: Path, file: str) -> None:
    first, plain = mine(), trained()
    path = Path(file)
    path.write_text(
        f"# a comment\n\n{path.read_text(encoding='utf-8')}  # more\n", encoding="utf-8"
    )
    assert mine().id == first.id
    edit = path.read_text(encoding="utf-8").replace("1.0", "0.5").replace("min=0", "min=-1")
    path.write_text(edit, encoding="utf-8")
    second = mine()
    assert second.id != first.id
    assert second.id.partition("-")[0] == first.id.partition("-")[0]
    assert trained().id == plain.id  # it uses nothing of the file


def test_an_old_run_is_opened_with_the_code_that_it_ran_with(here: Path) -> None:
    run = mine()
    import torch

    tokens = torch.arange(8)[None]
    before = open_run(run)[0].model(tokens)
    Path("slopes.py").write_text("SLOPE = 9.0\n", encoding="utf-8")
    other = mine()
    assert torch.equal(open_run(run)[0].model(tokens), before)
    assert not torch.equal(open_run(other)[0].model(tokens), before)
    Path("act.py").unlink()
    assert torch.equal(open_run(run)[0].model(tokens), before)
    shutil.rmtree("runs/code")
    with pytest.raises(UserError, match=r"no file|other code"):
        open_run(run)


def test_files_lie_anywhere_and_run_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = mine()
    project(here.parent / "elsewhere" / "deep")
    monkeypatch.chdir(here.parent / "elsewhere" / "deep")
    e = loader.load("tiny.yaml", ["model.ffn.activation=mine"])
    assert loader.run_id(e, 0) == run.id


def test_an_interrupted_run_of_other_code_or_text_is_refused(here: Path) -> None:
    for words, edit in (((), grow), (("model.ffn.activation=mine",), None)):
        run = trained(*words)
        (run / "result.json").unlink()  # as a killed one is
        if edit:
            edit()
        else:
            Path("slopes.py").write_text("SLOPE = 0.3\n", encoding="utf-8")
        one_line(ceteris("train", "tiny.yaml", *words), run.id, "--redo")
        assert trained("--redo", *words).id != run.id
        assert (run / "checkpoints").is_dir()


# --- again, and away -----------------------------------------------------------------------------


def test_redo_trains_beside_what_is_there(here: Path) -> None:
    first = trained()
    second = trained("--redo")
    assert second.id == f"{first.id}.2"
    metrics = [(run / "metrics.jsonl").read_bytes() for run in (first, second)]
    assert metrics[0] == metrics[1]
    assert trained().id == second.id


def swept(*words: str) -> Any:
    done = ceteris("sweep", "sweep.yaml", "--workers", "1", "--json", *words)
    assert done.code == 0, done.err
    record = json.loads(Path("runs/sweeps/sweep.json").read_text(encoding="utf-8"))
    return done, {row["label"]: row["runs"]["0"] for row in record["rows"]}


def test_stale_rows_are_named_and_trained_again_by_sweep(here: Path) -> None:
    _, before = swept()
    assert "stale" not in ceteris("status", "sweep").err
    Path("slopes.py").write_text("SLOPE = 0.25\n", encoding="utf-8")
    for words in (("table", "sweep"), ("status", "sweep")):
        assert "stale: 'Mine': " in ceteris(*words).err
    one_line(ceteris("retry", "sweep", "--row", "Mine"), "--redo")
    plan = ceteris("plan", "sweep.yaml", "--json").json
    assert [row["states"]["0"] for row in plan["rows"]] == ["done", "pending"]
    assert "'Mine'" in plan["stale"][0]
    done, after = swept()
    assert "stale: 'Mine'" in done.err
    assert after["Base"] == before["Base"]
    assert after["Mine"] != before["Mine"]
    assert set(ids()) == {*before.values(), after["Mine"]}
    assert before["Mine"] in ceteris("ledger").out
    assert "stale" not in ceteris("table", "sweep").err


def test_redo_of_a_row_leaves_the_others(here: Path) -> None:
    _, before = swept()
    one_line(ceteris("sweep", "sweep.yaml", "--row", "Mine"), "--redo")
    one_line(ceteris("sweep", "sweep.yaml", "--redo", "--row", "Mien"), "did you mean 'Mine'")
    _, after = swept("--redo", "--row", "Mine")
    assert after == {"Base": before["Base"], "Mine": f"{before['Mine']}.2"}
    assert ceteris("retry", "sweep", "--redo", "--row", "Base").code == 0
    assert swept()[1] == {"Base": f"{before['Base']}.2", "Mine": after["Mine"]}


def test_rm_never_takes_what_another_sweep_has(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, runs = swept()
    Path("other.yaml").write_text(f"{SWEEP}name: other\n", encoding="utf-8")
    assert ceteris("sweep", "other.yaml", "--workers", "1").code == 0
    one_line(ceteris("rm", runs["Mine"], "--yes"), "has this run")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert ceteris("rm", "sweep").code == 130
    assert Path("runs/sweeps/sweep.json").exists()
    assert ceteris("rm", "sweep", "--yes").code == 0
    assert not list(Path("runs/sweeps").glob("sweep*"))
    assert set(ids()) == set(runs.values())
    assert ceteris("rm", "other", "--yes").code == 0
    assert ids() == []
