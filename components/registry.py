"""The registry: the only path by which an experiment gets a component.

    @register("norm", "rmsnorm")
    class RMSNorm(nn.Module):
        def __init__(self, width: int, *, eps: float = 1e-6): ...

Positional parameters of `__init__` are what the harness passes (dimensions, a layer's index).
Keyword-only parameters are what YAML may set: their annotations and defaults, turned into a frozen
pydantic model, are the schema. One place holds a component's names, types, defaults and words.

A component comes in three ways: the files of this package, `imports:` in an experiment (a path to
a .py file), and `package.module:Class` written where a name would stand. Installed packages may
also announce theirs under the entry-point group `ceteris.components`.

components/imports.py reads such files, and what of them an experiment uses is part of its identity.

Nothing here imports torch: the command line lists and checks components before it is needed.
"""

import contextlib
import difflib
import importlib
import inspect
import os
import sys
import sysconfig
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import pydantic_core
from pydantic_core import core_schema

from components import source as source_files

BUILTIN = tuple(
    "activation block corpus ffn filter init mixer norm objective optimizer position schedule "
    "tokenizer".split()
)

Cls = TypeVar("Cls", bound=type)


class UserError(Exception):
    """Something a person can put right: printed as one line, exit code 2, no traceback."""


class Closed(pydantic.BaseModel):
    """The base of every schema: strict, frozen, and no key that nothing reads."""

    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


@dataclass(frozen=True)
class Entry:
    """One registered component: its class, and what its signature says.

    Attributes:
        code: digest of the tokens of the file that holds the class and of what it imports from
            beside it, as they were when it was imported; None for components of this program.
    """

    kind: str
    name: str
    cls: type
    source: str
    code: str | None = None

    @property
    def summary(self) -> str:
        """The first line of the class's docstring."""
        return (inspect.getdoc(self.cls) or "").split("\n")[0]

    @cached_property
    def schema(self) -> type[Closed]:
        """The keyword-only parameters of `__init__` as a frozen pydantic model.

        Raises:
            UserError: a parameter has no annotation, or one that can't be checked.
        """
        try:
            return self._schema()
        except UserError:
            raise
        except Exception as error:  # a third party's signature
            reason = " ".join(str(error).split("\n\n")[0].split())
            raise UserError(
                f"{self.source}: {self.kind} '{self.name}': its parameters make no schema: {reason}"
            ) from error

    def _schema(self) -> type[Closed]:
        fields: dict[str, Any] = {}
        hints = typing.get_type_hints(self.cls.__init__, include_extras=True)  # type: ignore[misc]
        for parameter in inspect.signature(self.cls).parameters.values():
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
                continue
            if parameter.name not in hints:
                raise UserError(
                    f"{self.source}: {self.kind} '{self.name}': parameter '{parameter.name}' "
                    "needs a type annotation, which is what YAML values are checked against"
                )
            required = parameter.default is inspect.Parameter.empty
            default = (
                pydantic.Field()
                if required
                else pydantic.Field(default=parameter.default, validate_default=True)
            )
            fields[parameter.name] = (hints[parameter.name], default)
        return pydantic.create_model(self.cls.__name__, __base__=Closed, **fields)


@dataclass(frozen=True)
class RelativeTo:
    """Marks the parameter in which the loader puts the folder that paths are relative to:

        def __init__(self, *, files: str, relative_to: Annotated[str, RelativeTo("files")] = ""):

    It is the folder of the file that sets the parameter `of`, or the current one where the command
    line does. Where text lies is no part of a run's identity, and neither is this parameter.
    """

    of: str


def is_place(info: pydantic.fields.FieldInfo) -> bool:
    """Whether a component's parameter only says where something lies."""
    return any(isinstance(marker, RelativeTo) for marker in info.metadata)


def path_from(folder: str, written: str) -> Path:
    """The path that `written` means in a file of this folder; `~` is the home folder.

    In the current folder it stays as short as it was written, which messages show.
    """
    path = Path(os.path.expanduser(written))  # noqa: PTH111 - it refuses nobody's home
    return path if Path(folder) == Path.cwd() else Path(folder) / path


@dataclass(frozen=True)
class Spec:
    """A component chosen and checked, not yet built: what a slot in an experiment holds."""

    kind: str
    name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    chosen: Entry | None = field(default=None, repr=False, compare=False)

    @property
    def entry(self) -> Entry:
        """What it was checked against, whatever has been imported under its name since."""
        return self.chosen or get(self.kind, self.name)

    def build(self, *harness: Any) -> Any:
        """The component itself; `harness` are its positional parameters."""
        return self.entry.cls(*harness, **self.params)

    def dump(self, defaults: bool = True) -> dict[str, Any]:
        """Plain data, as YAML would write it; without `defaults`, only what differs from them."""
        model = self.entry.schema.model_fields
        plain: dict[str, Any] = {"name": self.name}
        for key, value in self.params.items():
            differs = plain_value(value, False) != default_value(model[key])
            if defaults or (differs and not is_place(model[key])):
                plain[key] = plain_value(value, defaults)
        return plain

    def __hash__(self) -> int:
        return hash((self.kind, self.name, repr(self.dump())))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and (self.kind, self.dump()) == (other.kind, other.dump())


