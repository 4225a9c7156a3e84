"""Text from a trained model, one token at a time, with each mixer's own cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from components.decoder import Decoder
from experiments.record import UserError

if TYPE_CHECKING:
    from components.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only the k likeliest tokens (Fan et al. 2018, arXiv 1805.04833).
        top_p: only the likeliest tokens that together reach p (Holtzman et al. 2019,
            arXiv 1904.09751); the one that crosses p is kept.
        max_tokens: new tokens at most.
        seed: of the draws; the same seed gives the same text.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    max_tokens: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"--temperature {self.temperature}: should be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"--top-k {self.top_k}: should be 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"--top-p {self.top_p}: should be above 0 and at most 1")
        if self.max_tokens < 1:
            raise UserError(f"--max-tokens {self.max_tokens}: should be 1 or more")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """`(B, V)` logits -> `(B,)` tokens."""
        if self.temperature == 0:
            return logits.argmax(-1)
        return torch.multinomial(self.probabilities(logits), 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """`(B, V)` logits -> `(B, V)` probabilities after temperature, top-k and top-p."""
        # From the largest down, in double: the smallest temperature overflows nothing.
        logits = (logits - logits.amax(-1, keepdim=True)).double() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            best = logits.topk(self.top_k, dim=-1)  # of equals too no more than k
            logits = torch.full_like(logits, float("-inf")).scatter(-1, best.indices, best.values)
        probabilities = logits.softmax(-1)
        if self.top_p is not None:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p  # mass before this token
            outside[:, 0] = False
            probabilities = torch.zeros_like(ordered).scatter(-1, order, ordered * ~outside)
        return probabilities


@dataclass(frozen=True)
class Continuation:
    """What followed the prompt, and whether the model ended the text itself."""

    text: str
    tokens: int
    ended: bool


@torch.no_grad()
def generate(
    model: Decoder, tokenizer: Tokenizer, prompt: str, sampling: Sampling, samples: int = 1
) -> list[Continuation]:
    """`samples` continuations of a prompt that stands at the beginning of a document.

    Where the context is full, the cache is filled anew from its later half and goes on.

    Raises:
        UserError: the prompt alone is longer than the context, or no text.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 text at character {error.start + 1}") from error
    limit = model.dims.max_seq_len
    start = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    if len(start) > limit:
        raise UserError(f"the prompt has {len(start):,} tokens, the model's context {limit:,}")
    generator = torch.Generator().manual_seed(sampling.seed)
    sequence = torch.tensor([start] * samples)
    ended = torch.zeros(samples, dtype=torch.bool)
    caches = model.new_caches(samples, limit)
    pending = sequence
    for _ in range(sampling.max_tokens):
        if caches.filled + pending.shape[1] > limit:
            caches = model.new_caches(samples, limit)
            pending = sequence[:, -(limit // 2 + 1) :]
        logits = model.logits(model(pending, caches)[:, -1])
        drawn = sampling.draw(logits, generator).masked_fill(ended, tokenizer.end_of_text)
        ended |= drawn == tokenizer.end_of_text
        pending = drawn[:, None]
        sequence = torch.cat([sequence, pending], dim=1)
        if bool(ended.all()):
            break
    new = sequence[:, len(start) :].tolist()
    return [_cut(tokenizer, ids) for ids in new]


def _cut(tokenizer: Tokenizer, ids: list[int]) -> Continuation:
    ended = tokenizer.end_of_text in ids
    ids = ids[: ids.index(tokenizer.end_of_text)] if ended else ids
    return Continuation(tokenizer.decode(ids), len(ids), ended)
