"""Before an experiment trains: would a part of it spoil its numbers, or end it in a traceback?

Each experiment's own model and optimizer are put through the promises of components/promises.py:

    model      no output sees a later token, another sequence or an earlier batch; with a cache it
               gives the same; two builds are equal
    loss       finite on the first batch, a sum over targets
    optimizer  the schedule still acts after the round trip of its state; resuming is going on

A schedule is not asked here: training looks at each factor when it comes to its step.

A model made of this repository's components alone, which its tests have put through the same, is
looked at in a copy of one layer with few tokens. One with an imported part is looked at as it is,
as far as it is not too large; see `small`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components import (
    contract_report,
    contract_training,
    faults,
    promises,
    promises_training,
    registry,
)
from components.contract import Case
from components.decoder import Decoder, count, skeleton
from components.dims import Dims
from components.faults import Broken, require
from components.registry import UserError
from experiments import loader
from experiments.data import Dataset
from experiments.model import build
from experiments.schema import Experiment
from experiments.yaml_text import Mark

LARGEST = 50_000_000  # parameters of a model that is looked at complete
LARGEST_COPY = 200_000_000  # of a copy of two layers; a larger one is not looked at
TOKENS = 1024  # of the first batch, or a sequence where one is longer
FEW = 24  # tokens of a sequence, where no part is imported
LEAST, MOST = 64, 2048  # tokens of a sequence otherwise, as WORK allows
WORK = 5_000_000_000  # parameters times tokens of one pass, a second or so on a CPU
VOCABULARY = 257  # at the most, where nothing depends on it
PLAIN = {"norm": "layernorm", "position": "none", "mixer": "attention", "ffn": "mlp"}
PLAIN |= {"block": "pre", "init": "fan_in"}


def small(experiment: Experiment, vocabulary: int) -> Experiment | None:
    """The experiment, or a copy with two layers where it is large; None where that is large too."""

    def parameters(e: Experiment) -> int:
        m = e.model
        model = skeleton(e.dims(vocabulary), m.specs, m.tie_embeddings)
        return sum(p.numel() for p in model.parameters())

    if parameters(experiment) <= LARGEST:
        return experiment
    copy = shallow(experiment)
    return copy if parameters(copy) <= LARGEST_COPY else None


def shallow(experiment: Experiment, layers: int = 2) -> Experiment:
    """The experiment with two layers at the most."""
    layers = min(layers, experiment.model.n_layers)
    model = experiment.model.model_copy(update={"n_layers": layers})
    return experiment.model_copy(update={"model": model})


def parts(experiment: Experiment) -> list[registry.Entry]:
    """The imported components that its model and its training use."""
    t = experiment.training
    return faults.imported_in(
        [*experiment.model.specs.values(), t.optimizer, t.schedule, t.objective]
    )


def check(
    experiment: Experiment,
    seed: int,
    vocabulary: int,
    tokens: Callable[[], Tensor],
    done: set[str] | None = None,
    say: Callable[[str], object] = lambda text: None,
) -> None:
    """Refuses an experiment whose parts break what they owe.

    Args:
        tokens: `(B, T+1)` of the first batch.
        done: what was looked at before, of other experiments; what is found again is passed over.
        say: hears what could not be looked at.

    Raises:
        UserError: one line that names the component, its file and line, and what is wrong.
    """
    t, m = experiment.training, experiment.model
    seen = done if done is not None else set()

    def first(*what: Any) -> bool:
        key = repr(what)
        return key not in seen and not seen.add(key)  # type: ignore[func-returns-value]

    own = faults.imported_in(m.specs.values())
    dims = loader.dump(experiment, everything=True)["model"]
    with torch.random.fork_rng(devices=[]):
        if first("optimizer", t.optimizer.dump(), dims if own and _imported(t.optimizer) else None):
            _check_optimizer(experiment)
        if not first("model", dims, t.seq_len, t.objective.dump(), vocabulary if own else None):
            return
        looked, size = experiment, vocabulary
        if not own and not _imported(t.objective):
            looked, size = shallow(experiment, 1), min(vocabulary, VOCABULARY)
        found = small(looked, size)
        if found is None:
            if own:
                say("not checked whether the model sees the future: it is too large for that")
            return
        ids = tokens() if size == vocabulary else tokens() % size
        try:
            _check_model(found, seed, size, ids, bool(own))
        except UserError as error:
            if not _needs_gpu(error):
                raise
            say(f"not checked on this machine's CPU: {error}")


def _imported(*specs: registry.Spec) -> bool:
    return bool(faults.imported_in(specs))


def _needs_gpu(error: UserError) -> bool:
    """Whether a component failed because it has no CPU kernel, which says nothing against it."""
    text = str(error.__cause__ or "").lower()
    return any(word in text for word in ("cuda", "triton", "gpu"))


def _check_model(
    experiment: Experiment, seed: int, vocabulary: int, tokens: Tensor, own: bool
) -> None:
    m = experiment.model
    specs = list(m.specs.values())
    if own:
        with named(*specs):
            _check_initial_values(shallow(experiment), seed)
    model = build(experiment, vocabulary, seed)
    length = _length(model, tokens.shape[1] - 1) if own else FEW
    rows = max(1, WORK // _size(model) // length) if own else 1
    with (
        named(experiment.training.objective, *specs),
        faults.watched(model, "on the first batch", specs),
    ):
        _check_loss(model, experiment, tokens[:rows, : length + 1])
    length = min(tokens.shape[1] - 1, length)
    if length < 2:
        return
    promises.stir(model.eval())
    ids = tokens.flatten()[: 3 * length]
    ids = ids.repeat(3 * length // len(ids) + 1)[: 3 * length].view(3, length)
    with torch.no_grad():
        if not model(ids).isfinite().all():  # stirred too far
            model = build(experiment, vocabulary, seed).eval()
    with named(*specs), faults.watched(model, "in evaluation", specs):
        promises.keeps_sequences_apart(model, ids)
    through = [s for s in specs if s.kind in ("mixer", "position", "block")]
    specs = through if _imported(*through) else specs
    with named(*specs), faults.blamed("in steps with a cache", specs):
        promises.caches_keep_what_they_are_given(model, ids[:2])


def _size(model: Decoder) -> int:
    return sum(p.numel() for p in model.parameters())


def _length(model: Decoder, most: int) -> int:
    """Tokens of a sequence: all, or where that is too much work a power of two."""
    affordable = min(MOST, max(LEAST, WORK // _size(model) // 3))
    return most if most <= affordable else 1 << affordable.bit_length() - 1


def _check_initial_values(experiment: Experiment, seed: int) -> None:
    m, dims = experiment.model, experiment.dims(VOCABULARY)
    promises.same_initial_values(lambda: build(experiment, VOCABULARY, seed))
    promises.keeps_values_of_constructors(
        lambda: Decoder(dims, m.specs, m.tie_embeddings),
        lambda: build(experiment, VOCABULARY, seed),
    )


def _check_loss(model: Decoder, experiment: Experiment, tokens: Tensor) -> None:
    objective, targets = experiment.training.objective, tokens[:, 1:].flatten()
    hidden = model(tokens[:, :-1]).flatten(0, 1)
    if not hidden.isfinite().all():
        raise Broken("hidden states are not finite (nan or infinite) on the first batch")
    with named(objective), faults.blamed("in the objective", [objective]):
        built = objective.build()
        if _imported(objective) and len(targets) > 1:
            promises_training.loss_is_a_sum(built, hidden, model.output_weight, targets)
        else:
            promises_training.loss(built, hidden, model.output_weight, targets)


def _check_optimizer(experiment: Experiment) -> None:
    """On the experiment's own parameters where they are imported too: an optimizer sorts them."""
    optimizer, m = experiment.training.optimizer, shallow(experiment).model
    if not _imported(optimizer) or not faults.imported_in(m.specs.values()):
        specs = {kind: registry.spec(kind, name) for kind, name in PLAIN.items()}
        dims = Dims(16, 2, 2, 8, 16, 19)
    else:
        specs, dims = m.specs, shallow(experiment).dims(VOCABULARY)

    def make() -> Decoder:
        model = skeleton(dims, specs, tie_embeddings=True).to_empty(device="cpu")
        model.fill_buffers()
        return model.initialise(0)

    if sum(p.numel() for p in skeleton(dims, specs, True).parameters()) > LARGEST:
        return
    with named(optimizer), faults.blamed("in the optimizer", [optimizer]):
        promises_training.keeps_its_state(optimizer.build().build, make)