def plain_value(value: Any, defaults: bool = True) -> Any:
    """`value` as JSON would hold it; nested components become mappings."""
    if isinstance(value, Spec):
        return value.dump(defaults)
    if isinstance(value, tuple | list):
        return [plain_value(item, defaults) for item in value]
    if isinstance(value, Mapping):
        return {key: plain_value(item, defaults) for key, item in value.items()}
    return value


def default_value(info: pydantic.fields.FieldInfo) -> Any:
    """A field's default as `plain_value` would write it, so that the two compare."""
    default = info.get_default(call_default_factory=True)
    for marker in info.metadata:
        if isinstance(marker, Slot) and isinstance(default, str):
            default = {"name": default}  # perhaps of a file that is not known at the moment
        elif isinstance(marker, Slot) and isinstance(default, dict):
            default = spec(marker.kind, default)
    return plain_value(default, False)


_slots: set[str] = set()  # every kind that some place takes


class Slot:
    """Marks a place in a schema that takes a component: `Annotated[Spec, Slot("norm")]`.

    The name is looked up when a value is checked, not when the schema is made, so that a third
    party's component needs no rebuilding of any schema. YAML may write `rmsnorm`,
    `{name: rmsnorm, eps: 1e-6}` or `package.module:Class`.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        _slots.add(kind)

    def __repr__(self) -> str:
        article = "an" if self.kind[0] in "aeiou" else "a"
        return f"{article} {self.kind} component"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        def check(value: Any) -> Spec:
            if isinstance(value, Spec):
                return value
            return self.check(value)

        return core_schema.no_info_plain_validator_function(
            check,
            serialization=core_schema.plain_serializer_function_ser_schema(lambda s: s.dump()),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"description": repr(self)}

    def check(self, value: Any) -> Spec:
        """Raises pydantic's errors, so that they come out together with the rest, with paths."""
        if isinstance(value, str):
            value = {"name": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("name"), str):
            raise pydantic_core.PydanticCustomError(
                "component_form",
                "needs the name of a component, or a mapping with 'name' (known: {known})",
                {"known": ", ".join(names(self.kind))},
            )
        try:
            entry = get(self.kind, value["name"])
            schema = entry.schema
        except UserError as error:
            raise pydantic_core.PydanticCustomError(
                "unknown_component", "{message}", {"message": str(error)}
            ) from None
        params = {key: item for key, item in value.items() if key != "name"}
        model = schema.model_validate_json(_json(params))
        checked = {key: getattr(model, key) for key in type(model).model_fields}
        return Spec(self.kind, entry.name, checked, entry)


def _json(data: Any) -> bytes:
    # Strict JSON mode takes a list for a tuple and still refuses "4" for an int; Specs that are
    # already built pass through their plain form.
    return pydantic_core.to_json(
        data, fallback=lambda v: plain_value(v), inf_nan_mode="constants", by_alias=False
    )


_entries: dict[tuple[str, str], Entry] = {}
_by_paths: dict[tuple[str, str], Entry] = {}  # apart, since such a name is known to nobody else
_registered: list[tuple[types.ModuleType | None, Entry]] = []  # all that ever was, in order
_loaded = False


def register(kind: str, name: str) -> Callable[[Cls], Cls]:
    """Class decorator: makes the class the component `name` of `kind`.

    Raises:
        UserError: another class has that kind and name; names both places.
    """

    def add(cls: Cls) -> Cls:
        entry = _entry(kind, name, cls)
        check_free(entry)
        _entries[kind, name] = entry
        _registered.append((sys.modules.get(cls.__module__), entry))
        return cls

    return add


def check_free(entry: Entry) -> None:
    """Another class must not have this kind and name.

    Raises:
        UserError: one has; names both places.
    """
    known = _entries.get((entry.kind, entry.name))
    if known is not None and known.source != entry.source and not _copies(known.cls, entry.cls):
        raise UserError(
            f"{entry.source}: the {entry.kind} '{entry.name}' is already registered by "
            f"{known.source}; give one of them another name"
        )


def _entry(kind: str, name: str, cls: type) -> Entry:
    return Entry(kind, name, cls, _place(cls), _code_of(cls))


