"""An experiment file to a checked `Experiment`; every error with its place, all of them at once.

    file ─ yaml_text.read ─ merged over its `base:` ─ overrides `a.b=c` ─ pydantic ─ cross-checks

Mappings merge deeply; a list or a component is replaced whole, so that `norm: rmsnorm` over
`norm: {name: layernorm, eps: 1e-3}` does not inherit an eps. An override that goes into a component
(`model.ffn.hidden=512`) changes that one parameter.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pydantic
import yaml

from components import imports, registry
from components.registry import (
    Closed,
    RelativeTo,
    Slot,
    Spec,
    UserError,
    did_you_mean,
    is_place,
    path_from,
    plain_value,
)
from experiments import hints
from experiments.schema import PRESETS, Experiment
from experiments.yaml_text import (
    ConfigError,
    Located,
    Mark,
    Path_,
    parse,
    read,
    scalar,
    shown,
)


def load(
    name: str | Path, overrides: Iterable[str] = (), moved: Mapping[str, str] | None = None
) -> Experiment:
    """The experiment in a file, or of a preset's name, with `a.b=c` overrides.

    Args:
        moved: files under `imports:` -> where they are read instead.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    located = compose(find(name, PRESETS, "experiment"))
    files = located.data.get("imports")
    if moved and isinstance(files, list):
        located.data["imports"] = [moved.get(str(file), file) for file in files]
    load_imports(located)  # an override may go into a component that they hold
    apply_overrides(located, overrides)
    return validate(located)


def find(name: str | Path, presets: Path, what: str, folder: Path = Path()) -> Path:
    """The file that `name` means: a path (relative to `folder`), or a preset's name.

    Raises:
        ConfigError: there is neither; suggests what there is.
    """
    path, preset = path_from(str(folder), str(name)), presets / f"{name}.yaml"
    plain = Path(name).name == str(name)
    try:
        if path.is_file():
            return path
        if plain and preset.is_file():
            return preset
        beside = sorted(p.name for p in path.parent.glob("*.yaml"))
    except (OSError, ValueError):  # a name too long, or with a NUL in it; a folder shut to us
        beside = []
    known = sorted(p.stem for p in presets.glob("*.yaml"))
    close = difflib.get_close_matches(path.name, beside, n=1) if not plain or path.suffix else []
    hint = f" — did you mean '{Path(name).with_name(close[0])}'?" if close else ""
    if not hint:
        hint = did_you_mean(Path(name).stem, known)
    raise ConfigError(f"no {what} '{name}': no such file or preset{hint}")


def compose(path: Path, above: tuple[Path, ...] = ()) -> Located:
    """The data of a file merged over its base, with the mark of each value where it was written.

    Raises:
        ConfigError: a file in the chain is wrong, or includes itself.
    """
    located = read(path)
    hints.expect(located, "an experiment")
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
    return find(base, PRESETS, "experiment", folder)


def resolve_imports(located: Located, folder: Path) -> None:
    """Makes `imports:` and `evaluation.include_path` absolute: both are relative to the file that
    holds them."""
    files, evaluation = located.data.get("imports"), located.data.get("evaluation")
    places: list[tuple[Any, Any]] = []
    if isinstance(files, list):
        places += [(files, index) for index in range(len(files))]
    if isinstance(evaluation, dict) and "include_path" in evaluation:
        places.append((evaluation, "include_path"))
    for holder, key in places:
        if isinstance(holder[key], str) and "\0" not in holder[key]:
            holder[key] = str(path_from(str(folder), holder[key]).resolve())


def merge_into(lower: Located, upper: Located) -> None:
    """Lays `upper` over `lower`, in place. `imports` of both are kept, the lower ones first."""
    old, new = lower.data.get("imports"), upper.data.get("imports")
    if isinstance(old, list) and isinstance(new, list):
        upper.data["imports"] = old + new
        places = [lower.mark(("imports", i)) for i in range(len(old))]
        places += [upper.mark(("imports", i)) for i in range(len(new))]
        upper.marks.update({("imports", i): mark for i, mark in enumerate(places)})

    def merge(below: dict[str, Any], above: dict[str, Any], path: Path_) -> None:
        for key, value in above.items():
            here = (*path, key)
            old = below.get(key)
            if isinstance(old, dict) and isinstance(value, dict) and section(here) is not None:
                merge(old, value, here)
                lower.marks[here] = upper.mark(here)
                continue
            below[key] = value
            lower.forget(here)
            lower.marks.update({p: m for p, m in upper.marks.items() if p[: len(here)] == here})

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


