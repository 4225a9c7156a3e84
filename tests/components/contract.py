"""What every component promises, as plain functions that any registered one can be put through.

    for check, case in checks(registry.entries()):
        check(case)

`cases` puts an entry into a small decoder (or, for what trains it, beside one) and `CONTRACT` lists
the promises of its kind. Nothing here knows a component by its name, so that a third party's is
held to the same; a few settings that the defaults don't reach are added in `FURTHER`.
"""

from __future__ import annotations

import inspect
import itertools
import re
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from components import registry
from components.decoder import Decoder, count
from components.dims import Dims
from components.registry import Entry, Slot, Spec, UserError

LENGTH = 70  # more than one block of queries of the CPU's attention
DIMS = Dims(d_model=32, n_layers=2, n_heads=4, head_dim=8, max_seq_len=LENGTH, vocab_size=61)
BASE = {
    "norm": "layernorm",
    "position": "learned",
    "mixer": "attention",
    "ffn": "mlp",
    "block": "pre",
    "init": "fan_in",
}
MODEL_KINDS = ("activation", "block", "ffn", "mixer", "norm", "position")
SOURCED = (*MODEL_KINDS, "init", "optimizer")  # kinds that come from papers
UNSOURCED = ("none", "identity")  # names of what is left out

PLAIN_STACK = {"norm": "none", "position": "none", "ffn": "none", "block": "plain"}
FURTHER: list[dict[str, Any]] = [
    {"mixer": {"name": "attention", "n_kv_heads": 1}},
    {"mixer": {"name": "attention", "n_kv_heads": 2}, "position": "alibi"},
    {"mixer": {"name": "attention", "n_kv_heads": 2, "qk_norm": True}, "position": "rotary"},
    {"mixer": {"name": "attention", "qk_norm": True}, "norm": "rmsnorm"},
    {"mixer": {"name": "attention", "window": 5}, "position": "rotary"},
    {"mixer": {"name": "attention", "window": 66}, "position": "alibi"},
    {"mixer": {"name": "attention", "bias": True}, "ffn": {"name": "mlp", "bias": True}},
    {"mixer": {"name": "lstm", "project": False}, **PLAIN_STACK},
    {"mixer": {"name": "lstm", "hidden": 24}, "block": "sandwich", "position": "none"},
    {"mixer": "lstm", "ffn": "none", "block": "parallel"},
    {"norm": {"name": "layernorm", "bias": False}, "block": "post", "ffn": "swiglu"},
]


@dataclass(frozen=True)
class Case:
    """One component with its parameters, and the small model that it stands in."""

    entry: Entry
    params: dict[str, Any] = field(default_factory=dict)
    around: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        settings = {**{k: v for k, v in self.around.items() if k != self.entry.kind}, **self.params}
        return "-".join([self.entry.kind, self.entry.name, *map(_short, settings.items())])

    @cached_property
    def specs(self) -> dict[str, Spec]:
        """A Spec for each part of the decoder."""
        parts = {**BASE, **self.around}
        chosen = {"name": self.entry.name, **self.params}
        if self.entry.kind == "activation":
            parts["ffn"] = {"name": "mlp", "activation": chosen}
        elif self.entry.kind in parts:
            parts[self.entry.kind] = chosen
        return {kind: registry.spec(kind, value) for kind, value in parts.items()}

    def component(self) -> Any:
        """The component by itself, for kinds that need nothing of a model."""
        return registry.build(self.entry.kind, {"name": self.entry.name, **self.params})

    def decoder(self, seed: int = 0) -> Decoder:
        """The small model with its initial values, in evaluation."""
        return Decoder(DIMS, self.specs, tie_embeddings=True).initialise(seed).eval()


