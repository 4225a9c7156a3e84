"""Tasks of made corpora: right answers that follow, about nothing that was trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from components.registry import UserError, spec
from experiments import held_out, loader, made, scores
from experiments.data import Dataset, is_held_out, prepare
from experiments.record import Run
from experiments.trainer import train
from tests.conftest import ROOT

PRESETS = ROOT / "experiments" / "presets" / "tasks"


def dataset(folder: Path, **corpus: Any) -> Dataset:
    config = SimpleNamespace(
        corpus=spec("corpus", {"documents": 3000, **corpus}),
        filters=(),
        tokenizer=spec("tokenizer", "bytes"),
        validation_fraction=0.1,
        split_seed=0,
    )
    return prepare(config, folder, progress=False)


def rows_of(data: Dataset, *tasks: str) -> dict[str, list[dict[str, str]]]:
    folder = held_out.build(data, tasks)
    texts = {task: (folder / f"{task}.jsonl").read_text() for task in tasks}
    return {task: [json.loads(x) for x in text.splitlines()] for task, text in texts.items()}


def trained_on(data: Dataset) -> set[str]:
    documents = spec("corpus", data.meta["corpus"]).build().documents()
    return {text for text in documents if not is_held_out(text.encode(), 0, 0.1)}


def test_strings_to_copy_are_of_their_lengths_and_not_among_those_of_training(
    tmp_path: Path,
) -> None:
    data = dataset(tmp_path, name="copy", alphabet=4, lengths=[2, 5])
    rows = rows_of(data, *(f"{made.COPY}{percent}" for percent in made.PERCENT))
    known = {document.partition(">")[0] for document in trained_on(data)}
    lengths = {}
    for task, items in rows.items():
        lengths[task] = {len(item["continuation"]) for item in items}
        assert all(item["context"] == item["continuation"] + ">" for item in items)
        assert len({item["context"] for item in items}) == len(items)
        assert not known & {item["continuation"] for item in items}
    expected = zip(made.PERCENT, (5, 6, 6, 7, 8, 10), strict=True)
    assert lengths == {f"{made.COPY}{percent}": {length} for percent, length in expected}
    assert len(rows["held_out_copy_200"]) == made.ITEMS
    assert held_out.FEWEST <= len(rows["held_out_copy_100"]) < 0.15 * 4**5


def test_recall_asks_for_a_value_that_stands_behind_its_key(tmp_path: Path) -> None:
    data = dataset(tmp_path, name="recall", pairs=3)
    rows = rows_of(data, made.RECALL)[made.RECALL]
    assert len(rows) == made.ITEMS
    known = trained_on(data)
    for row in rows:
        context, value = row["context"], row["continuation"]
        given = {context[i]: context[i + 1] for i in range(0, 6, 2)}
        assert given[context[-1]] == value
        assert not any(document.startswith(context + value) for document in known)
    counts = [sum(len(row["context"]) == length for row in rows) for length in (7, 9, 11)]
    assert sum(counts) == made.ITEMS
    assert all(count > 60 for count in counts)


def test_a_task_of_another_corpus_is_one_line(tmp_path: Path) -> None:
    data = dataset(tmp_path, name="recall")
    with pytest.raises(UserError) as caught:
        held_out.build(data, ["held_out_copy_100"])
    assert str(caught.value) == (
        "evaluation.tasks: held_out_copy_100 asks what the corpus 'copy' teaches, and the "
        "experiment's is 'recall'; leave the task out"
    )


def test_a_language_whose_strings_were_all_trained_on_gives_too_few_items(tmp_path: Path) -> None:
    data = dataset(tmp_path, name="copy", alphabet=2, lengths=[1, 3])
    with pytest.raises(UserError, match=r"fewer than 50, for held_out_copy_100 \(\d\)"):
        held_out.build(data, ["held_out_copy_100"])


@pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
def test_lm_eval_scores_every_length_and_the_group_of_them(tmp_path: Path) -> None:
    (tmp_path / "copy.yaml").write_text(
        """\
model: {d_model: 32, n_layers: 2, n_heads: 2, max_seq_len: 40, position: alibi}
data: {corpus: {name: copy, lengths: [6, 8], documents: 2000}, validation_fraction: 0.1}
training: {tokens: 1800, seq_len: 18, global_batch_size: 20, lr: 1e-3}
evaluation: {tokens: 1800, tasks: [held_out_copy]}
execution: {threads: 1}
"""
    )
    experiment = loader.load(tmp_path / "copy.yaml")
    train(experiment, 0, tmp_path / "runs", progress="none")
    run = Run(tmp_path / "runs", loader.run_id(experiment, 0))
    records = scores.of_step(run, 5)
    assert set(records) == {"held_out_copy", *(f"{made.COPY}{p}" for p in made.PERCENT)}
    for record in records.values():
        assert record["metrics"]["acc"]["value"] == 0.0  # after five steps nobody can
        assert record["metrics"]["acc"]["chance"] == 0.0
    assert records["held_out_copy_200"]["metrics"]["answer_bpb"]["value"] > 1


def test_the_yaml_files_are_exact_match_on_these_items() -> None:
    for name in made.TASKS:
        config = yaml.safe_load((PRESETS / f"{name}.yaml").read_text("utf-8"))
        assert config["task"] == name
        assert config["output_type"] == "loglikelihood"
        assert config["dataset_kwargs"] == {"data_files": {"test": f"{name}.jsonl"}}
