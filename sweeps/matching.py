"""Matching: one width of each variant, solved so that its size or its cost is the baseline's.

`match: params` compares all trained parameters, embeddings and a learned position table included:
a variant without the table gets that many more in its feed-forward layers. `match: flops` compares
training FLOPs per token at the variant's own sequence length. `match: time` compares the measured
time of a training step: see probe.py.

The free width is `model.ffn.hidden`. A variant that sets it itself, or has no feed-forward layer,
is matched in `model.mixer.hidden` where its mixer has one (lstm), and otherwise left as it is. A
width is a multiple of the component's `multiple_of`, or any whole number where that would miss by
more than 1%. A variant that no width brings nearer, or that has too much at the narrowest, stays
as it is written, and so keeps its runs. What is left of the difference is printed, never hidden.

Sizes and FLOPs are counted on models without numbers, on torch's meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from components.registry import Spec
from experiments.schema import Experiment
from sweeps.design import Sweep, Variant

if TYPE_CHECKING:
    from components.decoder import Counts
    from components.dims import Dims
    from sweeps.probe import Probes

TOLERANCE = 0.01
WIDEST = 1 << 24


@dataclass(frozen=True)
class Sized:
    """A variant as it will run, and what it is made of.

    Attributes:
        variant: its experiment has the solved width.
        mismatch: signed, relative to the baseline, in the matched quantity; None without `match`.
        solved: the dotted path and value of the width that was solved, if one was.
    """

    variant: Variant
    counts: Counts
    mismatch: float | None
    solved: tuple[str, int] | None = None


def sized(sweep: Sweep, cache: Path, probes: Probes) -> tuple[Sized, ...]:
    """Every variant counted, and matched to the baseline where the sweep asks for it.

    `cache` is where prepared data lies, which some tokenizers' vocabulary is read from; `probes`
    are for `match: time` alone.

    Raises:
        UserError: as `probe.timed`.
    """
    if sweep.match == "time":
        from sweeps.probe import timed

        return timed(sweep, cache, probes)

    def counts(experiment: Experiment) -> Counts:
        return measure(experiment, cache, flops=True)

    if sweep.match is None:
        return tuple(Sized(v, counts(v.experiment), None) for v in sweep.variants)
    goal = _quantity(counts(sweep.baseline.experiment), sweep.match)
    rows = []
    for variant in sweep.variants:
        solved = None
        if variant is not sweep.baseline:
            solved = solve(variant, goal, sweep.match, cache)
        if solved is not None:
            variant = replace(variant, experiment=with_width(variant.experiment, *solved))
        found = counts(variant.experiment)
        mismatch = _quantity(found, sweep.match) / goal - 1
        rows.append(Sized(variant, found, mismatch, solved))
    return tuple(rows)


def solve(variant: Variant, goal: float, match: str, cache: Path) -> tuple[str, int] | None:
    """The path and value of the width that comes nearest to `goal`; None if none comes nearer."""
    experiment = variant.experiment
    path = free_width(variant)
    if path is None:
        return None
    params = experiment.model.specs[path.split(".")[1]].params

    def parameters(width: int | None) -> float:
        changed = experiment if width is None else with_width(experiment, path, width)
        return measure(changed, cache, flops=False).parameters

    def value(width: int | None) -> float:
        if match == "params":
            return parameters(width)
        changed = experiment if width is None else with_width(experiment, path, width)
        return measure(changed, cache, flops=True).flops_per_token

    tried: dict[int | None, float] = {None: value(None)}
    for multiple in dict.fromkeys((params.get("multiple_of", 1), 1)):
        for width in _candidates(tried, goal, parameters, match, multiple):
            tried[width] = value(width)
        best = min(tried, key=lambda w: abs(tried[w] - goal))  # None, the first, wins a tie
        if abs(tried[best] / goal - 1) <= TOLERANCE:
            break
    return None if best is None else (path, best)


def _candidates(
    tried: dict[int | None, float],
    goal: float,
    parameters: Callable[[int | None], float],
    match: str,
    multiple: int,
) -> Iterator[int]:
    """Widths to try, each nearer, until the next one has been tried.

    Parameters are counted in milliseconds, FLOPs are not: a weight of a matrix product costs 6 of
    them per token, a ratio that each width tried corrects.
    """
    own = parameters(None)
    ratio = 1.0 if match == "params" else 6.0
    for _ in range(6):
        wanted = own + (goal - tried[None]) / ratio
        width = nearest_width(parameters, wanted, multiple)
        if width is None or width in tried or parameters(width) == own:
            return
        yield width
        ratio = (tried[width] - tried[None]) / (parameters(width) - own) or ratio


def nearest_width(parameters: Callable[[int], float], wanted: float, multiple: int) -> int | None:
    """The multiple whose parameter count, which grows with width, comes nearest to `wanted`.

    None if the count does not grow with it, or the narrowest is too many already.
    """
    low, high = 1, 2
    if parameters(multiple) >= wanted:
        return None
    while parameters(high * multiple) < wanted:
        if high > WIDEST or parameters(high * multiple) <= parameters(low * multiple):
            return None
        low, high = high, high * 2
    while high - low > 1:  # straight lines land at once; curves take a few steps more
        below, above = parameters(low * multiple), parameters(high * multiple)
        guess = low + round((wanted - below) / (above - below) * (high - low))
        guess = min(max(guess, low + 1), high - 1)
        if parameters(guess * multiple) <= wanted:
            low = guess
        else:
            high = guess
    return min((low * multiple, high * multiple), key=lambda w: abs(parameters(w) - wanted))


def free_width(variant: Variant) -> str | None:
    """The dotted path of the width that may be solved, if the variant leaves one free."""
    for slot in ("ffn", "mixer"):
        path = f"model.{slot}.hidden"
        spec = variant.experiment.model.specs[slot]
        whole = variant.changes.get(f"model.{slot}")
        written = path in variant.changes or (isinstance(whole, dict) and "hidden" in whole)
        if "hidden" not in spec.params or written:
            continue
        refused = {where for where, _ in with_width(variant.experiment, path, 1).problems()}
        if path not in refused:
            return path
    return None


def with_width(experiment: Experiment, path: str, width: int) -> Experiment:
    """The same experiment with one width set."""
    slot = path.split(".")[1]
    spec = experiment.model.specs[slot]
    spec = replace(spec, params={**spec.params, "hidden": width})
    model = experiment.model.model_copy(update={slot: spec})
    return experiment.model_copy(update={"model": model})


def measure(experiment: Experiment, cache: Path, *, flops: bool = True) -> Counts:
    """What the experiment's model has, and what a token of its training costs."""
    dims = experiment.dims(vocabulary(experiment, cache))
    m = experiment.model
    seq_len = experiment.training.seq_len
    return _count(dims, tuple(m.specs.items()), m.tie_embeddings, seq_len, flops)


def vocabulary(experiment: Experiment, cache: Path) -> int:
    """Tokens in the vocabulary, before any data is prepared where its tokenizer allows."""
    from experiments.data import vocab_size

    return vocab_size(experiment.data, cache)


@lru_cache(maxsize=1024)
def _count(
    dims: Dims, specs: tuple[tuple[str, Spec], ...], tie: bool, seq_len: int, flops: bool
) -> Counts:
    from components.decoder import count

    return count(dims, dict(specs), tie, seq_len, flops)


def _quantity(counts: Counts, match: str) -> float:
    return counts.parameters if match == "params" else counts.flops_per_token
