"""Every registered component, a third party's too, keeps its kind's contract; see contract.py."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from components import registry
from components.decoder import Decoder
from components.registry import Entry, load_file
from tests.components.contract import DIMS, Case, Check, checks, tokens

ALL = [
    pytest.param(*pair, id=f"{pair[1]}-{pair[0].__name__}") for pair in checks(registry.entries())
]


@pytest.mark.parametrize(("check", "case"), ALL)
def test_every_component_keeps_its_contract(check: Check, case: Case) -> None:
    check(case)


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
        except AssertionError:
            caught.setdefault(case.entry.name, set()).add(check.__name__)
    for name, broken in BROKEN.items():
        assert broken <= caught[name], name
    assert caught["untrained"] == BROKEN["untrained"]
    assert caught["unsaid"] == BROKEN["unsaid"]
