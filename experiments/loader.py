"""An experiment file to a checked `Experiment`; every error with its place, all of them at once.

    file ─ yaml_text.read ─ merged over its `base:` ─ overrides `a.b=c` ─ pydantic ─ cross-checks

Mappings merge deeply; a list or a component is replaced whole, so that `norm: rmsnorm` over
`norm: {name: layernorm, eps: 1e-3}` does not inherit an eps. An override that goes into a component
(`model.ffn.hidden=512`) changes that one parameter.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from components import registry
from components.registry import Closed, Slot, UserError, did_you_mean, plain_value
from experiments.schema import PRESETS, Experiment
from experiments.yaml_text import ConfigError, Located, Mark, Path_, parse, read, shown


def load(name: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment in a file, or of a preset's name, with `a.b=c` overrides.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    located = compose(find(name, PRESETS, "experiment"))
    apply_overrides(located, overrides)
    return validate(located)


def find(name: str | Path, presets: Path, what: str) -> Path:
    """The file that `name` means: a path, or a preset's name without its ending.

    Raises:
        ConfigError: there is neither; suggests a preset.
    """
    path = Path(name)
    if path.is_file():
        return path
    preset = presets / f"{name}.yaml"
    if path.name == str(name) and preset.is_file():
        return preset
    known = sorted(p.stem for p in presets.glob("*.yaml"))
    raise ConfigError(f"no {what} '{name}': no such file or preset{did_you_mean(path.stem, known)}")


def compose(path: Path, above: tuple[Path, ...] = ()) -> Located:
    """The data of a file merged over its base, with the mark of each value where it was written.

    Raises:
        ConfigError: a file in the chain is wrong, or includes itself.
    """
    located = read(path)
    resolve_imports(located, path.parent)
    if "base" not in located.data:
        return located
    base = located.data.pop("base")
    mark = located.mark(("base",))
    if not isinstance(base, str):
        raise ConfigError(f"{mark}: base: should be the path of a file or a preset's name")
    chain = (*above, path.resolve())
    try:
        parent = find_base(base, path.parent)
    except ConfigError as error:
        raise ConfigError(f"{mark}: base: {error}") from None
    if parent.resolve() in chain:
        loop = " -> ".join(shown(p) for p in (*chain, parent.resolve()))
        raise ConfigError(f"{mark}: base: a file includes itself: {loop}")
    lower = compose(parent, chain)
    merge_into(lower, located)
    return lower


def find_base(base: str, folder: Path) -> Path:
    """A base is a path relative to the file that names it, or a preset's name."""
    beside = folder / base
    return beside if beside.is_file() else find(base, PRESETS, "experiment")


def resolve_imports(located: Located, folder: Path) -> None:
    """Makes `imports:` absolute: they are relative to the file that holds them."""
    imports = located.data.get("imports")
    if isinstance(imports, list) and all(isinstance(i, str) for i in imports):
        located.data["imports"] = [str((folder / i).resolve()) for i in imports]


def merge_into(lower: Located, upper: Located) -> None:
    """Lays `upper` over `lower`, in place."""

    def merge(below: dict[str, Any], above: dict[str, Any], path: Path_) -> None:
        for key, value in above.items():
            here = (*path, key)
            old = below.get(key)
            deep = isinstance(old, dict) and isinstance(value, dict) and section(here) is not None
            if deep:
                merge(old, value, here)  # type: ignore[arg-type]
            elif key == "imports" and not path and isinstance(old, list):
                below[key] = [*old, *(value if isinstance(value, list) else [value])]
            else:
                below[key] = value
                for stale in [p for p in lower.marks if p[: len(here)] == here]:
                    del lower.marks[stale]
            lower.marks.update(
                {
                    p: m
                    for p, m in upper.marks.items()
                    if p == here or (not deep and p[: len(here)] == here)
                }
            )

    merge(lower.data, upper.data, ())
    lower.marks[()] = upper.mark(())


