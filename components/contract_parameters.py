"""Whether each parameter that a component takes does something; see contract.py."""

from __future__ import annotations

import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from components import registry
from components.faults import require
from components.registry import Slot

if TYPE_CHECKING:
    from components.contract import Case


def keys(case: Case) -> Iterable[str]:
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
                changed = effect(replace(case, params={**case.params, key: value}))
            except Exception:  # not a value for it, or not at these sizes
                continue
            tried += 1
            if _differ(usual, changed):
                break
        else:
            require(not tried, f"'{key}' is accepted and changes nothing at any value tried")


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
