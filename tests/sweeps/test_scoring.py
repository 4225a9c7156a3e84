"""Sweeps that are scored: with their training, after it, here and on Slurm; never twice."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import scores
from experiments.record import Run, read_json
from tests.command_line import ceteris, desk
from tests.experiments.lm_tasks import write_tasks
from tests.experiments.test_evaluate import KILLER, write_task
from tests.slurm_desk import Desk, jobs_in_queue


def write_sweep(folder: Path, base: Path, **evaluation: Any) -> None:
    text = base.read_text() + f"description: {json.dumps('scored')}\n"
    (folder / "base.yaml").write_text(text)
    settings = {f"evaluation.{key}": value for key, value in evaluation.items()}
    rows = [{"label": "RMSNorm", "set": {"model.norm": "rmsnorm"}}]
    sweep = {"base": "base.yaml", "name": "small", "seeds": [0, 1], "rows": rows, "set": settings}
    (folder / "small.yaml").write_text(json.dumps(sweep))


@pytest.fixture
def folder(tmp_path: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with desk(tmp_path, monkeypatch):
        write_tasks(tmp_path / "tasks")
        write_sweep(tmp_path, tiny_yaml)
        yield tmp_path


def written(runs: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in runs.glob("*/scores/step-*/*")}


def states(name: str) -> list[str]:
    return [row["state"] for row in ceteris("status", name, "--json").json["runs"]]


def test_a_sweep_scores_its_runs_and_what_is_wanted_later_is_added(
    folder: Path, tiny_yaml: Path
) -> None:
    tasks = str(folder / "tasks")
    plain = ceteris("sweep", "small.yaml")
    assert plain.code == 0, plain.err
    results = {p: p.stat().st_mtime_ns for p in Path("runs").glob("*/result.json")}

    # wanted in the file: no training, the scores alone
    write_sweep(folder, tiny_yaml, tasks=["tiny_both"], include_path=tasks)
    assert states("small") == ["done"] * 4  # as it was submitted
    planned = ceteris("plan", "small.yaml", "--json").json
    assert planned["missing"] == 4 and planned["missing_flops"] == 0
    assert set(planned["rows"][0]["states"].values()) == {"unscored"}
    scored = ceteris("sweep", "small.yaml")
    assert scored.code == 0, scored.err
    assert "tiny_both acc" in scored.out and "±" in scored.out
    assert {p: p.stat().st_mtime_ns for p in Path("runs").glob("*/result.json")} == results

    # wanted on the command line, for all runs of the sweep
    first = written(Path("runs"))
    more = ceteris("eval", "small", "--tasks", "tiny_both,tiny_last")
    assert more.code == 0, more.err
    second = written(Path("runs"))
    assert first.items() <= second.items()
    assert {Path(p).name for p in second.keys() - first.keys()} == {
        "tiny_last.json",
        "tiny_last.parquet",
    }
    assert "0 to do" in more.err or "to do" not in more.err or "4 runs" in more.err
    again = ceteris("eval", "small")
    assert written(Path("runs")) == second and "started" not in again.err

    table = ceteris("table", "small", "--json").json
    titles = [column["title"] for column in table["columns"]]
    assert any(title.startswith("tiny_both acc ↑") for title in titles)
    assert not any(title.startswith("tiny_choice") for title in titles)  # its group speaks for it
    notes = " ".join(table["footnotes"])
    assert "lm-eval 0.4" in notes and "tiny_last version 1" in notes and "‡" in notes
    assert any("answer bits/byte" in title for title in titles)  # a task that can't tell


@pytest.mark.slow
def test_a_scoring_that_fails_is_shown_and_retried_alone(
    folder: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = folder / "tasks"
    (tasks / "killer.py").write_text(KILLER)
    write_task(
        tasks, "breakable", [{"n": n, "q": "a list", "a": " of"} for n in range(3)],
        "output_type: loglikelihood\ndoc_to_text: !function killer.text\ndoc_to_target: '{{a}}'\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    )  # fmt: skip
    write_sweep(folder, tiny_yaml, tasks=["breakable", "tiny_last"], include_path=str(tasks))
    monkeypatch.setenv("END_HERE", "fail")
    said = ceteris("sweep", "small.yaml")
    assert said.code == 1
    assert "unscored: baseline s0: breakable: ZeroDivisionError" in said.err
    assert "tiny_last acc" in said.out  # what could be scored stands in the table
    assert states("small") == ["unscored"] * 4
    assert all(Run(Path("runs"), p.parent.name).state == "done"
               for p in Path("runs").glob("*/result.json"))  # fmt: skip
    before = written(Path("runs"))
    monkeypatch.setenv("END_HERE", "")
    assert ceteris("retry", "small").code == 0
    assert states("small") == ["done"] * 4
    assert before.items() <= written(Path("runs")).items()


@pytest.mark.parametrize("verb", ["plan", "sweep", "train"])
def test_an_unknown_task_is_said_before_anything_is_trained(
    verb: str, folder: Path, tiny_yaml: Path
) -> None:
    write_sweep(folder, tiny_yaml, tasks=["tiny_bith"], include_path=str(folder / "tasks"))
    words = ("base.yaml", "evaluation.tasks=[tiny_bith]", "evaluation.include_path=tasks")
    said = ceteris(verb, *(words if verb == "train" else ("small.yaml",)))
    assert said.code == 2
    (line,) = said.err.splitlines()
    assert "tiny_bith" in line and "did you mean 'tiny_both'?" in line
    assert not list(Path("runs").glob("*/experiment.yaml"))


def test_eval_leaves_out_what_is_not_trained(folder: Path) -> None:
    ceteris("sweep", "small.yaml")
    left = next(Path("runs").glob("*-s1"))
    for path in [left / "result.json", left / "experiment.yaml"]:
        path.unlink()
    said = ceteris("eval", "small", "--tasks", "tiny_last", "--include-path", "tasks")
    assert "1 runs are not trained yet, and left out" in said.err
    assert len(list(Path("runs").glob("*/scores/step-*/tiny_last.json"))) == 3
    assert not (left / "result.json").exists()


def test_probe_looks_at_the_baseline_and_keeps_nothing(folder: Path) -> None:
    ceteris("sweep", "small.yaml")
    words = ("--tasks", "tiny_both,tiny_perplexity", "--include-path", "tasks", "--probe")
    said = ceteris("eval", "small", *words)
    assert said.code == 0 and "at chance" in said.out
    assert "compare their bits per byte" in said.err
    assert written(Path("runs")) == {}


def test_mistakes_of_eval_are_one_line(folder: Path) -> None:
    def fails(words: str, expected: str) -> None:
        said = ceteris("eval", *words.split())
        assert said.code == 2 and expected in said.err, said.err
        assert len(said.err.splitlines()) == 1, said.err

    fails("nothing --tasks tiny_last", "no run 'nothing'")
    fails("small --checkpoint 3", "no run 'small'")
    ceteris("sweep", "small.yaml")
    fails("small", "no tasks to score; name some")
    fails("small --tasks tiny_last --checkpoint 3", "--checkpoint is of one RUN")
    fails("small --tasks tiny_last --limit 1.5", "1.5 is neither a number of items nor a share")
    fails("small --tasks tiny_last --limit nan", "give a number of items, a share, or all")
    fails("small --tasks tiny_last --limit inf", "give a number of items, a share, or all")


def test_a_table_marks_scores_that_are_not_of_one_kind(folder: Path, tiny_yaml: Path) -> None:
    write_sweep(folder, tiny_yaml, tasks=["tiny_last"], include_path=str(folder / "tasks"))
    ceteris("sweep", "small.yaml")
    path = next(Path("runs").glob("*/scores/step-*/tiny_last.json"))
    path.write_text(path.read_text().replace('"lm_eval": "0.4', '"lm_eval": "0.3'))
    notes = " ".join(ceteris("table", "small", "--json").json["footnotes"])
    assert "§ not scored alike in all runs" in notes and "lm_eval 0.3" in notes
    path.unlink()
    table = ceteris("table", "small", "--format", "md").out
    assert "n = 1" in table  # one seed has a score


@pytest.mark.slow
@pytest.mark.slurm
def test_on_slurm_with_the_training_and_after_it(here: Desk, tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "tasks")
    settings = {"evaluation.tasks": ["tiny_last"], "evaluation.include_path": str(tasks)}
    here.sweep("tiny", next(tmp_path.glob("tiny.yaml")), set=settings)
    here.submit("tiny")
    here.done("tiny")
    here.until(lambda: not jobs_in_queue())
    first = written(here.root)
    assert len([p for p in first if p.endswith("tiny_last.json")]) == 4
    words = ("--tasks", "tiny_last,tiny_both", "--cluster", "cluster.yaml")
    sent = ceteris("eval", "tiny", *words)
    assert sent.code == 0 and "4 runs" in sent.out, sent.err
    assert set(here.states("tiny").values()) <= {"unscored", "queued", "running", "done"}
    assert "0 submitted now" in ceteris("eval", "tiny", *words).err
    here.done("tiny")
    second = written(here.root)
    assert first.items() <= second.items()
    assert len([p for p in second if p.endswith("tiny_both.json")]) == 4
    record = read_json(here.root / "sweeps" / "tiny.json")
    assert record["rows"][0]["experiment"]["evaluation"]["tasks"] == ["tiny_last", "tiny_both"]
    run = Run(here.root, here.status("tiny")["RMSNorm-1"]["id"])
    assert set(scores.of_step(run, 40)) == {"tiny_last", "tiny_both", "tiny_choice", "tiny_pairs"}
