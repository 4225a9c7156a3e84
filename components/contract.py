"""What every component promises, as plain functions that any registered one can be put through.

    for check, case in checks(registry.entries()):
        check(case)                                  # returns, or raises Broken with the reason

`Case(entry, params, around)` is one component with its parameters in a small model: the parameters
as YAML would write them (those left out have their defaults), `around` the other parts of the model
where the usual ones won't do:

    Case(registry.get("mixer", "attention"), {"n_kv_heads": 2}, {"position": "rotary"})

Nothing here knows a component by its name, so that a third party's is held to the same; `FURTHER`
adds settings of built-in ones that their defaults don't reach. The first line of a check's
docstring is the promise in words. What trains a model, or feeds it, is in contract_training.py; the
report for a person, `run.py check`, in contract_report.py.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from components import faults, promises, registry
from components.contract_parameters import no_dead_parameter
from components.decoder import Decoder, count, skeleton
from components.dims import Dims
from components.faults import require
from components.layout import Layout
from components.registry import Entry, Spec, UserError

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
    params: Mapping[str, Any] = field(default_factory=dict)
    around: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.entry.kind, self.entry.name, *map(_short, self.settings.items())])

    @property
    def settings(self) -> dict[str, Any]:
        """What was given of the model around and of the component."""
        return {**{k: v for k, v in self.around.items() if k != self.entry.kind}, **self.params}

    def words(self) -> str:
        """The settings as the command line takes them: ` window=4 model.position=rotary`."""
        kinds = (k for k in self.settings if k not in self.params)
        names = {**{k: k for k in self.params}, **{k: f"model.{k}" for k in kinds}}
        plain = {k: registry.plain_value(v, False) for k, v in self.settings.items()}
        return "".join(f" {name}={plain[k]}" for k, name in names.items())

    @property
    def spec(self) -> Spec:
        """The component with its parameters, checked.

        Raises:
            UserError: a parameter is missing, unknown, or of another type.
        """
        return registry.spec(self.entry.kind, {"name": self.entry.name, **self.params})

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
        return self.spec.build()

    def decoder(self, seed: int = 0) -> Decoder:
        """The small model with its initial values, in evaluation."""
        model = skeleton(DIMS, self.specs, tie_embeddings=True).to_empty(device="cpu")
        with faults.blamed("while the model is built", self.specs.values()):
            model.fill_buffers()
            return model.initialise(seed).eval()

    def stirred(self) -> Decoder:
        """The small model, with noise on what begins constant: gates of zero hide what follows."""
        model = self.decoder()
        promises.stir(model)
        with torch.no_grad():
            return model if model(tokens(1)).isfinite().all() else self.decoder()


def _short(item: tuple[str, Any]) -> str:
    name, value = item
    if isinstance(value, Spec):
        value = value.dump(defaults=False)
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
    """Its docstring begins with one line of at most 100 characters, ended by a full stop."""
    summary = case.entry.summary
    require(summary, "it has no docstring")
    require(summary.endswith((".", ":")), f"the first line has no full stop: {summary!r}")
    require(len(summary) <= 100, f"the first line has {len(summary)} characters")


def says_where_it_comes_from(case: Case) -> None:
    """Its docstring names a source: an arXiv number, or a paper's year."""
    if case.entry.name in UNSOURCED and case.entry.kind != "position":
        return
    text = inspect.getdoc(case.entry.cls) or ""
    found = re.search(r"\b\d{4}\.\d{4,5}\b|\b(19|20)\d\d\b", text)
    require(found, "the docstring has neither an arXiv number nor a year")


# --- promises of the parts of a model ----------------------------------------------------------


def counts_on_the_meta_device_are_the_real_ones(case: Case) -> None:
    """It can be built and run on torch's meta device, where parameters and FLOPs are counted."""
    counts = count(DIMS, case.specs, tie_embeddings=True, seq_len=16)
    real = {name: p.numel() for name, p in case.decoder().named_parameters()}
    require(counts.by_name == real, "the meta device has other parameters than the real model")
    least = 6 * DIMS.d_model * DIMS.vocab_size  # the output layer alone
    require(counts.flops_per_token > least, "fewer FLOPs are counted than the output layer has")


