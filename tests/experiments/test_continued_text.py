"""What follows a prompt is decoded with it and then cut; streamed, it is the same text."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
from lm_eval.api.instance import Instance

from components import registry
from components.decoder import Decoder
from components.tokenizer import Tokenizer
from experiments.generate import Printer, Sampling, Text, generate
from experiments.lm import CeterisLM
from tests.experiments.test_generate import Scripted

WORDS = ["▁the", "▁cat", "▁over", "▁dog", "▁", "s", ".", "▁naïve", "é", "日本", "▁\n"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece(folder: Path, decoder: str) -> Tokenizer:
    """As SentencePiece's tokenizers are published: by Metaspace, or as Llama's, with bytes."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pieces = [*SPECIAL, *BYTES, *WORDS]
    vocabulary = [(piece, -1.0 - i / 100) for i, piece in enumerate(pieces)]
    model = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    model.add_special_tokens(SPECIAL)
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    if decoder == "llama":
        model.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    model.save(str(folder / "tokenizer.json"))
    return registry.build("tokenizer", {"name": "huggingface", "path": str(folder)})


def lower_case(folder: Path) -> Tokenizer:
    """As BERT's: lower case, no spaces in the tokens, [CLS] and [SEP] by a post-processor."""
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    words = ["[UNK]", "[CLS]", "[SEP]", "the", "cat", "over", "dog", "##s", ".", "naive"]
    model = tokenizers.Tokenizer(
        models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    model.add_special_tokens(words[:3])
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    model.decoder = decoders.WordPiece()
    model.save(str(folder / "tokenizer.json"))
    return registry.build("tokenizer", {"name": "huggingface", "path": str(folder)})


def learnt(name: str, **more: Any) -> Tokenizer:
    tokenizer: Tokenizer = registry.build("tokenizer", {"name": name, **more})
    tokenizer.train(lambda: iter(["the cat over the dog. é 日本 🙂 naïve\n"] * 3))
    return tokenizer


KINDS = ("bytes", "characters", "bpe", "metaspace", "llama", "lower case")


def tokenizer_of(kind: str, folder: Path) -> Tokenizer:
    if kind in ("metaspace", "llama"):
        return sentencepiece(folder, kind)
    if kind == "lower case":
        return lower_case(folder)
    return learnt(kind, vocab_size=300) if kind == "bpe" else learnt(kind)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return tokenizer_of(request.param, tmp_path)


def pieces(tokenizer: Tokenizer, before: list[int], new: list[int]) -> list[str]:
    text = Text(tokenizer, before)
    return [*(text.add(token) for token in new), text.end()]


PROMPTS = ("", "the cat", " the cat ", "The  Cat", "naïve é 日本", "a <s> b</s><|endoftext|>", "\n")


def test_pieces_are_together_the_text_decoded_as_a_whole(tokenizer: Tokenizer) -> None:
    draw = random.Random(0)
    for round_ in range(60):
        before = tokenizer.encode(PROMPTS[round_ % len(PROMPTS)])
        new = [draw.randrange(tokenizer.vocab_size) for _ in range(draw.randrange(40))]
        if round_ % 2:  # of a real text: characters of several tokens
            new = tokenizer.encode("the cats 日本 🙂é. naïve dog\n\n")[draw.randrange(6) :]
        whole, head = tokenizer.decode([*before, *new]), tokenizer.decode(before)
        text = tokenizer.continuation(before, new)
        assert "".join(pieces(tokenizer, before, new)) == text
        # Llama's decoder takes back what single bytes spelt when a wrong one follows.
        assert text == whole[len(head) :] if whole.startswith(head) else "\ufffd" in text


def test_a_character_of_several_tokens_comes_at_once(tokenizer: Tokenizer) -> None:
    before, new = tokenizer.encode("the cat"), tokenizer.encode("é日🙂 the dog")
    assert not any("\ufffd" in piece for piece in pieces(tokenizer, before, new)) or (
        "\ufffd" in tokenizer.decode(new)  # which the tokenizer itself does not know
    )


@pytest.mark.parametrize("kind", ["metaspace", "llama"])
def test_the_space_before_the_first_new_word_is_kept(kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(kind, tmp_path)
    script = [tokenizer.encode("over")[0], tokenizer.encode("dog")[0], tokenizer.end_of_text]
    shown = printed(tokenizer, "the cat", script)
    assert shown == "the cat over dog\n"
    assert printed(tokenizer, "", script) == "over dog\n"  # a document's first word has none


def printed(tokenizer: Tokenizer, prompt: str, *scripts: list[int], tokens: int = 40) -> str:
    """What is put out for a model that says `scripts`; the same as its whole texts."""
    stream = io.StringIO()
    page = Printer(prompt, len(scripts), stream.write)
    model = cast(Decoder, Scripted(*scripts, vocabulary=tokenizer.vocab_size))
    how = Sampling(temperature=0, max_tokens=tokens)
    found = generate(model, tokenizer, prompt, how, len(scripts), page.write)
    assert stream.getvalue() == f"{'─' * 20}\n".join(f"{prompt}{r.text}\n" for r in found)
    return stream.getvalue()


def test_a_prompt_stays_as_it_was_written(tmp_path: Path) -> None:
    tokenizer = lower_case(tmp_path)
    over, dog, end = (tokenizer.model.token_to_id(word) for word in ("over", "dog", "[SEP]"))  # type: ignore[attr-defined]
    for prompt in ("The CAT", "The CAT "):  # the tokens have no space at the end
        assert printed(tokenizer, prompt, [over, dog, end]).lower() == "the cat over dog\n"
        assert printed(tokenizer, prompt, [over, dog, end]).startswith("The CAT ")


def test_samples_stand_one_under_the_other_as_they_end(tmp_path: Path) -> None:
    tokenizer = learnt("bytes")
    a, b, end = 97, 98, 256
    lines = printed(tokenizer, "x", [a, a, a, end], [b, end, b, b], [a, b, end, a]).splitlines()
    assert lines == ["xaaa", "─" * 20, "xb", "─" * 20, "xab"]


def test_each_token_is_put_out_before_the_next_is_drawn() -> None:
    tokenizer, seen = learnt("bytes"), list[tuple[int, str]]()
    model = Scripted([104, 195, 169, 33, 256])  # h é !
    how = Sampling(temperature=0, max_tokens=9)
    generate(
        cast(Decoder, model), tokenizer, "", how,
        write=lambda sample, piece, ended: seen.append((model.said, piece)),
    )  # fmt: skip
    assert seen == [(0, ""), (1, "h"), (2, ""), (3, "é"), (4, "!"), (5, "")]


def test_what_was_interrupted_ends_with_its_line() -> None:
    stream = io.StringIO()
    page = Printer("x", 2, stream.write)
    for sample, piece in ((0, ""), (1, ""), (0, "a"), (1, "b"), (0, "c")):
        page.write(sample, piece, False)
    assert stream.getvalue() == "xac"
    page.stop()
    assert stream.getvalue() == f"xac\n{'─' * 20}\nxb\n"


def test_a_stop_is_found_in_the_text_as_it_is_decoded(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, "metaspace")
    over, dog = (tokenizer.encode(word)[0] for word in ("over", "dog"))
    lm = CeterisLM.__new__(CeterisLM)
    lm.vocabulary = tokenizer
    prompt = [tokenizer.end_of_text, *tokenizer.encode("the cat")]
    assert lm._ends([" over"], prompt)([over])  # decoded alone it were no " over"
    assert not lm._ends([" cat"], prompt)([over])  # of the prompt, not of the text
    assert not lm._ends([" over"], [tokenizer.end_of_text])([over])  # a document begins without
    assert lm._ends([" over"], prompt)([dog] * 30 + [over])


class Recorded:
    """A scorer that writes the same tokens after each prompt."""

    def __init__(self, new: list[int]) -> None:
        self.new = new

    def generate(self, prompts: list[list[int]], **how: Any) -> list[list[int]]:
        return [self.new for _ in prompts]


def test_a_task_gets_the_first_word_with_its_space(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, "llama")
    lm = CeterisLM.__new__(CeterisLM)
    lm.vocabulary, lm.max_length, lm.add_bos_token = tokenizer, 64, False
    lm.cut, lm.strange = set(), set()
    lm.scorer = cast(Any, Recorded([*tokenizer.encode("over"), *tokenizer.encode("dog")]))
    request = Instance(
        "generate_until", {}, ("the cat", {"until": ["."], "max_gen_toks": 9}), 0, ("t", 0, 1)
    )
    assert lm._generate([request]) == [" over dog"]


def test_texts_in_json_are_those_that_are_shown(tmp_path: Path) -> None:
    tokenizer = sentencepiece(tmp_path, "llama")
    ids = tokenizer.model.token_to_id  # type: ignore[attr-defined]
    script = [*tokenizer.encode("over"), *(ids(byte) for byte in ("<0xC3>", "<0xA9>"))]
    model = cast(Decoder, Scripted(script, vocabulary=tokenizer.vocab_size))
    how = Sampling(temperature=0, max_tokens=len(script))
    (found,) = generate(model, tokenizer, "the cat", how)
    assert json.loads(json.dumps(found.text)) == " overé"
    assert printed(tokenizer, "the cat", script, tokens=len(script)) == "the cat overé\n"
