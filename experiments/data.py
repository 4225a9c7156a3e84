"""Data: from a corpus to numbered batches.

    corpus -> filters -> split by document -> tokenizer -> shards -> batch(step)

`prepare` does all but the last once and keeps the outcome under `cache/<key>/`, the key being a
hash of everything that decides it: the corpus's content, the filters, the split, the tokenizer.
The shards are three flat files, each document followed by the tokenizer's end of text:

    train.bin      ids of the training split, uint16 where the vocabulary fits, else uint32
    val.bin        ids of the validation split, the same type
    val_bytes.bin  uint32: bytes of text behind each id of val.bin, 0 for an end of text
    meta.json      counts, types, fingerprint and how they came about; beside the tokenizer's files

The split is a rule, not a draw: a document is in the validation split where its keyed hash, read
as a number in [0, 1), is below `validation_fraction`. Equal documents are so always on one side.

`batch(step)` is a pure function of (seed, step), whoever asks. An epoch is all windows of
`seq_len` targets that tile the split from a random offset, in random order, both drawn from
(seed, epoch); a batch that an epoch can't fill goes on into the next:

    training ids       · · a b c d e f g h i j k l m n o p …     offset 2, seq_len 5
    windows            0: a b c d e (f)   1: f g h i j (k)   2: k l m n o (p)   …
    order of epochs    2 0 3 1 | 1 3 0 2 | …
    batches of three   [2 0 3] [1 1 3] [0 2 …

A document of more than a million characters is tokenized in pieces that end between words (see
`components/pieces.py`), so that memory is bounded whatever the documents; it stays one document, on
one side of the split, with one end of text.

Where all documents have as many tokens (a made corpus's `window`) and windows hold a whole number
of them, the offset is 0: a window begins with a document.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from components import faults
from components.pieces import PIECE, encode_long
from components.registry import Spec, UserError, build
from experiments.record import disk_error

if TYPE_CHECKING:
    from components.tokenizer import Tokenizer

FORMAT = 1  # to be raised whenever the same configuration would give other shards
BATCH_BYTES = 4 << 20  # text tokenized at a time
RULE = "validation where blake2b-64(document, key=split_seed) / 2**64 < validation_fraction"


class DataConfig(Protocol):
    """What `prepare` reads of an experiment's `data` section."""

    @property
    def corpus(self) -> Spec: ...
    @property
    def filters(self) -> tuple[Spec, ...]: ...
    @property
    def tokenizer(self) -> Spec: ...
    @property
    def validation_fraction(self) -> float: ...
    @property
    def split_seed(self) -> int: ...


