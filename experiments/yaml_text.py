"""YAML to plain data that remembers where each value stood.

Scalars follow YAML 1.2 where plain PyYAML follows 1.1: `1e-4` is a float, `yes`, `012`, `12:30`
and dates are strings, `10_000` is an integer. A duplicate key is an error that names both lines,
and so is any tag (`!!python/…`): a file holds plain values only.
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
MAX_DEPTH = 50

_DIGITS = "[0-9]+(?:_[0-9]+)*"
_FLOAT = re.compile(
    rf"[-+]?(?:{_DIGITS}\.(?:{_DIGITS})?|\.{_DIGITS}|{_DIGITS}(?=[eE]))(?:[eE][-+]?[0-9]+)?"
)
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]*(?:_[0-9]+)*)")
_HEX = re.compile(r"0x[0-9a-fA-F]+(?:_[0-9a-fA-F]+)*")
_SURROGATE = re.compile("[\ud800-\udfff]")


class ConfigError(UserError):
    """All that is wrong with a configuration, one line each."""

    def __init__(self, *lines: str) -> None:
        self.lines = tuple(visible(line) for line in lines)
        super().__init__("\n".join(self.lines))


def visible(text: str) -> str:
    """Line ends, control characters and what no terminal can print as escapes: `a\\nb`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclass(frozen=True)
class Mark:
    """Where a value stands: `file:line:col`, or `command line: a.b=c`."""

    source: str
    line: int = 0
    column: int = 0

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """Sorts errors as a person reads them: by file, from the top; the command line last."""
        return not self.line, self.source if self.line else "", self.line, self.column

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

    def forget(self, path: Path_) -> None:
        """Drops the marks at and below `path`: something else stands there now."""
        for stale in [p for p in self.marks if p[: len(path)] == path]:
            del self.marks[stale]


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
    if _FLOAT.fullmatch(text):
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


class _Loader(yaml.SafeLoader):
    """Resolves nothing by itself, so that a tag on a node is one that somebody wrote."""

    DEFAULT_SCALAR_TAG = "plain"  # type: ignore[misc]
    DEFAULT_SEQUENCE_TAG = "plain"  # type: ignore[misc]
    DEFAULT_MAPPING_TAG = "plain"  # type: ignore[misc]


_Loader.yaml_implicit_resolvers = {}


def parse(text: str, name: str) -> Located:
    """YAML text to data with marks; see `read`."""
    builder = _Builder(name)
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            builder.located.data = builder.value(node, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        tab = "; indent with spaces" if "'\\t'" in reason else ""
        raise ConfigError(f"{name}{where}: not YAML: {reason}{tab}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigError(
            f"{name}:{line}:{column}: not YAML: character U+{ord(text[error.position]):04X} is not "
            "allowed"
        ) from None
    except (yaml.YAMLError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{name}: not YAML: {first}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply") from None
    if builder.errors:
        raise ConfigError(*builder.errors)
    builder.located.marks.setdefault((), Mark(name, 1, 1))
    return builder.located


def kind(value: Any) -> str:
    """What a value is, in YAML's words."""
    names = {dict: "a mapping", list: "a list", type(None): "nothing", str: "text", bool: "a bool"}
    return names.get(type(value), "a number")


class _Builder:
    def __init__(self, name: str) -> None:
        self.name, self.errors, self.nodes = name, [], 0  # type: tuple[str, list[str], int]
        self.located = Located({})
        self.open: list[yaml.Node] = []

    def place(self, node: yaml.Node) -> Mark:
        return Mark(self.name, node.start_mark.line + 1, node.start_mark.column + 1)

    def check(self, node: yaml.Node) -> None:
        """What holds for every node, keys too: no tag, no unprintable half of a character."""
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise ConfigError(f"{self.name}: aliases expand to more than {MAX_NODES} values")
        if node.tag != "plain" and not (isinstance(node, yaml.ScalarNode) and node.tag == "!"):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self.errors.append(f"{self.place(node)}: the tag {tag} is not supported; remove it")
        if isinstance(node, yaml.ScalarNode) and (half := _SURROGATE.search(node.value)):
            code = f"\\u{ord(half[0]):04x}"
            self.errors.append(f"{self.place(node)}: {code} alone is no character; remove it")

    def value(self, node: yaml.Node, path: Path_) -> Any:
        self.check(node)
        self.located.marks.setdefault(path, self.place(node))
        if isinstance(node, yaml.ScalarNode):
            return scalar(node.value) if node.style is None else node.value
        if any(node is outer for outer in self.open):
            raise ConfigError(f"{self.place(node)}: this value holds an alias of itself")
        if len(self.open) >= MAX_DEPTH:
            raise ConfigError(f"{self.place(node)}: nested more than {MAX_DEPTH} levels deep")
        self.open.append(node)
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            return self.mapping(node, path)
        finally:
            self.open.pop()

    def mapping(self, node: yaml.Node, path: Path_) -> dict[str, Any]:
        merged: dict[str, Any] = {}  # before the mapping's own keys, whose marks then prevail
        for key_node, value_node in node.value:
            if _is_merge(key_node):
                for source in reversed([*self.merge_sources(value_node)]):  # the first one wins
                    merged.update(self.value(source, path))
        own: dict[str, Any] = {}
        first: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            self.check(key_node)
            place = self.place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self.errors.append(f"{place}: a key must be a word")
                continue
            key = key_node.value
            if key in first:
                self.errors.append(
                    f"{place}: duplicate key '{key}' (first set at line {first[key].line})"
                )
                continue
            first[key] = place
            if _is_merge(key_node):
                continue
            if key in merged:
                self.located.forget((*path, key))
            self.located.marks[(*path, key)] = place
            own[key] = self.value(value_node, (*path, key))
        return {**merged, **own}

    def merge_sources(self, node: yaml.Node) -> Iterator[yaml.MappingNode]:
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if isinstance(source, yaml.MappingNode):
                yield source
            else:
                self.errors.append(f"{self.place(source)}: << merges a mapping, and no other thing")


def _is_merge(key: yaml.Node) -> bool:
    return isinstance(key, yaml.ScalarNode) and key.value == "<<" and key.style is None