def slot_kind(data: Any, path: Path_) -> str | None:
    """The component kind that the place at `path` takes, if it takes one.

    `data` tells which component holds it, where it is a component's own parameter.
    """
    if path[:-1] == ("data", "filters"):
        return "filter"
    if not path:
        return None
    holder = path[:-1] if isinstance(path[-1], str) else path[:-2]
    parent = schema_at(data, holder)
    info = parent.model_fields.get(str(path[len(holder)])) if parent else None
    if info is None:
        return None
    inside = [m for part in typing.get_args(info.annotation) for m in typing.get_args(part)[1:]]
    markers = info.metadata if isinstance(path[-1], str) else inside
    return next((m.kind for m in markers if isinstance(m, Slot)), None)


def schema_at(data: Any, path: Path_) -> type[Closed] | None:
    """The schema of the mapping at `path`: a section's, or that of the component written there."""
    model = section(path)
    kind_here = slot_kind(data, path) if model is None else None
    if kind_here is None:
        return model
    name = component_name(data, path)
    try:
        return registry.get(kind_here, name).schema if name is not None else None
    except UserError:
        return None


def component_name(data: Any, path: Path_) -> str | None:
    """The name of the component at `path`: as written, or else the default."""
    holder = schema_at(data, path[:-1])
    for key in path:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            data = None
    if data is None and holder is not None and str(path[-1]) in holder.model_fields:
        data = plain_value(holder.model_fields[str(path[-1])].default)
    name = data.get("name") if isinstance(data, dict) else data
    return name if isinstance(name, str) else None


def apply_overrides(located: Located, overrides: Iterable[str]) -> None:
    """`a.b=c` words from the command line, parsed by the same rules as the file.

    Raises:
        ConfigError: words that are not of this form, each on its line.
    """
    wrong: list[str] = []
    for word in overrides:
        path, equals, text = word.partition("=")
        secret = SECRET.search(path)  # none has a place here, and a log may keep what we say
        shown_word = f"{path}=***" if secret and equals else word
        mark = Mark(f"command line: {shorten(shown_word, quote=False)}")
        try:
            if not equals or not _DOTTED.fullmatch(path):
                raise ConfigError(f"{mark}: is no override; write it as a.b=c")
            if path == "base":
                raise ConfigError(f"{mark}: base: can only stand in a file")
            set_path(located, path, override_value(text, mark), mark)
        except ConfigError as error:
            wrong += error.lines
    if wrong:
        raise ConfigError(*wrong)
    resolve_imports(located, Path())


SECRET = re.compile(r"(key|token|secret|password)$", re.IGNORECASE)
_DOTTED = re.compile(r"[\w-]+(\.[\w-]+){0,20}")


def override_value(text: str, mark: Mark) -> Any:
    """What stands after the `=`."""
    try:
        return parse(text, "value").data if text.strip() else None
    except ConfigError as error:
        reason = re.sub(r"^value(:\d+:\d+)?: ", "", error.lines[0])
        raise ConfigError(f"{mark}: {reason}") from None


def set_path(located: Located, dotted: str, value: Any, mark: Mark) -> None:
    """Sets one value in place; a path into a component written as a name opens it first.

    Raises:
        ConfigError: the path goes through something that is no mapping.
    """
    path: Path_ = tuple(dotted.split("."))
    data = located.data
    for depth, key in enumerate(path[:-1], 1):
        here = path[:depth]
        current = data.get(key)
        if slot_kind(located.data, here) is not None and not isinstance(current, dict):
            current = data[key] = {"name": component_name(located.data, here)}
        elif current is None:
            current = data[key] = {}
            located.marks.setdefault(here, mark)
        elif not isinstance(current, dict):
            through = ".".join(map(str, here))
            raise ConfigError(
                f"{mark}: {dotted}: {through} is {shorten(current)}, no mapping; set it whole"
            )
        data = current
    data[str(path[-1])] = copy.deepcopy(value)
    located.forget(path)
    located.marks[path] = mark


def validate(located: Located) -> Experiment:
    """Checks the data against the schema, the registry and itself.

    Raises:
        ConfigError: all that is wrong, one line each.
    """
    load_imports(located)
    try:
        text = json.dumps(with_folders(located))
        experiment = Experiment.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        found = sorted(error.errors(), key=lambda e: located.mark(tuple(e["loc"])).order)
        raise ConfigError(*dict.fromkeys(describe(located, e) for e in found)) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{located.mark(())}: {error}") from None
    problems = [
        (blame(located, path, message), f"{path}: {message}")
        for path, message in experiment.problems()
    ]
    if problems:
        problems.sort(key=lambda problem: problem[0].order)
        raise ConfigError(*(f"{mark}: {text}" for mark, text in problems))
    return experiment


