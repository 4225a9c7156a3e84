"""The contract of what trains a model and of what feeds it; see contract.py.

schedule, optimizer, init, objective    how a model is trained
corpus, filter, tokenizer               what it reads
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from components import faults, promises_training, registry
from components.contract import (
    Case,
    Check,
    a_seed_decides_every_initial_value,
)
from components.contract_parameters import keys, no_dead_parameter
from components.decoder import Decoder
from components.faults import require

SOME = 200  # documents of a corpus that are looked at
TEXTS = ("the cat sat\n", "on  a mat. ", "Ärger, naïve café — 12,345 ½", "a", "the cat sat\n")


def having(case: Case, **params: Any) -> Case:
    """The case with those of the parameters that its schema has."""
    return Case(case.entry, {**case.params, **{k: v for k, v in params.items() if k in keys(case)}})


# --- schedules -----------------------------------------------------------------------------------


def factors_are_finite_and_not_negative(case: Case) -> None:
    """factor(step, steps) is a finite number of 0 or more, at 1 step and at many."""
    for steps in (1, 2, 7, 1000):
        promises_training.factors_are_rates(case.component(), steps)


def factor_warms_up_linearly_and_stays_within_bounds(case: Case) -> None:
    """Factors are at most 1, the first is above 0, and `warmup_fraction` is a straight line up."""
    for steps, warmup in itertools.product((1, 2, 7, 1000), (0.0, 0.1, 1.0)):
        schedule = having(case, warmup_fraction=warmup).component()
        factors = [schedule.factor(step, steps) for step in range(steps)]
        require(factors[0] > 0, f"factor(0, {steps}) is 0: the first step would do nothing")
        require(max(factors) <= 1, f"a factor is {max(factors):g}: training.lr is the peak")
        if "warmup_fraction" in keys(case):
            n = round(warmup * steps)
            line = [(i + 1) / n for i in range(n)]
            apart = [abs(a - b) for a, b in zip(factors, line, strict=False)]
            require(not apart or max(apart) < 1e-6, f"{n} steps of warm-up are no straight line")


def factor_ends_at_the_least_ratio(case: Case) -> None:
    """With `min_lr_ratio` the last factor is that, and factors never rise after the warm-up."""
    if "min_lr_ratio" not in keys(case):
        return
    for ratio in (0.0, 0.1, 1.0):
        schedule = having(case, min_lr_ratio=ratio, warmup_fraction=0.1).component()
        factors = [schedule.factor(step, 500) for step in range(500)]
        last = factors[-1]
        require(abs(last - ratio) < 1e-12, f"the last factor is {last:g}, min_lr_ratio {ratio:g}")
        require(max(factors) == 1.0, f"the greatest factor is {max(factors):g}, not 1")
        falling = itertools.pairwise(factors[50:])
        require(all(b <= a + 1e-12 for a, b in falling), "a factor rises after the warm-up")


def every_schedule_parameter_acts(case: Case) -> None:
    """Each keyword changes a factor at some other value."""
    no_dead_parameter(case, lambda c: [[c.component().factor(s, 100) for s in range(100)]])


# --- optimizers ----------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """|W|² + |b|²: a matrix and a bias, each with its least value at zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self) -> Tensor:
        return self.weight.square().sum() + self.bias.square().sum()


def trained(case: Case, steps: int, lr: float = 0.01, still: bool = False) -> Quadratic:
    """The quadratic after some steps; `still`: with gradients of zero."""
    model = Quadratic()
    optimizer = case.component().build(model, lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model() * (0.0 if still else 1.0)).backward()
        optimizer.step()
    return model


def plain_model() -> Decoder:
    """A small decoder of built-in parts."""
    return Case(registry.get("norm", "layernorm")).decoder().train()


def rate_and_state_survive_a_checkpoint(case: Case) -> None:
    """After load_state_dict(state_dict()) a rate of 0 moves nothing, and resuming is going on."""
    promises_training.keeps_its_state(case.component().build, plain_model)


