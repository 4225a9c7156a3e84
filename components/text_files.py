"""Reading documents out of files: .txt, .md, .html, .jsonl and .parquet, plain, .gz or .zst.

    find(pattern) -> paths;  read(path, cutting) -> documents, one `str` each

One block of a file is held at a time, or one line of .jsonl, one page of .html, one document. Bytes
are UTF-8 and kept as they are, but for a byte-order mark at the start of a file or of a column's
text. Everything that can be wrong with a file is a `UserError` of one line: file, place, remedy.
"""

import codecs
import fnmatch
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from components.html_text import PageError, page_text, visible_text
from components.registry import UserError

BLOCK = 1 << 20  # bytes read at a time
LONGEST = 1 << 30  # bytes of one document; more is an error, before memory runs out
LARGEST_PAGE = 64 << 20  # bytes of one .html file, whose tree takes ten to twenty times as much


@dataclass(frozen=True)
class Cutting:
    """Where in a file its documents are: see the corpus `text`."""

    column: str = "text"
    separator: str | None = None
    document_bytes: int = 1 << 20
    unseparated: list[Path] = field(default_factory=list, compare=False, repr=False)
    """Files in which `separator` did not occur; filled by `read`."""


def find(pattern: str) -> list[Path]:
    """The files that a path or pattern names, sorted by name, each file once.

    `*`, `?` and `[...]` match within a name, `**` any folders; none of them a name that begins with
    a dot. A part of the path that exists as it is written is that, whatever signs it holds. Links
    are followed, each folder once.

    Raises:
        UserError: a folder can't be listed.
    """
    path = Path(pattern).expanduser()
    found = [Path(path.anchor)]
    parts = path.parts[bool(path.anchor) :]
    for part in [*parts, "*"] if parts and parts[-1] == "**" else parts:
        found = [match for folder in found for match in _named(folder, part)]
    files = {os.path.realpath(file): file for file in sorted(found, reverse=True) if file.is_file()}
    return sorted(files.values(), key=str)


def _named(folder: Path, part: str) -> list[Path]:
    if os.path.lexists(folder / part):
        return [folder / part]
    if part == "**":
        return _folders_below(folder)
    if not re.search(r"[*?[]", part) or not folder.is_dir():
        return []
    names = fnmatch.filter(_listed(folder), part)
    return [folder / name for name in names if part.startswith(".") or not name.startswith(".")]


def _folders_below(top: Path) -> list[Path]:
    """`top` and the folders below it that are not hidden; a link back up is not followed."""
    found: dict[str, Path] = {}
    waiting = [top] if top.is_dir() else []
    while waiting:
        folder = waiting.pop()
        if found.setdefault(os.path.realpath(folder), folder) is folder:
            names = sorted(_listed(folder), reverse=True)
            below = [folder / name for name in names if not name.startswith(".")]
            waiting += [path for path in below if path.is_dir()]
    return list(found.values())


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError as error:
        raise UserError(f"{folder}: can't list this folder: {error.strerror}") from error


def digest(path: Path) -> str:
    """Hash of a file's bytes, about 1 s for each GB; remembered while the file is the same.

    Raises:
        UserError: the file can't be read.
    """
    try:
        status = path.stat()
        # The change time, which no program can set, shows a file rewritten with its old times.
        state = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        return _digest(path.resolve(), state)
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error


@functools.cache
def _digest(path: Path, state: tuple[int, ...]) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def read(path: Path, cutting: Cutting) -> Iterator[str]:
    """The documents of one file, in order.

    Raises:
        UserError: the file is missing, damaged, not UTF-8 or without the column, or a document of
            it is larger than `LONGEST`.
    """
    with _opened(path) as stream:
        yield from READERS[ending(path)](cutting, path, stream)