def section(path: Path_) -> type[Closed] | None:
    """The schema of the mapping at `path`, if it is one of the experiment's sections."""
    model: type[Closed] = Experiment
    for key in path:
        info = model.model_fields.get(str(key))
        if (
            info is None
            or not (isinstance(info.annotation, type))
            or not issubclass(info.annotation, Closed)
        ):
            return None
        model = info.annotation
    return model


def slot_kind(path: Path_) -> str | None:
    """The component kind that the field at `path` takes, if it is a slot."""
    parent = section(path[:-1]) if path else None
    info = parent.model_fields.get(str(path[-1])) if parent else None
    return next((m.kind for m in info.metadata if isinstance(m, Slot)), None) if info else None


def apply_overrides(located: Located, overrides: Iterable[str]) -> None:
    """`a.b=c` words from the command line, parsed by the same rules as the file.

    Raises:
        ConfigError: a word that is not of this form.
    """
    for word in overrides:
        path, equals, text = word.partition("=")
        if not equals or not path:
            raise ConfigError(f"command line: '{word}' is no override; write it as a.b=c")
        value = parse(text, f"command line: {path}").data if text.strip() else None
        set_path(located, path, value, Mark(f"command line: {word}"))


def set_path(located: Located, dotted: str, value: Any, mark: Mark) -> None:
    """Sets one value in place; a path into a component written as a name opens it first.

    Raises:
        ConfigError: the path goes through something that is no mapping.
    """
    path: Path_ = tuple(dotted.split("."))
    data = located.data
    for depth, key in enumerate(path[:-1], 1):
        here = path[:depth]
        kind = slot_kind(here)
        current = data.get(key)
        if kind is not None and not isinstance(current, dict):
            name = current if isinstance(current, str) else default_component(here)
            current = data[key] = {"name": name}
        elif current is None:
            current = data[key] = {}
        elif not isinstance(current, dict):
            raise ConfigError(
                f"{mark}: {dotted}: {'.'.join(map(str, here))} is {current!r}, no mapping"
            )
        data = current
    data[path[-1]] = copy.deepcopy(value)
    for stale in [p for p in located.marks if p[: len(path)] == path]:
        del located.marks[stale]
    located.marks[path] = mark


def default_component(path: Path_) -> str:
    """The name of the component that stands in a slot if nothing is written."""
    parent = section(path[:-1])
    assert parent is not None
    default = parent.model_fields[str(path[-1])].default
    return str(default)


def validate(located: Located) -> Experiment:
    """Checks the data against the schema, the registry and itself.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    load_imports(located)
    try:
        text = json.dumps(located.data)
        experiment = Experiment.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        found = sorted(error.errors(), key=lambda e: located.mark(tuple(e["loc"])).order)
        raise ConfigError(*dict.fromkeys(describe(located, e) for e in found)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{located.mark(())}: {error}") from None
    problems = [
        f"{located.mark(tuple(path.split('.')))}: {path}: {message}"
        for path, message in experiment.problems()
    ]
    if problems:
        raise ConfigError(*problems)
    return experiment


def load_imports(located: Located) -> None:
    imports = located.data.get("imports", [])
    for index, item in enumerate(imports if isinstance(imports, list) else []):
        if isinstance(item, str):
            try:
                registry.load_file(Path(item))
            except UserError as error:
                raise ConfigError(f"{located.mark(('imports', index))}: {error}") from None


def describe(located: Located, error: Any) -> str:
    """One pydantic error as `file:line:col: dotted.path: what is wrong`."""
    path: Path_ = tuple(error["loc"])
    dotted = ".".join(str(part) for part in path)
    kind = error["type"]
    if kind == "extra_forbidden":
        known = known_keys(located, path[:-1])
        message = f"unknown key '{path[-1]}'{did_you_mean(str(path[-1]), known)}"
    elif kind == "missing":
        message = "is missing; give it a value"
    elif kind in ("unknown_component", "component_form"):
        message = error["msg"]
    else:
        message = (
            error["msg"]
            .replace("Input should be", "should be")
            .replace("a valid integer", "a whole number")
        )
        message = f"{message[:1].lower()}{message[1:]}, got {shorten(error['input'])}"
    return (
        f"{located.mark(path)}: {dotted}: {message}"
        if dotted
        else f"{located.mark(path)}: {message}"
    )


def shorten(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def known_keys(located: Located, path: Path_) -> list[str]:
    """Keys that the mapping at `path` may have: a section's fields or a component's parameters."""
    model = section(path)
    if model is not None:
        return sorted([*model.model_fields, *(["base"] if not path else [])])
    value: Any = located.data
    kind, schema = None, None
    for depth, key in enumerate(path, 1):
        value = value[int(key)] if isinstance(value, list) else value.get(key, {})
        kind = slot_kind(path[:depth]) or (nested_kind(schema, str(key)) if schema else kind)
        if path[:depth] == ("data", "filters"):
            kind = "filter"
        if kind is None or isinstance(value, list):
            continue
        name = (
            value
            if isinstance(value, str)
            else value.get("name")
            if isinstance(value, dict)
            else None
        )
        try:
            schema = registry.get(kind, str(name)).schema
        except UserError:
            return []
    return ["name", *schema.model_fields] if schema else []


def nested_kind(schema: type[Closed], key: str) -> str | None:
    """The kind that a component's own parameter takes, if it is a component too."""
    info = schema.model_fields.get(key)
    return next((m.kind for m in info.metadata if isinstance(m, Slot)), None) if info else None


