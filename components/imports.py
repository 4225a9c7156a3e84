"""Component files of a person's own: importing them, and the code that an experiment uses of them.

An imported file may import modules that lie beside it. Of the components in such files only those
of the experiment at hand are known (`use_files`), so that two experiments of one process may import
two versions of a file, and each keeps its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from components import registry, source
from components.registry import Entry, Spec, UserError, did_you_mean


@dataclass(frozen=True)
class _File:
    """An imported file as it was when it was read: a later version of it is another one.

    Attributes:
        code: digest of the tokens of the file and of the modules beside it that it imports.
        modules: those modules, by name.
    """

    path: Path
    code: str
    modules: Mapping[str, types.ModuleType]
    entries: tuple[Entry, ...]


_files: dict[str, _File] = {}  # by the name of the module
_folders: list[str] = []  # that stand at the end of sys.path for the files in use
_helpers: dict[tuple[Path, str], types.ModuleType] = {}  # modules beside them, by file and digest


def use_files(paths: Iterable[Path]) -> Iterator[tuple[int, UserError]]:
    """Makes the components of exactly these files known, beside those of this program.

    Gives what is wrong with a file and its place in `paths`; to be read to its end.
    """
    while _folders:
        with contextlib.suppress(ValueError):
            sys.path.remove(_folders.pop())
    known = {id(entry) for file in _files.values() for entry in file.entries}
    for key, entry in [*registry._entries.items()]:
        if id(entry) in known:
            del registry._entries[key]
    for index, path in enumerate(paths):
        try:
            load_file(path)
        except UserError as error:
            yield index, error


def load_file(path: Path) -> None:
    """Imports a third party's .py file, whose `@register` lines then take effect.

    It may import modules that lie beside it. A file that has changed since it was imported, or
    whose modules have, is imported again as another one.

    Raises:
        UserError: no such file, or it does not import; says which line of it failed.
    """
    try:
        path = path.expanduser().resolve()
        there = path.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, or nobody's home
        there = False
    if not there:
        raise UserError(f"imports: no file {path}")
    if path.suffix != ".py":
        raise UserError(f"imports: {path} is not a Python file (its name should end in .py)")
    registry.load_builtin()
    files = source.closure(path)
    code = source.digest(files)
    place = hashlib.blake2b(os.fsencode(path), digest_size=6).hexdigest()
    name = f"ceteris_import_{place}_{code}"
    if name not in _files:
        _files[name] = _import(path, name, code, files)
        return
    sys.modules.update(_files[name].modules)
    _found_later(path.parent)
    for entry in _files[name].entries:
        registry.check_free(entry)
        registry._entries[entry.kind, entry.name] = entry


def _import(path: Path, name: str, code: str, files: Mapping[str, Path]) -> _File:
    loader = importlib.util.spec_from_file_location(name, path)
    assert loader is not None and loader.loader is not None  # it ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(loader)
    before, count = dict(registry._entries), len(registry._registered)
    try:
        with _beside(path.parent, files) as modules:
            loader.loader.exec_module(module)
        mine = {id(part) for part in (module, *modules.values())}
        entries = tuple(entry for part, entry in registry._registered if id(part) in mine)
        for entry in entries:
            _check_kind(entry)
            registry._entries[entry.kind, entry.name] = entry
        return _File(path, code, modules, entries)
    except (Exception, SystemExit) as error:
        del sys.modules[name], registry._registered[count:]
        registry._entries.clear()
        registry._entries.update(before)
        if isinstance(error, UserError):
            raise
        line = _line_in(error.__traceback__, files.values()) or (
            f"{path}:{getattr(error, 'lineno', None) or 1}"
        )
        raise UserError(
            f"imports: {line}: {type(error).__name__}: {error}; mend the file"
        ) from error


def _check_kind(entry: Entry) -> None:
    known = sorted({*registry.BUILTIN, *registry._slots})
    if entry.kind not in known:
        raise UserError(
            f"imports: {entry.source}: '{entry.name}' is registered as of the kind "
            f"'{entry.kind}', which nothing takes{did_you_mean(entry.kind, known)}"
        )


@contextlib.contextmanager
def _beside(folder: Path, files: Mapping[str, Path]) -> Iterator[dict[str, types.ModuleType]]:
    """While a file is imported, modules beside it are found first; gives those it imported, after.

    Modules of the same names that belong to another folder, or to an earlier version, are out of
    the way meanwhile. What was not imported by then is still found later, behind installed ones.
    """
    names = {
        name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
        for name, file in files.items()
        if name
    }
    digests = {name: source.digest({"": file}) for name, file in names.items()}
    for name, file in names.items():
        known = _helpers.get((file, digests[name]))
        if known is not None:
            sys.modules[name] = known
        elif getattr(sys.modules.get(name), "__file__", None) is not None:
            there = Path(str(sys.modules[name].__file__)).resolve()
            if there == file or any(there == path for path, _ in _helpers):
                del sys.modules[name]
    found: dict[str, types.ModuleType] = {}
    importlib.invalidate_caches()
    sys.path.insert(0, str(folder))
    try:
        yield found
    finally:
        sys.path.remove(str(folder))
        _found_later(folder)
    for name, file in names.items():
        module = sys.modules.get(name)
        if module is not None and Path(getattr(module, "__file__", None) or "").resolve() == file:
            found[name] = _helpers[file, digests[name]] = module


def _found_later(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        _folders.append(str(folder))


def _line_in(trace: types.TracebackType | None, files: Iterable[Path]) -> str | None:
    """`file:line` of the innermost of these files in which an error arose."""
    known, place = {str(file) for file in files}, None
    while trace is not None:
        if (file := trace.tb_frame.f_code.co_filename) in known:
            place = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def used(specs: Iterable[Spec], paths: Iterable[str]) -> dict[Path, str]:
    """The code beyond this program that components come from: file -> digest (`Entry.code`).

    Those are the files that hold the classes of `specs`, of `paths` (under `imports:`) those that
    register nothing, and those whose components are named in a string of another that counts.
    Modules beside a file are in its digest.
    """
    files: dict[Path, str] = {}

    def add(entry: Entry) -> None:
        place = registry.file_of(entry.cls)
        if entry.code is not None and place is not None:
            files[place] = entry.code

    for spec in _all_specs(specs):
        add(spec.entry)
    imported = {Path(path).resolve() for path in paths}
    active = [file for file in _files.values() if file.path in imported]
    files |= {file.path: file.code for file in active if not file.entries}
    entries = [entry for file in active for entry in file.entries]
    waiting, seen = list(files), set(files)
    while waiting:
        named = set(_strings(waiting.pop()))
        for entry in entries:
            if entry.name in named:
                add(entry)
        waiting += [file for file in files if file not in seen]
        seen |= set(files)
    return files


def _all_specs(values: Iterable[object]) -> Iterator[Spec]:
    """The specs among values and in their parameters, however deep."""
    for value in values:
        if isinstance(value, Spec):
            yield value
            yield from _all_specs(value.params.values())
        elif isinstance(value, Mapping):
            yield from _all_specs(value.values())
        elif isinstance(value, tuple | list):
            yield from _all_specs(value)


def _strings(file: Path) -> Iterator[str]:
    """The plain strings in a file and in what it imports from beside it."""
    for path in source.closure(file).values():
        with contextlib.suppress(OSError):
            yield from (t[1:-1] for t in source.tokens(path.read_bytes()) if t[:1] in "\"'")