def blame(located: Located, path: str, message: str) -> Mark:
    """Where a conflict between fields was written: on the command line, or in the file at hand."""
    section, _, rest = path.partition(".")
    keys: list[Path_] = [(section, *rest.split("."))]
    keys += [(section, word) for word in re.findall(r"\w+", message)]
    keys += [tuple(words.split(".")) for words in re.findall(r"\w+\.\w+", message)]
    own = located.mark(()).source
    marks = [located.marks[key] for key in keys if key in located.marks]
    newest = (mark for mark in marks if not mark.line or mark.source == own)
    return next(newest, located.mark(keys[0]))


def load_imports(located: Located) -> None:
    """Imports the files under `imports:`, so that their components are known.

    Raises:
        ConfigError: those that don't import, each on its line.
    """
    found = located.data.get("imports")
    items = [item for item in found if isinstance(item, str)] if isinstance(found, list) else []
    wrong = [
        f"{located.mark(('imports', index))}: {error}"
        for index, error in imports.use_files(map(Path, items))
    ]
    if wrong:
        raise ConfigError(*wrong)


def with_folders(located: Located) -> Any:
    """The data in which every component that reads files knows the folder that they are relative
    to: that of the file that names them, or the current one where the command line does."""
    data = copy.deepcopy(located.data)

    def fill(value: Any, path: Path_) -> None:
        if isinstance(value, list):
            for index, item in enumerate(value):
                fill(item, (*path, index))
        if not isinstance(value, dict):
            return
        for key, item in value.items():
            fill(item, (*path, key))
        schema = schema_at(data, path)
        for name, info in schema.model_fields.items() if schema else ():
            for marker in info.metadata:
                if isinstance(marker, RelativeTo) and marker.of in value:
                    mark = located.mark((*path, marker.of))
                    if name not in value or located.mark((*path, name)).source != mark.source:
                        folder = Path(mark.source).parent if mark.line else Path()
                        value[name] = str(folder.resolve())

    fill(data, ())
    return data


def describe(located: Located, error: Any) -> str:
    """One pydantic error as `file:line:col: dotted.path: what is wrong`."""
    path: Path_ = tuple(error["loc"])
    dotted = ".".join(str(part) for part in path)
    if error["type"] == "extra_forbidden":
        known = known_keys(located.data, path[:-1])
        message = hints.unknown_key(located.data, path, known)
    elif error["type"] == "missing":
        message = "is missing; give it a value"
    elif error["type"] in ("unknown_component", "component_form"):
        message = error["msg"]
    elif error["type"] == "json_invalid":
        message = "is nested too deeply, or holds a number that is too long"
    else:
        message = error["msg"]
        for formal, plain in _PLAIN_WORDS.items():
            message = re.sub(formal, plain, message)
        message = f"{message[:1].lower()}{message[1:]}, got {shorten(error['input'])}"
    where = f"{located.mark(path)}: {dotted}" if dotted else f"{located.mark(path)}"
    return f"{where}: {message}"


_PLAIN_WORDS = {  # pydantic's words to those of a person who writes YAML
    "^(Input|String|Tuple|List|Dictionary|Value) should": "should",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid boolean": "true or false",
    "a valid (array|list|tuple)": "a list",
    "(an object|a valid dictionary)": "a mapping",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "be a finite number": "be a number",
    " after validation, not .*": "",
}


def shorten(value: Any, quote: bool = True) -> str:
    """`value` for a message: as YAML would write it, and no longer than a line has room for."""
    if isinstance(value, str):
        text = repr(value) if quote else value
    elif isinstance(value, dict | list | bool):
        text = json.dumps(value, default=str, ensure_ascii=False)
    else:
        text = "nothing" if value is None else str(value)
    return text if len(text) <= 70 else text[:67] + "…"


def known_keys(data: Any, path: Path_) -> list[str]:
    """Keys that the mapping at `path` may have: a section's fields or a component's parameters."""
    model = section(path)
    if model is not None:
        return sorted([*model.model_fields, *(["base"] if not path else [])])
    schema = schema_at(data, path)
    return ["name", *schema.model_fields] if schema else []