def _short(item: tuple[str, Any]) -> str:
    name, value = item
    if isinstance(value, dict):
        return "-".join([value["name"], *(_short(i) for i in value.items() if i[0] != "name")])
    return f"{name}={value}"


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    """`(batch, length)` token ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(DIMS.vocab_size, (batch, length), generator=generator)


def logits(model: Decoder, ids: Tensor, caches: Any = None) -> Tensor:
    """`(B, T)` -> `(B, T, V)`."""
    return model.logits(model(ids, caches))


def gradients(model: Decoder) -> dict[str, Tensor | None]:
    """Of a loss in which every logit counts differently."""
    out = logits(model, tokens())
    weights = torch.linspace(-1, 1, out.numel()).view_as(out).sin()
    (out.log_softmax(-1) * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


# --- promises of all kinds ---------------------------------------------------------------------


def has_a_one_line_summary(case: Case) -> None:
    summary = case.entry.summary
    assert summary.endswith((".", ":")), f"{case.entry.source}: {summary!r}"
    assert len(summary) <= 100


def says_where_it_comes_from(case: Case) -> None:
    """A paper in the docstring: an arXiv number, or a year."""
    if case.entry.name in UNSOURCED and case.entry.kind != "position":
        return
    text = inspect.getdoc(case.entry.cls) or ""
    assert re.search(r"\b\d{4}\.\d{4,5}\b|\b(19|20)\d\d\b", text), case.entry.source


# --- promises of the parts of a model ----------------------------------------------------------


@torch.no_grad()
def maps_tokens_to_finite_logits_of_the_right_shape(case: Case) -> None:
    out = logits(case.decoder(), tokens(2))
    assert out.shape == (2, LENGTH, DIMS.vocab_size)
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert out.std() > 1e-3


@torch.no_grad()
def is_causal(case: Case) -> None:
    """Exactly: no output before a changed token differs in any bit; some output after it does."""
    model, ids = case.decoder(), tokens(1)
    before = logits(model, ids)
    for place in (1, LENGTH // 2, LENGTH - 1):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % DIMS.vocab_size
        after = logits(model, changed)
        assert torch.equal(after[:, :place], before[:, :place]), f"token {place} is seen earlier"
        assert not torch.equal(after[:, place:], before[:, place:])


@torch.no_grad()
def cached_forward_equals_the_whole_one(case: Case) -> None:
    model, ids = case.decoder(), tokens(2)
    whole = logits(model, ids)
    for lengths in ([1] * LENGTH, [40, 1, 29], [3, 64, 3]):
        caches = model.new_caches(2, LENGTH)
        pieces = [logits(model, piece, caches) for piece in ids.split(lengths, dim=1)]
        assert caches.filled == LENGTH
        torch.testing.assert_close(torch.cat(pieces, dim=1), whole, atol=2e-5, rtol=1e-4)


def every_parameter_gets_a_gradient(case: Case) -> None:
    found = gradients(case.decoder())
    missing = [name for name, grad in found.items() if grad is None or not grad.any()]
    assert not missing, f"not trained: {missing}"
    assert all(grad is not None and grad.isfinite().all() for grad in found.values())


@torch.no_grad()
def bf16_autocast_stays_close_to_fp32(case: Case) -> None:
    model, ids = case.decoder(), tokens(2)
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model, ids).float()
    error = (rough - exact).norm() / exact.norm()
    assert error < 0.03, f"relative error {error:.3f}"


def counts_on_the_meta_device_are_the_real_ones(case: Case) -> None:
    counts = count(DIMS, case.specs, tie_embeddings=True, seq_len=16)
    real = {name: p.numel() for name, p in case.decoder().named_parameters()}
    assert counts.by_name == real
    assert counts.parameters == sum(real.values())
    assert counts.flops_per_token > 6 * DIMS.d_model * DIMS.vocab_size  # the output layer alone


def a_seed_decides_every_initial_value(case: Case) -> None:
    first, again, other = (dict(case.decoder(s).named_parameters()) for s in (0, 0, 1))
    for name, value in first.items():
        assert torch.equal(value, again[name]), f"{name} differs at the same seed"
        if value.ndim >= 2:
            assert not torch.equal(value, other[name]), f"{name} is the same at another seed"


def shared_parameters_start_as_in_the_base(case: Case) -> None:
    """Name and shape alike: then the initial numbers are too, which makes variants pairs."""
    base = dict(Case(registry.get("norm", "layernorm")).decoder().named_parameters())
    mine = dict(case.decoder().named_parameters())
    shared = [n for n in mine.keys() & base.keys() if mine[n].shape == base[n].shape]
    assert "tok_emb.weight" in shared
    for name in shared:
        assert torch.equal(mine[name], base[name]), name


def every_parameter_of_the_schema_acts(case: Case) -> None:
    """Each keyword changes names, shapes, logits or gradients at some other value."""
    no_dead_parameter(case, _model_effect)


def _model_effect(case: Case) -> list[Any]:
    for kind, spec in case.specs.items():
        check = getattr(spec.entry.cls, "check", None)
        if check and list(check(DIMS, dict(spec.params))):
            raise UserError(f"{kind} does not fit these dimensions")
    model = case.decoder()
    found = gradients(model)
    names = {name: p.shape for name, p in model.named_parameters()}
    return [names, logits(model, tokens()), *(found[name] for name in sorted(found))]


# --- promises of what trains a model -----------------------------------------------------------


def factor_warms_up_linearly_and_stays_within_bounds(case: Case) -> None:
    for steps, warmup in itertools.product((1, 2, 7, 1000), (0.0, 0.1, 1.0)):
        params = {"warmup_fraction": warmup} if "warmup_fraction" in _keys(case) else {}
        schedule = registry.build(case.entry.kind, {"name": case.entry.name, **params})
        factors = [schedule.factor(step, steps) for step in range(steps)]
        assert factors[0] > 0
        assert all(0 <= f <= 1 for f in factors)
        if params:
            n = round(warmup * steps)
            torch.testing.assert_close(factors[:n], [(i + 1) / n for i in range(n)])


def factor_ends_at_the_least_ratio(case: Case) -> None:
    if "min_lr_ratio" not in _keys(case):
        return
    for ratio in (0.0, 0.1, 1.0):
        spec = {"name": case.entry.name, "min_lr_ratio": ratio, "warmup_fraction": 0.1}
        factors = [registry.build(case.entry.kind, spec).factor(s, 500) for s in range(500)]
        assert abs(factors[-1] - ratio) < 1e-12
        assert max(factors) == 1.0
        falling = itertools.pairwise(factors[50:])
        assert all(later <= earlier + 1e-12 for earlier, later in falling)


def every_schedule_parameter_acts(case: Case) -> None:
    no_dead_parameter(case, lambda c: [[c.component().factor(s, 100) for s in range(100)]])


class _Quadratic(nn.Module):
    """|W|² + |b|²: a matrix and a bias, each with its least value at zero."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self) -> Tensor:
        return self.weight.square().sum() + self.bias.square().sum()


