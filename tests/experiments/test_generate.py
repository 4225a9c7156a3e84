"""Generation: draws as they are defined, caches that change nothing, ends and full contexts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from components import registry
from components.decoder import Decoder
from components.dims import Dims
from components.tokenizer import Tokenizer
from experiments.generate import Continuation, Sampling, generate
from experiments.record import UserError

BYTES: Tokenizer = registry.build("tokenizer", "bytes")
GREEDY = Sampling(temperature=0, max_tokens=40)
PARTS: dict[str, dict[str, Any]] = {
    "learned": {"position": "learned"},
    "rotary": {"position": "rotary"},
    "alibi": {"position": "alibi"},
    "window": {"position": "rotary", "mixer": {"name": "attention", "window": 5}},
    "lstm": {"position": "none", "mixer": "lstm", "block": "plain"},
}


def model_of(parts: dict[str, Any], context: int = 64) -> Decoder:
    """A model with its initial values, in double precision: no near-tie turns over."""
    dims = Dims(
        d_model=16, n_layers=2, n_heads=2, head_dim=8, max_seq_len=context, vocab_size=257,
        dropout=0.0,
    )  # fmt: skip
    defaults: dict[str, Any] = {
        "norm": "layernorm", "mixer": "attention", "ffn": "mlp", "block": "pre", "init": "fan_in",
    }  # fmt: skip
    chosen = {kind: registry.spec(kind, value) for kind, value in {**defaults, **parts}.items()}
    model = Decoder(dims, chosen, tie_embeddings=False).initialise(0)
    for parameter in model.parameters():  # initial values alone hardly prefer any token
        parameter.data *= 3
    return model.double().eval()


@torch.no_grad()
def greedy_without_cache(model: Decoder, prompt: str, tokens: int) -> str:
    """The likeliest token after the whole context, again and again."""
    limit = model.dims.max_seq_len
    context = [256, *prompt.encode()]
    ids: list[int] = []
    while len(ids) < tokens:
        if len(context) > limit:
            context = context[-(limit // 2 + 1) :]
        ids.append(int(model.logits(model(torch.tensor([context]))[0, -1]).argmax()))
        if ids[-1] == 256:
            break
        context.append(ids[-1])
    return BYTES.decode(ids)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_temperature_0_is_the_argmax_of_the_model_without_a_cache(parts: dict[str, Any]) -> None:
    model = model_of(parts)
    (result,) = generate(model, BYTES, "Return the ", GREEDY)
    assert result.text == greedy_without_cache(model, "Return the ", 40)


@pytest.mark.parametrize("context", [1, 2, 3, 8])
def test_a_full_context_goes_on_from_its_later_half(context: int) -> None:
    model = model_of(PARTS["rotary"], context)
    (result,) = generate(model, BYTES, "", GREEDY)
    assert result.text == greedy_without_cache(model, "", 40)
    assert result.tokens == 40 or result.ended


def test_the_same_seed_gives_the_same_text_and_another_seed_another() -> None:
    model = model_of(PARTS["learned"])
    drawn = [generate(model, BYTES, "a", Sampling(seed=seed), 2) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_a_prompt_of_many_bytes_a_letter_counts_its_bytes_and_comes_back_whole() -> None:
    model = model_of(PARTS["learned"], context=16)
    prompt = "日本語 né"  # 13 bytes
    (result,) = generate(model, BYTES, prompt, GREEDY)
    assert result.text == greedy_without_cache(model, prompt, 40)
    with pytest.raises(UserError, match=r"^the prompt has 17 tokens, the model's context 16$"):
        generate(model, BYTES, prompt + "abc", GREEDY)
    assert len(generate(model, BYTES, prompt + "ab", GREEDY)) == 1  # 16 with the end of text
    with pytest.raises(UserError, match=r"^the prompt is not UTF-8 text at character 2$"):
        generate(model, BYTES, "a\udc80", GREEDY)


class Scripted:
    """A model that says each row of a script, whatever it reads."""

    def __init__(self, *rows: list[int], vocabulary: int = 257) -> None:
        self.script, self.said, self.vocabulary = torch.tensor(rows), 0, vocabulary
        self.dims = SimpleNamespace(max_seq_len=64)

    def new_caches(self, batch: int, length: int) -> Any:
        return SimpleNamespace(filled=0)

    def __call__(self, tokens: Tensor, caches: Any) -> Tensor:
        caches.filled += tokens.shape[1]
        column = self.script[:, self.said]
        self.said += 1
        return torch.nn.functional.one_hot(column, self.vocabulary).double()[:, None]

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden


def test_each_text_stops_at_its_own_end_and_all_when_the_last_has_ended() -> None:
    a, b, c, end = 97, 98, 99, 256
    model = Scripted([a, end, b, b, b], [a, b, c, end, b])
    results = generate(cast(Decoder, model), BYTES, "", GREEDY, samples=2)
    assert results == [Continuation("a", 1, True), Continuation("abc", 3, True)]
    assert model.said == 4


LOGITS = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, 1.0]])


def probabilities(**how: Any) -> Tensor:
    return Sampling(**{"temperature": 1.0, **how}).probabilities(LOGITS)[0]


def test_temperature_divides_the_logits() -> None:
    assert torch.allclose(probabilities(temperature=0.5), (LOGITS[0] / 0.5).softmax(0).double())
    assert torch.allclose(probabilities(temperature=float("inf")), torch.full((6,), 1 / 6).double())
    assert probabilities(temperature=1e-300).tolist() == [1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("k", range(1, 8))
def test_top_k_keeps_the_k_likeliest_in_their_proportions(k: int) -> None:
    plain, kept = probabilities(), probabilities(top_k=k)
    support = kept.nonzero().flatten().tolist()
    assert len(support) == min(k, 6)
    # Compared one by one: a sum's last bit depends on its order and on the processor.
    best = plain.topk(min(k, 6)).values
    assert torch.equal(plain[support].sort(descending=True).values, best)
    assert torch.allclose(kept[support], plain[support] / plain[support].sum())


@pytest.mark.parametrize("p", [1e-9, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0])
def test_top_p_keeps_the_fewest_likeliest_that_reach_p(p: float) -> None:
    plain, kept = probabilities(), probabilities(top_p=p)
    kept = kept / kept.sum()
    support = kept.nonzero().flatten()
    assert torch.allclose(kept[support], plain[support] / plain[support].sum())
    best = plain.topk(len(support)).values
    assert torch.equal(plain[support].sort(descending=True).values, best)
    assert plain[support].sum() >= p - 1e-12
    assert plain[support].sum() - plain[support].min() < p


def test_draws_follow_the_probabilities() -> None:
    how = Sampling(temperature=0.7, top_p=0.9)
    expected = how.probabilities(LOGITS)[0]
    expected = expected / expected.sum()
    # torch's numbers of a seed are others on another processor: so many that any will do.
    drawn = how.draw(LOGITS.expand(200_000, -1), torch.Generator().manual_seed(0))
    observed = drawn.bincount(minlength=6) / 200_000
    assert (observed - expected).abs().max() < 0.012  # more than 10 standard errors
    assert Sampling(temperature=0).draw(LOGITS, torch.Generator()).tolist() == [0]