_codes: dict[types.ModuleType, str | None] = {}


def _code_of(cls: type) -> str | None:
    """`Entry.code`. Of an installed package it is the version; torch's is no part of any identity,
    since every run has it in its record."""
    package = cls.__module__.partition(".")[0]
    module = sys.modules.get(cls.__module__)
    file = file_of(cls)
    if package in (*source_files.OWN, "torch") or module is None or file is None:
        return None
    if module not in _codes:
        installed = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib")}
        if any(file.is_relative_to(folder) for folder in installed):
            with contextlib.suppress(PackageNotFoundError):
                return _codes.setdefault(module, f"{package} {version(package)}")
        _codes[module] = source_files.digest(
            source_files.closure(file, "" if file.stem == "__init__" else cls.__module__)
        )
    return _codes[module]


def file_of(cls: type) -> Path | None:
    """The file that holds a class; None for one that was typed in."""
    path = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return None if path is None else Path(path).resolve()


def _copies(one: type, other: type) -> bool:
    """Whether two files hold the same: such as one under `imports:` and its copy kept with runs,
    or a file before and after it was edited."""
    files = [file_of(one), file_of(other)]
    if None in files or files[0] == files[1]:
        return None not in files and one.__module__ != other.__module__
    try:
        return len({file.read_bytes() for file in files if file}) == 1
    except OSError:
        return False


def _place(cls: type) -> str:
    """`file:line` of a class, the file relative to where we are when it lies below."""
    module = sys.modules.get(cls.__module__)
    file = Path(getattr(module, "__file__", None) or cls.__module__)
    try:
        line = inspect.getsourcelines(cls)[1]
    except (OSError, TypeError):
        line = 0
    try:
        file = file.resolve().relative_to(Path.cwd())
    except (ValueError, OSError):
        pass
    return f"{file}:{line}"


def load_builtin() -> None:
    """Imports this package's kinds and what installed packages announce; once."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for kind in BUILTIN:
        importlib.import_module(f"components.{kind}")
    for point in entry_points(group="ceteris.components"):
        try:
            point.load()
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the installed entry point '{point.name}' ({point.value}) of ceteris.components "
                f"can't be imported: {error}; mend or uninstall its package"
            ) from error


def load_file(path: Path) -> None:
    """Imports a third party's .py file: see `components.imports.load_file`."""
    from components import imports

    imports.load_file(path)


def get(kind: str, name: str) -> Entry:
    """The entry of a kind and name.

    Raises:
        UserError: no such component; says which there are.
    """
    load_builtin()
    if (kind, name) in _entries:
        return _entries[kind, name]
    if ":" in name:
        return _by_path(kind, name)
    known = names(kind)
    raise UserError(f"unknown {kind} '{name}'{did_you_mean(name, known)}")


def _by_path(kind: str, path: str) -> Entry:
    if (kind, path) in _by_paths:
        return _by_paths[kind, path]
    module_name, _, attribute = path.partition(":")
    try:
        cls = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        raise UserError(f"{kind} '{path}' can't be imported: {error}") from error
    if not isinstance(cls, type):
        raise UserError(f"{kind} '{path}' is not a class")
    return _by_paths.setdefault((kind, path), _entry(kind, path, cls))


def names(kind: str) -> list[str]:
    """Registered names of one kind, sorted."""
    load_builtin()
    return sorted(name for k, name in _entries if k == kind)


def kinds() -> list[str]:
    load_builtin()
    return sorted({kind for kind, _ in _entries})


def entries() -> Iterator[Entry]:
    """Everything registered, by kind and name."""
    load_builtin()
    return iter(_entries[key] for key in sorted(_entries))


def spec(kind: str, value: "str | Mapping[str, Any] | Spec") -> Spec:
    """`value` as YAML writes it (or a Spec already) checked against the registry.

    Raises:
        UserError: it names no component, or a parameter is wrong.
    """
    if isinstance(value, Spec):
        return value
    try:
        return Slot(kind).check(value)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{kind} {value!r}: {where}: {first['msg']}") from None
    except pydantic_core.PydanticCustomError as error:
        raise UserError(error.message()) from None


def build(kind: str, value: "str | Mapping[str, Any] | Spec", *harness: Any) -> Any:
    """Checks and builds in one go, for a component that holds another."""
    return spec(kind, value).build(*harness)


def did_you_mean(word: str, known: list[str]) -> str:
    """` — did you mean 'x'? (known: x, y)`: the tail of every message about a wrong name."""
    close = difflib.get_close_matches(word, known, n=1)
    hint = f" — did you mean '{close[0]}'?" if close else ""
    return f"{hint} (known: {', '.join(known)})" if known else f"{hint} (none is known)"
