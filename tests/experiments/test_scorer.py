"""Scores are those of one request at a time with whole logits, whatever is shared and batched."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch

from components import registry
from components.decoder import Decoder
from components.dims import Dims
from components.layout import Layout
from components.mixer import Attention
from experiments import prefix_tree
from experiments import scorer as scorer_module
from experiments.generate import Sampling
from experiments.output_layer import Likeliest
from experiments.prefix_tree import Plan, Request
from experiments.record import UserError
from experiments.scorer import Scorer

VOCAB, CONTEXT = 61, 48
PARTS: dict[str, dict[str, Any]] = {
    **{name: {"position": name} for name in registry.names("position")},
    **{f"block-{name}": {"block": name, "norm": "none"} for name in registry.names("block")},
    **{f"norm-{name}": {"norm": name, "position": "rotary"} for name in registry.names("norm")},
    **{f"mixer-{name}": {"mixer": name} for name in registry.names("mixer")},
    "grouped": {"mixer": {"name": "attention", "n_kv_heads": 2}, "position": "rotary"},
    "qk_norm": {"mixer": {"name": "attention", "qk_norm": True}, "norm": "rmsnorm"},
    "window": {"mixer": {"name": "attention", "window": 5}, "position": "rotary"},
    "window-alibi": {"mixer": {"name": "attention", "window": 9}, "position": "alibi"},
    "lstm-plain": {"mixer": "lstm", "position": "none", "block": "plain", "norm": "none"},
}


def model_of(parts: dict[str, Any], context: int = CONTEXT) -> Decoder:
    dims = Dims(
        d_model=32, n_layers=2, n_heads=4, head_dim=8, max_seq_len=context, vocab_size=VOCAB
    )
    defaults: dict[str, Any] = {
        "norm": "layernorm", "position": "learned", "mixer": "attention", "ffn": "mlp",
        "block": "pre", "init": "fan_in",
    }  # fmt: skip
    chosen = {kind: registry.spec(kind, value) for kind, value in {**defaults, **parts}.items()}
    model = Decoder(dims, chosen, tie_embeddings=False).initialise(0)
    for parameter in model.parameters():  # initial values alone hardly prefer any token
        parameter.data *= 2
    return model.eval()


@torch.no_grad()
def direct(model: Decoder, request: Request, max_length: int) -> tuple[float, bool, float]:
    """The definition: one forward pass, whole logits, log_softmax, gather, sum.

    Returns log-probability, greedy, and by how much the closest token decides that: the least
    distance of a target's logit from the largest other one.
    """
    before, after = request
    text = (before + after)[-(max_length + 1) :][:-1]
    logits = model.logits(model(torch.tensor([text])))[0, -len(after) :]
    targets = torch.tensor(after)
    values = logits.log_softmax(-1).gather(1, targets[:, None])
    own = logits.gather(1, targets[:, None])[:, 0]
    others = logits.scatter(1, targets[:, None], -torch.inf).amax(1)
    lead = float((own - others).abs().min())
    return float(values.sum()), bool((logits.argmax(-1) == targets).all()), lead


def greedy_after(model: Decoder, before: list[int], count: int) -> list[int]:
    """The likeliest continuation, so that some requests are greedy."""
    text = list(before)
    with torch.no_grad():
        for _ in range(count):
            window = torch.tensor([text[-CONTEXT:]])
            text.append(int(model.logits(model(window))[0, -1].argmax()))
    return text[len(before) :]


def requests_of(model: Decoder, seed: int = 0) -> list[Request]:
    """Every shape of request: see the comments."""
    draw = random.Random(seed)

    def some(low: int, high: int) -> list[int]:
        return [draw.randrange(VOCAB) for _ in range(draw.randint(low, high))]

    requests: list[Request] = []
    for _ in range(6):  # multiple choice: one context, answers of several tokens and of one
        context = some(5, 30)
        requests += [(context, some(1, 6)) for _ in range(4)]
        requests += [(context, some(1, 1)) for _ in range(3)]
        requests.append((context, greedy_after(model, context, 3)))
    for _ in range(8):  # minimal pairs after one start token
        stem = some(1, 8)
        requests += [([0], stem + some(1, 8)) for _ in range(2)]
    long = some(40, 40)
    for length in (1, 2, 17, 40):  # requests that are the beginning of others
        requests.append((long[:length], long[length : length + 1] or some(1, 1)))
        requests.append((long[:1], long[1 : length + 1] or some(1, 1)))
    requests += requests[:5]  # the same again
    requests += [(some(60, 90), some(1, 12)) for _ in range(4)]  # cut on the left
    requests += [(some(1, 9), some(CONTEXT, CONTEXT))]  # a continuation as long as the model
    requests += [(some(1, 1), some(1, 1)) for _ in range(4)]
    draw.shuffle(requests)
    return requests


def assert_exact(model: Decoder, requests: list[Request], scorer: Scorer) -> None:
    """Scores are as close to the exact ones, in fp64, as the direct ones in fp32 are.

    By how much rounding moves the direct ones, per token, is measured; sums in another order may
    move a score up to four times as far. Which of two tokens is the likelier one is promised only
    where their logits are further apart than that moves both.
    """
    found = scorer.loglikelihoods(requests)
    assert len(found) == len(requests)
    exact = copy.deepcopy(model).double()
    expected = [direct(exact, request, scorer.max_length) for request in requests]
    moved = 4 * max(
        abs(direct(model, request, scorer.max_length)[0] - value) / len(request[1])
        for request, (value, _, _) in zip(requests, expected, strict=True)
    )
    assert moved < 1e-3
    for request, (value, greedy), (right, likeliest, lead) in zip(
        requests, found, expected, strict=True
    ):
        assert value == pytest.approx(right, rel=0, abs=moved * len(request[1]))
        if lead > 2 * moved:
            assert greedy == likeliest


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("tokens", [64, 2048])
def test_scores_are_those_of_one_request_at_a_time(parts: dict[str, Any], tokens: int) -> None:
    model = model_of(parts)
    requests = requests_of(model)
    scorer = Scorer(model, max_length=CONTEXT, tokens_per_batch=tokens)
    assert_exact(model, requests, scorer)
    assert 5 < sum(greedy for _, greedy in scorer.loglikelihoods(requests)) < len(requests)


def test_the_vocabulary_in_blocks_gives_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scorer_module.WORDS, "cpu", 7)
    monkeypatch.setitem(scorer_module.STATES, "cpu", 16)
    model = model_of({})
    assert_exact(model, requests_of(model), Scorer(model, max_length=CONTEXT))


def test_of_equal_logits_the_first_is_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scorer_module.WORDS, "cpu", 16)
    model = model_of({})
    model.output_weight.data.zero_()
    requests = [([1, 2], [0]), ([1, 2], [1]), ([1], [20]), ([1, 2, 3], [0, 0])]
    greedy = [likeliest for _, likeliest in Scorer(model, max_length=8).loglikelihoods(requests)]
    assert greedy == [True, False, False, True]


@pytest.mark.parametrize("parts", ["learned", "rotary", "alibi", "window", "grouped"])
def test_what_many_texts_share_is_run_once(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_tree, "TRUNK", 8)
    monkeypatch.setattr(prefix_tree, "ROW", 16)
    draw, model = random.Random(1), model_of(PARTS[parts], 64)
    prompt = [draw.randrange(VOCAB) for _ in range(30)]
    requests: list[Request] = [(prompt[:20], prompt[20:]), (prompt[:29], prompt[29:])]
    for _ in range(40):
        question = prompt + [draw.randrange(VOCAB) for _ in range(draw.randint(1, 9))]
        requests += [(question, [draw.randrange(VOCAB), 3]) for _ in range(3)]
    plan = Plan(requests, 64, share=True)
    trunks = [section.trunk for section in plan.sections if section.trunk is not None]
    assert [len(trunk.tokens) for trunk in trunks] == [29]  # the shortest text is all of it
    body = sum(len(row.tokens) for section in plan.sections for row in section.rows)
    assert body < sum(len(before) + 1 for before, _ in requests) / 5
    assert_exact(model, requests, Scorer(model, max_length=64, tokens_per_batch=100))


# --- generation --------------------------------------------------------------------------------

END = 7


def prompts_of(model: Decoder, count: int = 12, seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(VOCAB) for _ in range(draw.randint(1, 20))] for _ in range(count)]


def stops(new: list[int]) -> bool:
    return new[-1] % 11 == 3


@torch.no_grad()
def one_at_a_time(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """The likeliest token after the whole text, again and again, without a cache."""
    new: list[int] = []
    for _ in range(count):
        logits = model.logits(model(torch.tensor([prompt + new]))[0, -1])
        token = int(logits.argmax())
        if token == END:
            break
        new.append(token)
        if stops(new):
            break
    return new


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_greedy_generation_is_that_of_one_text_at_a_time(parts: dict[str, Any]) -> None:
    model = model_of(parts).double()  # no near-tie turns over
    prompts = prompts_of(model)
    prompts += prompts[:2]
    scorer = Scorer(model, max_length=CONTEXT, tokens_per_batch=30)
    found = scorer.generate(prompts, max_new=20, stop=stops, end=END)
    assert found == [one_at_a_time(model, prompt, 20) for prompt in prompts]
    lengths = {len(new) for new in found}
    assert len(lengths) > 1, "all end at once: rows that leave are not tried"


@pytest.mark.parametrize("parts", ["learned", "rotary", "alibi", "window", "mixer-lstm"])
def test_what_prompts_share_is_read_once(parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorer_module, "TRUNK", 4)
    model = model_of(PARTS[parts]).double()
    shared = prompts_of(model, 1, seed=3)[0] + [1, 2, 3, 4, 5]
    prompts = [shared + prompt[:9] for prompt in prompts_of(model)] + [shared]
    found = Scorer(model, max_length=CONTEXT).generate(prompts, max_new=9, stop=stops, end=END)
    assert found == [one_at_a_time(model, prompt, 9) for prompt in prompts]


def test_draws_depend_on_seed_and_prompt_not_on_the_batch() -> None:
    model = model_of({"position": "rotary"}).double()
    prompts = prompts_of(model, 6)
    how: dict[str, Any] = {
        "max_new": 12, "stop": lambda new: False, "end": END, "temperature": 2.0, "top_k": 9,
        "top_p": 0.95,
    }  # fmt: skip
    scorer = Scorer(model, max_length=CONTEXT)
    state = torch.get_rng_state()
    found = scorer.generate(prompts * 2, seed=1, **how)
    assert found[:6] != found[6:]  # the same prompt again is drawn anew
    for prompt, new in zip(prompts, found, strict=False):
        assert scorer.generate([prompt], seed=1, **how) == [new]
    assert scorer.generate(prompts, seed=2, **how) != found[:6]
    assert torch.equal(torch.get_rng_state(), state)


def test_draws_follow_the_probabilities() -> None:
    model = model_of({}).double()
    prompt = [1, 2, 3]
    scorer = Scorer(model, max_length=8)
    found = scorer.generate(
        [prompt] * 4000, max_new=1, stop=lambda new: False, end=-1, temperature=1.5, top_k=4
    )
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([prompt]))[:, -1])
    expected = Sampling(1.5, top_k=4).probabilities(logits)[0]
    observed = torch.bincount(torch.tensor(found).flatten(), minlength=VOCAB) / 4000
    assert (observed - expected).abs().max() < 0.03  # more than 3 standard errors


def test_the_likeliest_is_exact_where_bf16_would_err() -> None:
    """A sum of n products is off by at most n u / (1 - n u) times the sum of their sizes, in any
    order, u = 2^-24 (Higham 2002, eq. 3.5). Two logits may each be off by that, so the word that
    is chosen is at most twice that below the largest."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3000, 32, generator=generator)
    weight[1500:] = weight[:1500] + 1e-3 * torch.randn(1500, 32, generator=generator)
    hidden = torch.randn(200, 32, generator=generator)
    exact = hidden.double() @ weight.double().T
    nu = 32 * 2**-24
    slack = 2 * nu / (1 - nu) * (hidden.double().abs() @ weight.double().abs().T).amax(1)

    def below(words: torch.Tensor) -> torch.Tensor:
        return exact.amax(1) - exact.gather(1, words[:, None])[:, 0]

    assert (below(Likeliest(weight)(hidden)) <= slack).all()
    rounded = (hidden.bfloat16() @ weight.bfloat16().T).argmax(1)
    assert (below(rounded) > slack).sum() > 20


