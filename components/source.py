"""Source files as what they say: a digest of their tokens, and the files that one imports.

    closure(file) -> {"": file, "helper.py": its helper, …}     digest(closure) -> hexadecimal

Comments, blank lines, line breaks inside brackets and the width of indentation change no digest;
any other token does, docstrings included. The digest is the same on every Python version that can
import the file: an f-string counts as the text that it is written as, since versions before 3.12
read it as one token and later ones as several.

Nothing here imports the files or runs their code.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER)
SHAPE = {
    tokenize.NEWLINE: "\n",
    tokenize.INDENT: "\n>",
    tokenize.DEDENT: "\n<",
}  # no token has a line end first
OWN = ("components", "experiments", "sweeps", "analysis", "run")  # this program, not a helper
# f-strings (3.12) and t-strings (3.14): tokens that open and close one, where there are such
OPENS = tuple(
    getattr(tokenize, n) for n in ("FSTRING_START", "TSTRING_START") if n in dir(tokenize)
)
CLOSES = tuple(getattr(tokenize, n) for n in ("FSTRING_END", "TSTRING_END") if n in dir(tokenize))


def tokens(source: bytes) -> Iterator[str]:
    """The tokens of a Python file, without comments and layout; a block's shape as signs.

    A file that can't be read as Python counts as its bytes.
    """
    try:
        yield from list(_tokens(source))
    except (tokenize.TokenError, SyntaxError, UnicodeDecodeError, ValueError):
        yield repr(source)


def _tokens(source: bytes) -> Iterator[str]:
    depth, start = 0, (0, 0)
    encoding, _ = tokenize.detect_encoding(io.BytesIO(source).readline)
    lines = io.StringIO(source.decode(encoding), newline=None).readlines()
    for token in tokenize.tokenize(io.BytesIO(source).readline):
        if token.type in OPENS:
            start = start if depth else token.start
            depth += 1
        elif token.type in CLOSES:
            depth -= 1
            if not depth:
                yield _between(lines, start, token.end)
        elif depth or token.type in LAYOUT:
            continue
        elif token.type in SHAPE:
            yield SHAPE[token.type]
        else:
            yield token.string.replace("\r\n", "\n")


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text from one (row, column) to another; rows count from 1."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    first, last = lines[start[0] - 1][start[1] :], lines[end[0] - 1][: end[1]]
    return "".join([first, *lines[start[0] : end[0] - 1], last])


def closure(file: Path, module: str = "", leave_out: tuple[str, ...] = OWN) -> dict[str, Path]:
    """A file and all that it imports from beside it, directly or through one another.

    Names are relative to the file's folder, its own is "".

    Args:
        module: its dotted name, where it is part of a package: then the package's other modules
            count as beside it, imported absolutely or with dots, and names begin at the package.
        leave_out: top-level modules and packages that don't count.
    """
    file = file.resolve()
    top = file.parents[module.count(".")]
    roots = (file.parent, top) if top != file.parent else (top,)
    found: dict[Path, None] = {file: None}
    waiting = [file]
    while waiting:
        for path in _imported(waiting.pop(), roots, leave_out):
            if path not in found and path.is_relative_to(top):
                found[path] = None
                waiting.append(path)
    helpers = {path.relative_to(top).as_posix(): path for path in found if path != file}
    return {"": file, **dict(sorted(helpers.items()))}


def _imported(file: Path, roots: tuple[Path, ...], leave_out: tuple[str, ...]) -> Iterator[Path]:
    """Files below `roots` that the import statements of `file` name, wherever they stand in it."""
    try:
        named = _import_statements(file.read_bytes())
    except OSError:
        return
    for words, level in named:
        bases = (file.parents[level - 1],) if level else roots
        if level or words[0] not in leave_out:
            for base in bases:
                yield from _modules(base, words)


@functools.lru_cache(maxsize=256)  # a sweep asks for the same files once for each of its rows
def _import_statements(content: bytes) -> tuple[tuple[list[str], int], ...]:
    """(dotted words, leading dots) of all that the import statements of a file name."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of its strings: that is its author's
            tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return ()
    found: list[tuple[list[str], int]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name.split("."), 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            words = node.module.split(".") if node.module else []
            found += [([*words, alias.name], node.level) for alias in node.names]
    return tuple(found)


def _modules(root: Path, words: list[str]) -> Iterator[Path]:
    """The module that dotted words name below a folder, and the packages on the way to it."""
    for end in range(1, len(words) + 1):
        place = root.joinpath(*words[:end])
        for path in (place.with_name(f"{place.name}.py"), place / "__init__.py"):
            if path.is_file():
                yield path.resolve()


def digest(files: Mapping[str, Path]) -> str:
    """A hash of the tokens of files and of the names of all but the first, as `closure` gives them.

    BLAKE2b-64 in hexadecimal. A file that can't be read counts as empty.
    """
    whole = hashlib.blake2b(digest_size=8)
    for name, file in files.items():
        try:
            content = file.read_bytes()
        except OSError:
            content = b""
        whole.update(f"{name}\0".encode() + _token_digest(content))
    return whole.hexdigest()


@functools.lru_cache(maxsize=256)
def _token_digest(content: bytes) -> bytes:
    part = hashlib.blake2b(digest_size=16)
    for token in tokens(content):
        raw = token.encode("utf-8", "surrogatepass")
        part.update(len(raw).to_bytes(4, "big") + raw)
    return part.digest()