# --- what an experiment resolves to, and who it is -------------------------------------------


def resolved(experiment: Experiment) -> dict[str, Any]:
    """Plain data with every default filled in."""
    return dump(experiment, everything=True)


def to_yaml(experiment: Experiment) -> str:
    """The resolved experiment as YAML, which loads to the same experiment again."""
    return yaml.dump(
        resolved(experiment), Dumper=_Dumper, sort_keys=False, width=96, allow_unicode=True
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text that `scalar` or another YAML reader would take for something else."""

    def resolve(self, node: Any, value: Any, implicit: Any) -> Any:
        if node is yaml.ScalarNode and implicit[0] and not isinstance(scalar(value), str):
            name = {bool: "bool", int: "int", float: "float"}.get(type(scalar(value)), "null")
            return f"tag:yaml.org,2002:{name}"
        return super().resolve(node, value, implicit)

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _list(dumper: yaml.SafeDumper, value: list[Any]) -> yaml.Node:
    flat = all(not isinstance(v, dict | list) for v in value)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=flat)


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    style = None if value.replace("\n", "").isprintable() else '"'  # escapes, not the bare signs
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


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
    extra = info.json_schema_extra
    return (isinstance(extra, Mapping) and "execution" in extra) or is_place(info)


def run_id(experiment: Experiment, seed: int) -> str:
    """A run's id, `identity-s<seed>`."""
    return f"{identity(experiment)}-s{seed}"


def identity(experiment: Experiment) -> str:
    """The hash of the science that differs from the defaults; after a `-` that of the code of
    imported components, where it uses some.

    Two files that say the same are the same run; a new field with a default leaves every finished
    run valid. A changed default would give new meaning to an old id: `changed_defaults` tells.
    """
    text = json.dumps(dump(experiment, everything=False), sort_keys=True, separators=(",", ":"))
    settings = hashlib.blake2b(text.encode(), digest_size=5).hexdigest()
    code = code_digest(experiment)
    return settings if code is None else f"{settings}-{code}"


def own_code(experiment: Experiment) -> dict[Path, str]:
    """The files beyond this program that the experiment's components come from, and the digest of
    each with the modules beside it: see `components.imports.used`."""
    return imports.used([spec for _, spec in specs_of(experiment)], experiment.imports)


def code_digest(experiment: Experiment) -> str | None:
    """A hash of `own_code`, wherever the files lie; None where there is none."""
    codes = sorted(set(own_code(experiment).values()))
    if not codes:
        return None
    return hashlib.blake2b("/".join(codes).encode(), digest_size=4).hexdigest()


def code_by_name(experiment: Experiment) -> dict[str, str] | None:
    """`own_code` by the names of the files alone; None where there is none."""
    codes = own_code(experiment)
    names = sorted({path.name for path in codes})
    of = {n: "/".join(sorted(c for path, c in codes.items() if path.name == n)) for n in names}
    return of or None


def specs_of(model: Closed, path: str = "") -> Iterator[tuple[str, Spec]]:
    """The components of an experiment or a section of it, with their dotted paths."""
    for name, value in model:
        if isinstance(value, Closed):
            yield from specs_of(value, f"{path}{name}.")
        elif isinstance(value, Spec):
            yield f"{path}{name}", value
        elif isinstance(value, tuple):
            yield from ((f"{path}{name}", item) for item in value if isinstance(item, Spec))


def changed_defaults(experiment: Experiment, stored: Mapping[str, Any]) -> list[str]:
    """Where the science of a stored run of the same id is not what it would be now."""
    now, then = flatten(resolved(experiment)), flatten(stored)
    return [
        f"{path}: stored {then[path]!r}, now {now[path]!r}"
        for path in sorted(set(now) & set(then))
        if now[path] != then[path] and not in_execution(path)
    ]


def in_execution(dotted: str) -> bool:
    """Whether the field at a path, or a section that it is in, is declared execution."""
    model: type[Closed] | None = Experiment
    path: Path_ = ()
    if dotted.endswith(".relative_to"):  # of a component
        return True
    for key in dotted.split("."):
        info = model.model_fields.get(key) if model is not None else None
        if info is None:
            return False
        if is_execution(info):
            return True
        path = (*path, key)
        model = section(path)
    return False


def flatten(data: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as {dotted path: value}."""
    if not isinstance(data, Mapping):
        return {path: data}
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat.update(flatten(value, f"{path}.{key}" if path else str(key)))
    return flat
