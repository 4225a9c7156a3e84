"""The registry as a person reads it: generated from the signatures that YAML is checked against."""

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from components import registry
from components.registry import Entry, Slot, UserError, did_you_mean


def rows(kind: str | None, name: str | None, imports: Iterable[Path] = ()) -> list[dict[str, Any]]:
    """What is registered, filtered by kind and name.

    Raises:
        UserError: no such kind or name.
    """
    for path in imports:
        registry.load_file(path)
    if kind is not None and kind not in registry.kinds():
        raise UserError(f"unknown kind '{kind}'{did_you_mean(kind, registry.kinds())}")
    if kind is not None and name is not None:
        return [_row(registry.get(kind, name))]
    return [_row(entry) for entry in registry.entries() if kind in (None, entry.kind)]


def _row(entry: Entry) -> dict[str, Any]:
    return {
        "kind": entry.kind,
        "name": entry.name,
        "summary": entry.summary,
        "doc": inspect.getdoc(entry.cls) or "",
        "source": entry.source,
        "parameters": [
            {
                "name": key,
                "type": _type(info),
                "required": info.is_required(),
                "default": None if info.is_required() else registry.plain_value(info.default),
            }
            for key, info in entry.schema.model_fields.items()
        ],
    }


def _type(info: Any) -> str:
    slots = [marker for marker in info.metadata if isinstance(marker, Slot)]
    if slots:
        return repr(slots[0])
    bounds = [repr(m) for m in info.metadata if not isinstance(m, Slot)]
    annotation = info.annotation
    plain = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    plain = plain.replace("typing.", "").replace("annotated_types.", "")
    return f"{plain} {' '.join(bounds)}".strip()


def text(found: list[dict[str, Any]], whole: bool) -> str:
    """Lines for a terminal; `whole` shows each component's docstring and parameters."""
    lines: list[str] = []
    for row in found:
        if whole:
            lines += [f"{row['kind']}: {row['name']}   ({row['source']})", "", row["doc"], ""]
            lines += [_parameter(p) for p in row["parameters"]] or ["no parameters"]
            continue
        if not lines or found[found.index(row) - 1]["kind"] != row["kind"]:
            lines += ["", row["kind"]] if lines else [row["kind"]]
        settable = ", ".join(p["name"] for p in row["parameters"])
        lines.append(f"  {row['name']:<12} {row['summary']}")
        if settable:
            lines.append(f"  {'':<12} parameters: {settable}")
    return "\n".join(lines)


def _parameter(parameter: dict[str, Any]) -> str:
    default = "required" if parameter["required"] else f"default {parameter['default']!r}"
    return f"  {parameter['name']:<16} {parameter['type']}, {default}"
