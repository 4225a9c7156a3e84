"""Which component is at fault, when one that somebody else wrote fails or breaks its interface.

    traceback ─ innermost frame of such a component ──────────── file:line: kind 'name': error
    its output, inside `watched` ─ None, another shape or dtype ─ the same line

A component of this repository is ours to debug, and keeps its traceback. An imported one is
reported in one line: where its class stands, what happened, and at which of its lines. Where
built-in code fails on what an imported part returned, the traceback does not show that part:
`watched` looks at what each of them returns.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components import registry
from components.registry import Entry, Spec, UserError

if TYPE_CHECKING:
    from torch import nn

SAME_SHAPE = ("norm", "activation", "ffn", "mixer", "block")  # kinds: (..., D) -> (..., D)
UNTOUCHED = ("norm", "ffn", "mixer")  # kinds whose input is read again after they return
LONGEST = 160  # characters of an error's own message
META = (
    "while parameters and FLOPs are counted on torch's meta device, where tensors have shapes and "
    "no values (take no size from values, as nonzero() and item() do, and give no device's name "
    "to autocast)"
)


class Broken(Exception):
    """A promise that is not kept; the message says how.

    Attributes:
        at: the imported component whose output shows it first, where that is known.
    """

    def __init__(self, message: str, at: Entry | None = None) -> None:
        super().__init__(message)
        self.at = at


def require(kept: Any, message: str) -> None:
    """Raises Broken with the message unless `kept`."""
    if not kept:
        raise Broken(message)


PASSED_ON = (UserError, Broken, OSError, MemoryError)  # say it themselves, or are of no one part


def foreign(entry: Entry) -> bool:
    """Whether a component is imported: not one of this repository's."""
    return entry.cls.__module__.partition(".")[0] != "components"


def imported() -> list[Entry]:
    """Every imported component that is known now."""
    return [e for e in (*registry.entries(), *registry._by_paths.values()) if foreign(e)]


def within(value: Any) -> Iterator[Spec]:
    """The components in a setting: itself, and those that it holds as parameters."""
    if isinstance(value, Spec):
        yield value
        yield from (spec for item in value.params.values() for spec in within(item))
    elif isinstance(value, tuple | list):
        yield from (spec for item in value for spec in within(item))


def imported_in(specs: Iterable[Any]) -> list[Entry]:
    """The imported components among some settings and what they hold, each once."""
    found = {spec.entry.source: spec.entry for value in specs for spec in within(value)}
    return [entry for entry in found.values() if foreign(entry)]


def title(entry: Entry) -> str:
    """`parts.py:12: ffn 'mine'`."""
    return f"{entry.source}: {entry.kind} '{entry.name}'"


def message(error: BaseException) -> str:
    """An exception's type and its message, in one line."""
    text = " ".join(str(error).split())
    if len(text) > LONGEST:
        text = text[: LONGEST - 1] + "…"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def owner(thing: Any) -> Entry | None:
    """The imported component that an object is an instance of."""
    if isinstance(thing, Spec):  # it was about to be built: its constructor takes something else
        return thing.entry if foreign(thing.entry) else None
    by_class = {entry.cls: entry for entry in imported()}
    return next((by_class[c] for c in type(thing).__mro__ if c in by_class), None)


def file_of(entry: Entry) -> str | None:
    return getattr(sys.modules.get(entry.cls.__module__), "__file__", None)


def attribute(error: BaseException) -> str | None:
    """The line that reports an error raised in an imported component, or in what it called.

    None where no frame of the traceback belongs to one.
    """
    if isinstance(error, PASSED_ON) or type(error).__name__ == "OutOfMemoryError":
        return None
    known = imported()
    if not known:
        return None
    files = {file: entry for entry in known if (file := file_of(entry)) is not None}
    place: str | None = None  # the innermost line in a file of components
    guess: Entry | None = None
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if file in files and guess is None:
            place, guess = f"{Path(file).name}:{line}", files[file]
        entry = owner(frame.f_locals.get("self"))
        if entry is not None:
            return f"{title(entry)}: {message(error)}{_at(place)}"
    return f"{title(guess)}: {message(error)}{_at(place)}" if guess is not None else None


def _at(place: str | None) -> str:
    return f" (at {place})" if place else ""


