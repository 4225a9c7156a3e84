"""Before anything runs: does every row do something?

A setting that nothing reads, or that changes nothing at these sizes (a window as long as the text),
would be trained at every seed and reported as "no difference". Two rows that differ in the model
or the objective alone are therefore compared on the CPU, in full precision: names and shapes of
their parameters, then the logits and gradients of the first batch, and weights and buffers after
one step of the optimizer, bit for bit. Where logits would also be taken at a greater length
(evaluation.lengths, lm-eval), they are compared at it too. All of it alike: an error.

The first batch is that of the first seed, as many of its sequences as are cheap, or tokens drawn
evenly over the vocabulary where the text is not prepared yet. A model of more than LARGEST
parameters is compared as a copy of two layers: what differs there differs, what does not may yet
differ in the layers left out, and is said, not refused.

Every row with runs to do is also put through experiments/precheck.py, each distinct model once: a
mixer that sees the future would come out "better".
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from components.decoder import Decoder, skeleton
from components.registry import UserError
from experiments import data, loader, precheck
from experiments.model import build
from experiments.record import FINISHED, Run, id_parts
from experiments.schema import Experiment
from experiments.trainer import key
from sweeps import manifest, matching
from sweeps.design import Sweep

LONGEST = 4096  # tokens at which logits are compared beyond the training length
MANY = 20  # models, from which on it takes long enough to be announced


@dataclass(frozen=True)
class _Row:
    """One row of a manifest, and whether it has runs to do."""

    label: str
    waits: bool
    experiment: Experiment
    vocabulary: int

    @property
    def elsewhere(self) -> str:
        """Its science but for the model and the objective."""
        science = loader.dump(self.experiment, everything=False)
        science.pop("model")
        science["training"].pop("objective", None)
        return json.dumps(science, sort_keys=True)


def check(sweep: Sweep, record: Mapping[str, Any], root: Path, say: Callable[[str], None]) -> None:
    """Compares the rows of a sweep's manifest that have runs to do, and says what it can't tell.

    Raises:
        UserError: two rows do the same; names both and the setting, one line for each such pair.
    """
    rows = _rows(record, root)
    refuse(sweep, [row for row in rows if row.waits], root / "data", say)
    groups: dict[Any, list[_Row]] = defaultdict(list)
    for row in rows if any(row.waits for row in rows) else ():
        groups[row.elsewhere, _shapes(row.experiment, row.vocabulary)].append(row)
    alike = [group for group in groups.values() if len(group) > 1 and any(r.waits for r in group)]
    if (count := sum(map(len, alike))) > MANY:
        say(f"looking whether {count} models differ in what they compute")
    wrong: list[str] = []
    for group in alike:
        wrong += _same(sweep, group, root / "data", say)
    if wrong:
        raise UserError("\n".join(wrong))


def refuse(sweep: Sweep, rows: Sequence[_Row], cache: Path, say: Callable[[str], None]) -> None:
    """Refuses rows with a part that would spoil their numbers; see experiments/precheck.py.

    Raises:
        UserError: a line for each such component, with the first row that uses it.
    """
    seed, done = sweep.seeds[0], set[str]()
    wrong: dict[str, str] = {}
    for row in rows:

        def tokens(row: _Row = row) -> Tensor:
            return first_tokens(row.experiment, seed, row.vocabulary, cache)

        def hear(text: str, row: _Row = row) -> None:
            say(f"'{row.label}': {text}")

        try:
            precheck.check(row.experiment, seed, row.vocabulary, tokens, done, hear)
        except UserError as error:
            wrong.setdefault(str(error), row.label)
    if wrong:
        raise UserError("\n".join(f"{line} (row '{label}')" for line, label in wrong.items()))


def _rows(record: Mapping[str, Any], root: Path) -> list[_Row]:
    """A row for each experiment: neither tries of `tune` nor the same one again."""
    rows: dict[str, _Row] = {}
    for row in record["rows"]:
        first = next(iter(row["runs"].values()))
        identity = id_parts(first)[0]
        if row.get("tuned") or identity in rows:
            continue
        job = manifest.Job(first, 0, row["label"], row["experiment"])
        waits = any(Run(root, id).state not in FINISHED for id in row["runs"].values())
        experiment = manifest.experiment(job)
        vocabulary = matching.vocabulary(experiment, root / "data")
        rows[identity] = _Row(row["label"], waits, experiment, vocabulary)
    return list(rows.values())


def _same(
    sweep: Sweep, rows: Sequence[_Row], cache: Path, say: Callable[[str], None]
) -> Iterator[str]:
    """A line for each row that does the same as one before it; says what is not known."""
    seed = sweep.seeds[0]
    first: dict[str, _Row] = {}
    for row in rows:
        small = precheck.small(row.experiment, row.vocabulary)
        if small is None:
            say(f"not checked whether '{row.label}' does anything: its model is too large for it")
            continue
        try:
            tokens = first_tokens(small, seed, row.vocabulary, cache)
            found = fingerprint(small, seed, row.vocabulary, tokens)
        except Exception as error:  # of a component: its runs will tell it at length
            say(f"not checked whether '{row.label}' does anything: {type(error).__name__}: {error}")
            continue
        other = first.setdefault(found, row)
        if other is row or not (row.waits or other.waits):
            continue
        setting = "; ".join(_settings(other.experiment, row.experiment))
        alike = "same parameters, same first-batch logits, same first-step gradients"
        if small is not row.experiment:
            layers = small.model.n_layers
            say(f"'{row.label}' may do nothing: {setting} changes nothing against '{other.label}' "
                f"in a copy of {layers} layers ({alike})")  # fmt: skip
            continue
        mark = next(v.mark for v in sweep.variants if v.label == row.label)
        yield (
            f"{mark}: '{row.label}' does nothing: {setting} changes nothing against "
            f"'{other.label}' ({alike}); remove the row, or mend the component"
        )


def _settings(one: Experiment, other: Experiment) -> Iterator[str]:
    """`model.mixer.window: null → 512` for each setting in which two experiments differ."""
    before, after = (loader.flatten(loader.resolved(e)) for e in (one, other))
    for path in sorted({*before, *after}):
        if before.get(path) != after.get(path) and not loader.in_execution(path):
            values = (json.dumps(side.get(path), ensure_ascii=False) for side in (before, after))
            yield f"{path}: {' → '.join(values)}"


def _shapes(experiment: Experiment, vocabulary: int) -> tuple[tuple[str, torch.Size], ...]:
    m = experiment.model
    model = skeleton(experiment.dims(vocabulary), m.specs, m.tie_embeddings)
    return tuple((name, p.shape) for name, p in model.named_parameters())


def first_tokens(experiment: Experiment, seed: int, vocabulary: int, cache: Path) -> Tensor:
    """`(B, T+1)` of the first batch's sequences, or drawn where the text is not prepared."""
    t = experiment.training
    try:
        text = data.load(cache / data.cache_key(experiment.data))
        return precheck.first_batch(text, experiment, seed)
    except UserError:
        count = min(t.global_batch_size, max(1, precheck.TOKENS // t.seq_len))
        generator = torch.Generator().manual_seed(key(seed))
        tokens = torch.randint(vocabulary, (count, t.seq_len + 1), generator=generator)
        tokens[:, 7::16] = vocabulary - 1  # where tokenizers have their end of text
        return tokens


def fingerprint(experiment: Experiment, seed: int, vocabulary: int, tokens: Tensor) -> str:
    """A hash of all that a first step computes on `(B, T+1)` tokens, in training mode."""
    whole = hashlib.blake2b(digest_size=16)

    def add(name: str, value: Tensor | None) -> None:
        whole.update(name.encode())
        if value is not None:
            plain = value.detach().contiguous().flatten()
            whole.update(plain.view(torch.uint8).numpy().tobytes())

    t = experiment.training
    with torch.random.fork_rng(devices=[]):
        decoder = build(experiment, vocabulary, seed)
        optimizer = t.optimizer.build().build(decoder, t.lr)
        torch.manual_seed(key(seed, 0, 0))  # dropout
        hidden = decoder(tokens[:, :-1])
        targets = tokens[:, 1:].flatten()
        loss = t.objective.build()(hidden.flatten(0, 1), decoder.output_weight, targets)
        (loss / targets.numel()).backward()
        add("logits", decoder.logits(hidden))
        for name, parameter in decoder.named_parameters():
            add(name, parameter.grad)
        optimizer.step()
        for name, value in decoder.state_dict().items():  # buffers too, and a step's scale
            add(name, value)
        length = _longest(experiment, decoder)
        if length > tokens.shape[1] - 1:
            text = tokens.flatten().repeat(length // tokens.numel() + 1)[:length]
            with torch.no_grad():
                add("longer", decoder.eval().logits(decoder(text[None])))
    return whole.hexdigest()


def _longest(experiment: Experiment, decoder: Decoder) -> int:
    """The greatest length at which anything is measured, as far as the positions go."""
    e = experiment.evaluation
    lengths = [experiment.training.seq_len, *e.lengths]
    if e.tasks:
        lengths.append(e.max_length or experiment.max_seq_len)
    most = experiment.max_seq_len if decoder.position.limited else LONGEST
    return min(max(lengths), most)