def ending(path: Path) -> str:
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in (".gz", ".zst") else suffix


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, decompressed; what goes wrong below comes out as one line."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".gz", ".zst") and path.stat().st_size == 0:
            raise UserError(f"{path}: empty, so not compressed data; fetch the file again")
        if suffix == ".gz":
            with gzip.open(path) as unpacked:
                yield unpacked  # type: ignore[misc]
        elif suffix == ".zst":
            import pyarrow

            with pyarrow.input_stream(str(path), compression="zstd") as source:
                yield io.BufferedReader(source)
        else:
            with path.open("rb") as plain:
                yield plain
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip data ({error}); fetch the file again") from error
    except (OSError, ValueError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: can't be read: {error.strerror}") from error
        raise UserError(f"{path}: {_explained(str(error).split(chr(10))[0])}") from error


_MEANINGS = {
    "too much memory": "compressed with a window over 128 MiB; unpack it with zstd -d --long=31 "
    "and compress it again without --long",
    "Dictionary mismatch": "compressed with a dictionary; unpack it with zstd -d -D DICTIONARY and "
    "compress it again without -D",
    "encrypted": "an encrypted Parquet file; write it again without encryption",
    "Support for codec": "compressed in a way that can't be read here; write it again with zstd",
}


def _explained(reason: str) -> str:
    """What pyarrow's message means, and what to do."""
    for words, meaning in _MEANINGS.items():
        if words in reason:
            return f"{meaning} ({reason})"
    return f"damaged data ({reason}); fetch the file again"


# What a file may hold instead of text, by its first bytes.
_NOT_TEXT = {
    codecs.BOM_UTF32_LE: "UTF-32, not UTF-8; convert the file to UTF-8",
    codecs.BOM_UTF32_BE: "UTF-32, not UTF-8; convert the file to UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16, not UTF-8; convert the file to UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16, not UTF-8; convert the file to UTF-8",
    b"\x1f\x8b": "gzip data, not text; let its name end in .gz, or unpack it",
    b"\x28\xb5\x2f\xfd": "zstd data, not text; let its name end in .zst, or unpack it",
    b"PK\x03\x04": "a zip archive, not text; unpack it",
}


def _mark(head: bytes, path: Path) -> int:
    """How many bytes of a byte-order mark a file begins with: none of the text.

    Raises:
        UserError: the file begins as UTF-16, UTF-32 or an archive does.
    """
    for mark, what in _NOT_TEXT.items():
        if head.startswith(mark):
            raise UserError(f"{path}: {what}")
    nul = [byte == 0 for byte in head[:4]]
    if nul in ([False, True] * 2, [True, False] * 2):
        raise UserError(f"{path}: UTF-16, not UTF-8; convert the file to UTF-8")
    return len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0


def _decode(raw: bytes | bytearray, path: Path, start: int = 0, line: int | None = None) -> str:
    """UTF-8 bytes that begin at byte `start` of the file (of the line, where one is given)."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        place = f"{path}:{line}" if line else f"{path}"
        raise UserError(
            f"{place}: byte {start + error.start} is not UTF-8 text; convert the file to UTF-8"
        ) from None


def _check_size(size: int, place: str, remedy: str) -> None:
    if size > LONGEST:
        raise UserError(f"{place}: a document of more than {LONGEST >> 20:,} MiB; {remedy}")


def _read_plain(cutting: Cutting, path: Path, stream: BinaryIO) -> Iterator[str]:
    separator = cutting.separator.encode() if cutting.separator else None
    buffer, start = bytearray(), 0  # bytes not yet given out, and where in the file they begin
    searched = 0  # bytes of the buffer in which no separator begins
    size, found = 0, False
    while block := stream.read(BLOCK):
        done = 0 if size else _mark(block, path)
        size += len(block)
        buffer += block  # in place: what was read before is not copied for each block
        if separator:
            while (at := buffer.find(separator, max(done, searched))) >= 0:
                yield from _stripped(_decode(buffer[done:at], path, start + done))
                done, found = at + len(separator), True
            _check_size(len(buffer) - done, f"{path}", "check corpus.separator")
        while not separator and len(buffer) - done > cutting.document_bytes:
            cut = _cut(buffer, done, cutting.document_bytes)
            yield _decode(buffer[done:cut], path, start + done)
            done = cut
        del buffer[:done]
        start += done
        searched = max(0, len(buffer) - len(separator or b"") + 1)
    last = _decode(buffer, path, start)
    yield from _stripped(last) if separator else [last] * bool(last)
    if separator and size and not found:
        cutting.unseparated.append(path)


def _stripped(document: str) -> list[str]:
    document = document.strip("\r\n")
    return [document] if document else []


def _cut(buffer: bytearray, start: int, size: int) -> int:
    """Where to cut for about `size` bytes from `start`: a line's end, else a character's."""
    if line := buffer.rfind(b"\n", start, start + size) + 1:
        return line
    cut = start + size
    while cut < min(len(buffer), start + size + 3) and buffer[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def _read_html(cutting: Cutting, path: Path, stream: BinaryIO) -> Iterator[str]:
    raw = stream.read(LARGEST_PAGE + 1)
    if len(raw) > LARGEST_PAGE:
        raise UserError(f"{path}: a page of more than {LARGEST_PAGE >> 20} MiB; split it")
    mark = _mark(raw, path)
    try:
        yield from _stripped(visible_text(page_text(raw[mark:], marked=mark > 0)))
    except PageError as error:
        raise UserError(f"{path}: {error}") from None


def _read_jsonl(cutting: Cutting, path: Path, stream: BinaryIO) -> Iterator[str]:
    number = 0
    while raw := stream.readline(LONGEST + 1):
        number += 1
        place = f"{path}:{number}"
        _check_size(len(raw), place, "write it as several rows")
        if number == 1:
            raw = raw[_mark(raw, path) :]
        if raw.strip():
            line, raw = _decode(raw, path, line=number), b""
            yield _json_text(cutting.column, line, place)
            del line  # so that the next long line has its memory


def _json_text(column: str, line: str, place: str) -> str:
    """The text of one row."""
    try:
        row = json.loads(line)
        name = json.dumps(column, ensure_ascii=False)
        if isinstance(row, dict) and line.count(name) > 1:  # of which json keeps the last
            pairs = json.loads(line, object_pairs_hook=list)
            if [key for key, _ in pairs].count(column) > 1:
                raise UserError(f"{place}: column '{column}' twice in one row; drop one of them")
    except json.JSONDecodeError as error:
        if line.lstrip().startswith("["):
            hint = "a JSON array; write one object a line (jq -c '.[]' FILE > FILE.jsonl)"
        else:
            hint = "a line is one JSON object; fix or drop the line"
        raise UserError(f"{place}:{error.colno}: not JSON ({error.msg}); {hint}") from None
    except RecursionError:
        raise UserError(f"{place}: nested too deep to be read; drop the line") from None
    except ValueError as error:  # a number of thousands of digits
        reason = str(error).split(";")[0]
        raise UserError(f"{place}: can't be read ({reason}); fix or drop the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: not a JSON object; a line is {{'column': text}}")
    check_column(column, list(row), place)
    return string(row[column], column, place)


def _read_parquet(cutting: Cutting, path: Path, stream: BinaryIO) -> Iterator[str]:
    import pyarrow.parquet

    with tempfile.TemporaryFile() as unpacked:  # Parquet is read from its end
        if packed := path.suffix.lower() != ".parquet":
            shutil.copyfileobj(stream, unpacked, BLOCK)
        # Without pre_buffer a row group is read page by page, not all of it at once.
        table = pyarrow.parquet.ParquetFile(
            unpacked if packed else str(path), buffer_size=BLOCK, pre_buffer=False
        )
        check_column(cutting.column, table.schema_arrow.names, str(path))
        row = 0
        for group in range(table.num_row_groups):
            for batch in table.iter_batches(
                batch_size=_batch_size(table, group, cutting.column),
                row_groups=[group],
                columns=[cutting.column],
                use_threads=False,
            ):
                for value in _values(batch.column(0), row, path):
                    row += 1
                    yield string(value, cutting.column, f"{path}: row {row}")


def _batch_size(table: Any, group: int, column: str) -> int:
    """How many rows to read at a time: 256, or fewer that hold about 16 blocks."""
    rows = table.metadata.row_group(group)
    sizes = [rows.column(i) for i in range(rows.num_columns)]
    size = sum(c.total_uncompressed_size for c in sizes if c.path_in_schema == column)
    return max(1, min(256, 16 * BLOCK * rows.num_rows // max(size, 1)))


def _values(column: Any, rows: int, path: Path) -> Iterator[Any]:
    """A column's values, one at a time; `rows` of the file are before it."""
    for row, value in enumerate(column, rows + 1):
        try:
            yield value.as_py()
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: row {row}: byte {error.start} of the text is not UTF-8; write the column "
                "again as UTF-8, or drop the row"
            ) from None


def check_column(column: str, known: list[str], place: str) -> None:
    if known.count(column) != 1:
        what = "no" if column not in known else "more than one"
        there = ", ".join(map(str, known)) or "none"
        raise UserError(
            f"{place}: {what} column '{column}' (there are: {there}); set corpus.column"
        )


def string(value: Any, column: str, place: str) -> str:
    """A column's text; a byte-order mark that some other reader left at its start is none of it."""
    if value is None:
        raise UserError(f"{place}: column '{column}' is null; drop such rows, or write \"\"")
    if not isinstance(value, str):
        raise UserError(
            f"{place}: column '{column}' holds {type(value).__name__}, not text; "
            "set corpus.column to one that holds strings"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise UserError(f"{place}: {error.reason}; fix or drop this text") from None
    return value.removeprefix("\ufeff")


READERS: dict[str, Callable[[Cutting, Path, BinaryIO], Iterator[str]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".html": _read_html,
    ".htm": _read_html,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