def test_of_equal_words_the_first_is_the_likeliest() -> None:
    whole = torch.randint(9, (200, 32), generator=torch.Generator().manual_seed(0)).float()
    for words in (torch.zeros(3000, 32), torch.ones(9, 32)):  # whole numbers: sums are exact
        assert Likeliest(words)(whole).tolist() == [0] * 200


# --- the model stays as it was, and what is not possible is said --------------------------------


@pytest.mark.parametrize("parts", ["grouped", "window-alibi", "qk_norm", "mixer-lstm"])
def test_bf16_is_close_and_leaves_the_weights(parts: str) -> None:
    model = model_of(PARTS[parts])
    requests = requests_of(model)
    exact = Scorer(model, max_length=CONTEXT).loglikelihoods(requests)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rough = Scorer(model, max_length=CONTEXT, precision="bf16").loglikelihoods(requests)
    errors = [abs(a - b) / abs(a) for (a, _), (b, _) in zip(exact, rough, strict=True) if a < -1]
    assert sum(errors) / len(errors) < 0.03
    assert max(errors) > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("parts", ["learned", "mixer-lstm"])
def test_training_goes_on_as_if_nothing_had_been_scored(parts: str) -> None:
    def step(model: Decoder) -> list[torch.Tensor]:
        ids = torch.tensor([[1, 2, 3, 4]])
        loss = model.logits(model(ids)).square().mean()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    model = model_of(PARTS[parts]).train()
    expected = step(model)
    beats = []
    scorer = Scorer(model, max_length=CONTEXT, tokens_per_batch=64, pulse=lambda: beats.append(1))
    scorer.loglikelihoods(requests_of(model))
    assert len(beats) > 2
    scorer.generate([[1, 2]], max_new=3, stop=stops, end=END)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(step(model), expected, strict=True))


