"""Filters: what of a corpus is kept. Each is a function from a stream of documents to another.

Filters run in the order written, before the split and the tokenizer. One is called afresh for
every pass over the corpus, so what it remembers lives in the call and not in the object.
"""

import hashlib
from collections.abc import Iterator
from typing import Annotated

from pydantic import Field

from components.registry import register


class Filter:
    """The interface: takes documents one by one and yields those that stay, in their order."""

    def __call__(self, documents: Iterator[str]) -> Iterator[str]:
        raise NotImplementedError


@register("filter", "dedup")
class Dedup(Filter):
    """Drops a document that is exactly equal to an earlier one.

    Compares 128-bit BLAKE2b digests, about 100 bytes of memory for each document kept.
    """

    def __call__(self, documents: Iterator[str]) -> Iterator[str]:
        seen: set[bytes] = set()
        for document in documents:
            digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
            if digest not in seen:
                seen.add(digest)
                yield document


@register("filter", "min_length")
class MinLength(Filter):
    """Drops documents shorter than `characters` characters."""

    def __init__(self, *, characters: Annotated[int, Field(gt=0)] = 100) -> None:
        self.characters = characters

    def __call__(self, documents: Iterator[str]) -> Iterator[str]:
        return (document for document in documents if len(document) >= self.characters)
