"""Corpora: where the text comes from. A corpus streams documents, each a `str`, in a fixed order.

    documents() -> filters -> split -> tokenizer -> shards        (experiments/data.py)

Streaming keeps memory flat: nothing here holds more than one document or one block of a file.
`fingerprint()` says what the text *is* (its content and how it is cut), never where it lies, so
that a copy of the files elsewhere finds the same cached shards.
"""

import ast
import functools
import hashlib
import importlib
import inspect
import math
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from components import synthetic, text_files
from components.registry import RelativeTo, UserError, path_from, register


class Corpus:
    """The interface: a stream of documents, and a hash of what they are made from."""

    window: int | None = None
    """Characters of every document, its end counted as one, where all have the same number: then
    windows of as many tokens, or of a multiple, hold whole documents."""

    def documents(self) -> Iterator[str]:
        """Every document, always in the same order; each call starts from the beginning.

        Raises:
            UserError: something can't be read; names the file and the place in it.
        """
        raise NotImplementedError

    def fingerprint(self) -> str:
        """Changes whenever the documents would; far cheaper than reading them as text."""
        raise NotImplementedError

    def sources(self) -> dict[Path, str]:
        """The local files that it reads and the digest of each, `text_files.digest`; empty where
        it reads none. What `status` and `table` say of changed text goes by them."""
        return {}

    surprisal: Callable[[str], list[float]] | None = None
    """Of a document of its own, or of the beginning of one: -ln of the probability that the corpus
    itself gives each character after those before it, and then the end; one number more than
    characters, in nats. None where that is not known, as of any text that people wrote."""


def _digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


# ── the documentation that every Python carries ────────────────────────────────────────────────

_NOT_DOCUMENTATION = frozenset(
    "test tests idlelib lib2to3 turtledemo pydoc_data site-packages dist-packages lib-dynload "
    "__pycache__".split()
)


@register("corpus", "python_docs")
class PythonDocs(Corpus):
    """The documentation inside this Python: docstrings of the standard library, and help topics.

    About 2.5 MB of technical English that needs no download. One document for each module (its
    docstring, then `name(signature)` and docstring of each class and function), one for each
    built-in module, one for each topic of `help()`. Sources are parsed, never imported. Differs
    from one Python version to the next, and the fingerprint with it.
    """

    def documents(self) -> Iterator[str]:
        return iter(_python_documents())

    def fingerprint(self) -> str:
        contents = [(name, path.read_bytes()) for name, path in _standard_library()]
        return _digest("python_docs", sys.version, _help_topics(), contents)


def _standard_library() -> list[tuple[str, Path]]:
    """(module name, source file) of the standard library, sorted by name."""
    root = sysconfig.get_paths()["stdlib"]
    found = {}
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - _NOT_DOCUMENTATION
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                name = path.relative_to(root).as_posix().removesuffix(".py")
                found[name.removesuffix("/__init__").replace("/", ".")] = path
    return sorted(found.items())