def _steps(case: Case, n: int, lr: float = 0.01, still: bool = False) -> _Quadratic:
    """The quadratic after n steps; `still`: with gradients of zero."""
    model = _Quadratic()
    optimizer = case.component().build(model, lr)
    for _ in range(n):
        optimizer.zero_grad()
        (model() * (0.0 if still else 1.0)).backward()
        optimizer.step()
    return model


def a_step_lowers_a_quadratic(case: Case) -> None:
    start = _Quadratic()().item()
    assert _steps(case, 1)().item() < start
    assert _steps(case, 20)().item() < 0.95 * start


def weight_decay_is_on_matrices_only(case: Case) -> None:
    if "weight_decay" not in _keys(case):
        return
    decayed = Case(case.entry, {**case.params, "weight_decay": 0.5})
    before, after = _Quadratic(), _steps(decayed, 1, still=True)
    assert after.weight.norm() < before.weight.norm()
    assert torch.equal(after.bias, before.bias)


def every_optimizer_parameter_acts(case: Case) -> None:
    no_dead_parameter(case, lambda c: list(_steps(c, 4).parameters()))


def initial_values_are_finite_and_decided_by_the_seed(case: Case) -> None:
    for parameter in case.decoder().parameters():
        assert parameter.isfinite().all()
    a_seed_decides_every_initial_value(case)


def every_init_parameter_acts(case: Case) -> None:
    no_dead_parameter(case, lambda c: list(c.decoder().parameters()))


def _loss_and_gradient(case: Case, targets: Tensor) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=True)
    weight = torch.randn(11, 8, generator=generator, requires_grad=True)
    loss = case.component()(hidden, weight, targets)
    return [loss, *torch.autograd.grad(loss, [hidden, weight])]


def objective_is_a_sum_over_targets(case: Case) -> None:
    """Of two halves is that of the whole, and targets of -100 add nothing."""
    targets = torch.arange(20) % 11
    first, last = (targets.clone() for _ in range(2))
    first[10:], last[:10] = -100, -100
    parts = [_loss_and_gradient(case, t) for t in (first, last)]
    for whole, a, b in zip(_loss_and_gradient(case, targets), *parts, strict=True):
        assert whole.any()
        torch.testing.assert_close(whole, a + b, rtol=1e-4, atol=1e-5)


def every_objective_parameter_acts(case: Case) -> None:
    no_dead_parameter(case, lambda c: _loss_and_gradient(c, torch.arange(20) % 11))


