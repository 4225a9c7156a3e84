"""The registry as a person reads it: generated from the signatures that YAML is checked against."""

import inspect
import json
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

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
    """A parameter's type in words: `float > 0`, `int ≥ 1 or null`, `a norm component`."""
    bounds = [marker for marker in info.metadata if not isinstance(marker, Slot)]
    slots = [marker for marker in info.metadata if isinstance(marker, Slot)]
    return _limited(repr(slots[0]) if slots else _plain(info.annotation), bounds)


def _plain(annotation: Any) -> str:
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is types.NoneType:
        return "null"
    if origin is typing.Annotated:
        info = FieldInfo.from_annotation(annotation)
        return _limited(_plain(info.annotation), info.metadata)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(_plain, inside))
    if origin is typing.Literal:
        return " or ".join(map(repr, inside))
    if origin in (tuple, list):
        listed = [_plain(item) for item in inside if item is not Ellipsis]
        return "list of " + listed[0] if Ellipsis in inside else f"[{', '.join(listed)}]"
    return str(getattr(annotation, "__name__", annotation))


def _limited(plain: str, bounds: Iterable[Any]) -> str:
    return f"{plain} {' and '.join(map(_bound, bounds))}".strip()


SIGNS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤", "multiple_of": "a multiple of"}


def _bound(marker: Any) -> str:
    """A limit as a person writes it: `> 0`; what has no sign of its own as its author wrote it."""
    said = [f"{sign} {getattr(marker, k)}" for k, sign in SIGNS.items() if hasattr(marker, k)]
    if (least := getattr(marker, "min_length", None)) is not None:
        said.append(f"of length ≥ {least}")
    return " ".join(said) or repr(marker)


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


def markdown(found: list[dict[str, Any]]) -> str:
    """The reference docs/components.md: every component with its words and parameters."""
    lines = [
        "# Components",
        "",
        "<!-- Generated from the signatures and docstrings in components/; do not edit. Anew with:",
        "     python -m components.catalogue > docs/components.md -->",
        "",
        "What can stand in an experiment. YAML writes a component's name where it takes no",
        "parameters or their defaults do (`norm: rmsnorm`), else a mapping",
        "(`norm: {name: rmsnorm, eps: 1e-5}`). The same from your own installation:",
        "`python run.py components`. How to add one: [add-a-component.md](add-a-component.md).",
    ]
    kind = None
    for row in found:
        if row["kind"] != kind:
            kind = row["kind"]
            lines += ["", f"## {kind}"]
        lines += ["", f"### {kind}: {row['name']}", "", row["doc"]]
        lines += [""] * bool(row["parameters"])
        lines += [_bullet(p) for p in row["parameters"]]
    return "\n".join(lines) + "\n"


def _bullet(parameter: dict[str, Any]) -> str:
    default = "required"
    if not parameter["required"]:
        default = f"default `{json.dumps(parameter['default'], ensure_ascii=False)}`"
    return f"- `{parameter['name']}`: {parameter['type']}, {default}"


if __name__ == "__main__":
    print(markdown(rows(None, None)), end="")