def _help_topics() -> list[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return []
    return sorted(topics.items())


@functools.lru_cache(maxsize=1)
def _python_documents() -> tuple[str, ...]:
    documents = []
    for name, path in _standard_library():
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        documents.append(_join(name, [(name, ast.get_docstring(tree)), *_described(tree, "")]))
    for name in sorted(set(sys.builtin_module_names) - {"xxsubtype"}):
        module = importlib.import_module(name)
        documents.append(_join(name, [(name, inspect.getdoc(module)), *_inspected(module)]))
    documents += [text.strip() + "\n" for _, text in _help_topics()]
    return tuple(dict.fromkeys(document for document in documents if document))


def _join(name: str, entries: list[tuple[str, str | None]]) -> str:
    """Entries as text, one after the other; empty when none of them has a docstring."""
    written = [f"{head}\n\n{text.strip()}\n" for head, text in entries if text and text.strip()]
    if written and not entries[0][1]:
        written.insert(0, f"{name}\n")
    return "\n".join(written)


def _described(node: ast.AST, prefix: str) -> Iterator[tuple[str, str | None]]:
    """(signature, docstring) of the classes and functions below `node`, in source order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            bases = ", ".join(ast.unparse(base) for base in child.bases)
            head = f"class {prefix}{child.name}" + (f"({bases})" if bases else "")
            yield head, ast.get_docstring(child)
            yield from _described(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield (
                f"{prefix}{child.name}({ast.unparse(child.args)})",
                ast.get_docstring(child),
            )
        elif isinstance(child, ast.If | ast.Try):
            yield from _described(child, prefix)


def _inspected(owner: Any, prefix: str = "") -> Iterator[tuple[str, str | None]]:
    """The same of a module or class that has no source, from the objects themselves.

    As Python made them: other packages put functions of theirs in, such as sys.excepthook, which
    torch replaces in each of several processes.
    """
    for name, member in sorted(vars(owner).items()):
        if owner is sys:
            member = vars(sys).get(f"__{name}__", member)
        if inspect.isfunction(member):
            continue
        text = getattr(member, "__doc__", None)
        if name.startswith("_") or not isinstance(text, str) or not callable(member):
            continue
        try:
            signature = str(inspect.signature(member))
        except (ValueError, TypeError):
            signature = "(...)"
        head = f"{prefix}{name}{re.sub(r' at 0x[0-9a-fA-F]+', '', signature)}"
        yield (
            ("class " if isinstance(member, type) else "") + head,
            inspect.cleandoc(text),
        )
        if isinstance(member, type) and not prefix:
            yield from _inspected(member, f"{name}.")


# ── files ──────────────────────────────────────────────────────────────────────────────────────


@register("corpus", "text")
class Text(Corpus):
    """Local files: .txt, .md, .html (.htm), .jsonl or .parquet, each also as .gz or .zst.

    `files` are paths or patterns, relative to the file that names them, read in the order written,
    a pattern's matches sorted by name, each file once. A path that exists is that file, whatever
    signs its name holds; otherwise `*`, `?` and `[...]` match within a name, `**` any folders, none
    of them names that begin with a dot.

    A .jsonl line or .parquet row is a document, its text in `column`; an .html page is one: what a
    browser shows of it. A .txt or .md file is cut at `separator` where one is given
    (`"<|endoftext|>"`, or `"\\n"` for a document a line), otherwise it is one document, or, where
    longer than `document_bytes`, pieces of about that size cut at line ends. Text is UTF-8 and
    otherwise kept as it is; a byte-order mark at the start of a file or column is none of it.

    Memory: a document is held whole, its tokens are not (see `experiments/data.py`). One of more
    than 1 GiB, or a page of more than 64 MiB, is refused.
    """

    def __init__(
        self,
        *,
        files: tuple[str, ...] | str,
        column: str = "text",
        separator: Annotated[str, Field(min_length=1)] | None = None,
        document_bytes: Annotated[int, Field(gt=0)] = 1 << 20,
        relative_to: Annotated[str, RelativeTo("files")] = "",
    ) -> None:
        self.relative_to = relative_to
        self.files = (files,) if isinstance(files, str) else tuple(files)
        self.cutting = text_files.Cutting(column, separator, document_bytes)
        self.warned = False

    def paths(self) -> list[Path]:
        """The files, each once.

        Raises:
            UserError: a pattern matches nothing, or a file's ending isn't one that can be read.
        """
        found: dict[str, Path] = {}
        for pattern in self.files:
            pattern = str(path_from(self.relative_to, pattern))
            files = text_files.find(pattern)
            if not files:
                folder = Path(pattern).expanduser().is_dir()
                hint = f"it is a folder: write '{pattern}/*.txt'" if folder else "check the path"
                raise UserError(f"corpus.files: no file matches '{pattern}'; {hint}")
            for file in files:
                found.setdefault(os.path.realpath(file), file)
        for path in found.values():
            if text_files.ending(path) not in text_files.READERS:
                raise UserError(
                    f"corpus.files: {path}: can't read this kind of file "
                    f"(known: {', '.join(text_files.READERS)}, each also .gz or .zst)"
                )
        return list(found.values())

    def documents(self) -> Iterator[str]:
        unseparated, paths = self.cutting.unseparated, self.paths()
        unseparated.clear()
        for path in paths:
            yield from text_files.read(path, self.cutting)
        if unseparated and not self.warned:
            self.warned = True
            print(
                f"warning: corpus.separator {self.cutting.separator!r} does not occur in "
                f"{unseparated[0]} ({len(unseparated)} of {len(paths)} files); "
                "each of these is one document",
                file=sys.stderr,
            )

    def sources(self) -> dict[Path, str]:
        return {path: text_files.digest(path) for path in self.paths()}

    def fingerprint(self) -> str:
        contents = []
        for path, digest in self.sources().items():
            kind = text_files.ending(path)
            kind = _HTML if kind in (".html", ".htm") else kind
            contents.append((kind, path.suffix.lower(), digest))
        return _digest("text", self.cutting, contents)


_HTML = ".html by lexbor, 1"  # to be raised when pages would give other text


# ── made, not written ──────────────────────────────────────────────────────────────────────────

Many = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]


class _Made(Corpus):
    """Text that depends on its parameters alone."""

    def fingerprint(self) -> str:
        return _digest(type(self).__name__, 1, vars(self))  # 1: raised when the text changes


@register("corpus", "copy")
class Copy(_Made):
    """Strings to be copied: `dbeac>dbeac`, then dots to the length of the longest, then the end.

    How long a string is, from `lengths[0]` to `lengths[1]`, and each of its letters are drawn
    evenly. Every document has 2 `lengths[1]` + 2 tokens, its end included: the `seq_len` to train
    with, so that each window is one document. A model may be asked for longer strings than it has
    seen: tasks `held_out_copy`. Kazemnejad et al. 2023, The Impact of Positional Encoding on
    Length Generalization in Transformers, arXiv 2305.19466.
    """

    def __init__(
        self,
        *,
        alphabet: Annotated[int, Field(ge=2, le=26)] = 10,
        lengths: tuple[Many, Many] = (1, 10),
        documents: Many = 50_000,
        seed: Seed = 0,
    ) -> None:
        self.alphabet, self.lengths, self.count, self.seed = alphabet, lengths, documents, seed
        if lengths[0] > lengths[1]:
            raise UserError(f"corpus.lengths: {list(lengths)}: the shortest goes first")

    @property
    def window(self) -> int:  # type: ignore[override]
        return 2 * self.lengths[1] + 2

    def documents(self) -> Iterator[str]:
        draws, (shortest, longest) = synthetic.Draws(self.seed), self.lengths
        for _ in range(self.count):
            length = shortest + draws.below(longest - shortest + 1)
            yield self.document(self._string(draws, length))

    def document(self, text: str) -> str:
        """The document whose string is `text`."""
        return synthetic.copied(text, self.window - 1)

    def strings(self, length: int) -> Iterator[str]:
        """Other strings of this length, without end."""
        draws = synthetic.Draws(self.seed, length)
        while True:
            yield self._string(draws, length)

    def _string(self, draws: synthetic.Draws, length: int) -> str:
        return "".join(synthetic.LETTERS[draws.below(self.alphabet)] for _ in range(length))

    def surprisal(self, document: str) -> list[float]:
        return synthetic.copied_surprisal(document, self.alphabet, *self.lengths)


@register("corpus", "recall")
class Recall(_Made):
    """Associative recall: keys with their values, then every key again: `aXbYcZbYcZaX`.

    The second time the keys stand in another order, each before its value. Keys and values are
    characters of two different sets; the keys of a document are different, its values need not be.
    Every document has 4 `pairs` + 1 tokens, its end included: the `seq_len` to train with, so that
    each window is one document. Task `held_out_recall`. After the multi-query recall of Arora et
    al. 2023, Zoology, arXiv 2312.04927, but that every key is asked for once, with nothing between.
    """

    def __init__(
        self,
        *,
        pairs: Many = 4,
        keys: Annotated[int, Field(ge=1, le=47)] = 32,
        values: Annotated[int, Field(ge=1, le=47)] = 32,
        documents: Many = 50_000,
        seed: Seed = 0,
    ) -> None:
        self.pairs, self.keys, self.values = pairs, keys, values
        self.count, self.seed = documents, seed
        if pairs > keys:
            raise UserError(f"corpus.pairs: {pairs} pairs need as many keys, and there are {keys}")

    @property
    def window(self) -> int:  # type: ignore[override]
        return 4 * self.pairs + 1

    def documents(self) -> Iterator[str]:
        draws = synthetic.Draws(self.seed)
        for _ in range(self.count):
            yield self._document(draws)

    def others(self) -> Iterator[str]:
        """Documents of another stream, without end."""
        draws = synthetic.Draws(self.seed, 1)
        while True:
            yield self._document(draws)

    def _document(self, draws: synthetic.Draws) -> str:
        pairs = [
            synthetic.SYMBOLS[key] + synthetic.SYMBOLS[47 + draws.below(self.values)]
            for key in draws.some(self.pairs, self.keys)
        ]
        return "".join(pairs + [pairs[index] for index in draws.some(self.pairs, self.pairs)])

    def surprisal(self, document: str) -> list[float]:
        nats = []
        for seen in range(self.pairs):
            nats += [math.log(self.keys - seen), math.log(self.values)]
        for asked in range(self.pairs):
            nats += [math.log(self.pairs - asked), 0.0]
        return [*nats[: len(document)], 0.0]


@register("corpus", "markov")
class Markov(_Made):
    """A language whose every loss is known: letters that depend on the `order` letters before.

    The probabilities are drawn once, from `seed`, each row alike from all that there are (a flat
    Dirichlet distribution). A document ends after each letter with probability 1 / `length`. Losses
    are shown above that of the chain itself on the same text, which sees the whole document; with
    `order: 1` that is what a window shows, too. Shannon 1948, A Mathematical Theory of
    Communication, section 3.
    """

    def __init__(
        self,
        *,
        order: Many = 1,
        alphabet: Annotated[int, Field(ge=2, le=26)] = 20,
        length: Annotated[int, Field(ge=2)] = 256,
        documents: Many = 5_000,
        seed: Seed = 0,
    ) -> None:
        self.order, self.alphabet, self.length = order, alphabet, length
        self.count, self.seed = documents, seed
        if alphabet**order > 10**5:
            raise UserError(
                f"corpus.order: {alphabet} letters to the power of {order} are {alphabet**order:,} "
                "tables of probabilities, more than 100,000; take fewer letters or a lower order"
            )

    @property
    def _chain(self) -> synthetic.Chain:
        return _chain(self.order, self.alphabet, self.length, self.seed)

    def documents(self) -> Iterator[str]:
        draws, reach = synthetic.Draws(self.seed, 1), self._chain.table.cumsum(1).tolist()
        for _ in range(self.count):
            yield self._chain.document(draws, reach)

    def surprisal(self, document: str) -> list[float]:
        return self._chain.surprisal(document)


@functools.lru_cache(maxsize=4)
def _chain(order: int, alphabet: int, length: int, seed: int) -> synthetic.Chain:
    return synthetic.Chain(order, alphabet, length, seed)


# ── the Hugging Face hub ───────────────────────────────────────────────────────────────────────


@register("corpus", "huggingface")
class HuggingFace(Corpus):
    """A data set of the Hugging Face hub, or a local folder that `datasets` can read.

    `path`, `config`, `split` and `revision` are those of `datasets.load_dataset`; the text is in
    `column`. With `streaming` nothing is stored and each pass reads over the network. The
    fingerprint is the hub's commit, or for a local folder a hash of its files, hidden ones left
    out. Of a local folder `datasets` keeps a copy in its cache, one for each content.
    """

    def __init__(
        self,
        *,
        path: str,
        config: str | None = None,
        split: str = "train",
        column: str = "text",
        revision: str | None = None,
        streaming: bool = False,
        relative_to: Annotated[str, RelativeTo("path")] = "",
    ) -> None:
        folder = path_from(relative_to, path)  # a hub's name is no folder here
        self.path = str(folder) if folder.exists() else path
        self.config = config
        self.split = split
        self.column = column
        self.revision = revision
        self.streaming = streaming

    def documents(self) -> Iterator[str]:
        with self._explained():
            import datasets

            cache = None
            folder = self._folder()
            if folder:  # datasets knows a file by its time, which need not change with its text
                contents = self._contents(folder)
                caches = Path(datasets.config.HF_DATASETS_CACHE)
                cache = str(caches / f"ceteris-{_digest(contents)}")
            rows = datasets.load_dataset(
                str(folder or self.path),
                self.config,
                split=self.split,
                revision=self.revision,
                streaming=self.streaming,
                cache_dir=cache,
            )
            if folder and self._contents(folder) != contents:
                shutil.rmtree(str(cache), ignore_errors=True)
                raise UserError(f"corpus.path: {folder} changed while it was read; start again")
            if rows.column_names is not None:  # a stream may not know before it is read
                text_files.check_column(self.column, rows.column_names, f"data set '{self.path}'")
                rows = rows.select_columns(self.column)
            for number, row in enumerate(rows, 1):
                place = f"data set '{self.path}': row {number}"
                text_files.check_column(self.column, list(row), place)
                yield text_files.string(row[self.column], self.column, place)

    def sources(self) -> dict[Path, str]:
        folder = self._folder()
        return {folder / name: digest for name, digest in self._contents(folder)} if folder else {}

    def fingerprint(self) -> str:
        with self._explained():
            content: Any
            if folder := self._folder():
                content = self._contents(folder)
            else:
                content = _hub_hash(self.path, self.config, self.revision)
            return _digest("huggingface", self.config, self.split, self.column, content)

    def _folder(self) -> Path | None:
        """The local folder, where the path names one."""
        folder = Path(self.path).expanduser()
        return folder if folder.is_dir() else None

    @staticmethod
    def _contents(folder: Path) -> list[tuple[str, str]]:
        """(path, hash) of each file that `datasets` would look at."""
        files = [file.relative_to(folder) for file in text_files.find(f"{folder}/**")]
        return [
            (file.as_posix(), text_files.digest(folder / file))
            for file in files
            if file.suffix != ".lock" and not any(part.startswith("__") for part in file.parts)
        ]

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # datasets raises a dozen kinds, chained several deep
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(
                f"corpus.path: can't load data set '{self.path}' ({reason}); check the name, "
                "config and split, or fetch it once where there is a network"
            ) from error


@functools.cache
def _hub_hash(path: str, config: str | None, revision: str | None) -> str:
    """The hub's commit; from the local cache when offline. Asked for once."""
    import datasets

    return datasets.load_dataset_builder(path, config, revision=revision).hash
