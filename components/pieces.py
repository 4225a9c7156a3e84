"""Long documents, tokenized piece by piece: memory follows the piece's size, not the document's.

    pieces(text) -> (context, piece), ...        encode_long(tokenizer, text) -> (ids, bytes), ...

A piece ends where no usual tokenizer joins what stands on both sides: before a single space between
two letters or digits, else behind a single line's end. There the ids are those of the whole text.
Where a piece has neither in its second half, as in text without spaces, it ends after any
character, and no token spans that place. Each piece is encoded behind the word before it, whose ids
are dropped: a tokenizer that puts something at the start of a text puts it at the document's.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from components.tokenizer import Tokenizer

PIECE = 1 << 20  # characters; documents up to this are tokenized in one go
CONTEXT = 32  # characters of the word before, at most


def pieces(text: str, size: int = PIECE) -> Iterator[tuple[str, str]]:
    """(the word before, the piece) of each piece in order, at most `size` characters long."""
    start = 0
    while start < len(text):
        end = len(text) if len(text) - start <= size else _cut(text, start, start + size)
        first = start
        while first > max(0, start - CONTEXT) and text[first - 1].isalnum():
            first -= 1
        yield text[min(first, max(0, start - 1)) : start], text[start:end]
        start = end


def _cut(text: str, start: int, end: int) -> int:
    half = (start + end) // 2
    for sign, behind in ((" ", 0), ("\n", 1)):
        place = text.rfind(sign, half, end)
        while place > half:
            before, after = text[place - 1], text[place + 1]
            if behind and not before.isspace() and not after.isspace():
                return place + 1
            if not behind and before.isalnum() and after.isalnum():
                return place
            place = text.rfind(sign, half, place)
    return end


def encode_long(
    tokenizer: "Tokenizer", text: str, *, lengths: bool, size: int = PIECE
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The ids of each piece of a text and, where `lengths`, the bytes of text behind each id.

    The bytes of a piece's ids sum to those of the piece, as `Tokenizer.byte_lengths` has it.
    """
    for context, piece in pieces(text, size):
        known = tokenizer.encode_batch([context])[0]
        ids = tokenizer.encode_batch([context + piece])[0]
        if not np.array_equal(ids[: len(known)], known):  # joined with what is before
            context, known = "", known[:0]
            ids = tokenizer.encode_batch([piece])[0]
        if not lengths:
            yield ids[len(known) :], None
            continue
        sizes = tokenizer.byte_lengths(context + piece, ids)[len(known) :]
        sizes[:1] += len(piece.encode()) - sizes.sum()
        yield ids[len(known) :], sizes