@torch.no_grad()
def maps_tokens_to_finite_logits_of_the_right_shape(case: Case) -> None:
    """forward returns finite numbers of the shape and dtype that it is given."""
    model = case.decoder()
    with faults.watched(model, "in evaluation", case.specs.values()):
        out = logits(model, tokens(2))
    require(out.shape == (2, LENGTH, DIMS.vocab_size), f"logits have the shape {tuple(out.shape)}")
    require(out.dtype == torch.float32, f"logits are {out.dtype}, not torch.float32")
    require(out.isfinite().all(), "logits are not finite")
    require(out.std() > 1e-3, "logits are all the same")


@torch.no_grad()
def is_causal(case: Case) -> None:
    """No output depends on a later token, another sequence of its batch, or an earlier batch."""
    model, ids = case.stirred(), tokens(3)
    promises.keeps_sequences_apart(model, ids)
    other, places = promises.changed(ids, DIMS.vocab_size)
    after, before = model(other), model(ids)
    seen = not torch.equal(after[1, places[1] :], before[1, places[1] :])
    require(seen, "a changed token changes no output after it either")


def cached_forward_equals_the_whole_one(case: Case) -> None:
    """With a cache, tokens one by one or in pieces give what one complete pass gives."""
    model, ids = case.stirred(), tokens(2)
    for lengths in ([1] * LENGTH, [40, 1, 29], [3, 64, 3]):
        promises.caches_keep_what_they_are_given(model, ids, lengths, most=1e-4)


@torch.no_grad()
def selected_rows_of_a_cache_go_on_alone(case: Case) -> None:
    """A cache's select(rows, length), where there is one, gives a new cache with these rows."""
    model, ids = case.stirred(), tokens(2)
    caches = model.new_caches(2, LENGTH)
    model(ids[:, :40], caches)
    if not all(hasattr(layer, "select") for layer in caches.layers):
        return
    rows = torch.tensor([1, 0, 1])
    chosen = caches.select(rows, LENGTH)
    model(ids[:, 40:].flip(0), caches)  # what is added to the first does not reach the second
    out, whole = model(ids[rows][:, 40:], chosen), model(ids)[rows][:, 40:]
    error = float((out - whole).norm() / whole.norm())
    require(error < 1e-4, f"tokens behind a selected cache are {error:.1%} off a complete pass")


@torch.no_grad()
def takes_layout_only_where_texts_stay_apart(case: Case) -> None:
    """With takes_layout = True, texts that share a beginning in one row are scored as if apart."""
    model, ids = case.stirred(), tokens(2, 24)
    if not model.takes_layout:
        return
    ids[1, :10] = ids[0, :10]
    row = torch.cat([ids[0], ids[1, 10:]])[None]  # shared beginning, rest of one, rest of the other
    places = torch.cat([torch.arange(24), torch.arange(10, 24)])[None]
    own = torch.arange(38)
    seen = own[:, None] >= own[None, :]
    seen[24:, 10:24] = False
    out = model(row, None, Layout(places, places, seen[None]))[0]
    both = model(ids)
    whole = torch.cat([both[0], both[1, 10:]])
    error = float((out - whole).norm() / whole.norm())
    require(error < 1e-4, f"outputs are {error:.1%} off; leave takes_layout out")


def every_parameter_gets_a_gradient(case: Case) -> None:
    """Every parameter gets a gradient, and all gradients are finite."""
    found = gradients(case.decoder())
    missing = [name for name, grad in found.items() if grad is None or not grad.any()]
    require(not missing, f"no gradient reaches {', '.join(missing[:3])}")
    wild = [name for name, grad in found.items() if grad is not None and not grad.isfinite().all()]
    require(not wild, f"the gradient of {', '.join(wild[:3])} is not finite")


