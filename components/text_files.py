"""Reading documents out of files: .txt, .md, .html, .jsonl and .parquet, plain, .gz or .zst.

    read(path, cutting) -> documents, one `str` each

One block of a file is held at a time (of .html the whole file). Bytes are UTF-8 and kept as they
are. Everything that can be wrong with a file is a `UserError` of one line: file, place, remedy.
"""

import codecs
import gzip
import html.parser
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from components.registry import UserError

BLOCK = 1 << 20  # bytes read at a time


@dataclass(frozen=True)
class Cutting:
    """Where in a file its documents are: see the corpus `text`."""

    column: str = "text"
    separator: str | None = None
    document_bytes: int = 1 << 20


def read(path: Path, cutting: Cutting) -> Iterator[str]:
    """The documents of one file, in order.

    Raises:
        UserError: the file is missing, damaged, not UTF-8 or lacks the column.
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
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip data ({error}); fetch the file again") from error
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path}: can't be read: {error.strerror}") from error
        reason = str(error).split("\n")[0]
        raise UserError(f"{path}: damaged data ({reason}); fetch the file again") from error


def _decode(raw: bytes, path: Path, start: int = 0, line: int | None = None) -> str:
    """UTF-8 bytes that begin at byte `start` of the file (of the line, where one is given)."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        place = f"{path}:{line}" if line else f"{path}"
        raise UserError(
            f"{place}: byte {start + error.start} is not UTF-8 text; convert the file to UTF-8"
        ) from None


def _read_plain(cutting: Cutting, path: Path, stream: BinaryIO) -> Iterator[str]:
    separator = cutting.separator.encode() if cutting.separator else None
    buffer, start = b"", 0  # bytes not yet given out, and where in the file they begin
    while block := stream.read(BLOCK):
        if start == 0 and not buffer and block.startswith(codecs.BOM_UTF8):
            start, block = 3, block[3:]
        buffer += block
        if separator:
            *whole, rest = buffer.split(separator)
            for raw in whole:
                yield from _stripped(_decode(raw, path, start))
                start += len(raw) + len(separator)
            buffer = rest
            continue
        done = 0
        while len(buffer) - done > cutting.document_bytes:
            cut = _cut(buffer, done, cutting.document_bytes)
            yield _decode(buffer[done:cut], path, start + done)
            done = cut
        buffer, start = buffer[done:], start + done
    last = _decode(buffer, path, start)
    yield from _stripped(last) if separator else [last] * bool(last)


def _stripped(document: str) -> list[str]:
    document = document.strip("\r\n")
    return [document] if document else []


def _cut(buffer: bytes, start: int, size: int) -> int:
    """Where to cut for about `size` bytes from `start`: a line's end, else a character's."""
    if line := buffer.rfind(b"\n", start, start + size) + 1:
        return line
    cut = start + size
    while cut < min(len(buffer), start + size + 3) and buffer[cut] & 0xC0 == 0x80:
        cut += 1
    return cut


def _read_html(cutting: Cutting, path: Path, stream: BinaryIO) -> Iterator[str]:
    parser = _VisibleText()
    parser.feed(_decode(stream.read(), path))
    parser.close()
    yield from _stripped(re.sub(r"\n{3,}", "\n\n", "".join(parser.parts)))


class _VisibleText(html.parser.HTMLParser):
    """Collects what a reader would see; a paragraph's end becomes an empty line."""

    hidden_tags = frozenset(("script", "style"))
    line_tags = frozenset(("br", "li", "tr", "dt", "dd", "title"))
    paragraph_tags = frozenset(
        [
            "p",
            "div",
            "h1",
            "h2",
            "h3",
            "h4",
            "h5",
            "h6",
            "ul",
            "ol",
            "dl",
            "table",
            "pre",
            "blockquote",
            "section",
            "article",
            "hr",
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0
        self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.hidden_tags
        self.verbatim += tag == "pre"
        self._break(tag)

    def handle_endtag(self, tag: str) -> None:
        self._break(tag)
        self.hidden = max(0, self.hidden - (tag in self.hidden_tags))
        self.verbatim = max(0, self.verbatim - (tag == "pre"))

    def _break(self, tag: str) -> None:
        if tag in self.paragraph_tags or tag in self.line_tags:
            if self.parts and not self.verbatim:
                self.parts[-1] = self.parts[-1].rstrip(" ")
            self.parts.append("\n\n" if tag in self.paragraph_tags else "\n")

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if not self.verbatim:  # white space counts once, and not at a line's start
            data = re.sub(r"\s+", " ", data)
            if not self.parts or self.parts[-1].endswith(("\n", " ")):
                data = data.lstrip(" ")
        if data:
            self.parts.append(data)


def _read_jsonl(cutting: Cutting, path: Path, stream: BinaryIO) -> Iterator[str]:
    for number, raw in enumerate(stream, 1):
        if not raw.strip():
            continue
        try:
            row = json.loads(_decode(raw, path, line=number))
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}:{error.colno}: not JSON ({error.msg}); mend or drop the line"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: not a JSON object; a line is {{'column': text}}")
        check_column(cutting.column, list(row), f"{path}:{number}")
        yield string(row[cutting.column], cutting.column, f"{path}:{number}")


def _read_parquet(cutting: Cutting, path: Path, stream: BinaryIO) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    packed = path.suffix.lower() != ".parquet"
    source = pyarrow.BufferReader(stream.read()) if packed else str(path)
    table = pyarrow.parquet.ParquetFile(source)
    check_column(cutting.column, table.schema_arrow.names, str(path))
    row = 0
    for batch in table.iter_batches(batch_size=256, columns=[cutting.column], use_threads=False):
        for value in batch.column(0).to_pylist():
            row += 1
            yield string(value, cutting.column, f"{path}: row {row}")


def check_column(column: str, known: list[str], place: str) -> None:
    if column not in known:
        raise UserError(
            f"{place}: no column '{column}' (there are: {', '.join(known)}); set corpus.column"
        )


def string(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: column '{column}' holds {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character
        raise UserError(f"{place}: {error.reason}; mend or drop this text") from None
    return value


READERS: dict[str, Callable[[Cutting, Path, BinaryIO], Iterator[str]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".html": _read_html,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