class named:
    """Turns a broken promise into a line that names the imported components it may be of."""

    def __init__(self, *specs: registry.Spec) -> None:
        self.specs = specs

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, Broken):
            return
        found = [error.at] if error.at is not None else faults.imported_in(self.specs)
        names = [f"{s.kind} '{s.name}'" for s in self.specs]
        if len(found) == 1:
            raise UserError(f"{faults.title(found[0])}: {error}") from error
        if found:
            names = [f"{e.kind} '{e.name}' ({e.source})" for e in found]
        raise UserError(f"{' or '.join(names)}: {error}") from error


def check_run(experiment: Experiment, seed: int, data: Dataset, folder: Path) -> None:
    """As `check`, of one experiment with imported components that has not begun in `folder`.

    Raises:
        UserError: as `check`.
    """
    if (folder / "provenance.json").exists():
        return
    _check_data(experiment, data)
    if not parts(experiment):
        return
    m, t = experiment.model, experiment.training
    count(experiment.dims(data.vocab_size), m.specs, m.tie_embeddings, t.seq_len)
    check(experiment, seed, data.vocab_size, lambda: first_batch(data, experiment, seed))


def _check_data(experiment: Experiment, data: Dataset) -> None:
    """What an imported corpus or tokenizer made: shards whose name changes with the text, and ids
    that the model has an embedding for."""
    corpus, tokenizer = experiment.data.corpus, experiment.data.tokenizer
    with named(corpus):
        if _imported(corpus):
            contract_training.fingerprint_is_a_name_for_the_text(Case(corpus.entry, corpus.params))
    with named(tokenizer):
        for ids in (data.train, data.val) if _imported(tokenizer) else ():
            most = max((int(part.max()) for part in _pieces(ids)), default=0)
            size = data.vocab_size
            require(most < size, f"it gives the id {most}, but vocab_size is {size}")


