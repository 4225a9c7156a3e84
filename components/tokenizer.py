"""Tokenizers: text to integers and back, and how many bytes of text each integer stands for.

    train(documents) once, on the training split  ->  save(folder)  ->  load(folder) in every run

One id, `end_of_text`, is put after each document by the data pipeline. It never comes out of
`encode`, whatever the text: a document that spells `<|endoftext|>` is encoded letter by letter.
`byte_lengths` makes bits per byte comparable between tokenizers: its sum over a text is exactly
the text's length in UTF-8.
"""

import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from components.pieces import PIECE, pieces
from components.registry import RelativeTo, UserError, path_from, register

if TYPE_CHECKING:
    import tokenizers

Documents = Callable[[], Iterator[str]]

END_OF_TEXT = "<|endoftext|>"


class Tokenizer:
    """The interface. What isn't overridden suits a tokenizer that has nothing to learn."""

    vocab_size: int  # how many ids there are, end_of_text included; all ids are smaller
    end_of_text: int
    unknown: int | None = None  # the id of whatever has no other, where there is such an id

    def train(self, documents: Documents) -> None:
        """Learns from the training split; `documents()` may be called more than once."""

    def save(self, folder: Path) -> None:
        """Writes what was learnt as files in `folder`, which exists."""

    def load(self, folder: Path) -> None:
        """Reads back what `save` wrote, instead of `train`."""

    def fingerprint(self) -> str:
        """What decides the ids besides the parameters and the training text, if anything does."""
        return ""

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids (unsigned integers) for each text."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text; `end_of_text` and ids that stand for nothing are left out."""
        raise NotImplementedError

    def continuation(self, before: Iterable[int], new: Iterable[int]) -> str:
        """What `new` adds to the text of `before`: both are decoded together, then cut.

        Decoded alone, new tokens can lose what they have from standing behind others: a word its
        space (SentencePiece's decoders drop that of a text's first word), a character its first
        bytes.
        """
        before = list(before)
        head, whole = self.decode(before), self.decode([*before, *new])
        if not whole.startswith(head):  # an unfinished character of `before` is finished now
            head = head.rstrip("\ufffd")
        return whole[len(head) :]

    def byte_pieces(self) -> frozenset[int]:
        """Ids of single bytes that are decoded only together with all bytes beside them."""
        return frozenset()

    def byte_lengths(self, text: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Bytes of `text` behind each of its `ids`; their sum is `len(text.encode())`."""
        raise NotImplementedError


@register("tokenizer", "bytes")
class Bytes(Tokenizer):
    """One id for each UTF-8 byte: 256, and the end of text. Nothing to learn, nothing unknown."""

    vocab_size = 257
    end_of_text = 256

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def byte_lengths(self, text: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.ones(len(ids), dtype=np.int64)


@register("tokenizer", "characters")
class Characters(Tokenizer):
    """One id for each character (code point) of the training split, and one for all others.

    Id 0 is the end of text, id 1 an unknown character (decoded as U+FFFD); then the characters
    by code point.
    """

    end_of_text = 0
    unknown = 1

    def __init__(self) -> None:
        self.codes: np.ndarray | None = None  # sorted code points

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return len(self._codes()) + 2

    def _codes(self) -> np.ndarray:
        if self.codes is None:
            raise UserError(
                "tokenizer characters: its vocabulary comes from the training text; "
                "prepare the data first"
            )
        return self.codes

    def train(self, documents: Documents) -> None:
        seen: set[str] = set()
        for document in documents():
            seen.update(document)
        self.codes = np.array(sorted(map(ord, seen)), dtype=np.uint32)

    def save(self, folder: Path) -> None:
        characters = "".join(map(chr, self._codes()))
        (folder / "characters.json").write_text(json.dumps(characters), encoding="utf-8")

    def load(self, folder: Path) -> None:
        characters = json.loads((folder / "characters.json").read_text(encoding="utf-8"))
        self.codes = _code_points(characters)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        codes = self._codes()
        encoded = []
        for text in texts:
            points = _code_points(text)
            found = np.minimum(np.searchsorted(codes, points), max(len(codes) - 1, 0))
            known = codes[found] == points if len(codes) else np.zeros(len(points), dtype=bool)
            encoded.append(np.where(known, found + 2, self.unknown).astype(np.uint32))
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        codes = self._codes()
        kept = (i for i in ids if 0 < i < len(codes) + 2)
        return "".join("\ufffd" if i == self.unknown else chr(codes[i - 2]) for i in kept)

    def byte_lengths(self, text: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        return _utf8_widths(text)


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")


def _utf8_widths(text: str) -> np.ndarray:
    """Bytes of each character: 1, and 1 more from U+80, U+800 and U+10000 on."""
    points = _code_points(text)
    widths = np.ones(len(points), dtype=np.int64)
    for least in (0x80, 0x800, 0x10000):
        widths += points >= least
    return widths


class _Subwords(Tokenizer):
    """What `bpe` and `huggingface` share: a `tokenizers.Tokenizer`, made when first needed."""

    @functools.cached_property
    def model(self) -> "tokenizers.Tokenizer":
        raise NotImplementedError

    def _adopt(self, model: "tokenizers.Tokenizer") -> None:
        """Takes a tokenizer over and makes it see plain text in whatever it is given."""
        model.encode_special_tokens = True  # that is: as the text that they spell
        model.no_truncation()
        model.no_padding()
        self.model = model
        self.__dict__.pop("_byte_table", None)

    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text(self.model.to_str(), encoding="utf-8")

    def load(self, folder: Path) -> None:
        import tokenizers

        model = (folder / "tokenizer.json").read_text(encoding="utf-8")
        self._adopt(tokenizers.Tokenizer.from_str(model))

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # The _fast variant leaves out the character offsets and with them half of the memory.
        encodings = self.model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode([int(i) for i in ids], skip_special_tokens=True)

    def byte_pieces(self) -> frozenset[int]:
        found = (self.model.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        return frozenset(i for i in found if i is not None)

    @functools.cached_property
    def _byte_table(self) -> np.ndarray | None:
        """Bytes of each id, where the tokenizer writes every byte as one character."""
        import tokenizers

        if not isinstance(self.model.decoder, tokenizers.decoders.ByteLevel):
            return None
        table = np.zeros(self.vocab_size, dtype=np.int64)
        added = self.model.get_added_tokens_decoder()  # these are written as they are
        for token, i in self.model.get_vocab(with_added_tokens=True).items():
            table[i] = len(token.encode()) if i in added else len(token)
        return table

    def byte_lengths(self, text: str, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        total = len(text.encode())
        if self._byte_table is not None:
            lengths = self._byte_table[np.asarray(ids, dtype=np.int64)]
            if lengths.sum() == total:
                return lengths
        # The tokenizer changes the text (lower case, spaces, ...): each token gets the bytes from
        # where the one before ended in the original to where it ends itself.
        offsets = self.model.encode(text, add_special_tokens=False).offsets
        positions = np.concatenate([[0], np.cumsum(_utf8_widths(text))])
        ends = np.maximum.accumulate(positions[[end for _, end in offsets]])
        if len(ends):
            ends[-1] = total
        return np.diff(ends, prepend=0)


@register("tokenizer", "bpe")
class BPE(_Subwords):
    """Byte-level byte-pair encoding, learnt from the training split.

    Starts from the 256 bytes and merges the most frequent pair again and again until there are
    `vocab_size` ids, within words as GPT-2's pattern splits them. Any text has an encoding and
    decodes to itself. Learns from the first `train_bytes` of the split, which bounds its memory.
    Text too short for that many merges leaves the last ids unused. Id 0 is the end of text.

    Sennrich, Haddow & Birch 2016, arXiv:1508.07909; over bytes: Radford et al. 2019 (GPT-2).
    """

    end_of_text = 0

    def __init__(
        self,
        *,
        vocab_size: Annotated[int, Field(ge=257)] = 8192,
        train_bytes: Annotated[int, Field(gt=0)] = 100_000_000,
    ) -> None:
        self.vocab_size = vocab_size
        self.train_bytes = train_bytes

    @functools.cached_property
    def model(self) -> "tokenizers.Tokenizer":
        raise UserError(
            "tokenizer bpe: it is learnt from the training text; prepare the data first"
        )

    def train(self, documents: Documents) -> None:
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, trainers

        model = tokenizers.Tokenizer(models.BPE())
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        model.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        model.train_from_iterator(_sample(documents(), self.train_bytes), trainer)
        self._adopt(model)


def _sample(documents: Iterator[str], limit: int, piece: int = 1 << 16) -> Iterator[str]:
    """About the first `limit` bytes, in pieces: the trainer buffers 256 of what it is given."""
    taken = 0
    for document in documents:
        for text in _lines(document, piece):
            yield text
            taken += len(text.encode())
            if taken >= limit:
                return


_LINE = re.compile(r"[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]*(?:\r\n|[\s\S]|\Z)")  # as str.splitlines


def _lines(document: str, size: int) -> Iterator[str]:
    """A document's lines, as many together as have `size` characters; a huge one in pieces."""
    together: list[str] = []
    taken = 0
    for match in _LINE.finditer(document):
        line = match[0]
        for part in [line] if len(line) <= PIECE else [part for _, part in pieces(line, size)]:
            if together and taken + len(part) > size:
                yield "".join(together)
                together, taken = [], 0
            together.append(part)
            taken += len(part)
    if taken:
        yield "".join(together)


_END_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|im_end|>", "[SEP]")


@register("tokenizer", "huggingface")
class HuggingFace(_Subwords):
    """A published tokenizer, used as it is: a local folder, a tokenizer.json, or a hub name.

    A folder holds `tokenizer.json`, or GPT-2's pair: `vocab.json` and `merges.txt` (also under
    their old names `encoder.json` and `vocab.bpe`). `end_of_text_token` names the token that ends
    a document; left out, it is what `tokenizer_config.json` calls `eos_token`, or the first that
    exists of `<|endoftext|>`, `</s>` and other usual ones. The data cache keeps a copy, so later
    runs need no network.
    """

    def __init__(
        self,
        *,
        path: str,
        end_of_text_token: str | None = None,
        relative_to: Annotated[str, RelativeTo("path")] = "",
    ) -> None:
        local = path_from(relative_to, path)  # a hub's name is no file here
        self.path = str(local) if local.exists() else path
        self.end_of_text_token = end_of_text_token

    @functools.cached_property
    def model(self) -> "tokenizers.Tokenizer":
        import tokenizers

        path = Path(self.path)
        try:
            if path.is_file():
                model = _from_json(path)
            elif path.is_dir():
                model = _from_folder(path)
            else:
                model = tokenizers.Tokenizer.from_pretrained(self.path)
        except UserError:
            raise
        except Exception as error:  # tokenizers raises plain Exceptions
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"tokenizer.path: can't load '{self.path}' ({reason}); give a folder that exists, "
                "or a hub name where there is a network"
            ) from error
        self.end_of_text_token = self._end_token(model, path)
        # Marked special, so that text which spells it doesn't become it and decoding skips it.
        model.add_special_tokens([self.end_of_text_token])
        self._adopt(model)
        return model

    def _end_token(self, model: "tokenizers.Tokenizer", path: Path) -> str:
        wanted = self.end_of_text_token
        if wanted is None and (settings := path / "tokenizer_config.json").is_file():
            try:
                token = json.loads(settings.read_text(encoding="utf-8-sig")).get("eos_token")
                wanted = token and str(token.get("content") if isinstance(token, dict) else token)
            except (ValueError, AttributeError, OSError) as error:
                raise UserError(f"tokenizer.path: {settings}: not read ({error})") from None
        for token in [wanted] if wanted else _END_NAMES:
            if model.token_to_id(token) is not None:
                return token
        known = ", ".join(str(token.content) for token in model.get_added_tokens_decoder().values())
        what = f"token '{wanted}'" if wanted else f"token of a usual name ({', '.join(_END_NAMES)})"
        raise UserError(
            f"tokenizer.end_of_text_token: '{self.path}' has no {what}; "
            f"name the one that ends a document (its special tokens: {known or 'none'})"
        )

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return max(self.model.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def end_of_text(self) -> int:  # type: ignore[override]
        model = self.model  # which settles what the token is
        return model.token_to_id(self.end_of_text_token or "") or 0

    @property
    def unknown(self) -> int | None:  # type: ignore[override]
        name = getattr(self.model.model, "unk_token", None)
        return self.model.token_to_id(name) if name else None

    def fingerprint(self) -> str:
        content = self.model.to_str(), self.end_of_text_token
        return hashlib.blake2b(repr(content).encode(), digest_size=16).hexdigest()

    def save(self, folder: Path) -> None:
        super().save(folder)
        end = json.dumps(self.end_of_text_token)
        (folder / "end_of_text.json").write_text(end, encoding="utf-8")

    def load(self, folder: Path) -> None:
        super().load(folder)
        end = (folder / "end_of_text.json").read_text(encoding="utf-8")
        self.end_of_text_token = json.loads(end)


def _from_json(path: Path) -> "tokenizers.Tokenizer":
    import tokenizers

    return tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8-sig"))


def _from_folder(folder: Path) -> "tokenizers.Tokenizer":
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    if (folder / "tokenizer.json").is_file():
        return _from_json(folder / "tokenizer.json")
    for vocab, merges in (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")):
        if (folder / vocab).is_file() and (folder / merges).is_file():
            model = tokenizers.Tokenizer(
                models.BPE.from_file(str(folder / vocab), str(folder / merges))
            )
            model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            model.decoder = decoders.ByteLevel()
            return model
    raise UserError(
        f"tokenizer.path: {folder} has neither tokenizer.json nor vocab.json and merges.txt "
        "(nor encoder.json and vocab.bpe)"
    )
