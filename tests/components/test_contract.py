"""Every registered component, a third party's too, keeps its kind's contract; see contract.py."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components import contract_report, registry
from components.contract import (
    DIMS,
    LENGTH,
    MODEL_KINDS,
    Case,
    Check,
    cases,
    checks,
    promised,
    tokens,
)
from components.decoder import Decoder
from components.faults import Broken
from components.registry import Entry, UserError, load_file
from tests.command_line import ceteris

ALL = [
    pytest.param(*pair, id=f"{pair[1]}-{pair[0].__name__}") for pair in checks(registry.entries())
]


@pytest.mark.parametrize(("check", "case"), ALL)
def test_every_component_keeps_its_contract(check: Check, case: Case) -> None:
    check(case)


MODELS = [case for case in cases(registry.entries()) if case.entry.kind in MODEL_KINDS]


@pytest.mark.parametrize("case", MODELS, ids=str)
@torch.no_grad()
def test_built_in_models_are_causal_to_the_bit(case: Case) -> None:
    model, ids = case.decoder(), tokens(1)
    before = model(ids)
    for place in (1, LENGTH // 2, LENGTH - 1):
        changed = ids.clone()
        changed[0, place] = (changed[0, place] + 1) % DIMS.vocab_size
        after = model(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.parametrize("mixer", registry.names("mixer"))
@pytest.mark.parametrize("block", registry.names("block"))
def test_dropout_acts_in_training_only(block: str, mixer: str) -> None:
    dims, specs = replace(DIMS, dropout=0.3), Case(registry.get("block", block)).specs
    specs = {**specs, "mixer": registry.spec("mixer", mixer)}
    usual, dropped = (Decoder(d, specs, True).initialise(0) for d in (DIMS, dims))
    with torch.no_grad():
        torch.manual_seed(0)
        first, again = dropped(tokens()), dropped(tokens())
        assert not torch.equal(first, again)
        assert torch.equal(dropped.eval()(tokens()), usual.eval()(tokens()))


@pytest.fixture
def third_party(tmp_path: Path) -> Iterator[Path]:
    """A place for a .py file; what it registers is forgotten afterwards."""
    before = dict(registry._entries)
    yield tmp_path / "theirs.py"
    registry._entries.clear()
    registry._entries.update(before)


def entries_of(file: Path, source: str) -> list[Entry]:
    """What a third party's file registers, once it is imported."""
    known = set(registry.entries())
    file.write_text(source)
    importlib.invalidate_caches()
    load_file(file)
    return [entry for entry in registry.entries() if entry not in known]


GOOD = '''
"""Components of somebody else's."""
from typing import Annotated
import torch
from pydantic import Field
from torch import nn
from components.position import Position
from components.registry import register

@register("norm", "scale_only")
class ScaleOnly(nn.Module):
    """y = strength x weight. Somebody 2024, arXiv 2401.00001."""
    def __init__(self, width: int, *, strength: Annotated[float, Field(gt=0)] = 1.0):
        super().__init__()
        self.constants, self.strength = {"gain": 1.0}, strength
        self.gain = nn.Parameter(torch.empty(width))
    def forward(self, x):
        return x * self.gain * self.strength

@register("activation", "softplus")
class Softplus(nn.Module):
    """y = log(1 + exp(x)). Dugas et al. 2001."""
    def forward(self, x):
        return nn.functional.softplus(x)

@register("schedule", "square_root")
class SquareRoot:
    """1 / sqrt(step + 1)."""
    def factor(self, step, steps):
        return (step + 1) ** -0.5
'''

BAD = '''
"""Components that break one promise each."""
import torch
from torch import nn
from components.mixer import Attention, StateCache
from components.registry import register

class Uncached(nn.Module):
    def __init__(self, dims, layer, norm):
        super().__init__()
        self.w = nn.Linear(dims.d_model, dims.d_model, bias=False)
    def cache(self, batch, length):
        return StateCache()

@register("mixer", "looks_ahead")
class LooksAhead(Uncached):
    def forward(self, x, position, tables, cache=None):
        return self.w(x.mean(1, keepdim=True) + x)

@register("mixer", "forgets_its_cache")
class ForgetsItsCache(Uncached):
    def forward(self, x, position, tables, cache=None):
        return self.w(x.cumsum(1))

@register("norm", "dead_flag")
class DeadFlag(nn.Identity):
    """A flag that nothing reads."""
    def __init__(self, width, *, centre: bool = True):
        super().__init__()

@register("norm", "untrained")
class Untrained(nn.Module):
    """A weight that nothing uses. Nobody 2020."""
    def __init__(self, width):
        super().__init__()
        self.constants = {"weight": 1.0}
        self.weight = nn.Parameter(torch.empty(width))
    def forward(self, x):
        return x

@register("norm", "draws_by_itself")
class DrawsByItself(nn.Module):
    """Initial values that no seed decides. Nobody 2020."""
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
    def initialise(self, name, parameter):
        parameter.normal_()
        return True
    def forward(self, x):
        return x * self.weight

@register("activation", "unsaid")
class Unsaid(nn.Tanh):
    def __init__(self):
        super().__init__()

Unsaid.__doc__ = "Neither formula nor paper."
'''

