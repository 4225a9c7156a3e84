"""What prepared data promises: every run the same batches, nothing twice, nothing half."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.registry import UserError, spec
from experiments import data
from experiments.data import Dataset, load, prepare

FORK = multiprocessing.get_context("fork")
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
TEXTS = [f"document {i}: " + "äb c" * (i % 7) + "." for i in range(400)]


class Lines:
    """A corpus of given texts that counts how often it is read; a stand-in for a Spec as well."""

    name = "lines"

    def __init__(self, texts: list[str], log: Path | None = None) -> None:
        self.texts, self.log = texts, log

    def build(self) -> Lines:
        return self

    def dump(self) -> dict:
        return {"name": self.name}

    def fingerprint(self) -> str:
        return repr(self.texts)

    def documents(self):
        if self.log:
            with self.log.open("a") as file:
                file.write("read\n")
        yield from self.texts


def config(corpus=None, tokenizer="bytes", filters=(), fraction=0.1, seed=0) -> SimpleNamespace:
    return SimpleNamespace(
        corpus=corpus if hasattr(corpus, "build") else Lines(corpus or TEXTS),
        filters=tuple(spec("filter", each) for each in filters),
        tokenizer=spec("tokenizer", tokenizer),
        validation_fraction=fraction,
        split_seed=seed,
    )


def documents_of(dataset: Dataset, ids: np.ndarray) -> list[str]:
    ends = np.flatnonzero(ids == dataset.meta["end_of_text"])
    assert len(ids) == 0 or ends[-1] == len(ids) - 1
    return [dataset.tokenizer.decode(part[part != dataset.meta["end_of_text"]].tolist())
            for part in np.split(ids, ends + 1)[:-1]]  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return prepare(config(), tmp_path_factory.mktemp("cache"), progress=False)


def flat(dataset: Dataset, steps: range, seq_len: int, size: int, seed: int = 0) -> np.ndarray:
    batches = [
        dataset.batch(step, seed=seed, seq_len=seq_len, global_batch_size=size) for step in steps
    ]
    return np.concatenate(batches)


# ── shards ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", {"name": "bpe", "vocab_size": 300}])
def test_shards_hold_every_document_once_in_order_and_count_its_bytes(tmp_path, tokenizer) -> None:
    made = prepare(config(tokenizer=tokenizer), tmp_path, progress=False)
    train, val = documents_of(made, made.train), documents_of(made, made.val)
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    counts = made.meta["counts"]
    assert counts["train"]["documents"] == len(train)
    assert counts["val"]["documents"] == len(val)
    assert counts["train"]["bytes"] == sum(len(text.encode()) for text in train)
    assert counts["val"]["bytes"] == sum(len(t.encode()) for t in val) == made.val_bytes.sum()
    assert (made.val_bytes[made.val == made.meta["end_of_text"]] == 0).all()
    assert made.train.dtype == np.uint16
    assert made.train.max() < made.vocab_size
    assert made.fingerprint == load(made.folder).fingerprint


def test_equal_documents_are_on_one_side_whatever_surrounds_them(tmp_path: Path) -> None:
    once = prepare(config(), tmp_path, progress=False)
    twice = prepare(config(TEXTS[::-1] + TEXTS), tmp_path, progress=False)
    sides = [set(documents_of(twice, ids)) for ids in (twice.train, twice.val)]
    assert not sides[0] & sides[1]
    assert sides[1] == set(documents_of(once, once.val))
    assert 0.05 < len(sides[1]) / len(TEXTS) < 0.15
    other = prepare(config(seed=1), tmp_path, progress=False)
    assert set(documents_of(other, other.val)) != sides[1]


def test_the_tokenizer_learns_from_the_training_split_alone(tmp_path: Path) -> None:
    marked = prepare(config([f"ß {i}" for i in range(100)]), tmp_path, progress=False)
    held_out = documents_of(marked, marked.val)  # a text keeps its side wherever it stands
    made = prepare(config(TEXTS + held_out, "characters"), tmp_path, progress=False)
    assert not any("\ufffd" in text for text in documents_of(made, made.train))
    seen = [text for text in documents_of(made, made.val) if "\ufffd" in text]
    assert seen == [text.replace("ß", "\ufffd") for text in held_out] != []


def test_filters_run_before_the_split(tmp_path: Path) -> None:
    filters = ["dedup", {"name": "min_length", "characters": 20}]
    made = prepare(config(TEXTS * 2, filters=filters), tmp_path, progress=False)
    kept = documents_of(made, made.train) + documents_of(made, made.val)
    assert sorted(kept) == sorted(text for text in TEXTS if len(text) >= 20)


@pytest.mark.parametrize("tokenizer", ["bytes", "characters", {"name": "bpe", "vocab_size": 300}])
@pytest.mark.parametrize("fraction", [0.1, 0.9])
def test_a_long_document_in_pieces_gives_the_same_shards(
    tmp_path: Path, monkeypatch, tokenizer, fraction: float
) -> None:
    texts = [*TEXTS[:99], " ".join(TEXTS[:200]), *TEXTS[99:]]
    made = prepare(config(texts, tokenizer, fraction=fraction), tmp_path / "a", progress=False)
    sizes: list[int] = []

    def measured(trained, text: str, **params):
        for ids, lengths in encode_long(trained, text, size=500, **params):
            sizes.append(len(ids))
            yield ids, lengths

    encode_long = data.encode_long
    monkeypatch.setattr(data, "encode_long", measured)
    monkeypatch.setattr(data, "PIECE", 500)
    again = prepare(config(texts, tokenizer, fraction=fraction), tmp_path / "b", progress=False)
    assert again.fingerprint == made.fingerprint
    assert again.meta["counts"] == made.meta["counts"]
    assert len(sizes) > 5
    assert max(sizes) <= 1000


def test_shards_of_ordinary_text_never_change(tmp_path: Path) -> None:
    wanted = {"bytes": "b519862df37b926e4353", "characters": "08ad8237992d057751df"}
    for name, fingerprint in wanted.items():
        assert prepare(config(tokenizer=name), tmp_path, progress=False).fingerprint == fingerprint


def test_text_that_changes_while_it_is_read_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS))

    class Changing(Lines):
        def fingerprint(self) -> str:
            return path.read_text()

        def documents(self):
            yield from path.read_text().split("\n")
            path.write_text(path.read_text() + "more")

    with pytest.raises(UserError, match="changed while they were read; nothing is kept"):
        prepare(config(Changing(TEXTS)), tmp_path / "cache", progress=False)
    assert not [found for found in (tmp_path / "cache").iterdir() if found.is_dir()]


def test_large_vocabularies_get_wide_ids(tmp_path: Path) -> None:
    tokenizer = {"name": "bpe", "vocab_size": 1 << 17}
    assert prepare(config(tokenizer=tokenizer), tmp_path, progress=False).train.dtype == np.uint32


# ── the cache ──────────────────────────────────────────────────────────────────────────────────


def test_the_same_text_elsewhere_is_not_prepared_again(tmp_path: Path, monkeypatch) -> None:
    def files(folder: str, text: str) -> SimpleNamespace:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "text.txt").write_text(text)
        pattern = str(tmp_path / folder / "*.txt")
        return config(spec("corpus", {"name": "text", "files": pattern, "separator": "\n"}))

    first = prepare(files("a", "\n".join(TEXTS)), tmp_path / "cache", progress=False)
    monkeypatch.setattr(data, "_write_shards", lambda *_: pytest.fail("prepared twice"))
    again = prepare(files("b", "\n".join(TEXTS)), tmp_path / "cache", progress=False)
    assert again.folder == first.folder
    monkeypatch.undo()
    changed = prepare(files("a", "\n".join(TEXTS) + "!"), tmp_path / "cache", progress=False)
    assert changed.folder != first.folder
    assert changed.fingerprint != first.fingerprint


def test_whatever_decides_the_shards_is_in_the_key(tmp_path: Path) -> None:
    configs = [
        config(), config(TEXTS[1:]), config(tokenizer="characters"), config(filters=["dedup"]),
        config(fraction=0.2), config(seed=1), config(tokenizer={"name": "bpe", "vocab_size": 300}),
        config(tokenizer={"name": "bpe", "vocab_size": 300, "train_bytes": 10}),
    ]  # fmt: skip
    assert len({data.cache_key(each) for each in configs}) == len(configs)
    assert data.cache_key(config()) == data.cache_key(config())


def test_many_processes_at_once_prepare_once(tmp_path: Path) -> None:
    log, barrier = tmp_path / "log", FORK.Barrier(4)

    def start() -> None:
        barrier.wait()
        made = prepare(config(Lines(TEXTS, log)), tmp_path / "cache", progress=False)
        made.batch(0, seed=0, seq_len=8, global_batch_size=2)

    processes = [FORK.Process(target=start) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "read\n"


def test_a_killed_preparation_leaves_nothing_that_breaks_the_next(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(data, "BATCH_BYTES", 100)
    halfway = FORK.Event()

    class Stuck(Lines):
        def documents(self):
            yield from self.texts[:200]
            halfway.set()
            time.sleep(600)

    def start() -> None:
        prepare(config(Stuck(TEXTS)), tmp_path, progress=False)

    process = FORK.Process(target=start, daemon=True)
    process.start()
    assert halfway.wait(60)
    assert list(tmp_path.glob("*.tmp-*"))
    assert process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    made = prepare(config(), tmp_path, progress=False)
    assert (
        made.meta["counts"]["train"]["documents"] + made.meta["counts"]["val"]["documents"] == 400
    )
    assert not list(tmp_path.glob("*.tmp-*"))


def test_a_full_disk_is_one_line_and_leaves_no_half(tmp_path: Path, monkeypatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(data.os, "fsync", full)
    with pytest.raises(UserError, match="no space left on the disk"):
        prepare(config(), tmp_path, progress=False)
    assert [path.suffix for path in tmp_path.iterdir()] in ([], [".lock"])
    monkeypatch.undo()
    assert len(prepare(config(), tmp_path, progress=False).train)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "val_bytes.bin", "meta.json"])
def test_damaged_shards_are_told_by_load_and_made_again_by_prepare(tmp_path, name: str) -> None:
    made = prepare(config(), tmp_path, progress=False)
    whole = (made.folder / name).read_bytes()
    (made.folder / name).write_bytes(whole[:-3])
    with pytest.raises(UserError, match="not whole prepared data"):
        load(made.folder)
    prepare(config(), tmp_path, progress=False)
    assert (made.folder / name).read_bytes() == whole


def test_shards_can_be_read_where_nothing_can_be_written(tmp_path: Path, monkeypatch) -> None:
    prepare(config(), tmp_path, progress=False)
    monkeypatch.setattr(data, "FileLock", lambda _: pytest.fail("took a lock"))
    assert prepare(config(), tmp_path, progress=False).fingerprint


# ── batches ────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=30, deadline=None)
@given(st.data(), st.integers(1, 60), st.integers(1, 9), st.integers(0, 2**63))
def test_a_batch_depends_on_seed_and_step_alone(dataset, draw, seq_len, size, seed) -> None:
    steps = draw.draw(st.permutations(range(6)))
    forwards = flat(dataset, range(6), seq_len, size, seed).reshape(6, size, seq_len + 1)
    fresh = load(dataset.folder)
    for step in steps:
        batch = fresh.batch(step, seed=seed, seq_len=seq_len, global_batch_size=size)
        assert batch.dtype == np.int64
        assert np.array_equal(batch, forwards[step])


def test_small_batches_are_the_large_ones_in_pieces(dataset: Dataset) -> None:
    assert np.array_equal(flat(dataset, range(12), 16, 2), flat(dataset, range(4), 16, 6))


def test_an_epoch_has_every_window_once_and_the_next_another_order(dataset: Dataset) -> None:
    seq_len, windows = 16, dataset.windows(16)
    size = windows - 3  # so that the second batch goes from one epoch into the next
    sequences = flat(dataset, range(3), seq_len, size)
    epochs = [sequences[:windows], sequences[windows : 2 * windows]]
    ids = np.asarray(dataset.train)
    for number, epoch in enumerate(epochs):
        offset, order = data._epoch(0, number, windows, seq_len)
        tiles = [ids[offset + i * seq_len : offset + (i + 1) * seq_len + 1] for i in range(windows)]
        assert sorted(map(tuple, epoch)) == sorted(map(tuple, tiles))
        assert sorted(order) == list(range(windows))
        assert 0 <= offset < seq_len
    assert not np.array_equal(epochs[0], epochs[1])
    end = (seq_len - 1) + windows * seq_len + 1  # of the last window at the largest offset
    assert end <= len(ids) < end + seq_len
    assert not np.array_equal(flat(dataset, range(1), seq_len, size, seed=1), epochs[0][:size])


def test_the_order_of_windows_never_changes_between_versions() -> None:
    offset, order = data._epoch(7, 3, 8, 16)
    assert (offset, order.tolist()) == (6, [1, 3, 6, 2, 4, 0, 7, 5])


def test_validation_is_the_start_of_its_split_and_counts_its_bytes(dataset: Dataset) -> None:
    inputs, size = dataset.validation(100, 16)
    assert inputs.shape == (6, 17)
    assert inputs.dtype == np.int64
    assert np.array_equal(inputs[:, 1:].ravel(), dataset.val[1:97])
    assert np.array_equal(inputs[1:, 0], inputs[:-1, -1])
    text = dataset.tokenizer.decode(dataset.val[1:97].tolist())
    assert size == len(text.encode())
    everything, _ = dataset.validation(10**9, 16)
    assert len(everything) == (len(dataset.val) - 1) // 16
    assert len(dataset.validation(10**9, len(dataset.val) - 1)[0]) == 1
    with pytest.raises(UserError, match="no validation window"):
        dataset.validation(10**9, len(dataset.val))  # the first id has nothing to predict it


# ── what a person can get wrong ────────────────────────────────────────────────────────────────


def test_too_little_text_for_a_batch_says_how_much_there_is(dataset: Dataset) -> None:
    with pytest.raises(UserError, match=r"the training split has [\d,]+ tokens, \d+ windows of"):
        dataset.batch(0, seed=0, seq_len=512, global_batch_size=100)
    with pytest.raises(UserError, match="no validation window of seq_len 100,000 fits"):
        dataset.validation(10**6, 100_000)
    with pytest.raises(UserError, match="raise validation_fraction or the evaluation's tokens"):
        dataset.validation(10, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"corpus": ["", ""]}, "'lines' has no text; check its files"),
        ({"corpus": ["a"], "filters": ["min_length"]}, "'lines' has no text after its filters"),
        ({"corpus": ["a", "b"], "fraction": 1e-9}, "of 2 documents none is in the val split"),
        ({"corpus": ["a", "b"], "fraction": 1.0}, "of 2 documents none is in the train split"),
    ],
)
def test_text_that_cannot_be_split_is_one_line(tmp_path: Path, wrong, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepare(config(**wrong), tmp_path, progress=False)
    assert "\n" not in str(error.value)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_progress_goes_to_stderr_of_a_terminal(tmp_path: Path, capsys, monkeypatch) -> None:
    prepare(config(), tmp_path / "log", progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    prepare(config(), tmp_path, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "data: tokenizing" in err
