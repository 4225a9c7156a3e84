"""Scoring a run: what is kept, what is left out, and what befalls it when something goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from experiments import evaluate, loader, scores
from experiments.lm import CeterisLM
from experiments.model import open_run
from experiments.record import Run, UserError
from experiments.scores import ScoringFailed, Settings
from experiments.trainer import train
from tests.conftest import ROOT
from tests.experiments.lm_tasks import write_task, write_tasks
from tests.slurm import free_ports

ALL = "[tiny_both, tiny_tag, tiny_perplexity, tiny_answer]"
LEAVES = ("tiny_choice", "tiny_pairs", "tiny_last", "tiny_perplexity", "tiny_answer")


def trained(yaml: Path, root: Path, *overrides: str) -> Run:
    experiment = loader.load(yaml, overrides)
    train(experiment, 0, root, progress="none")
    return Run(root, loader.run_id(experiment, 0))


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_tasks(tmp_path / "tasks")


@pytest.fixture
def scored(tiny_yaml: Path, tasks: Path, tmp_path: Path) -> Run:
    overrides = (f"evaluation.tasks={ALL}", f"evaluation.include_path={tasks}")
    return trained(tiny_yaml, tmp_path / "runs", *overrides)


def record(run: Run, name: str) -> dict[str, Any]:
    return scores.of_step(run, 40)[name]


def items(run: Run, name: str) -> dict[str, list[Any]]:
    return pq.read_table(scores.folder(run, 40) / f"{name}.parquet").to_pydict()


def test_every_task_group_and_tag_leaves_a_record_and_every_task_its_items(scored: Run) -> None:
    kept = scores.of_step(scored, 40)
    assert set(kept) == {*LEAVES, "tiny_both", "tiny_tag"}
    for name in LEAVES:
        table = items(scored, name)
        assert len(table["item"]) == kept[name]["items"] == kept[name]["of"]
        assert kept[name]["tokens"] == 10240 and kept[name]["lm_eval"]
    assert (kept["tiny_both"]["kind"], kept["tiny_tag"]["kind"]) == ("group", "tag")
    assert kept["tiny_both"]["children"] == ["tiny_choice", "tiny_pairs"]
    assert items(scored, "tiny_pairs")["cluster"][:4] == ["0", "0", "0", "1"]


def test_records_hold_what_lm_eval_itself_reports(scored: Run, tasks: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    for yaml in tasks.glob("*.yaml"):  # lm-eval takes data files relative to the current folder
        yaml.write_text(yaml.read_text().replace("{test: ", f"{{test: {tasks}/"))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = simple_evaluate(
        model="ceteris",
        model_args={"run": str(scored.folder)},
        tasks=["tiny_both", "tiny_last", "tiny_perplexity", "tiny_answer"],
        task_manager=manager,
        bootstrap_iters=10,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
    )["results"]
    compared = 0
    for name, values in theirs.items():
        for key, value in values.items():
            metric, comma, _ = key.partition(",")
            if comma and isinstance(value, float) and not metric.endswith("stderr"):
                ours = record(scored, name)["metrics"][metric]
                assert ours["value"] == pytest.approx(value, rel=2e-6), (name, metric)
                compared += 1
                stderr = values.get(f"{metric}_stderr,none")
                if isinstance(stderr, float) and metric != "perplexity":  # that is drawn by lot
                    assert ours["stderr"] == pytest.approx(stderr, rel=2e-6), (name, metric)
    assert compared >= 10


def test_smooth_measures_come_from_the_items(scored: Run) -> None:
    table = items(scored, "tiny_choice")
    first, right = table["loglikelihoods"][0], table["answer"][0]
    assert right == 0
    weights = np.exp(np.array(first))
    assert table["answer_probability"][0] == pytest.approx(weights[0] / weights.sum(), rel=1e-6)
    assert table["answer_bpb"][0] == pytest.approx(-first[0] / math.log(2) / table["bytes"][0][0])
    metrics = record(scored, "tiny_choice")["metrics"]
    assert metrics["answer_bpb"]["value"] == pytest.approx(np.mean(table["answer_bpb"]))
    assert metrics["acc"]["chance"] == pytest.approx(1 / 3)


def test_word_and_byte_perplexity_equal_a_direct_computation(scored: Run, tasks: Path) -> None:
    trained, data = open_run(scored)
    total = words = size = 0.0
    for line in (tasks / "tiny_perplexity.jsonl").read_text("utf-8").splitlines():
        text = json.loads(line)["page"]
        ids = [data.tokenizer.end_of_text, *data.tokenizer.encode(text)]
        at, length, last = 1, 64, len(ids)
        while at < last:  # disjoint windows; the last is filled up with what stands before it
            end = min(at + length, last)
            window = torch.tensor(ids[max(0, end - length - 1) if end == last else at - 1 : end])
            with torch.no_grad():
                logits = trained.model.logits(trained.model(window[None, :-1]))[0].double()
            logs = logits.log_softmax(-1)[torch.arange(len(window) - 1), window[1:]]
            total += float(logs[-(end - at) :].sum())
            at = end
        words += len(text.split())
        size += len(text.encode())
    metrics = record(scored, "tiny_perplexity")["metrics"]
    assert metrics["word_perplexity"]["value"] == pytest.approx(math.exp(-total / words), rel=1e-5)
    assert metrics["byte_perplexity"]["value"] == pytest.approx(math.exp(-total / size), rel=1e-5)
    bits = -total / size / math.log(2)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(bits, rel=1e-5)


def test_scoring_on_the_way_and_at_the_end_leaves_training_as_it_is(
    tiny_yaml: Path, tasks: Path, tmp_path: Path
) -> None:
    plain = trained(tiny_yaml, tmp_path / "plain", "model.dropout=0.1")
    settings = (
        *("model.dropout=0.1", "evaluation.tasks=[tiny_choice, tiny_answer]"),
        *(f"evaluation.include_path={tasks}", "evaluation.every=2560"),
    )
    run = trained(tiny_yaml, tmp_path / "runs", *settings)
    assert run.id == plain.id
    assert (run / "metrics.jsonl").read_bytes() == (plain / "metrics.jsonl").read_bytes()
    weights = "checkpoints/step-00000040/model.safetensors"
    assert (run / weights).read_bytes() == (plain / weights).read_bytes()
    assert scores.steps(run) == [10, 20, 30, 40]
    curve = [scores.of_step(run, s)["tiny_choice"] for s in scores.steps(run)]
    assert [r["tokens"] for r in curve] == [2560, 5120, 7680, 10240]
    bits = [r["metrics"]["answer_bpb"]["value"] for r in curve]
    assert bits[0] > bits[-1]  # it learns


def test_only_what_is_missing_is_scored_and_a_changed_task_anew(scored: Run, tasks: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in scores.folder(scored, 40).glob("*.parquet")}
    change = {"limit": None}
    evaluate.score_run(scored, change)
    after = {p.name: p.stat().st_mtime_ns for p in scores.folder(scored, 40).glob("*.parquet")}
    assert after == before
    with open(tasks / "tiny_last.jsonl", "a", encoding="utf-8") as file:
        file.write('{"text": "one more line of text"}\n')
    evaluate.score_run(scored, change)
    later = {p.name: p.stat().st_mtime_ns for p in scores.folder(scored, 40).glob("*.parquet")}
    assert {name for name in before if later[name] != before[name]} == {"tiny_last.parquet"}
    assert record(scored, "tiny_last")["items"] == 13


def test_other_settings_are_another_score(scored: Run) -> None:
    for change in ({"limit": 5}, {"limit": 0.5}, {"precision": "bf16"}, {"add_bos_token": True}):
        evaluate.score_run(scored, {"tasks": ("tiny_choice",), **change})
    evaluate.score_run(scored, {"tasks": ("tiny_choice",), "max_length": 40})
    kept = scores.of_step(scored, 40)
    names = ("first5", "first50%", "bf16", "bos", "length40")
    assert {f"tiny_choice,{name}" for name in names} < set(kept)
    assert kept["tiny_choice,first5"]["items"] == 5 and kept["tiny_choice,first50%"]["items"] == 6
    assert kept["tiny_choice,length40"]["truncated"] > kept["tiny_choice"]["truncated"] == 0
    exact, rough = (
        kept[name]["metrics"]["answer_bpb"]["value"] for name in ("tiny_choice", "tiny_choice,bf16")
    )
    assert rough != exact and rough == pytest.approx(exact, rel=0.01)


KILLER = """
import os, signal
def text(doc):
    if doc["n"] < 2:  # the first is looked at when the task is loaded
        return doc["q"]
    if os.environ.get("END_HERE") == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("END_HERE") == "fail":
        raise ZeroDivisionError("of the task's own code")
    return doc["q"]
