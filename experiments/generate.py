"""Text from a trained model, one token at a time, with each mixer's own cache."""

from __future__ import annotations

from collections.abc import Callable
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


class Text:
    """A text as its tokens come: whole characters only, each as soon as it is certain.

    The pieces are together `tokenizer.continuation(before, tokens)`. A step decodes the tokens
    since the last piece and those of the piece before it, not all of them. What may change with the
    next token is held back: an unfinished character (U+FFFD), a run of single bytes.

    Args:
        before: tokens of the prompt.
        lost: the end of the prompt that its tokens have lost (a space that the tokenizer strips);
            where the text begins with it, it is not repeated.
    """

    def __init__(self, tokenizer: Tokenizer, before: list[int], lost: str = "") -> None:
        self.tokenizer, self.lost = tokenizer, lost
        self.bytes = tokenizer.byte_pieces()
        self.before, self.new = list(before), list[int]()
        self.sent = 0  # characters of `new` that have been returned

    def add(self, token: int) -> str:
        """What is certain now of the text, and was not before."""
        self.new.append(token)
        text = self.tokenizer.continuation(self.before, self.new)
        held = 0
        if len(self.new) < HELD:
            held = len(text) if token in self.bytes else _unfinished(text)
        piece = self._piece(text, len(text) - held)
        if not held and text:
            self.before, self.new, self.sent = self.new, [], 0
        elif not held and (self.tokenizer.decode(self.before) or len(self.new) >= HELD):
            self.new = []  # tokens that are no text, like a special one; at the very beginning,
            # what looks like none may be a space that decoding has dropped
        return piece

    def end(self) -> str:
        """What was held back: no token follows."""
        text = self.tokenizer.continuation(self.before, self.new)
        return self._piece(text, len(text))

    def _piece(self, text: str, certain: int) -> str:
        piece, self.sent = text[self.sent : certain], max(self.sent, certain)
        while piece and piece[0] == self.lost[:1]:
            piece, self.lost = piece[1:], self.lost[1:]
        self.lost = "" if piece else self.lost
        return piece


HELD = 64  # tokens in a row that may be held back


def _unfinished(text: str) -> int:
    """Characters at the end that may be parts of one to come: of its bytes at most three."""
    return min(3, len(text) - len(text.rstrip("\ufffd")))


Write = Callable[[int, str, bool], None]  # sample, the next piece of its text, whether it has ended


@torch.no_grad()
def generate(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    sampling: Sampling,
    samples: int = 1,
    write: Write = lambda sample, piece, ended: None,
) -> list[Continuation]:
    """`samples` continuations of a prompt that stands at the beginning of a document.

    Where the context is full, the cache is filled again from its later half and goes on.

    Args:
        write: is given each text as it comes, once with an empty piece before the first token.

    Raises:
        UserError: the prompt alone is longer than the context, or no text; or the model's logits
            are not numbers.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not UTF-8 text at character {error.start + 1}") from error
    limit, end = model.dims.max_seq_len, tokenizer.end_of_text
    ids = tokenizer.encode(prompt)
    if len(ids) + 1 > limit:
        raise UserError(f"the prompt has {len(ids) + 1:,} tokens, the model's context {limit:,}")
    space, kept = (text[len(text.rstrip()) :] for text in (prompt, tokenizer.decode(ids)))
    lost = space[len(kept) :] if space.startswith(kept) else ""
    texts = [Text(tokenizer, ids, lost) for _ in range(samples)]
    parts: list[list[str]] = [[] for _ in texts]
    counts, ended = [0] * samples, [False] * samples
    for i in range(samples):
        write(i, "", False)
    generator = torch.Generator().manual_seed(sampling.seed)
    sequences = [[end, *ids] for _ in texts]
    caches = model.new_caches(samples, limit)
    pending = torch.tensor(sequences)
    for step in range(sampling.max_tokens):
        if caches.filled + pending.shape[1] > limit:
            caches = model.new_caches(samples, limit)
            pending = torch.tensor([tokens[-(limit // 2 + 1) :] for tokens in sequences])
        logits = model.logits(model(pending, caches)[:, -1])
        if logits.isnan().any():
            raise UserError("the model's logits are not numbers: its weights can't generate text")
        drawn = sampling.draw(logits, generator)
        drawn = drawn.masked_fill(torch.tensor(ended), end)
        pending = drawn[:, None]
        for i, token in enumerate(drawn.tolist()):
            sequences[i].append(token)
            if ended[i]:
                continue
            ended[i] = token == end
            counts[i] += not ended[i]
            piece = "" if ended[i] else texts[i].add(token)
            last = ended[i] or step + 1 == sampling.max_tokens
            parts[i].append(piece + texts[i].end() if last else piece)
            write(i, parts[i][-1], last)
        if all(ended):
            break
    return [
        Continuation("".join(some), count, end)
        for some, count, end in zip(parts, counts, ended, strict=True)
    ]


class Printer:
    """Puts samples one under the other, while all of them are still being written.

    The first that has not ended is put as it comes; those below it wait for their turn.
    """

    def __init__(self, prompt: str, samples: int, put: Callable[[str], object]) -> None:
        self.put, self.turn, self.begun = put, 0, False
        self.waiting = [prompt] + [f"{'─' * 20}\n{prompt}"] * (samples - 1)
        self.ended = [False] * samples

    def write(self, sample: int, piece: str, ended: bool) -> None:
        """See `generate`."""
        self.begun = True
        self.waiting[sample] += piece
        self.ended[sample] = ended
        while self.turn < len(self.waiting) and (text := self._next()) is not None:
            self.put(text)

    def _next(self) -> str | None:
        text, self.waiting[self.turn] = self.waiting[self.turn], ""
        if self.ended[self.turn]:
            self.turn += 1
            return text + "\n"
        return text or None

    def stop(self) -> None:
        """Nothing more comes: puts what there is of all samples."""
        for sample in range(self.turn, len(self.waiting) * self.begun):
            self.write(sample, "", True)