def _pieces(ids: Any) -> Iterator[Any]:
    return (ids[start : start + (1 << 22)] for start in range(0, len(ids), 1 << 22))


def first_batch(data: Dataset, experiment: Experiment, seed: int) -> Tensor:
    """`(B, T+1)`: as many sequences of the first batch as are cheap."""
    t = experiment.training
    count = min(t.global_batch_size, max(1, TOKENS // t.seq_len))
    batch = data.batch(0, seed=seed, seq_len=t.seq_len, global_batch_size=t.global_batch_size)
    return torch.from_numpy(batch[:count])


def cases(file: str, words: Sequence[str]) -> list[Case]:
    """What `run.py check FILE WORDS` checks; see components/contract_report.py.

    Raises:
        UserError: no such file, it registers nothing, or a word is wrong.
    """
    if not file.endswith(".py"):
        experiment = loader.load(file, words)
        m, t = experiment.model, experiment.training
        specs = [*m.specs.values(), t.optimizer, t.schedule, t.objective]
        d = experiment.data
        specs += [s for s in (d.corpus, *d.filters, d.tokenizer) if _imported(s)]
        return contract_report.of_specs(specs, m.specs)
    before = set(registry.entries())
    registry.load_file(Path(file).expanduser())
    path = str(Path(file).expanduser().resolve())
    added = [e for e in registry.entries() if e not in before or faults.file_of(e) == path]
    if not added:
        raise UserError(f"{file}: registers no component; put @register(kind, name) above a class")
    mark = Mark("command line")
    return contract_report.cases(added, words, lambda text: loader.override_value(text, mark))