"""


@pytest.fixture
def breakable(tasks: Path) -> Path:
    """A task whose own code ends the process, or fails, when the environment says so."""
    (tasks / "killer.py").write_text(KILLER)
    write_task(
        tasks,
        "zz_breakable",
        [{"n": n, "q": "a list", "a": " of"} for n in range(3)],
        "output_type: loglikelihood\ndoc_to_text: !function killer.text\ndoc_to_target: '{{a}}'\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    )
    return tasks


def command(*words: str, processes: int = 1, **more: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable]
    if processes > 1:
        program += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        program += ["--master_addr=127.0.0.1", f"--master_port={next(free_ports())}"]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [*program, "run.py", *words], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_killed_in_the_middle_the_scored_tasks_are_kept(
    tiny_yaml: Path, breakable: Path, tmp_path: Path
) -> None:
    run = trained(tiny_yaml, tmp_path / "runs")
    words = ["eval", str(run.folder), "--tasks", "tiny_choice,tiny_last,zz_breakable"]
    words += ["--include-path", str(breakable)]
    killed = command(*words, END_HERE="kill")
    assert killed.returncode == -signal.SIGKILL
    first = {p.name: p.stat().st_mtime_ns for p in scores.folder(run, 40).glob("*")}
    assert {n for n in first if n.endswith(".json")} == {"tiny_choice.json", "tiny_last.json"}
    again = command(*words)
    assert again.returncode == 0, again.stderr
    second = {p.name: p.stat().st_mtime_ns for p in scores.folder(run, 40).glob("*")}
    assert first.items() <= second.items() and "zz_breakable.json" in second


def test_a_failing_task_stops_no_other_and_the_run_stays_done(
    tiny_yaml: Path, breakable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("END_HERE", "")
    overrides = [
        "evaluation.tasks=[zz_breakable, tiny_choice]",
        f"evaluation.include_path={breakable}",
    ]
    experiment = loader.load(tiny_yaml, overrides)
    wanted = loader.resolved(experiment)["evaluation"]
    run = Run(tmp_path / "runs", loader.run_id(experiment, 0))

    said = command("train", str(tiny_yaml), *overrides, "--runs", str(run.root), END_HERE="fail")
    assert said.returncode == 1
    assert "ZeroDivisionError: of the task's own code (at killer.py:" in said.stderr
    assert "Traceback" not in said.stderr
    kept = json.loads((run / "scores" / "failure.json").read_text())
    assert "Traceback" in kept["tracebacks"]["zz_breakable"]
    assert run.state == "done" and scores.lacking(run, wanted) == ["zz_breakable"]
    assert "of the task's own code" in (scores.failure(run) or "")
    train(experiment, 0, run.root, progress="none")  # the scores alone
    assert scores.lacking(run, wanted) == [] and scores.failure(run) is None


@pytest.mark.slow
def test_two_processes_share_the_requests_and_agree(scored: Run, tasks: Path) -> None:
    change = ("--tasks", ",".join(LEAVES), "--include-path", str(tasks), "--limit", "11")
    alone = command("eval", str(scored.folder), *change)
    assert alone.returncode == 0, alone.stderr
    kept = {name: items(scored, f"{name},first11") for name in LEAVES}
    for path in scores.folder(scored, 40).glob("*,first11.*"):
        path.unlink()
    both = command("eval", str(scored.folder), *change, processes=2)
    assert both.returncode == 0, both.stderr
    for name in LEAVES:
        now = items(scored, f"{name},first11")
        assert now.keys() == kept[name].keys()
        for key, values in now.items():
            if key in ("loglikelihoods", "answer_bpb", "answer_probability", "perplexity"):
                flat = np.concatenate([np.atleast_1d(v) for v in values])
                assert flat == pytest.approx(
                    np.concatenate([np.atleast_1d(v) for v in kept[name][key]]), rel=1e-5
                )
            elif "perplexity" not in key and key != "bits_per_byte":
                assert values == kept[name][key], (name, key)


@pytest.mark.slow
def test_what_fails_in_one_process_fails_in_all(scored: Run, tasks: Path) -> None:
    rows = [{"q": "a", "a": " b"}] * 70 + [{"q": "a", "a": ""}] + [{"q": "a", "a": " b"}]
    write_task(
        tasks, "tiny_long", rows,
        "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
        "target_delimiter: ''\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    )  # fmt: skip
    words = ("eval", str(scored.folder), "--tasks", "tiny_long", "--include-path", str(tasks))
    said = command(*words, processes=2)
    assert said.returncode != 0
    assert "item 70: the continuation '' has no tokens" in said.stderr


def test_wrong_settings_are_one_line(scored: Run, tasks: Path) -> None:
    with pytest.raises(UserError, match="no tasks to score"):
        evaluate.score_run(scored, {"tasks": ()})
    with pytest.raises(UserError, match=r"no checkpoint of step 7 \(there are: 40\)"):
        evaluate.score_run(scored, {"tasks": ("tiny_choice",)}, checkpoint=7)
    with pytest.raises(UserError, match=r"evaluation\.limit: .* got -1"):
        evaluate.score_run(scored, {"limit": -1})
    with pytest.raises(ScoringFailed, match="learned positions end at max_seq_len 64"):
        evaluate.score_run(scored, {"max_length": 65})
    with pytest.raises(UserError, match=r"include_path: .*: no such folder"):
        evaluate.score_run(scored, {"include_path": str(tasks / "none")})


@pytest.mark.parametrize("model", ["model.position=alibi", "model.mixer=lstm"])
def test_past_the_training_length(model: str, tiny_yaml: Path, tasks: Path, tmp_path: Path) -> None:
    position = () if "position" in model else ("model.position=none",)
    run = trained(tiny_yaml, tmp_path / "runs", model, *position)
    change = {"tasks": ("tiny_perplexity",), "include_path": str(tasks), "max_length": 160}
    made = evaluate.score_run(run, change)["tiny_perplexity"]["metrics"]["bits_per_byte"]["value"]
    opened, data = open_run(run)
    lm = CeterisLM(opened.model, data.tokenizer, max_length=160)
    assert lm.max_length == 160 and math.isfinite(made)


def test_a_probe_keeps_nothing(scored: Run, tasks: Path) -> None:
    before = sorted(p.name for p in scores.folder(scored, 40).iterdir())
    made = evaluate.score_run(scored, {"tasks": ("tiny_both",), "limit": 6}, kept=False)
    assert made["tiny_both"]["items"] == 12
    assert sorted(p.name for p in scores.folder(scored, 40).iterdir()) == before
    ((name, of, score, chance, verdict, _, _),) = scores.lines(made)
    assert (name, of, chance, verdict) == ("tiny_both", "12 of 24", "0.4167", "at chance")
    assert score.startswith("acc ")


def test_at_chance_is_about_the_noise_of_the_items() -> None:
    def metric(stderr: float, chance: float | None = 0.25) -> dict[str, Any]:
        return {"chance": chance, "stderr": stderr}

    noise = math.sqrt(0.25 * 0.75 / 400)  # 0.0217 for 400 items
    assert scores.at_chance(metric(0.02), 0.25 + 1.9 * noise, 400) is True
    assert scores.at_chance(metric(0.02), 0.25 + 2.0 * noise, 400) is False
    assert scores.at_chance(metric(0.03), 0.25 + 2.0 * noise, 400) is True
    assert scores.at_chance(metric(0.02), 0.1, 400) is True  # below is no better
    assert scores.at_chance(metric(0.0, 0.0), 0.0, 400) is True
    assert scores.at_chance(metric(0.1, None), 0.5, 400) is None


def test_names_of_records_say_the_settings() -> None:
    assert Settings().words == ()
    words = Settings(5, 100, 256, True, "bf16").words
    assert words == ("5shot", "first100", "length256", "bos", "bf16")
    path = scores.path_of(Run(Path("r"), "x-s0"), 7, "my/own task", Settings(num_fewshot=0))
    assert path == Path("r/x-s0/scores/step-00000007/my%2Fown%20task,0shot.json")


def rescored(run: Run, folder: Path, name: str, **more: Any) -> dict[str, dict[str, Any]]:
    change = {"tasks": (name,), "include_path": str(folder), **more}
    return evaluate.score_run(run, change)


def test_a_group_does_not_outlive_the_scores_of_its_tasks(scored: Run, tasks: Path) -> None:
    with open(tasks / "tiny_pairs.jsonl", "a", encoding="utf-8") as file:
        file.write('{"good": "one more", "bad": "more one", "cluster": 9}\n')
    rescored(scored, tasks, "tiny_pairs")
    assert "tiny_both" not in scores.of_step(scored, 40)
    made = rescored(scored, tasks, "tiny_both")
    assert made["tiny_both"]["items"] == 25


def test_a_tag_is_returned_as_its_tasks(scored: Run, tasks: Path) -> None:
    assert set(rescored(scored, tasks, "tiny_tag")) == {"tiny_choice", "tiny_last"}


WRONG = {
    "answer out of range": (
        [{"ends": [" a", " b"], "right": r} for r in (0, 7)],
        "",
        "acc",
        "item 1: the right answer is 7, which is none of its 2 choices",
    ),
    "answer below zero": (
        [{"ends": [" a", " b"], "right": -1}],
        "",
        "acc",
        "the right answer is -1",
    ),
    "answer in other words": (
        [{"ends": [" a", " b"], "right": "zzz"}],
        "",
        "acc",
        "the right answer is 'zzz'",
    ),
    "metric of another kind": (
        [{"ends": [" a", " b"], "right": 0}],
        "",
        "word_perplexity",
        "no metric that it asks for",
    ),
    "more examples than there are": (
        [{"ends": [" a", " b"], "right": 0}] * 3,
        "fewshot_split: test\n",
        "acc",
        "num_fewshot is more than the examples",
    ),
}


@pytest.mark.parametrize(("rows", "more", "metric", "said"), WRONG.values(), ids=WRONG)
def test_a_faulty_task_is_one_line_and_no_score(
    rows: list[dict[str, Any]], more: str, metric: str, said: str, scored: Run, tasks: Path
) -> None:
    write_task(
        tasks, "faulty", rows,
        f"{more}output_type: multiple_choice\ndoc_to_text: 'a'\ndoc_to_choice: ends\n"
        "doc_to_target: right\ntarget_delimiter: ''\n"
        f"metric_list: [{{metric: {metric}, aggregation: mean, higher_is_better: true}}]\n",
    )  # fmt: skip
    shots = {"num_fewshot": 9} if "examples" in said else {}
    with pytest.raises(ScoringFailed) as caught:
        rescored(scored, tasks, "faulty", **shots)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not any(name.startswith("faulty") for name in scores.of_step(scored, 40))


def test_a_task_whose_code_ends_the_program_or_that_holds_itself_is_one_line(
    scored: Run, tasks: Path
) -> None:
    (tasks / "leaver.py").write_text("import sys\ndef text(doc):\n    sys.exit(3)\n")
    write_task(
        tasks, "leaves", [{"a": " b"}],
        "output_type: loglikelihood\ndoc_to_text: !function leaver.text\ndoc_to_target: '{{a}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"own code ended the program"):
        rescored(scored, tasks, "leaves")
    (tasks / "ring.yaml").write_text("group: ring\ntask: [tiny_last, ring]\n")
    with pytest.raises(UserError, match="contains itself"):
        rescored(scored, tasks, "ring")


def test_a_metric_that_is_no_number_is_kept_as_none(scored: Run, tasks: Path) -> None:
    (tasks / "nothing.py").write_text(
        "def results(doc, results):\n    return {'acc': float('nan')}\n"
    )
    write_task(
        tasks, "unnumbered", [{"a": " b"}] * 2,
        "output_type: loglikelihood\ndoc_to_text: 'a'\ndoc_to_target: '{{a}}'\n"
        "process_results: !function nothing.results\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    )  # fmt: skip
    made = rescored(scored, tasks, "unnumbered")["unnumbered"]["metrics"]["acc"]
    assert (made["value"], made["stderr"]) == (None, None)


def test_an_absolute_include_is_taken_as_it_is(scored: Run, tasks: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = (tasks / "tiny_last.yaml").read_text().replace("task: tiny_last\n", "")
    (elsewhere / "_base.yaml").write_text(text)
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.yaml").write_text(
        f"include: {elsewhere / '_base.yaml'}\ntask: mine\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'tiny_last.jsonl'}}}}}\n"
    )
    assert rescored(scored, own, "mine")["mine"]["items"] == 12