@contextlib.contextmanager
def blamed(what: str, specs: Iterable[Any]) -> Iterator[None]:
    """Turns an error in work that goes wrong by a component alone into a line that names it.

    Args:
        what: when it went wrong, as in "while the model is built".
        specs: the settings that hold the components; if none is imported, errors are left alone.

    Raises:
        UserError: the work failed with imported components in it.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        if (line := attribute(error)) is not None:
            raise UserError(f"{line} {what}") from error
        parts = imported_in(specs)
        if not parts:
            raise
        if len(parts) == 1:
            raise UserError(f"{title(parts[0])}: {message(error)} {what}") from error
        named = " or ".join(f"{e.kind} '{e.name}' ({e.source})" for e in parts)
        raise UserError(f"{named}: {message(error)} {what}") from error


@contextlib.contextmanager
def watched(model: nn.Module, what: str, specs: Iterable[Any]) -> Iterator[None]:
    """As `blamed`, for forward passes of a model in full precision; also looks at what its imported
    parts return.

    Raises:
        UserError: one returned no tensor, another shape or dtype than it was given, or changed its
            input in place; or the work failed.
    """
    faults: list[tuple[Entry, str]] = []
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if (entry := owner(module)) is not None:
                _watch(module, entry, faults, stack)
        try:
            with blamed(what, specs):
                yield
        except (UserError, Broken) as error:
            if not faults:
                raise
            entry, fault = faults[0]
            raise UserError(f"{title(entry)}: {fault}") from error
    for entry, fault in faults:
        if entry.kind != "activation":  # one may halve a width inside its own feed-forward layer
            raise UserError(f"{title(entry)}: {fault}")


def _watch(
    module: nn.Module,
    entry: Entry,
    faults: list[tuple[Entry, str]],
    stack: contextlib.ExitStack,
) -> None:
    """Adds to `faults` what a module's outputs are that they should not be, until `stack` ends."""
    if entry.kind == "position":
        _watch_hooks(module, entry, faults, stack)
        return
    if entry.kind not in SAME_SHAPE:
        return
    versions: list[int | None] = []

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        versions.append(_version(args[0]) if args else None)

    def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        version = versions.pop()
        if args and (fault := mismatch("forward", out, args[0])):
            faults.append((entry, fault))
        if entry.kind in UNTOUCHED and args and _version(args[0]) != version:
            faults.append((entry, "forward changes its input in place, which others read after it; "
                                  "work on a copy (x = x + …, not x += …)"))  # fmt: skip

    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after).remove)


def _watch_hooks(
    module: nn.Module,
    entry: Entry,
    faults: list[tuple[Entry, str]],
    stack: contextlib.ExitStack,
) -> None:
    def embed(x: Any, out: Any) -> str | None:
        return mismatch("embed", out, x)

    def rotate(q: Any, out: Any) -> str | None:
        if not isinstance(out, tuple) or len(out) != 2:
            return f"rotate should return queries and keys, a pair, not {described(out)}"
        return mismatch("rotate", out[0], q)

    def wrapped(hook: Callable[..., Any], look: Callable[[Any, Any], str | None]) -> Any:
        def call(first: Any, *rest: Any) -> Any:
            out = hook(first, *rest)
            if fault := look(first, out):
                faults.append((entry, fault))
            return out

        return call

    for name, look in (("embed", embed), ("rotate", rotate)):
        if callable(hook := getattr(module, name, None)):
            setattr(module, name, wrapped(hook, look))
            stack.callback(delattr, module, name)


def mismatch(method: str, out: Any, given: Any) -> str | None:
    """What is wrong with an output that should look like the input `given`; None where nothing is.

    Shapes and dtypes are those of `given`; under autocast another floating dtype is usual.
    """
    from torch import Tensor

    if not isinstance(out, Tensor):
        return f"{method} should return a tensor, not {described(out)}"
    if not isinstance(given, Tensor):
        return None
    if out.shape != given.shape:
        return f"{method} is given {_size(given)} and should return that shape, not {_size(out)}"
    if out.dtype != given.dtype:
        return f"{method} is given {given.dtype} and should return that, not {out.dtype}"
    return None


def described(value: Any) -> str:
    """`(2, 16, 32)`, `None`, `a tuple`: what a value is, in a few words."""
    from torch import Tensor

    if isinstance(value, Tensor):
        return _size(value)
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _size(tensor: Any) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _version(value: Any) -> int | None:
    """How often a tensor was changed in place; None where torch does not count it."""
    from torch import Tensor

    counted = isinstance(value, Tensor) and not value.is_inference()
    return int(value._version) if counted else None