@torch.no_grad()
def bf16_autocast_stays_close_to_fp32(case: Case) -> None:
    """Under bf16 autocast outputs stay within 3% of full precision."""
    model, ids = case.decoder(), tokens(2)
    exact = logits(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rough = logits(model, ids).float()
    error = float((rough - exact).norm() / exact.norm())
    require(error < 0.03, f"they are {error:.1%} off")


def a_seed_decides_every_initial_value(case: Case) -> None:
    """The seed alone decides every initial value, and every matrix depends on it."""
    promises.same_initial_values(case.decoder)
    first, other = (dict(case.decoder(s).named_parameters()) for s in (0, 1))
    for name, value in first.items():
        if value.ndim >= 2 and not bool((value == value.flatten()[0]).all()):
            require(not torch.equal(value, other[name]), f"{name} is the same at another seed")


def values_of_the_constructor_are_kept(case: Case) -> None:
    """A parameter that the constructor sets to given numbers begins with these numbers."""
    promises.keeps_values_of_constructors(
        lambda: Decoder(DIMS, case.specs, tie_embeddings=True), case.decoder
    )


def shared_parameters_start_as_in_the_base(case: Case) -> None:
    """Parameters named and shaped as in the base model begin as there: variants are pairs."""
    base = dict(Case(registry.get("norm", "layernorm")).decoder().named_parameters())
    mine = dict(case.decoder().named_parameters())
    for name in (n for n in mine.keys() & base.keys() if mine[n].shape == base[n].shape):
        if not torch.equal(mine[name], base[name]):
            require(case.entry.kind == "init", f"{name} begins otherwise")


def every_parameter_of_the_schema_acts(case: Case) -> None:
    """Each keyword changes names, shapes, logits or gradients at some other value."""
    no_dead_parameter(case, _model_effect)


def _model_effect(case: Case) -> list[Any]:
    for kind, spec in case.specs.items():
        check = getattr(spec.entry.cls, "check", None)
        if check and list(check(DIMS, dict(spec.params))):
            raise UserError(f"{kind} does not fit these dimensions")
    model = case.decoder()
    effect: list[Any] = [logits(model, tokens())]
    for mode in (False, True):  # the weight of an auxiliary loss acts in training alone
        torch.manual_seed(0)
        found = gradients(model.train(mode))
        names = {name: p.shape for name, p in model.named_parameters()}
        effect += [names, *(found[name] for name in sorted(found))]
        model.zero_grad(set_to_none=True)
    return effect


# --- which promises are whose ------------------------------------------------------------------

Check = Callable[[Case], None]

MODEL_CONTRACT: tuple[Check, ...] = (
    counts_on_the_meta_device_are_the_real_ones,
    maps_tokens_to_finite_logits_of_the_right_shape,
    is_causal,
    cached_forward_equals_the_whole_one,
    selected_rows_of_a_cache_go_on_alone,
    takes_layout_only_where_texts_stay_apart,
    every_parameter_gets_a_gradient,
    bf16_autocast_stays_close_to_fp32,
    a_seed_decides_every_initial_value,
    values_of_the_constructor_are_kept,
    shared_parameters_start_as_in_the_base,
    every_parameter_of_the_schema_acts,
)


def contract(kind: str) -> tuple[Check, ...]:
    """What components of a kind promise, beside what their docstrings say."""
    from components.contract_training import CONTRACT

    return MODEL_CONTRACT if kind in MODEL_KINDS else CONTRACT.get(kind, ())


def cases(entries: Iterable[Entry]) -> Iterator[Case]:
    """Each entry with its defaults, where it has them; and what FURTHER has for those listed."""
    listed = list(entries)
    yield from (case for entry in listed if (case := usual(entry)) is not None)
    for around in FURTHER:
        kind = next(iter(around))
        chosen = around[kind] if isinstance(around[kind], dict) else {"name": around[kind]}
        entry = next((e for e in listed if (e.kind, e.name) == (kind, chosen["name"])), None)
        if entry is not None:
            yield Case(entry, {k: v for k, v in chosen.items() if k != "name"}, around)


def usual(entry: Entry) -> Case | None:
    """The entry with its defaults; None where a parameter has none and must be given."""
    required = any(info.is_required() for info in entry.schema.model_fields.values())
    return None if required else Case(entry)


def checks(entries: Iterable[Entry]) -> Iterator[tuple[Check, Case]]:
    """Every promise with every case that it binds."""
    for case in cases(entries):
        yield from ((check, case) for check in promised(case))


def promised(case: Case) -> Iterator[Check]:
    """The promises of one case."""
    if not case.params and not case.around:
        yield has_a_one_line_summary
        if case.entry.kind in SOURCED:
            yield says_where_it_comes_from
    yield from contract(case.entry.kind)
