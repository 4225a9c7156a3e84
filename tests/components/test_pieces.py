"""What tokenizing in pieces promises: the ids of the whole text, and its bytes."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.pieces import encode_long, pieces
from components.tokenizer import BPE, Bytes, Characters, HuggingFace, Tokenizer

WORDS = "the cat sat on été Ωμέγα 日本語 I'm 12345 x=y; can't 🙂 e\u0301 https://a.b/c".split()
SPACES = [" "] * 20 + ["\n", "\n\n", "  ", "\n  ", "\t", ". ", ", ", "\r\n", " \u00a0"]


def prose(seed: int, words: int) -> str:
    draws = random.Random(seed)
    return "".join(draws.choice(WORDS) + draws.choice(SPACES) for _ in range(words))


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    made: dict[str, Tokenizer] = {"bytes": Bytes(), "characters": Characters()}
    made["bpe"] = BPE(vocab_size=400)
    for each in made.values():
        each.train(lambda: iter([prose(0, 400)]))
    folder = tmp_path_factory.mktemp("published")
    metaspace = pre_tokenizers.Metaspace()
    prepend = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    for name, normalizer, pre in (
        ("metaspace", None, metaspace),
        ("prepend", prepend, None),
        ("prefix space", normalizers.NFC(), digits),
        ("lowercase", normalizers.Lowercase(), pre_tokenizers.Whitespace()),
    ):
        model = tokenizers.Tokenizer(models.BPE(unk_token="[UNK]"))
        trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["[UNK]", "</s>"],
                                      show_progress=False, max_token_length=8)  # fmt: skip
        model.normalizer = normalizer or normalizers.Sequence([])
        model.pre_tokenizer = pre or metaspace
        model.train_from_iterator([prose(0, 400)], trainer)
        if pre is None:
            model.pre_tokenizer = pre_tokenizers.Sequence([])
        model.decoder = decoders.Metaspace()
        model.save(str(folder / f"{name}.json"))
        made[name] = HuggingFace(path=str(folder / f"{name}.json"))
    return made


NAMES = ["bytes", "characters", "bpe", "metaspace", "prepend", "prefix space", "lowercase"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(250, 600))
def test_pieces_have_the_ids_of_the_whole_text(tokenizers, name: str, seed: int, size: int) -> None:
    tokenizer, text = tokenizers[name], prose(seed, 400)
    parts = list(encode_long(tokenizer, text, lengths=True, size=size))
    whole = tokenizer.encode_batch([text])[0]
    assert np.array_equal(np.concatenate([ids for ids, _ in parts]), whole)
    lengths = np.concatenate([lengths for _, lengths in parts])
    assert len(lengths) == len(whole)
    assert lengths.sum() == len(text.encode())
    assert lengths.min() >= 0


@given(text=st.text(max_size=300), size=st.integers(1, 50))
def test_any_text_is_its_pieces(text: str, size: int) -> None:
    found = list(pieces(text, size))
    assert "".join(piece for _, piece in found) == text
    assert all(0 < len(piece) <= size for _, piece in found)
    before = 0
    for context, piece in found:
        assert text[:before].endswith(context)
        before += len(piece)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_add_up_where_no_place_to_cut_is_found(tokenizers, name: str) -> None:
    text = "日本語" * 50 + "abc" * 50
    total = 0
    for ids, lengths in encode_long(tokenizers[name], text, lengths=True, size=37):
        assert lengths is not None
        assert len(ids) == len(lengths)
        total += int(lengths.sum())
    assert total == len(text.encode())