def a_step_lowers_a_quadratic(case: Case) -> None:
    """Steps lower a quadratic, the first already, and 20 at a rate of 0.01 by 5%."""
    start, first, last = Quadratic()().item(), trained(case, 1)().item(), trained(case, 20)().item()
    require(first < start, f"one step takes it from {start:.4g} to {first:.4g}")
    require(last < 0.95 * start, f"20 steps take it from {start:.4g} to {last:.4g}")


def every_parameter_is_stepped(case: Case) -> None:
    """Every parameter of a model moves."""
    model = plain_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = case.component().build(model, 0.01)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) / 8
    optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    require(not still, f"a step leaves {', '.join(still[:3])} as it was")


def weight_decay_is_on_matrices_only(case: Case) -> None:
    """`weight_decay` shrinks matrices, and leaves biases and norms alone."""
    if "weight_decay" not in keys(case):
        return
    before, after = Quadratic(), trained(having(case, weight_decay=0.5), 1, still=True)
    require(after.weight.norm() < before.weight.norm(), "it does not shrink a matrix")
    require(torch.equal(after.bias, before.bias), "it changes a bias")


def every_optimizer_parameter_acts(case: Case) -> None:
    """Each keyword changes what four steps do at some other value."""
    no_dead_parameter(case, lambda c: list(trained(c, 4).parameters()))


# --- initial values and objectives ---------------------------------------------------------------


def initial_values_are_finite_and_decided_by_the_seed(case: Case) -> None:
    """Initial values are finite, and the seed alone decides them."""
    for name, parameter in case.decoder().named_parameters():
        require(parameter.isfinite().all(), f"{name} is not finite")
    a_seed_decides_every_initial_value(case)


def every_init_parameter_acts(case: Case) -> None:
    """Each keyword changes an initial value at some other value."""
    no_dead_parameter(case, lambda c: list(c.decoder().parameters()))


def _hidden() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    return hidden, weight, torch.arange(20) % 11


def _loss_and_gradient(case: Case, targets: Tensor) -> list[Any]:
    hidden, weight, _ = _hidden()
    value = promises_training.loss(case.component(), hidden, weight, targets)
    return [value, *torch.autograd.grad(value, [hidden, weight])]


def objective_is_a_finite_sum_over_targets(case: Case) -> None:
    """The loss is a finite scalar, a sum over targets, with gradients."""
    promises_training.loss_is_a_sum(case.component(), *_hidden())


def targets_of_minus_100_add_nothing(case: Case) -> None:
    """Targets of -100 add nothing to loss and gradients."""
    targets = _hidden()[2]
    first, last = targets.clone(), targets.clone()
    first[10:], last[:10] = -100, -100
    parts = [_loss_and_gradient(case, t) for t in (first, last)]
    for whole, a, b in zip(_loss_and_gradient(case, targets), *parts, strict=True):
        require(whole.any(), "a gradient is zero everywhere")
        close = torch.allclose(whole, a + b, rtol=1e-4, atol=1e-5)
        require(close, "the losses of two halves, the other half -100, are not that of all")


def every_objective_parameter_acts(case: Case) -> None:
    """Each keyword changes loss or gradients at some other value."""
    no_dead_parameter(case, lambda c: _loss_and_gradient(c, torch.arange(20) % 11))


# --- text ----------------------------------------------------------------------------------------


def documents_are_text_and_always_the_same(case: Case) -> None:
    """documents() gives str, the same in the same order each time."""
    corpus = case.component()
    first, again = ([*itertools.islice(c.documents(), SOME)] for c in (corpus, case.component()))
    require(first, "it has no documents")
    texts_only("documents()", first)
    require(first == again, "a second pass gives other documents, or another order")


