"""An experiment's model: fresh with its initial values, in training, or as a run left it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from components import faults
from components.decoder import Decoder, skeleton
from components.linear_cross_entropy import linear_cross_entropy, losses_by_target
from components.objective import CrossEntropy
from experiments import checkpoint, own_code, provenance
from experiments.data import Dataset, recorded
from experiments.loader import code_by_name, load
from experiments.record import Run, UserError, read_json
from experiments.schema import Experiment


def build(experiment: Experiment, vocab_size: int, seed: int) -> Decoder:
    """The experiment's model on the CPU with its initial values; no number is drawn twice.

    Raises:
        UserError: an imported component can't be built, or says not how a parameter begins.
    """
    m, dims = experiment.model, experiment.dims(vocab_size)
    model = skeleton(dims, m.specs, m.tie_embeddings).to_empty(device="cpu")
    with faults.blamed("while the model is built", m.specs.values()):
        model.fill_buffers()
        return model.initialise(seed)


class LanguageModel(nn.Module):
    """Decoder and objective as one module, so that autocast, DDP and compile see the whole step."""

    def __init__(self, decoder: Decoder, objective: CrossEntropy) -> None:
        super().__init__()
        self.decoder, self.objective = decoder, objective

    def forward(self, windows: Tensor) -> Tensor:
        """`(B, T+1)` tokens -> the sum of the objective over B x T targets."""
        hidden = self.decoder(windows[:, :-1]).flatten(0, 1)
        return self.objective(hidden, self.decoder.output_weight, windows[:, 1:].flatten())

    def nats(self, windows: Tensor) -> Tensor:
        """`(B, T+1)` tokens -> the summed cross-entropy, whatever the objective."""
        hidden = self.decoder(windows[:, :-1]).flatten(0, 1)
        targets = windows[:, 1:].flatten()
        return linear_cross_entropy(hidden, self.decoder.output_weight, None, targets)

    def nats_by_target(self, windows: Tensor) -> Tensor:
        """`(B, T+1)` tokens -> `(B, T)`, the cross-entropy of each target; without gradients."""
        hidden, targets = self.decoder(windows[:, :-1]), windows[:, 1:]
        flat = losses_by_target(hidden.flatten(0, 1), self.decoder.output_weight, targets.flatten())
        return flat.view(targets.shape)


@dataclass(frozen=True)
class Trained:
    """A finished or running run's model, for generation and scoring."""

    run: Run
    experiment: Experiment
    model: Decoder
    step: int


def load_trained(
    run: Run, experiment: Experiment, vocab_size: int, step: int | None = None
) -> Trained:
    """The model of a run's newest whole checkpoint, on the CPU, in evaluation mode.

    Args:
        step: of another checkpoint than the newest.

    Raises:
        UserError: it has none yet, or none of that step.
    """
    folder = run / "checkpoints"
    found = checkpoint.newest(folder, lambda text: print(text, file=sys.stderr))
    if found is None:
        raise UserError(f"{run.folder}: no whole checkpoint to read; the run is {run.state}")
    path, state = found
    if step is not None and step != state["step"]:
        kept = checkpoint.steps(folder)
        if step not in kept:
            raise UserError(
                f"{folder}: no checkpoint of step {step} (there are: {', '.join(map(str, kept))})"
            )
        path = checkpoint.path_of(folder, step)
        state = checkpoint.check(path)
    m = experiment.model
    model = skeleton(experiment.dims(vocab_size), m.specs, m.tie_embeddings)
    model.fill_buffers()
    model.load_state_dict(checkpoint.load_weights(path), assign=True)
    return Trained(run, experiment, model.eval(), state["step"])


def open_run(run: Run, step: int | None = None) -> tuple[Trained, Dataset]:
    """A run's model, as `load_trained`, and its data with the tokenizer, from its own records.

    Its code, weights, tokenizer and shards are those that it was trained with, whatever has become
    of the files under `imports:` and of the text since.

    Raises:
        UserError: one of them is not there any more, or is another; or as `load_trained`.
    """
    known = read_json(run / "provenance.json")
    experiment = load(run / "experiment.yaml", moved=own_code.kept(run, known))
    check_code(run, experiment, known)
    data = recorded(run.root / "data", known.get("data") or {}, str(run.folder))
    return load_trained(run, experiment, data.vocab_size, step), data


def check_code(run: Run, experiment: Experiment, known: Mapping[str, Any]) -> None:
    """The components of its own that an opened experiment uses are those that it was trained with.

    Raises:
        UserError: they are not.
    """
    now, then = code_by_name(experiment), known["attempts"][-1].get("imports")
    if now is None or now == then:
        return
    before = None if "imports" in known else provenance.digest(map(Path, experiment.imports))
    if before != then:  # as earlier versions wrote it
        raise UserError(
            f"{run.folder}: was trained with other code of {', '.join(experiment.imports)}, and "
            "the copy of that is gone; put it back, or train the experiment again"
        )
