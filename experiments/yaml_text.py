"""YAML to plain data that remembers where each value stood.

Scalars follow YAML 1.2 where plain PyYAML follows 1.1: `1e-4` is a float, `yes`, `012`, `12:30`
and dates are strings, `10_000` is an integer. A duplicate key is an error that names both lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from components.registry import UserError

Path_ = tuple[str | int, ...]
MAX_NODES = 50_000  # aliases can make a small file expand without end

_FLOAT = re.compile(r"[-+]?(\d[\d_]*\.[\d_]*|\.\d[\d_]*|\d[\d_]*)([eE][-+]?\d+)?")
_INT = re.compile(r"[-+]?(0|[1-9][\d_]*)")
_HEX = re.compile(r"0x[0-9a-fA-F_]+")


class ConfigError(UserError):
    """All that is wrong with a configuration, one line each."""

    def __init__(self, *lines: str) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass(frozen=True)
class Mark:
    """Where a value stands: `file:line:col`, or `command line: a.b=c`."""

    source: str
    line: int = 0
    column: int = 0

    @property
    def order(self) -> tuple[str, int, int]:
        """Sorts errors as a person reads them: by file, from the top."""
        return self.source, self.line, self.column

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass
class Located:
    """Plain data and the mark of every path in it."""

    data: Any
    marks: dict[Path_, Mark] = field(default_factory=dict)

    def mark(self, path: Path_) -> Mark:
        """The mark of a path, or of the nearest one above it."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.marks:
                return self.marks[path[:end]]
        return Mark("configuration")


def scalar(text: str) -> Any:
    """A plain (unquoted) scalar's value; overrides on the command line use the same rule."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE"):
        return True
    if text in ("false", "False", "FALSE"):
        return False
    if _INT.fullmatch(text) or _HEX.fullmatch(text):
        return int(text.replace("_", ""), 0) if len(text) < 400 else text
    if _FLOAT.fullmatch(text) and not re.fullmatch(r"[-+]?0\d+", text):
        return float(text.replace("_", ""))
    if text.lower() in (".inf", "+.inf", "-.inf", ".nan"):
        return float(text.replace(".", ""))
    return text


def shown(path: Path) -> str:
    """A path as people type it: relative where it lies below the current folder."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except (ValueError, OSError):
        return str(path)


def read(path: Path) -> Located:
    """The mapping in a YAML file, with marks.

    Raises:
        ConfigError: no such file, not UTF-8, not YAML, a duplicate key, or no mapping.
    """
    name = shown(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name}: byte {error.start} is not UTF-8; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{name}: can't be read: {reason}") from None
    located = parse(text, name)
    if not isinstance(located.data, dict):
        raise ConfigError(f"{name}:1:1: should be a mapping (key: value), got {kind(located.data)}")
    return located


def parse(text: str, name: str) -> Located:
    """YAML text to data with marks; see `read`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise ConfigError(f"{name}{where}: not YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(
            f"{name}:{line}:1: not YAML: character #x{error.character:04x} is not allowed"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"{name}: not YAML: {first}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    builder = _Builder(name)
    if node is None:
        return Located({}, {(): Mark(name, 1, 1)})
    try:
        data = builder.value(node, ())
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    if builder.errors:
        raise ConfigError(*builder.errors)
    return Located(data, builder.marks)


def kind(value: Any) -> str:
    """What a value is, in YAML's words."""
    names = {dict: "a mapping", list: "a list", type(None): "nothing", str: "text", bool: "a bool"}
    return names.get(type(value), "a number")


class _Builder:
    def __init__(self, name: str) -> None:
        self.name, self.errors, self.nodes = name, [], 0  # type: tuple[str, list[str], int]
        self.marks: dict[Path_, Mark] = {}
        self.open: list[yaml.Node] = []

    def place(self, node: yaml.Node) -> Mark:
        return Mark(self.name, node.start_mark.line + 1, node.start_mark.column + 1)

    def value(self, node: yaml.Node, path: Path_) -> Any:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ConfigError(f"{self.name}: aliases expand to more than {MAX_NODES} values")
        if any(node is outer for outer in self.open):
            raise ConfigError(f"{self.place(node)}: an alias inside the value that it stands for")
        self.marks.setdefault(path, self.place(node))
        if isinstance(node, yaml.ScalarNode):
            if node.tag not in ("tag:yaml.org,2002:" + t for t in _PLAIN_TAGS):
                self.errors.append(f"{self.place(node)}: the tag {node.tag} is not supported")
            return scalar(node.value) if node.style is None else node.value
        self.open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            return self.mapping(node, path)
        finally:
            self.open.pop()

    def mapping(self, node: yaml.Node, path: Path_) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            place = self.place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.errors.append(f"{place}: a key must be a word")
                continue
            key = key_node.value
            if key == "<<" and key_node.style is None:
                for source in self.merge_sources(value_node):
                    for name, value in self.mapping(source, path).items():
                        merged.setdefault(name, value)
                continue
            if key in first:
                self.errors.append(
                    f"{place}: duplicate key '{key}' (first set at line {first[key].line})"
                )
                continue
            first[key] = place
            self.marks[(*path, key)] = place
            own[key] = self.value(value_node, (*path, key))
        return {**merged, **own}

    def merge_sources(self, node: yaml.Node) -> Iterator[yaml.Node]:
        nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
        for source in nodes:
            if isinstance(source, yaml.MappingNode) and not any(source is o for o in self.open):
                self.nodes += 1
                yield source
            else:
                self.errors.append(f"{self.place(source)}: << merges a mapping, and no other thing")


_PLAIN_TAGS = ["str", "int", "float", "bool", "null", "timestamp", "value", "merge", "binary"]