class Dataset:
    """Prepared shards, opened without reading them. Made by `prepare` and `load`.

    Attributes:
        train, val: ids, memory-mapped, (tokens,).
        val_bytes: bytes of text behind each id of `val`, (tokens,).
        fingerprint: hash of the three and of the vocabulary's size; equal means equal data.
        meta: what meta.json holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = _read_meta(folder)
        self.fingerprint: str = self.meta["fingerprint"]
        self.vocab_size: int = self.meta["vocab_size"]
        self.train = _open_shard(folder / "train.bin", self.meta["dtype"])
        self.val = _open_shard(folder / "val.bin", self.meta["dtype"])
        self.val_bytes = _open_shard(folder / "val_bytes.bin", "uint32")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the ids, from its files beside the shards.

        Raises:
            UserError: they have changed since.
        """
        for name, digest in self.meta.get("files", {}).items():
            if _file_digest(self.folder / name) != digest:
                raise UserError(
                    f"{self.folder / name}: changed or gone since the text was prepared; remove "
                    f"the folder {self.folder} and train again, which prepares it again"
                )
        tokenizer: Tokenizer = build("tokenizer", self.meta["tokenizer"])
        tokenizer.load(self.folder)
        return tokenizer

    def windows(self, seq_len: int) -> int:
        """How many windows an epoch has: as many as fit whatever the offset."""
        return max(0, len(self.train) // seq_len - 1)

    def holds_documents(self, seq_len: int) -> bool:
        """Whether a window of `seq_len` is a whole number of documents."""
        window = self.meta.get("window")
        return window is not None and seq_len % window == 0

    def batch(self, step: int, *, seed: int, seq_len: int, global_batch_size: int) -> np.ndarray:
        """The batch of one step: (global_batch_size, seq_len + 1) int64, inputs and last target.

        Raises:
            UserError: the training split has fewer windows than one batch.
        """
        windows = self.windows(seq_len)
        if windows < global_batch_size:
            raise UserError(
                f"data: the training split has {len(self.train):,} tokens, {windows:,} windows of "
                f"seq_len {seq_len:,}, fewer than one batch of {global_batch_size:,}; "
                "take more text, or lower seq_len or global_batch_size"
            )
        places = np.arange(step * global_batch_size, (step + 1) * global_batch_size)
        epochs, places = np.divmod(places, windows)
        starts = np.empty_like(places)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            offset, order = _epoch(seed, epoch, windows, seq_len)
            offset = 0 if self.holds_documents(seq_len) else offset
            mine = epochs == epoch
            starts[mine] = offset + seq_len * order[places[mine]]
        return self._gather(np.asarray(self.train), starts, seq_len)

    def validation(self, tokens: int, seq_len: int) -> tuple[np.ndarray, int]:
        """The fixed validation windows, from the start of the split, and the bytes they predict.

        Of at most `tokens` target tokens: (windows, seq_len + 1) int64. Every target is predicted
        once; a window's first id is only an input, or the last target of the window before.

        Raises:
            UserError: not even one window fits.
        """
        windows = self._reported(tokens, seq_len)
        if windows < 1:
            raise UserError(
                f"data: no validation window of seq_len {seq_len:,} fits: the split has "
                f"{len(self.val):,} tokens and {tokens:,} are asked for; raise "
                "validation_fraction or the evaluation's tokens, or lower seq_len"
            )
        starts = np.arange(windows) * seq_len
        predicted = self.val_bytes[1 : windows * seq_len + 1]
        inputs = self._gather(np.asarray(self.val), starts, seq_len)
        return inputs, int(predicted.sum(dtype=np.int64))

    def tuning(self, tokens: int, seq_len: int) -> np.ndarray:
        """The windows behind those of `validation`, (windows, seq_len + 1): what settings may be
        chosen by without touching what is reported. As many, or as there are: perhaps none."""
        reported = self._reported(tokens, seq_len)
        both = min(2 * reported, (len(self.val) - 1) // seq_len)
        return self._gather(np.asarray(self.val), np.arange(reported, both) * seq_len, seq_len)

    def _reported(self, tokens: int, seq_len: int) -> int:
        """How many windows of the validation split are reported on."""
        return max(0, min(tokens, len(self.val) - 1)) // seq_len

    @staticmethod
    def _gather(ids: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
        out = np.empty((len(starts), seq_len + 1), dtype=np.int64)
        for row, start in zip(out, starts.tolist(), strict=True):
            row[:] = ids[start : start + seq_len + 1]
        return out


@lru_cache(maxsize=2)  # a batch touches at most two epochs as long as it fits in one
def _epoch(seed: int, epoch: int, windows: int, seq_len: int) -> tuple[int, np.ndarray]:
    """(offset in [0, seq_len), order of the windows) of an epoch.

    Sorts raw draws: numpy promises PCG64's stream for ever, but not that of `permutation`.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, epoch]))
    offset = int(draws.random_raw()) % seq_len
    return offset, np.argsort(draws.random_raw(windows), kind="stable")


def recorded(cache: Path, known: Mapping[str, Any], who: str) -> Dataset:
    """The prepared data that a run's provenance names (`known`, its `data`), whatever has become of
    the text since: found by fingerprint, never prepared.

    Args:
        who: the run, for the message.

    Raises:
        UserError: it is not there any more.
    """
    fingerprint = known.get("fingerprint")
    others = sorted(path.parent for path in cache.glob("*/meta.json"))
    for folder in [cache / str(known.get("folder")), *others]:
        if not _is_whole(folder):
            continue
        data = Dataset(folder)
        files = data.meta.get("files"), known.get("files")
        if data.fingerprint == fingerprint and (None in files or files[0] == files[1]):
            return data
    raise UserError(
        f"{who}: its prepared data (fingerprint {fingerprint}) is not in {cache} any more, and "
        "other data would give other numbers; put it back, or train the experiment again from the "
        "same text, which prepares it"
    )


def load(folder: Path) -> Dataset:
    """Opens shards that `prepare` made; imports no torch and reads only meta.json.

    Raises:
        UserError: they are not there or not whole.
    """
    return Dataset(Path(folder))


def prepare(data: DataConfig, cache: Path, *, progress: bool = True) -> Dataset:
    """The shards for `data`, made now if `cache` doesn't have them yet.

    Any number of processes may ask at once: one prepares, the others wait for it. A preparation
    that is killed leaves only a folder that the next one clears away.

    Raises:
        UserError: the corpus can't be read or is empty, or the disk is full.
    """
    key = cache_key(data)
    folder = Path(cache) / key
    if not _is_whole(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f"{key}.lock"):
                if not _is_whole(folder):
                    parts = (data.corpus, *data.filters, data.tokenizer)
                    with faults.blamed("while the text is prepared", parts):
                        _prepare_alone(data, folder, progress)
        except OSError as error:
            raise disk_error(error, folder.parent) from error
    return Dataset(folder)


def cache_key(data: DataConfig) -> str:
    """Hash of everything that decides the shards, the code that reads, filters and tokenizes among
    it; equal text in another place has the same."""
    decided = {
        "format": FORMAT,
        "corpus": [data.corpus.name, data.corpus.build().fingerprint()],
        "filters": [spec.dump(defaults=False) for spec in data.filters],
        "tokenizer": [data.tokenizer.dump(defaults=False), data.tokenizer.build().fingerprint()],
        "split": [data.validation_fraction, data.split_seed],
        "code": [code_of(spec) for spec in (data.corpus, *data.filters, data.tokenizer)],
    }
    text = json.dumps(decided, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def code_of(spec: Spec) -> str:
    """A digest of the code behind a component, of this program too."""
    entry = getattr(spec, "entry", None)  # None: a stand-in of a test, of no module
    return (entry.code or _own_code(entry.cls.__module__)) if entry else ""


@cache
def _own_code(module: str) -> str:
    """Of a module of components/ and those of the room that it uses, but for the registry."""
    names, waiting = set(_ASIDE), [module]
    digests = []
    while waiting:
        name = waiting.pop()
        if name in names or not name.startswith("components.") or name not in sys.modules:
            continue
        names.add(name)
        for member in vars(sys.modules[name]).values():
            waiting.append(str(getattr(member, "__module__", getattr(member, "__name__", ""))))
        digests.append((name, _file_digest(Path(str(sys.modules[name].__file__)))))
    return hashlib.blake2b(repr(sorted(digests)).encode(), digest_size=8).hexdigest()


_ASIDE = ("components.registry", "components.source", "components.imports")


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return "none"


def _prepare_alone(data: DataConfig, folder: Path, progress: bool) -> None:
    """Prepares beside `folder` and renames; the caller holds the lock."""
    for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):  # of one that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    temporary.mkdir()
    try:
        _write_shards(data, temporary, progress)
        if cache_key(data) != folder.name:
            raise UserError(
                f"data: the text of '{data.corpus.name}', or the tokenizer's files, changed while "
                "they were read; nothing is kept: start again when they are complete"
            )
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one
        temporary.replace(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_shards(data: DataConfig, folder: Path, progress: bool) -> None:
    documents = _documents(data, progress)
    tokenizer: Tokenizer = data.tokenizer.build()
    tokenizer.train(lambda: (text for text, held_out in documents("learning") if not held_out))
    tokenizer.save(folder)
    tokenizer_files = sorted(folder.iterdir())

    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    train = _Shard(folder / "train.bin", dtype)
    val = _Shard(folder / "val.bin", dtype)
    val_bytes = _Shard(folder / "val_bytes.bin", "uint32")
    window = getattr(data.corpus.build(), "window", None)
    counts = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    end = [tokenizer.end_of_text]
    with train, val, val_bytes:
        for batch in _batched(documents("tokenizing")):
            for parts, validation, size in _encoded(tokenizer, *batch):
                tokens = 1
                for ids, lengths in parts:
                    (val if validation else train).add(ids)
                    if lengths is not None:
                        val_bytes.add(lengths)
                    tokens += len(ids)
                (val if validation else train).add(end)
                if validation:
                    val_bytes.add([0])
                count = counts["val" if validation else "train"]
                count["documents"] += 1
                count["tokens"] += tokens
                count["bytes"] += size
                window = window if tokens == window else None
    _check_split(data, counts)

    meta = {
        "format": FORMAT,
        "fingerprint": _combined(train, val, val_bytes, tokenizer.vocab_size),
        "files": {path.name: _file_digest(path) for path in tokenizer_files},
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "dtype": dtype,
        "counts": counts,
        **({"window": window} if window is not None else {}),
        "corpus": data.corpus.dump(),
        "filters": [spec.dump() for spec in data.filters],
        "tokenizer": data.tokenizer.dump(),
        "split": {
            "rule": RULE,
            "validation_fraction": data.validation_fraction,
            "split_seed": data.split_seed,
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "tokenizers")},
        },
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")


def _documents(data: DataConfig, progress: bool) -> Callable[[str], Iterator[tuple[str, bool]]]:
    """A function that starts a pass over (document, whether it is held out for validation)."""
    corpus = data.corpus.build()
    filters = [spec.build() for spec in data.filters]

    def start(what: str) -> Iterator[tuple[str, bool]]:
        stream = corpus.documents()
        for keep in filters:
            stream = keep(stream)
        hidden = None if progress else True  # None: shown on a terminal only
        with tqdm(unit="B", unit_scale=True, desc=f"data: {what}", disable=hidden) as bar:
            for document in stream:
                if not document:
                    continue
                raw = document.encode()
                bar.update(len(raw))
                held_out = is_held_out(raw, data.split_seed, data.validation_fraction)
                del raw  # of a long document as much again
                yield document, held_out

    return start


def is_held_out(document: bytes, split_seed: int, fraction: float) -> bool:
    """Whether a document is in the validation split, by `RULE`."""
    drawn = hashlib.blake2b(document, digest_size=8, key=str(split_seed).encode()).digest()
    return int.from_bytes(drawn, "big") / 2**64 < fraction


def _batched(
    documents: Iterator[tuple[str, bool]],
) -> Iterator[tuple[list[str], list[bool], list[int]]]:
    """(texts, held out or not, bytes) of about `BATCH_BYTES` together, a long one by itself."""
    texts: list[str] = []
    held_out: list[bool] = []
    sizes: list[int] = []
    total = 0
    for text, validation in documents:
        if len(text) > PIECE:
            if texts:
                yield texts, held_out, sizes
                texts, held_out, sizes, total = [], [], [], 0
            yield [text], [validation], [len(text.encode())]
            continue
        texts.append(text)
        held_out.append(validation)
        sizes.append(len(text.encode()))
        total += sizes[-1]
        if total >= BATCH_BYTES:
            yield texts, held_out, sizes
            texts, held_out, sizes, total = [], [], [], 0
    if texts:
        yield texts, held_out, sizes


def _encoded(
    tokenizer: Tokenizer, texts: list[str], held_out: list[bool], sizes: list[int]
) -> Iterator[tuple[Iterable[tuple[np.ndarray, np.ndarray | None]], bool, int]]:
    """((ids, bytes of text behind each where held out) of each part, held out, bytes) of each."""
    if len(texts[0]) > PIECE:  # which is alone
        yield encode_long(tokenizer, texts[0], lengths=held_out[0]), held_out[0], sizes[0]
        return
    for text, ids, validation, size in zip(
        texts, tokenizer.encode_batch(texts), held_out, sizes, strict=True
    ):
        lengths = tokenizer.byte_lengths(text, ids) if validation else None
        yield [(ids, lengths)], validation, size


def _check_split(data: DataConfig, counts: dict[str, dict[str, int]]) -> None:
    name, total = data.corpus.name, sum(count["documents"] for count in counts.values())
    if total == 0:
        after = " after its filters" if data.filters else ""
        raise UserError(f"data.corpus: '{name}' has no text{after}; check its files or filters")
    for split, wanted in (("train", True), ("val", data.validation_fraction > 0)):
        if wanted and counts[split]["documents"] == 0:
            raise UserError(
                f"data: of {total} documents none is in the {split} split (validation_fraction "
                f"{data.validation_fraction:g}, split_seed {data.split_seed}); change these, or "
                "cut the text into more documents (corpus text: separator, document_bytes)"
            )


class _Shard:
    """A file of integers that grows, hashed on the way."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = dtype
        self.hash = hashlib.blake2b(digest_size=16)
        self.file = path.open("wb", buffering=1 << 20)

    def add(self, *parts: Any) -> None:
        for part in parts:
            raw = np.asarray(part).astype(self.dtype).tobytes()
            self.hash.update(raw)
            self.file.write(raw)

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *error: object) -> None:
        # Closed whatever happens; what failed first is what the caller hears of.
        try:
            if error[0] is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()


def _combined(train: _Shard, val: _Shard, val_bytes: _Shard, vocab_size: int) -> str:
    parts = [shard.hash.hexdigest() for shard in (train, val, val_bytes)]
    return hashlib.blake2b(repr((parts, vocab_size)).encode(), digest_size=10).hexdigest()


def _read_meta(folder: Path) -> dict[str, Any]:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        sizes = {"uint16": 2, "uint32": 4}
        counts, item = meta["counts"], sizes[meta["dtype"]]
        for name, tokens, width in (
            ("train.bin", counts["train"]["tokens"], item),
            ("val.bin", counts["val"]["tokens"], item),
            ("val_bytes.bin", counts["val"]["tokens"], 4),
        ):
            if (folder / name).stat().st_size != tokens * width:
                raise ValueError(f"{name} is not {tokens} tokens long")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder}: not whole prepared data ({error}); remove it and prepare again"
        ) from error
    return meta


def _is_whole(folder: Path) -> bool:
    try:
        _read_meta(folder)
    except UserError:
        return False
    return True


def _open_shard(path: Path, dtype: str) -> np.ndarray:
    if path.stat().st_size == 0:  # which mmap refuses
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def vocab_size(data: DataConfig, cache: Path) -> int:
    """How many ids the tokenizer has; tokenizes the corpus only where it can't be known before."""
    asked = data.tokenizer.params.get("vocab_size")  # bpe: the table has exactly that many rows
    if isinstance(asked, int):
        return asked
    if data.tokenizer.name == "characters":
        return prepare(data, cache, progress=False).vocab_size
    return int(data.tokenizer.build().vocab_size)
