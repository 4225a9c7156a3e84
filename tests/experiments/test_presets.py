"""The shipped experiments load, build, have the sizes that they say, and the tiny ones train."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch

from components import registry
from components.decoder import Counts, Decoder, count
from components.objective import CrossEntropy
from components.registry import Spec
from experiments.loader import load
from experiments.schema import PRESETS, Experiment
from sweeps import design

SWEEPS = Path(design.__file__).parent / "presets"
NAMES = sorted(path.stem for path in PRESETS.glob("*.yaml"))
TINY = [name for name in NAMES if name.endswith("tiny")]
PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080}


def vocab_size(experiment: Experiment) -> int:
    """Without preparing data: GPT-2's published size where its tokenizer would be fetched."""
    tokenizer = experiment.data.tokenizer
    if tokenizer.name == "huggingface":
        assert tokenizer.params["path"] == "gpt2"
        return 50257
    return tokenizer.build().vocab_size


@cache
def counted(name: str) -> Counts:
    experiment = load(name)
    dims, m = experiment.dims(vocab_size(experiment)), experiment.model
    return count(dims, m.specs, m.tie_embeddings, experiment.training.seq_len, flops=False)


def opening_comment(name: str) -> str:
    lines = (PRESETS / f"{name}.yaml").read_text().split("\n")
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(line.lstrip("# ") for line in lines[:end])


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_has_a_model_of_half_a_million_to_a_billion_parameters(name: str) -> None:
    assert 500_000 <= counted(name).parameters <= 1_200_000_000


@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items())
def test_the_gpt2_sizes_are_the_published_ones(name: str, parameters: int) -> None:
    assert counted(name).parameters == parameters


@pytest.mark.parametrize("name", sorted({*NAMES} - {"demo"}))
def test_the_opening_comment_says_the_size_and_a_source(name: str) -> None:
    comment = opening_comment(name)
    assert f"{counted(name).parameters:,}" in comment
    assert re.search(r"arXiv|github\.com|et al\. \d{4}|[Tt]rained as the preset", comment)


@pytest.mark.parametrize("name", NAMES)
def test_every_preset_says_what_it_is_and_how_long_it_trains(name: str) -> None:
    experiment = load(name)
    assert 0 < len(experiment.description) <= 72
    assert experiment.training.steps >= 180
    every = experiment.evaluation.every_tokens
    assert every is not None
    assert 5 <= experiment.training.tokens / every <= 100


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_preset_needs_no_network_and_its_loss_falls(name: str) -> None:
    experiment = load(name)
    assert (experiment.data.corpus.name, experiment.data.tokenizer.name) == ("python_docs", "bytes")
    m, t = experiment.model, experiment.training
    decoder = Decoder(experiment.dims(257), m.specs, m.tie_embeddings).initialise(0)
    optimizer, objective = t.optimizer.build().build(decoder, t.lr), CrossEntropy()
    text = Path(registry.__file__).read_bytes()[: 4 * 129]
    windows = torch.tensor(list(text)).view(4, 129)
    losses = []
    for _ in range(12):
        hidden = decoder(windows[:, :-1]).flatten(0, 1)
        loss = objective(hidden, decoder.output_weight, windows[:, 1:].flatten()) / (4 * 128)
        losses.append(loss.item())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), t.grad_clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
    assert 5 < losses[0] < 8  # near log 257 = 5.5
    assert losses[-1] < losses[0] - 1


def used(value: Spec) -> set[tuple[str, str]]:
    """A component and those inside it."""
    inside = [used(param) for param in value.params.values() if isinstance(param, Spec)]
    return {(value.kind, value.name)}.union(*inside)


def test_every_part_of_a_model_is_used_by_a_shipped_experiment_or_sweep() -> None:
    shipped = set[tuple[str, str]]()
    sweeps = [design.load(path) for path in sorted(SWEEPS.glob("*.yaml"))]
    variants = [v.experiment for sweep in sweeps for v in sweep.variants]
    for experiment in [*map(load, NAMES), *variants]:
        shipped.update(*map(used, experiment.model.specs.values()))
    kinds = {kind for kind, _ in shipped}
    ours = {
        (e.kind, e.name) for e in registry.entries() if e.cls.__module__ == f"components.{e.kind}"
    }
    assert {(kind, name) for kind, name in ours - shipped if kind in kinds} == set()


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in SWEEPS.glob("*.yaml") if not p.stem.endswith("-gpu"))
)
def test_sweeps_for_a_cpu_train_in_fp32(name):
    precisions = {row.experiment.training.precision for row in design.load(name).variants}
    assert precisions == {"fp32"}