# --- what an experiment resolves to, and who it is -------------------------------------------


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Plain data with every default filled in."""
    return dump(experiment, everything=True)


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML, which loads to the same experiment again."""
    return yaml.dump(resolved(experiment), Dumper=_Dumper, sort_keys=False, width=96)


class _Dumper(yaml.SafeDumper):
    """Floats as `scalar` reads them back (1e-06, not 1.0e-06 as a string); short lists inline."""


def _float(dumper: yaml.SafeDumper, value: float) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:float", repr(value))


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    flat = all(not isinstance(v, dict | list) for v in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    from experiments.yaml_text import scalar

    style = None if isinstance(scalar(value), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(float, _float)
_Dumper.add_representer(list, _list)
_Dumper.add_representer(str, _text)


def dump(model: Closed, everything: bool) -> dict[str, Any]:
    """A schema object as plain data; without `everything`, science that differs from defaults."""
    plain: dict[str, Any] = {}
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        if not everything and is_execution(info):
            continue
        if isinstance(value, Closed):
            inner = dump(value, everything)
            if inner or everything:
                plain[name] = inner
        elif everything:
            plain[name] = plain_value(value)
        elif info.is_required() or plain_value(value, False) != registry.default_value(info):
            plain[name] = plain_value(value, False)
    return plain


def is_execution(info: pydantic.fields.FieldInfo) -> bool:
    """Whether a field is declared to be no part of a run's identity."""
    return isinstance(info.json_schema_extra, Mapping) and "execution" in info.json_schema_extra


def run_id(experiment: Experiment, seed: int) -> str:
    """`hash-s<seed>`: the hash of the science that differs from the defaults.

    Two files that say the same are the same run; a new field with a default leaves every finished
    run valid. A changed default would give new meaning to an old id: `changed_defaults` tells.
    """
    text = json.dumps(dump(experiment, everything=False), sort_keys=True, separators=(",", ":"))
    return f"{hashlib.blake2b(text.encode(), digest_size=5).hexdigest()}-s{seed}"


def changed_defaults(experiment: Experiment, stored: Mapping[str, Any]) -> list[str]:
    """Where the science of a stored run of the same id is not what it would be now."""
    now = flatten({k: v for k, v in resolved(experiment).items() if not is_execution_key(k)})
    then = flatten({k: v for k, v in stored.items() if not is_execution_key(k)})
    return [
        f"{path}: stored {then[path]!r}, now {now[path]!r}"
        for path in sorted(set(now) & set(then))
        if now[path] != then[path]
    ]


def is_execution_key(key: str) -> bool:
    info = Experiment.model_fields.get(key)
    return info is not None and is_execution(info)


def flatten(data: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted path: value}."""
    if not isinstance(data, Mapping):
        return {path: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(flatten(value, f"{path}.{key}" if path else str(key)))
    return flat
