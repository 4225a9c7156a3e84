"""Log-probabilities and generated tokens of many short texts, exact, at a fraction of the work.

What a benchmark asks for is the log-probability of continuations after contexts. Computed directly,
each request is a forward pass, with logits at every position, of which a few are read:

    log p(continuation | context) = sum of log_softmax(logits)[i, continuation_i]

The same numbers come from less:

    what requests share    is run once, in rows that are prefix trees (experiments/prefix_tree.py),
                           each token seeing its own ancestors (components/layout.py)
    the output layer       only where a continuation is predicted, once for all continuations that
                           follow there, without logits in memory (experiments/output_layer.py)
    batches                rows of like length, up to a number of tokens, not of requests

Where the position or the mixer takes no layout (an LSTM, a third party's), a row is one text, and
only texts that are the beginning of others are not run again.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from components.decoder import Caches, Decoder
from components.layout import Layout
from components.registry import UserError
from experiments.generate import Sampling
from experiments.output_layer import Head, Likeliest
from experiments.prefix_tree import TRUNK, Plan, Request, Row, batches, common

TOKENS = {"cpu": 1024, "cuda": 32768}
"""Tokens in a batch: enough for the products to run at full speed, few enough for the cache."""

STATES = {"cpu": 1024, "cuda": 4096}
"""Predictions that go through the output layer at once."""

WORDS = {"cpu": 512}
"""Words of the vocabulary whose logits exist at once (elsewhere, all)."""

ROWS = 256
"""Texts generated together, so that reading the weights serves many."""

Stop = Callable[[list[int]], bool]

HELD = {"cpu": 1 << 16, "cuda": 1 << 17}
"""Tokens that the caches of a generation hold."""


class Scorer:
    """Scores and generates with a model, in batches that suit it; the model stays as it was.

    Args:
        model: on any device; put into evaluation for the time of each call.
        max_length: tokens the model sees at once; more than its `max_seq_len` where positions
            are not `limited`.
        tokens_per_batch: by default what suits the device.
        precision: `fp32` leaves the weights as they are; `bf16` casts a copy of them for each
            call, while log-normalisers and the targets' own logits are summed in fp32.
        pulse: called once per batch.
    """

    def __init__(
        self,
        model: Decoder,
        *,
        max_length: int,
        tokens_per_batch: int | None = None,
        precision: Literal["fp32", "bf16"] = "fp32",
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self.model, self.max_length, self.precision, self.pulse = (
            model, max_length, precision, pulse,
        )  # fmt: skip
        self.device = model.output_weight.device
        self.tokens = tokens_per_batch or self._usual(TOKENS)

    def _usual(self, by_device: dict[str, int]) -> int:
        return by_device.get(self.device.type, by_device.get("cuda", 1 << 30))

    @contextmanager
    def _ready(self) -> Iterator[Decoder]:
        """The model in evaluation and in the wanted precision, without gradients."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                if self.precision == "bf16":
                    yield copy.deepcopy(self.model).to(torch.bfloat16)
                else:
                    yield self.model
        finally:
            self.model.train(training)

    def loglikelihoods(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """(log-probability, greedy) of each (context ids, continuation ids), in their order.

        The log-probability of the continuation is in nats and summed over its tokens; greedy says
        whether each of them is the likeliest (of equals, the first). Of context and continuation
        the last max_length + 1 tokens count, the last of which is only predicted.

        Raises:
            UserError: an empty context or continuation, or a continuation above max_length.
        """
        for number, (before, after) in enumerate(requests):
            if not before or not after:
                empty = "continuation" if before else "context"
                raise UserError(f"request {number}: an empty {empty}: nothing can be scored")
            if len(after) > self.max_length:
                raise UserError(
                    f"request {number}: a continuation of {len(after):,} tokens, of which the "
                    f"model sees {self.max_length:,} at once; raise max_length or leave it out"
                )
        if not requests:
            return []
        with self._ready() as model:
            return self._loglikelihoods(model, requests)

    def _loglikelihoods(
        self, model: Decoder, requests: Sequence[Request]
    ) -> list[tuple[float, bool]]:
        plan = Plan(requests, self.max_length, model.takes_layout)
        head = Head(model.output_weight, self._usual(STATES), self._usual(WORDS))
        for section in plan.sections:
            caches = None
            if section.trunk is not None:
                length = len(section.trunk.tokens)
                caches = model.new_caches(1, length)
                hidden = model(torch.tensor([section.trunk.tokens], device=self.device), caches)
                head.read(hidden, [section.trunk])
            for rows in batches(section.rows, self.tokens):
                head.read(self._hidden(model, rows, caches), rows)
                self.pulse()
        return head.answers(len(requests))

    def _hidden(self, model: Decoder, rows: list[Row], trunk: Caches | None) -> Tensor:
        """`(B, T, D)` of rows padded at their end; padding sees itself and nothing sees it."""
        length = max(len(row.tokens) for row in rows)
        tokens = padded((row.tokens for row in rows), length).to(self.device)
        if all(row.single for row in rows):
            return model(tokens)
        places = padded((row.depths for row in rows), length).to(self.device)
        ends = padded((row.ends for row in rows), length).to(self.device)
        slots = torch.arange(length, device=self.device)
        ends = torch.maximum(ends, slots + 1)[:, None, :]
        seen = (slots <= slots[:, None]) & (slots[:, None] < ends)  # (B, T, T)
        if trunk is None:
            return model(tokens, None, Layout(places, places, seen))
        before = torch.arange(trunk.filled, device=self.device).expand(len(rows), -1)
        keys = torch.cat([before, places], dim=1)
        seen = torch.cat([seen.new_ones(()).expand(*places.shape, trunk.filled), seen], dim=2)
        same = torch.zeros(len(rows), dtype=torch.long, device=self.device)
        caches = trunk.select(same, trunk.filled + length)
        return model(tokens, caches, Layout(places, keys, seen))

    def generate(
        self,
        prompts: Sequence[list[int]],
        *,
        max_new: int,
        stop: Stop | Sequence[Stop],
        end: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> list[list[int]]:
        """New tokens for each prompt, as many as `max_new`.

        A text ends before its token `end`, or once `stop(its new tokens)`; `stop` is one for all
        or one for each prompt. Draws are decided by
        the seed and the prompt alone (and by how often it came before), not by what stands with it
        in a batch; see `experiments.generate.Sampling` for temperature, top_k and top_p.

        Raises:
            UserError: an empty prompt, or one that leaves no room for `max_new` within max_length.
        """
        how = Sampling(temperature, top_k, top_p, max_new, seed)
        for number, prompt in enumerate(prompts):
            if not prompt or len(prompt) + max_new > self.max_length:
                raise UserError(
                    f"prompt {number}: {len(prompt):,} tokens and {max_new:,} to generate; there "
                    f"should be 1 at least, and {self.max_length:,} together at most"
                )
        stops = [stop] * len(prompts) if callable(stop) else stop
        results: list[list[int]] = [[] for _ in prompts]
        seeds = [
            [seed, *prompt, again] for prompt, again in zip(prompts, earlier(prompts), strict=True)
        ]
        with self._ready() as model:
            for numbers in self._together(model, prompts, max_new):
                generators = [np.random.default_rng(seeds[i]) for i in numbers]
                draws = [g.random(max_new) for g in generators] if temperature else None
                some = [prompts[i] for i in numbers]
                batch = Generation(model, some, how, draws, 4 * self.tokens)
                found = batch.run([stops[i] for i in numbers], end, self.pulse)
                for i, new in zip(numbers, found, strict=True):
                    results[i] = new
        return results

    def _together(
        self, model: Decoder, prompts: Sequence[list[int]], max_new: int
    ) -> Iterator[list[int]]:
        """Numbers of prompts of about the same length, of the same where layouts aren't taken."""
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        while order:
            longest = len(prompts[order[0]])
            size = min(ROWS, max(1, self._usual(HELD) // (longest + max_new)))
            if not model.takes_layout:
                size = min(size, sum(len(prompts[i]) == longest for i in order))
            yield order[:size]
            order = order[size:]


class Generation:
    """A batch of prompts being continued: padded on the left, so that all end together.

    What all of them begin with is read once, and stands in the caches before the padding.

    Args:
        prompts: longest first, and all as long where the model takes no layout.
        draws: uniform numbers for each prompt's tokens; None for the likeliest.
        tokens: read at once.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: list[list[int]],
        how: Sampling,
        draws: list[np.ndarray] | None,
        tokens: int,
    ) -> None:
        self.model, self.how, self.draws = model, how, draws
        self.device = model.output_weight.device
        self.likeliest = Likeliest(model.output_weight)
        self.length = len(prompts[0]) + how.max_tokens
        self.caches, self.trunk = model.new_caches(len(prompts), self.length), 0
        self.selects = all(hasattr(layer, "select") for layer in self.caches.layers)
        self.padded = False
        self.pads = torch.zeros(1, 1, dtype=torch.long, device=self.device)  # (B, 1)
        shared = min(common(min(prompts), max(prompts)), len(prompts[-1]) - 1)
        if self.selects and len(prompts) > 1 and shared >= TRUNK:
            self.caches, self.trunk = model.new_caches(1, shared), shared
            self.read(torch.tensor([prompts[0][:shared]], device=self.device))
            self.caches = self._select([0] * len(prompts))
        self._read_rest(prompts, max(8, tokens // len(prompts)))

    def _read_rest(self, prompts: list[list[int]], columns: int) -> None:
        """The prompts after the trunk, piece by piece; a row joins in when its text begins."""
        pads = [len(prompts[0]) - len(prompt) for prompt in prompts]
        lines = [[0] * pad + p[self.trunk :] for pad, p in zip(pads, prompts, strict=True)]
        rest, places = (torch.tensor(x, device=self.device) for x in (lines, pads))
        self.padded = pads[-1] > 0
        for start in range(0, rest.shape[1], columns):
            rows = sum(pad < start + columns for pad in pads)
            self.pads = places[:rows, None]
            self.read(rest[:rows, start : start + columns])

    def _select(self, rows: list[int]) -> Caches:
        return self.caches.select(torch.tensor(rows, device=self.device), self.length)

    def read(self, tokens: Tensor) -> None:
        """Runs the rows' next tokens `(B, T)`."""
        layout = self._layout(tokens.shape[1]) if self.padded else None
        self.hidden = self.model(tokens, self.caches, layout)[:, -1]

    def _layout(self, count: int) -> Layout:
        start = self.caches.filled
        slots = torch.arange(start + count, device=self.device)
        queries = slots[start:, None]
        trunk = slots < self.trunk
        text = trunk | (slots >= self.trunk + self.pads)  # (B, S)
        keys = torch.where(trunk, slots, (slots - self.pads).clamp_min(self.trunk))
        # Padding sees itself, since a softmax over nothing is not a number.
        seen = (text[:, None] & (slots <= queries)) | (slots == queries)
        return Layout(keys[:, start:], keys, seen)

    def draw(self, step: int, texts: list[int]) -> list[int]:
        """The next token of each row; `texts` are the prompts' numbers, by row."""
        if self.draws is None:
            return self.likeliest(self.hidden).tolist()
        uniform = np.array([self.draws[i][step] for i in texts])
        mass = self.how.probabilities(self.model.logits(self.hidden)).cumsum(-1)
        share = torch.from_numpy(uniform).to(self.device)[:, None] * mass[:, -1:]
        return (mass <= share).sum(-1).tolist()  # the first whose mass exceeds the share

    def keep(self, rows: list[int]) -> None:
        """Goes on with these rows alone."""
        self.caches, self.pads = self._select(rows), self.pads[rows]

    def run(self, stops: Sequence[Stop], end: int, pulse: Callable[[], None]) -> list[list[int]]:
        """The new tokens of each prompt, which has its own stop."""
        news: list[list[int]] = [[] for _ in self.hidden]
        texts = list(range(len(news)))  # by row
        ended = [False] * len(news)
        for step in range(self.how.max_tokens):
            drawn = self.draw(step, texts)
            pulse()
            for i, token in zip(texts, drawn, strict=True):
                if not ended[i] and token != end:
                    news[i].append(token)
                ended[i] = ended[i] or token == end or stops[i](news[i])
            left = [row for row, i in enumerate(texts) if not ended[i]]
            if not left or step + 1 == self.how.max_tokens:
                break
            if 4 * len(left) <= 3 * len(texts) and self.selects:
                self.keep(left)
                texts, drawn = [texts[row] for row in left], [drawn[row] for row in left]
            self.read(torch.tensor(drawn, device=self.device)[:, None])
        return news


def padded(lists: Iterable[list[int]], length: int) -> Tensor:
    """`(B, length)` int64, filled up with 0."""
    return torch.tensor([some + [0] * (length - len(some)) for some in lists])


def earlier(prompts: Sequence[list[int]]) -> Iterator[int]:
    """How often each prompt came before."""
    seen: Counter[tuple[int, ...]] = Counter()
    for prompt in map(tuple, prompts):
        yield seen[prompt]
        seen[prompt] += 1
