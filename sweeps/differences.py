"""What a variant changes, to be read: `model.norm: layernorm → rmsnorm`."""

from __future__ import annotations

from typing import Any

from experiments import loader
from sweeps.design import Sweep, Variant, value_at
from sweeps.drafts import shown_value


def differences(
    sweep: Sweep, variant: Variant, solved: tuple[str, int] | None = None
) -> tuple[str, ...]:
    """One line for each setting in which a variant differs from the base.

    Parameters that a replaced component takes along from its own defaults, the solved width and
    seeds of the row's own have a line too.
    """
    base, now = loader.resolved(sweep.base), loader.resolved(variant.experiment)
    lines: list[str] = []
    for path, value in variant.changes.items():
        before = value_at(base, path)
        if before == value:
            continue
        beside = []
        if isinstance(before, dict) and "name" in before:
            beside = side_effects(before, value, value_at(now, path), path)
            same = isinstance(value, dict) and value.get("name") == before["name"]
            shared = {k: v for k, v in before.items() if same and k in value}
            before = shared or before["name"]
        arrow = "" if before is None else f"{shown_value(before)} → "
        lines += [f"{path}: {arrow}{shown_value(value)}", *beside]
    if solved is not None:
        lines.append(f"{solved[0]}: {solved[1]} (solved)")
    if variant.seeds:
        lines.append(f"seeds: {', '.join(map(str, variant.seeds))}")
    return tuple(lines)


def side_effects(before: Any, written: Any, now: Any, path: str) -> list[str]:
    """Parameters that a replaced component has too, and that changed without being written."""
    named = {"name", "hidden", *(written if isinstance(written, dict) else ())}
    if not isinstance(now, dict):
        return []
    return [
        f"{path}.{key}: {shown_value(old)} → {shown_value(now[key])} (by default)"
        for key, old in before.items()
        if key not in named and key in now and now[key] != old
    ]