# --- dead parameters ---------------------------------------------------------------------------


def _keys(case: Case) -> Iterable[str]:
    return case.entry.schema.model_fields


def no_dead_parameter(case: Case, effect: Callable[[Case], list[Any]]) -> None:
    """Fails where a parameter of the schema changes nothing at any other value tried.

    A parameter for which no other valid value is found (a required string, say) is let through.
    """
    usual = effect(case)
    for key, info in case.entry.schema.model_fields.items():
        now = case.params.get(key, info.default)
        tried = 0
        for value in _others(info.annotation, info.metadata, now):
            try:
                changed = effect(Case(case.entry, {**case.params, key: value}, case.around))
            except UserError:
                continue
            tried += 1
            if _differ(usual, changed):
                break
        else:
            assert not tried, f"{case.entry.source}: '{key}' is accepted and changes nothing"


def _others(annotation: Any, metadata: Iterable[Any], now: Any) -> Iterator[Any]:
    """Values of a type that are not `now`; the schema refuses those out of range."""
    slot = next((m for m in metadata if isinstance(m, Slot)), None)
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if slot is not None:
        yield from (name for name in registry.names(slot.kind) if name != str(now))
    elif origin is typing.Annotated:
        yield from _others(inner[0], inner[1:], now)
    elif origin is typing.Literal:
        yield from (value for value in inner if value != now)
    elif origin is tuple and isinstance(now, tuple):
        for place, kind in enumerate(inner[: len(now)]):
            for value in _others(kind, (), now[place]):
                yield [*now[:place], value, *now[place + 1 :]]
    elif inner:  # a union
        for kind in inner:
            yield from _others(kind, (), now)
    elif annotation is bool:
        yield not now
    elif annotation is int:
        yield from ({1, 2, 3, 9, (now or 4) + 1, 2 * (now or 4)} - {now})
    elif annotation is float:
        usual = now or 0.0
        yield from ({0.5, 0.9, 2.0, usual / 2, usual * 2, usual + 0.25, usual * 100} - {now})


def _differ(one: list[Any], other: list[Any]) -> bool:
    if len(one) != len(other):
        return True
    for a, b in zip(one, other, strict=True):
        same = torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        if not same:
            return True
    return False


# --- which promises are whose ------------------------------------------------------------------

Check = Callable[[Case], None]

MODEL_CONTRACT: tuple[Check, ...] = (
    maps_tokens_to_finite_logits_of_the_right_shape,
    is_causal,
    cached_forward_equals_the_whole_one,
    every_parameter_gets_a_gradient,
    bf16_autocast_stays_close_to_fp32,
    counts_on_the_meta_device_are_the_real_ones,
    a_seed_decides_every_initial_value,
    shared_parameters_start_as_in_the_base,
    every_parameter_of_the_schema_acts,
)

CONTRACT: dict[str, tuple[Check, ...]] = {
    **dict.fromkeys(MODEL_KINDS, MODEL_CONTRACT),
    "schedule": (
        factor_warms_up_linearly_and_stays_within_bounds,
        factor_ends_at_the_least_ratio,
        every_schedule_parameter_acts,
    ),
    "optimizer": (
        a_step_lowers_a_quadratic,
        weight_decay_is_on_matrices_only,
        every_optimizer_parameter_acts,
    ),
    "init": (initial_values_are_finite_and_decided_by_the_seed, every_init_parameter_acts),
    "objective": (objective_is_a_sum_over_targets, every_objective_parameter_acts),
}


def cases(entries: Iterable[Entry]) -> Iterator[Case]:
    """Each entry as it stands, and the further settings of those that are among them."""
    listed = list(entries)
    yield from (Case(entry) for entry in listed)
    for around in FURTHER:
        kind = next(iter(around))
        chosen = around[kind] if isinstance(around[kind], dict) else {"name": around[kind]}
        entry = next((e for e in listed if (e.kind, e.name) == (kind, chosen["name"])), None)
        if entry is not None:
            yield Case(entry, {k: v for k, v in chosen.items() if k != "name"}, around)


def checks(entries: Iterable[Entry]) -> Iterator[tuple[Check, Case]]:
    """Every promise with every case that it binds."""
    for case in cases(entries):
        if not case.params and not case.around:
            yield has_a_one_line_summary, case
            if case.entry.kind in SOURCED:
                yield says_where_it_comes_from, case
        for check in CONTRACT.get(case.entry.kind, ()):
            yield check, case
