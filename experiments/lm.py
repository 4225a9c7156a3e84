"""A trained model as lm-eval's own kind of model: the same number for each item as its HFLM.

Where lm-eval leaves a choice to the model, it is made as `lm_eval.models.huggingface.HFLM` makes it
for a causal model:

- **Start token.** An empty context becomes the tokenizer's end of text, which is what stood before
  each document in training. Other contexts get none, as with GPT-2's tokenizer; `add_bos_token`
  puts it before every context, as with Llama's.
- **Boundary.** White space at the end of a context goes to the continuation. Context and whole are
  tokenized, and the continuation is what the whole has beyond the context's number of tokens. A
  context of white space alone counts as empty (HFLM fails there). Items that hold something for
  which the tokenizer has no id but "unknown" are counted.
- **Truncation.** Of context and continuation the last `max_length + 1` tokens are kept, the last of
  them predicted only; a generation's prompt leaves room for the tokens to come. A continuation of
  more than `max_length` tokens (HFLM refuses it) is scored in the windows of a rolling text. How
  many items lost a part of their context is counted.
- **Rolling windows.** Disjoint windows of `max_length` targets, each predicted from one token of
  context at the least; the last window is filled up with earlier context. The start token is not
  itself predicted (with `add_bos_token`, HFLM predicts it once).
- **Generation.** Greedy unless the task says `do_sample`, then among the 50 likeliest unless it
  gives `top_k`. It ends with the end of text, a text of `until`, which is cut off, or
  `max_gen_toks`.
  A text is what its tokens add to the text before them, so that its first word keeps its space
  with every tokenizer (HFLM decodes the new tokens alone: Llama's loses that space).
- **Special tokens** spelt out in a text are text here: `<|endoftext|>` in an item ends nothing.

Several processes that each hold the model share the requests; each then has all the answers, so
that lm-eval, which runs in each, computes the same metrics everywhere.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)

from components.decoder import Decoder
from components.registry import UserError
from experiments.record import find
from experiments.scorer import Scorer

if TYPE_CHECKING:
    from components.tokenizer import Tokenizer

MAX_GEN_TOKS = 256  # HFLM's default
TOP_K = 50  # transformers' default in sampling
NEIGHBOURS = 16  # tokens before a text that may decide how it is decoded
BLOCK = 64  # neighbouring requests that stay together: they may share a context
SAMPLED = {"do_sample", "temperature", "top_k", "top_p"}


@register_model("ceteris")
class CeterisLM(TemplateLM):
    """Scores and generates with a `Decoder`; see the module for how.

    Args:
        max_length: tokens seen at once, the model's `max_seq_len` by default. More than that
            works where positions have no limit (rotary, ALiBi, sinusoidal, none).
        precision: of the weights in scoring; sums over the vocabulary are in fp32.
        pulse: called after each batch.

    Raises:
        UserError: the model's positions end before `max_length`.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        max_length: int | None = None,
        add_bos_token: bool = False,
        precision: Literal["fp32", "bf16"] = "fp32",
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.max_length = max_length or model.dims.max_seq_len
        if self.max_length > model.dims.max_seq_len and model.position.limited:
            raise UserError(
                f"max_length {self.max_length}: {type(model.position).__name__.lower()} positions "
                f"end at max_seq_len {model.dims.max_seq_len}"
            )
        self.vocabulary = tokenizer
        self.add_bos_token = add_bos_token
        self.scorer = Scorer(model, max_length=self.max_length, precision=precision, pulse=pulse)
        self._device = next(model.parameters()).device
        self.cut: set[tuple[str, int]] = set()  # (task, document) that lost a part of its context
        self.strange: set[tuple[str, int]] = set()  # or holds what the tokenizer has no id for

    @classmethod
    def from_run(
        cls, run: str, *, root: str = "runs", checkpoint: int | None = None, **how: Any
    ) -> CeterisLM:
        """The model of a run (an id below `root`, or a folder); `how` is for the constructor."""
        from pathlib import Path

        from experiments.model import open_run

        trained, data = open_run(find(Path(root), run), checkpoint)
        return cls(trained.model, data.tokenizer, **how)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> CeterisLM:
        """`simple_evaluate(model="ceteris", model_args={"run": ...})`: as `from_run`."""
        return cls.from_run(**arg_dict)

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> CeterisLM:
        """`--model_args run=runs/3f9a1c2b7d-s0`: as `from_run`."""
        return cls.from_run(**simple_parse_args_string(arg_string))

    @property
    def eot_token_id(self) -> int:
        return self.vocabulary.end_of_text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids of a text; the start token before them if `add_special_tokens`, or by default."""
        return self._encoded([string], add_special_tokens)[string]

    def _encoded(
        self, texts: Iterable[str], add_special_tokens: bool | None = None
    ) -> dict[str, list[int]]:
        """Each distinct text once."""
        distinct = list(dict.fromkeys(texts))
        start = self.add_bos_token if add_special_tokens is None else add_special_tokens
        before = [self.eot_token_id] if start else []
        ids = self.vocabulary.encode_batch(distinct)
        return {text: [*before, *some.tolist()] for text, some in zip(distinct, ids, strict=True)}

    def _encode_for(
        self, requests: Sequence[Instance], texts: Sequence[str], special: bool | None = None
    ) -> dict[str, list[int]]:
        """`_encoded`; a text that the tokenizer can't take is an error that names its item."""
        try:
            ids = self._encoded(texts, special)
            if (unknown := self.vocabulary.unknown) is not None:
                pairs = zip(requests, texts, strict=True)
                self.strange |= {document(r) for r, text in pairs if unknown in ids[text]}
            return ids
        except Exception:  # of the tokenizer's own kind: which item is it?
            for request, text in zip(requests, texts, strict=True):
                try:
                    self._encoded([text], special)
                except Exception as error:
                    reason = " ".join(str(error).split())[:120]
                    raise UserError(
                        f"{item(request)}: the tokenizer can't encode it ({reason}): {brief(text)}"
                    ) from error
            raise

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether every token is the likeliest) of each continuation.

        Raises:
            UserError: a continuation has no tokens; names the item.
        """
        pairs = []
        for request in requests:
            context, continuation = request.args
            stripped = context.rstrip()
            pairs.append((stripped, context[len(stripped) :] + continuation))
        with_context = [bool(context) for context, _ in pairs]
        filled = list(itertools.compress(zip(requests, pairs, strict=True), with_context))
        wholes = self._encode_for([r for r, _ in filled], [c + t for _, (c, t) in filled])
        contexts = self._encode_for([r for r, _ in filled], [c for _, (c, _) in filled])
        empty = [not some for some in with_context]
        bare = list(itertools.compress(zip(requests, pairs, strict=True), empty))
        alone = self._encode_for([r for r, _ in bare], [t for _, (_, t) in bare], False)
        encoded = []
        for request, (context, continuation) in zip(requests, pairs, strict=True):
            if context:
                before = contexts[context]
                after = wholes[context + continuation][len(before) :]
            else:
                before, after = [self.prefix_token_id], alone[continuation]
                if after[:1] == before:
                    before, after = after[:1], after[1:]
            if not after:
                raise UserError(
                    f"{item(request)}: the continuation {brief(request.args[1])} has no tokens "
                    f"after the context {brief(request.args[0][-40:])}; there is nothing to score"
                )
            if len(before) + len(after) > self.max_length + 1:
                self.cut.add(document(request))
            encoded.append((request.args, before, after))
        answers = self._loglikelihood_tokens(encoded, disable_tqdm=disable_tqdm)
        all_numbers(requests, [value for value, _ in answers])
        return answers

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        answers = self._in_windows([(before, after) for _, before, after in requests])
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def _in_windows(
        self, pairs: Sequence[tuple[list[int], list[int]]], rolling: bool = False
    ) -> list[tuple[float, bool]]:
        """The scorer's answers; of a text too long for one window, or `rolling`, their sum."""
        windows: list[tuple[list[int], list[int]]] = []
        ends = []
        for before, after in pairs:
            if rolling or len(after) > self.max_length:
                rolled = get_rolling_token_windows(
                    token_list=after,
                    prefix_token=before[-1],
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                windows += (make_disjoint_window(window) for window in rolled)
            else:
                windows.append((before, after))
            ends.append(len(windows))
        answers = spread(self.scorer.loglikelihoods, windows)
        parts = [answers[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        return [(sum(v for v, _ in some), all(greedy for _, greedy in some)) for some in parts]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability in nats of each whole text, predicted from its beginning on."""
        texts = [request.args[0] for request in requests]
        ids = self._encode_for(requests, texts, False)
        start = [self.prefix_token_id]
        answers = self._in_windows([(start, ids[text]) for text in texts], rolling=True)
        totals = [value for value, _ in answers]
        all_numbers(requests, totals)
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the first of the task's stops.

        Raises:
            UserError: the task asks for a way of generating that is not there, or for more tokens
                than the model sees.
        """
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            key = json.dumps(request.args[1], sort_keys=True, default=str)
            groups.setdefault(key, []).append(index)
        texts = [""] * len(requests)
        for members in groups.values():
            chosen = [requests[i] for i in members]
            for i, text in zip(members, self._generate(chosen), strict=True):
                texts[i] = text
                self.cache_hook.add_partial("generate_until", requests[i].args, text)
        return texts

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        """`generate_until` for requests that share one way of generating."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(requests[0].args[1], MAX_GEN_TOKS))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=None)
        most = int(kwargs.pop("max_gen_toks"))
        task = requests[0].task_name
        if unknown := sorted(kwargs.keys() - SAMPLED):
            raise UserError(
                f"task '{task}': generation_kwargs: {', '.join(unknown)}: not among what is known "
                f"here ({', '.join(sorted(SAMPLED))}, until, max_gen_toks)"
            )
        room = self.max_length - most
        if room < 1:
            raise UserError(
                f"task '{task}' generates up to {most:,} tokens and the model sees "
                f"{self.max_length:,}; lower generation_kwargs: max_gen_toks in the task's YAML, "
                "or raise max_length if the model's positions allow that"
            )
        contexts = [request.args[0] for request in requests]
        ids = self._encode_for(requests, contexts)
        for request, context in zip(requests, contexts, strict=True):
            if len(ids[context]) > room:
                self.cut.add(document(request))
        sampled = bool(kwargs.get("do_sample")) and kwargs.get("temperature", 1.0) > 0
        stop = partial(self._ends, [text for text in until if text])
        generate = partial(
            self.scorer.generate,
            max_new=most,
            end=self.eot_token_id,
            temperature=float(kwargs.get("temperature", 1.0)) if sampled else 0.0,
            top_k=int(kwargs.get("top_k", TOP_K)) if sampled else None,
            top_p=float(kwargs["top_p"]) if sampled and kwargs.get("top_p") else None,
        )
        prompts = [ids[context][-room:] or [self.prefix_token_id] for context in contexts]
        news = spread(lambda some: generate(some, stop=[stop(p) for p in some]), prompts)
        texts = [
            self.vocabulary.continuation(prompt[-NEIGHBOURS:], new)
            for prompt, new in zip(prompts, news, strict=True)
        ]
        return [postprocess_generated_text(text, until, None) for text in texts]

    def _ends(self, stops: Sequence[str], prompt: list[int]) -> Callable[[list[int]], bool]:
        """Whether one of these texts stands at the end of what has been generated."""
        # A token is a byte at the least; three more for a character cut in two, and a first one
        # that may lose its space, and with it is not looked at.
        reach = max((len(text.encode()) for text in stops), default=0) + 5

        def stop(new: list[int]) -> bool:
            if not stops:
                return False
            if len(new) <= reach:
                end = self.vocabulary.continuation(prompt[-NEIGHBOURS:], new)
            else:
                end = self.vocabulary.decode(new[-reach:])
            return any(text in end for text in stops)

        return stop

    def get_model_info(self) -> dict[str, Any]:
        """For lm-eval's own report."""
        return {"model_max_length": self.max_length, "add_bos_token": self.add_bos_token}


def spread(compute: Callable[[list[Any]], list[Any]], items: list[Any]) -> list[Any]:
    """`compute(items)`, each process computing a share of it; what fails for one fails for all."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return compute(items)
    world, rank = dist.get_world_size(), dist.get_rank()
    shares = [[i for i in range(len(items)) if i // BLOCK % world == r] for r in range(world)]
    answers: list[Any] = []
    error: Exception | None = None
    try:
        answers = compute([items[i] for i in shares[rank]])
    except Exception as raised:  # the others wait to hear of it
        error = raised
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, (answers, error))
    for _, problem in parts:
        if problem is not None:
            raise problem
    merged: list[Any] = [None] * len(items)
    for share, (some, _) in zip(shares, parts, strict=True):
        for i, answer in zip(share, some, strict=True):
            merged[i] = answer
    return merged


def document(request: Instance) -> tuple[str, int]:
    return request.task_name or "", request.doc_id or 0


def all_numbers(requests: Sequence[Instance], values: Sequence[float]) -> None:
    """Raises UserError where a log-probability is none: lm-eval would take the first choice."""
    for request, value in zip(requests, values, strict=True):
        if math.isnan(value):
            raise UserError(
                f"{item(request)}: its log-probability is not a number: the model's weights can't "
                "be scored"
            )


def item(request: Instance) -> str:
    return f"task '{request.task_name}', item {request.doc_id}"


def brief(text: str) -> str:
    """A text for a message: on one line, and no longer than that has room for."""
    shown = repr(text)
    return shown if len(shown) <= 60 else shown[:57] + "…'"
