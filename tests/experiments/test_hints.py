"""A key in the wrong place is pointed to its own, whatever other trainers call it."""

from __future__ import annotations

from pathlib import Path

import pytest

from components import registry
from experiments import hints
from experiments.loader import load
from experiments.yaml_text import ConfigError

POINTERS = {
    # a key that exists elsewhere
    "training.weight_decay": "it is training.optimizer.weight_decay",
    "training.z_loss": "it is training.objective.z_loss",
    "training.eps": "it is training.optimizer.eps",
    "model.eps": "it is model.norm.eps",
    "model.qk_norm": "it is model.mixer.qk_norm",
    "model.activation": "it is model.ffn.activation",
    "training.optimizer.lr": "it is training.lr",
    "model.ffn.dropout": "it is model.dropout",
    "tokens": "it is training.tokens or evaluation.tokens",
    "dModel": "it is model.d_model",
    "training.wieght_decay": "did you mean training.optimizer.weight_decay?",
    # of a component that is not chosen
    "model.vocab_size": "it is data.tokenizer: {name: bpe, vocab_size: …}",
    "model.rope_theta": "here it is model.position: {name: rotary, theta: …}",
    "training.momentum": "it is training.optimizer: {name: sgd, momentum: …}",
    # other trainers' words
    "training.warmup": "here it is training.schedule.warmup_fraction (a share of all steps",
    "training.min_lr": "here it is training.schedule.min_lr_ratio (a share of training.lr)",
    "training.steps": "here it is training.tokens (steps x seq_len x global_batch_size",
    "training.epochs": "here it is training.tokens",
    "training.learning_rate": "here it is training.lr",
    "training.batch_size": "did you mean 'global_batch_size'?",
    "batchsize": "here it is training.global_batch_size",
    "model.n_embd": "here it is model.d_model",
    "model.hidden_size": "here it is model.d_model",
    "model.block_size": "here it is training.seq_len",
    "model.attn_pdrop": "here it is model.dropout",
    "grad_accum": "here it is execution.micro_batch_size",
    "training.gradient_accumulation_steps": "here it is execution.micro_batch_size",
    "training.amp": "here it is training.precision",
    "wandb_project": "here it is tracking.wandb.project",
    # what is no setting of an experiment
    "training.seed": "not in an experiment: train --seed N, or seeds: [0, 1, 2] in a sweep file",
    "output_dir": "not in an experiment: --runs FOLDER or $CETERIS_RUNS",
    "training.num_workers": "not needed: batches have no workers",
    "seeds": "a key of sweep files",
    # a key of the same mapping is closer than any of these
    "model.n_layer": "did you mean 'n_layers'?",
    "model.norm.epsilon": "did you mean 'eps'?",
    "training.grad_clipp": "did you mean 'grad_clip'?",
    "model.ffn.hiden": "did you mean 'hidden'?",
    "xyzzy": "(known: ",
}


@pytest.mark.parametrize(("key", "pointer"), POINTERS.items(), ids=POINTERS)
def test_an_unknown_key_is_pointed_to_its_place(key: str, pointer: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load("gpt2-tiny", [f"{key}=1"])
    (line,) = raised.value.lines
    word = key.rpartition(".")[2]
    assert line.startswith(f"command line: {key}=1: {key}: unknown key '{word}'")
    assert pointer in line


def test_a_file_names_the_line_of_each_such_key(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("base: gpt2-tiny\ntraining:\n  weight_decay: 0.1\n  warmup: 100\n")
    with pytest.raises(ConfigError) as raised:
        load(file)
    assert [line.partition("x.yaml")[2].split(": ")[0] for line in raised.value.lines] == [
        ":3:3",
        ":4:3",
    ]


def test_a_dotted_key_in_a_file_is_shown_nested(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("base: gpt2-tiny\nmodel.norm: rmsnorm\n")
    with pytest.raises(ConfigError, match=r"in a file it is nested: model: \{norm: …\}"):
        load(file)


def test_an_own_parameter_wins_over_a_synonym(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))

    @registry.register("optimizer", "own_with_warmup")
    class Own:
        def __init__(self, *, warmup_steps: int = 10) -> None: ...

    data = {"training": {"optimizer": "own_with_warmup"}}
    found = hints.elsewhere(data, "training", "warmup_steps")
    assert found == "it is training.optimizer.warmup_steps"


def test_every_synonym_leads_to_a_key_that_exists() -> None:
    paths = {place.path for place in hints._places(hints.Experiment, {})}
    assert set(hints.SYNONYMS) <= paths
    assert set(hints.REMARKS) <= paths


def test_no_synonym_is_a_key_of_the_section_it_leads_to() -> None:
    for target, words in hints.SYNONYMS.items():
        section = target.rpartition(".")[0]
        own = {p.key for p in hints._places(hints.Experiment, {}) if p.path.startswith(section)}
        assert not own & set(words.split()), target