def test_positions_without_a_limit_go_past_the_training_length() -> None:
    model = model_of({"position": "alibi"}, context=16)
    draw = random.Random(0)
    text = [draw.randrange(VOCAB) for _ in range(100)]
    requests = [(text[:60], text[60:70]), (text[:60], text[70:]), (text[:1], text[1:90])]
    assert_exact(model, requests, Scorer(model, max_length=100))


def test_no_requests_no_answers() -> None:
    scorer = Scorer(model_of({}), max_length=8)
    assert scorer.loglikelihoods([]) == []
    assert scorer.generate([], max_new=3, stop=stops, end=END) == []


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (([1], []), "request 1: an empty continuation: nothing can be scored"),
        (([], [1]), "request 1: an empty context: nothing can be scored"),
        (
            ([1], [1] * 9),
            "request 1: a continuation of 9 tokens, of which the model sees 8 at once; "
            "raise max_length or leave it out",
        ),
    ],
)
def test_what_cannot_be_scored_is_said(request_: Request, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Scorer(model_of({}), max_length=8).loglikelihoods([([1], [2]), request_])
    assert str(caught.value) == message


@pytest.mark.parametrize("prompt", [[], [1] * 6])
def test_a_prompt_that_leaves_no_room_is_said(prompt: list[int]) -> None:
    with pytest.raises(UserError, match=rf"^prompt 0: {len(prompt)} tokens and 3 to generate"):
        Scorer(model_of({}), max_length=8).generate([prompt], max_new=3, stop=stops, end=END)


# --- layouts ------------------------------------------------------------------------------------


class Subclassed(Attention):
    """Inherits attention's word that it takes layouts, and computes something else."""

    def forward(self, x: Any, position: Any, tables: Any, cache: Any = None) -> Any:
        out = super().forward(x, position, tables, cache)
        return out + x.cumsum(1) / 9 if cache is None else out


def test_a_subclass_that_does_not_say_so_itself_takes_no_layout() -> None:
    model = model_of({})
    assert model.takes_layout
    for block in model.blocks:
        block.mixer.__class__ = Subclassed
    assert not model.takes_layout
    assert_exact(model, requests_of(model), Scorer(model, max_length=CONTEXT))


def test_a_row_holds_each_token_of_a_tree_once() -> None:
    requests = [([1, 2, 3], [4, 5]), ([1, 2, 3], [4, 6]), ([1, 2], [9]), ([1, 8], [1, 1])]
    (section,) = Plan(requests, 16, share=True).sections
    (row,) = section.rows
    assert row.tokens == [1, 2, 3, 4, 8, 1]
    assert row.depths == [0, 1, 2, 3, 1, 2]
    assert row.ends == [6, 4, 4, 4, 6, 6]
    predicted = [(1, 9, 2), (2, 4, 0), (2, 4, 1), (3, 5, 0), (3, 6, 1), (4, 1, 3), (5, 1, 3)]
    assert sorted(row.targets) == predicted
    (section,) = Plan(requests, 16, share=False).sections
    assert [row.tokens for row in section.rows] == [[1, 2, 3, 4], [1, 8, 1]]


@torch.no_grad()
@pytest.mark.parametrize("parts", ["learned", "rotary", "alibi", "window", "sinusoidal"])
def test_a_layout_of_ordinary_rows_changes_nothing(parts: str) -> None:
    model = model_of(PARTS[parts]).double()
    ids = torch.randint(VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))
    places = torch.arange(20).expand(3, -1)
    seen = torch.ones(20, 20, dtype=torch.bool).tril().expand(3, -1, -1)
    torch.testing.assert_close(model(ids, None, Layout(places, places, seen)), model(ids))
