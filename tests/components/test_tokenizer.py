"""What tokenizers promise: text comes back, bytes add up, and no text spells the end of text."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.registry import UserError
from components.tokenizer import BPE, Bytes, Characters, HuggingFace, Tokenizer

TEXTS = [
    "The cat sat on the mat. The cat sat.",
    "été à la plage 日本語 🙂\n\n  def f(x):\n\treturn x",
] * 3
SPELT = "a<|endoftext|> b</s><|endoftext|>"


def learnt(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.train(lambda: iter(TEXTS))
    return tokenizer


BPE_400 = BPE(vocab_size=400)
learnt(BPE_400)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> dict[str, Tokenizer]:
    """As others publish: a tokenizer.json, GPT-2's pair of files, and one that lowercases."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    root = tmp_path_factory.mktemp("published")
    BPE_400.save(root)
    gpt2 = root / "gpt2"
    gpt2.mkdir()
    model = json.loads((root / "tokenizer.json").read_text())["model"]
    (gpt2 / "encoder.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (gpt2 / "vocab.bpe").write_text("#version: 0.2\n" + merges + "\n")
    lower = tokenizers.Tokenizer(
        models.WordLevel({"[UNK]": 0, "the": 1, "cat": 2, "</s>": 3, "été": 4}, unk_token="[UNK]")
    )
    lower.normalizer = normalizers.Lowercase()
    lower.pre_tokenizer = pre_tokenizers.Whitespace()
    lower.save(str(root / "lower.json"))
    return {
        "tokenizer.json": HuggingFace(path=str(root)),
        "gpt2": HuggingFace(path=str(gpt2)),
        "lower": HuggingFace(path=str(root / "lower.json")),
    }  # fmt: skip


@pytest.mark.parametrize("tokenizer", [Bytes(), BPE_400], ids=["bytes", "bpe"])
@settings(max_examples=200, deadline=None)
@given(text=st.text() | st.sampled_from([*TEXTS, SPELT, "\x00", "e\u0301", " \n \r\n\u2028 "]))
def test_any_text_comes_back_and_its_bytes_add_up(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    lengths = tokenizer.byte_lengths(text, ids)
    assert len(lengths) == len(ids)
    assert lengths.sum() == len(text.encode())
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text


@given(text=st.text())
def test_characters_come_back_where_known(text: str) -> None:
    tokenizer = learnt(Characters())
    known = set("".join(TEXTS))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == "".join(c if c in known else "\ufffd" for c in text)
    assert tokenizer.byte_lengths(text, ids).tolist() == [len(c.encode()) for c in text]
    assert tokenizer.vocab_size == len(known) + 2


def test_each_token_has_the_bytes_that_it_spells() -> None:
    text = TEXTS[1]
    ids = BPE_400.encode(text)
    pieces = [BPE_400.decode([i]) for i in ids]
    lengths = BPE_400.byte_lengths(text, ids)
    whole = [(n, p) for n, p in zip(lengths, pieces, strict=True) if "\ufffd" not in p]
    assert len(whole) > 10
    assert all(n == len(p.encode()) for n, p in whole)


def test_bpe_compresses_what_it_has_seen_and_is_deterministic() -> None:
    assert len(BPE_400.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    code = (
        "from components.tokenizer import BPE\nfrom tests.components.test_tokenizer import TEXTS\n"
        "b = BPE(vocab_size=400); b.train(lambda: iter(TEXTS)); print(b.model.to_str(), end='')"
    )
    root = Path(__file__).resolve().parents[2]
    other = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True)
    assert other.stdout.decode() == BPE_400.model.to_str()


def test_bpe_learns_from_no_more_than_train_bytes() -> None:
    def endless():
        while True:
            yield "word after word\n"

    tokenizer = BPE(vocab_size=300, train_bytes=10_000)
    tokenizer.train(endless)
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("word after word")) == 3


def test_bpe_is_given_lines_together_and_a_huge_one_in_pieces(monkeypatch) -> None:
    from components import tokenizer

    lines = "a\nbc\r\n\u2028def\x85\rghi j"
    together = list(tokenizer._sample(iter([lines, "k"]), 100, piece=3))
    assert together == ["a\n", "bc\r\n", "\u2028", "def\x85", "\r", "ghi j", "k"]
    monkeypatch.setattr(tokenizer, "PIECE", 1000)
    parts = list(tokenizer._sample(iter(["word " * 9999]), 10**6, piece=100))
    assert "".join(parts) == "word " * 9999
    assert max(map(len, parts)) <= 100
    assert all(part.startswith(" word") for part in parts[1:])


@pytest.mark.parametrize("make", [Bytes, Characters, lambda: BPE(vocab_size=400)])
def test_saved_and_loaded_is_the_same(tmp_path: Path, make) -> None:
    tokenizer, again = learnt(make()), make()
    tokenizer.save(tmp_path)
    again.load(tmp_path)
    assert again.encode(SPELT) == tokenizer.encode(SPELT)
    assert (again.vocab_size, again.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)


@pytest.mark.parametrize("tokenizer", [Characters(), BPE()])
def test_an_untrained_tokenizer_says_what_to_do(tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="prepare the data first"):
        tokenizer.encode("x")


@pytest.mark.parametrize("form", ["tokenizer.json", "gpt2"])
def test_a_published_byte_level_tokenizer_encodes_as_its_origin(published, form: str) -> None:
    for text in [*TEXTS, SPELT]:
        ids = published[form].encode(text)
        assert ids == BPE_400.encode(text)
        assert published[form].decode([*ids, published[form].end_of_text]) == text
        assert published[form].end_of_text == 0 not in ids
        assert published[form].byte_lengths(text, ids).sum() == len(text.encode())


def test_bytes_add_up_where_a_tokenizer_changes_the_text(published) -> None:
    lower = published["lower"]
    text = "THE  cat ÉTÉ </s> "
    ids = lower.encode(text)
    assert lower.end_of_text == 3 not in ids
    assert ids[:3] == [1, 2, 4]
    lengths = lower.byte_lengths(text, ids)
    assert lengths[:3].tolist() == [3, 5, 6]
    assert lengths.sum() == len(text.encode())


def test_a_saved_copy_needs_the_published_files_no_more(published, tmp_path: Path) -> None:
    original = published["lower"]
    original.save(tmp_path)
    copy = HuggingFace(path="gone")
    copy.load(tmp_path)
    assert copy.encode("the cat") == original.encode("the cat") == [1, 2]
    assert (copy.vocab_size, copy.end_of_text) == (5, 3)
    assert copy.fingerprint() == original.fingerprint() != published["gpt2"].fingerprint()


def test_what_a_published_tokenizer_lacks_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.path: can't load"):
        HuggingFace(path=str(tmp_path)).encode("x")
    BPE_400.save(tmp_path)
    named = HuggingFace(path=str(tmp_path), end_of_text_token="<end>")
    with pytest.raises(UserError, match=r"no token '<end>'.*<\|endoftext\|>"):
        named.encode("x")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has neither tokenizer"):
        HuggingFace(path=str(tmp_path)).encode("x")


def test_ids_are_unsigned_arrays() -> None:
    for tokenizer in (Bytes(), learnt(Characters()), BPE_400):
        first, empty = tokenizer.encode_batch(["ab", ""])
        assert isinstance(first, np.ndarray)
        assert first.dtype.kind == "u"
        assert len(empty) == 0


def test_a_replaced_or_marked_tokenizer_file_is_what_is_loaded(tmp_path: Path) -> None:
    BPE_400.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    first = HuggingFace(path=str(tmp_path)).fingerprint()
    times, whole = file.stat(), file.read_text()
    file.write_bytes(b"\xef\xbb\xbf" + whole.encode())
    (tmp_path / "tokenizer_config.json").write_bytes(b'\xef\xbb\xbf{"eos_token": null}')
    assert HuggingFace(path=str(tmp_path)).fingerprint() == first
    other = learnt(BPE(vocab_size=300))
    other.save(tmp_path)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    replaced = HuggingFace(path=str(tmp_path))
    assert replaced.fingerprint() != first
    assert replaced.encode(TEXTS[0]) == other.encode(TEXTS[0])
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not read"):
        HuggingFace(path=str(tmp_path)).encode("x")