def fingerprint_is_a_name_for_the_text(case: Case) -> None:
    """fingerprint() is a str, not empty, the same in every object."""
    first, again = (case.component().fingerprint() for _ in range(2))
    good = isinstance(first, str) and (first or case.entry.kind == "tokenizer")
    require(good, f"fingerprint() is {first!r}: changed text would pass for the same")
    require(first == again, "fingerprint() differs between two objects of the same parameters")


def keeps_text_in_order(case: Case) -> None:
    """A filter takes an iterator of str, which may be empty, and yields str, the same each time."""
    keep = case.component()
    first, again = ([*keep(iter(TEXTS * 3))] for _ in range(2))
    texts_only("a filter", first)
    require(
        first == again, "a second pass keeps other documents: what it remembers lives in the call"
    )
    require([*keep(iter(()))] == [], "of no documents it makes some")


def texts_only(what: str, found: list[Any]) -> None:
    """Raises Broken unless all are str."""
    other = [faults.described(item) for item in found if not isinstance(item, str)]
    require(not other, f"{what} gives {other[0] if other else None}, not a str")


def _learned(case: Case) -> Any:
    tokenizer = case.component()
    tokenizer.train(lambda: iter(TEXTS * 20))
    return tokenizer


def ids_are_numbers_below_the_vocabulary(case: Case) -> None:
    """encode gives numbers from 0 to below vocab_size, and never end_of_text."""
    tokenizer = _learned(case)
    size, end = tokenizer.vocab_size, tokenizer.end_of_text
    require(isinstance(size, int) and size > 0, f"vocab_size is {size!r}")
    require(isinstance(end, int) and 0 <= end < size, f"end_of_text is {end!r}, of {size} ids")
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        numbers = np.asarray(ids)
        require(numbers.dtype.kind in "ui", f"ids of {text!r} are {numbers.dtype}, not integers")
        inside = numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < size)
        require(inside, f"{text!r} has an id outside 0 … {size - 1}")
        require(end not in numbers, f"{text!r} has the id of end_of_text in it")


def decoding_gives_the_text_back(case: Case) -> None:
    """decode(encode(text)) is the text, and byte_lengths add up to its bytes."""
    tokenizer = _learned(case)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        lossy = tokenizer.unknown is not None and tokenizer.unknown in ids
        back = tokenizer.decode(ids)
        require(lossy or back == text, f"{text!r} comes back as {back!r}")
        summed, size = int(np.sum(tokenizer.byte_lengths(text, ids))), len(text.encode())
        require(summed == size, f"byte_lengths of {text!r} add up to {summed}, it has {size} bytes")


def what_is_learnt_is_saved(case: Case) -> None:
    """save, then load in another object, gives the same ids."""
    tokenizer, other = _learned(case), case.component()
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        other.load(Path(folder))
        for text in TEXTS:
            same = [*map(int, tokenizer.encode(text))] == [*map(int, other.encode(text))]
            require(same, f"{text!r} has other ids after save and load")


CONTRACT: dict[str, tuple[Check, ...]] = {
    "schedule": (
        factors_are_finite_and_not_negative,
        factor_warms_up_linearly_and_stays_within_bounds,
        factor_ends_at_the_least_ratio,
        every_schedule_parameter_acts,
    ),
    "optimizer": (
        rate_and_state_survive_a_checkpoint,
        a_step_lowers_a_quadratic,
        every_parameter_is_stepped,
        weight_decay_is_on_matrices_only,
        every_optimizer_parameter_acts,
    ),
    "init": (initial_values_are_finite_and_decided_by_the_seed, every_init_parameter_acts),
    "objective": (
        objective_is_a_finite_sum_over_targets,
        targets_of_minus_100_add_nothing,
        every_objective_parameter_acts,
    ),
    "corpus": (documents_are_text_and_always_the_same, fingerprint_is_a_name_for_the_text),
    "filter": (keeps_text_in_order,),
    "tokenizer": (
        ids_are_numbers_below_the_vocabulary,
        decoding_gives_the_text_back,
        what_is_learnt_is_saved,
        fingerprint_is_a_name_for_the_text,
    ),
}