BROKEN = {
    "looks_ahead": {"is_causal", "cached_forward_equals_the_whole_one"},
    "forgets_its_cache": {"cached_forward_equals_the_whole_one"},
    "dead_flag": {"says_where_it_comes_from", "every_parameter_of_the_schema_acts"},
    "untrained": {"every_parameter_gets_a_gradient"},
    "draws_by_itself": {"a_seed_decides_every_initial_value"},
    "unsaid": {"says_where_it_comes_from"},
}


def test_a_third_partys_components_are_held_to_the_same_contract(third_party: Path) -> None:
    found = entries_of(third_party, GOOD)
    assert {e.name for e in found} == {"scale_only", "softplus", "square_root"}
    bound = list(checks(found))
    assert len(bound) > 20
    for check, case in bound:
        check(case)


def test_the_contract_catches_each_broken_promise(third_party: Path) -> None:
    caught: dict[str, set[str]] = {}
    for check, case in checks(entries_of(third_party, BAD)):
        try:
            check(case)
        except (Broken, UserError):
            caught.setdefault(case.entry.name, set()).add(check.__name__)
    for name, broken in BROKEN.items():
        assert broken <= caught[name], name
    assert caught["untrained"] == BROKEN["untrained"]
    assert caught["unsaid"] == BROKEN["unsaid"]


PARAMETERS = '''
"""Components that take parameters."""
import torch
from torch import nn
from components.dims import Linear, ResidualLinear
from components.registry import register

@register("ffn", "balanced")
class Balanced(nn.Module):
    """y = W x, with an auxiliary gradient in training alone. Nobody 2024."""
    def __init__(self, dims, layer, *, balance: float = 0.1):
        super().__init__()
        self.balance = balance
        self.w = ResidualLinear(dims.d_model, dims.d_model, bias=False)
    def forward(self, x):
        out = self.w(x)
        if self.training:
            aux = self.balance * out.square().sum()
            out = out + (aux - aux.detach())
        return out

@register("activation", "clipped")
class Clipped(nn.Module):
    """min(x, most). Nobody 2024."""
    def __init__(self, *, most: float):
        super().__init__()
        self.most = most
    def forward(self, x):
        return x.clamp(max=self.most)
'''


def broken(case: Case) -> list[str]:
    return [f.promise for f in contract_report.report(case).findings if f.broken]


def test_a_parameter_that_acts_in_training_alone_is_not_dead(third_party: Path) -> None:
    balanced = next(e for e in entries_of(third_party, PARAMETERS) if e.name == "balanced")
    assert broken(Case(balanced)) == []


def test_a_required_parameter_is_asked_for_and_can_be_given(third_party: Path) -> None:
    clipped = next(e for e in entries_of(third_party, PARAMETERS) if e.name == "clipped")
    asked = contract_report.report(Case(clipped))
    assert not asked.kept
    assert asked.unchecked == "it needs most; add: activation:clipped most=…"
    assert broken(Case(clipped, {"most": 0.5})) == []
    assert [str(case) for case in cases([clipped])] == []


def test_every_promise_has_words() -> None:
    for case in cases(registry.entries()):
        for check in promised(case):
            assert (check.__doc__ or "").split("\n")[0].endswith("."), check.__name__


def test_check_reports_in_words_what_a_file_keeps(
    third_party: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(third_party.parent)
    third_party.write_text(PARAMETERS)
    kept = ceteris("check", "theirs.py", "activation:clipped", "most=0.5")
    assert (kept.code, "BROKEN" in kept.out) == (0, False), kept.out
    assert ": activation 'clipped' most=0.5\n" in kept.out
    asked = ceteris("check", "theirs.py", "--json")
    assert (asked.code, asked.json["kept"]) == (1, False)
    wrong = ceteris("check", "theirs.py", "activation:clipped", "mosst=0.5")
    assert (wrong.code, wrong.out) == (2, "")
    assert "has no parameter 'mosst' — did you mean 'most'?" in wrong.err
