"""The shapes of the schedules, and what the optimizers' groups hold; bounds are in contract.py."""

from __future__ import annotations

import math
from typing import Any

import pytest

from components import registry
from components.contract import Case
from components.optimizer import decay_groups
from components.registry import UserError


def factors(name: str, steps: int, **params: Any) -> list[float]:
    schedule = registry.build("schedule", {"name": name, **params})
    return [schedule.factor(step, steps) for step in range(steps)]


NO_WARMUP = {"warmup_fraction": 0.0, "min_lr_ratio": 0.2}


def test_cosine_is_half_way_in_the_middle_and_flat_at_both_ends() -> None:
    made = factors("cosine", 101, **NO_WARMUP)
    assert made[0] == 1.0
    assert made[50] == pytest.approx(0.6)
    assert made[25] == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)
    assert made[-1] == pytest.approx(0.2)
    assert made[0] - made[1] < 0.001 > made[-2] - made[-1]


def test_linear_falls_by_the_same_each_step() -> None:
    made = factors("linear", 101, **NO_WARMUP)
    assert made == pytest.approx([1 - 0.008 * step for step in range(101)])


def test_wsd_is_constant_until_its_last_part_falls_in_a_line() -> None:
    made = factors("wsd", 101, decay_fraction=0.25, **NO_WARMUP)
    assert made[:76] == [1.0] * 76
    assert made[76:] == pytest.approx([1 - 0.032 * step for step in range(1, 26)])


def test_constant_stays_after_its_warm_up() -> None:
    assert factors("constant", 10, warmup_fraction=0.2) == [0.5, *[1.0] * 9]


@pytest.mark.parametrize("name", registry.names("schedule"))
def test_a_changed_budget_keeps_the_shape(name: str) -> None:
    short, long = factors(name, 101), factors(name, 1001)
    assert short[50] == pytest.approx(long[500], abs=0.01)
    assert short.index(1.0) / 101 == pytest.approx(long.index(1.0) / 1001, abs=0.01)


def test_a_fraction_above_one_is_refused() -> None:
    with pytest.raises(UserError, match="warmup_fraction: Input should be less than or equal to 1"):
        registry.spec("schedule", {"name": "cosine", "warmup_fraction": 20})


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    model = Case(registry.get("norm", "dyt")).decoder()
    matrices, vectors = decay_groups(model, 0.3)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert all(p.ndim < 2 for p in vectors["params"])
    ours = {id(p) for p in [*matrices["params"], *vectors["params"]]}
    assert ours == {id(p) for p in model.parameters()}
