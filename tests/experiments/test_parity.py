"""The same weights through our adapter and through lm-eval's own HFLM: the same number per item.

Models are small but not flat: their initial values are scaled up, so that likelihoods differ much
between tokens and greedy choices are no ties.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from benchmarks.peers import export, hflm
from components.tokenizer import BPE, Characters, Tokenizer
from experiments import loader
from experiments.lm import CeterisLM
from experiments.model import build
from tests.experiments.lm_tasks import sentences

LENGTH = 48
SMALL = (
    "model.d_model=48",
    "model.n_layers=2",
    f"model.max_seq_len={LENGTH}",
    "training.seq_len=32",
)


@pytest.fixture(scope="module")
def tokenizer(text_file: Path) -> Tokenizer:
    made = BPE(vocab_size=600)
    text = text_file.read_text("utf-8") + " ".join(sentences(50))
    made.train(lambda: iter([text]))
    return made


@pytest.fixture(scope="module", params=["gpt2-tiny", "llama-tiny"])
def pair(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> tuple[CeterisLM, Any]:
    """(ours, HFLM) over the same weights, tokenizer and length."""
    heads = ("model.n_heads=4",) if request.param.startswith("gpt2") else ()
    experiment = loader.load(request.param, [*SMALL, *heads])
    model = build(experiment, tokenizer.vocab_size, seed=0).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(4.0 if "tok_emb" in name else 2.0 if weight.ndim > 1 else 1.0)
    # With its cache of logits HFLM gives a request the numbers of other positions where two are the
    # same tokens, cut into context and continuation at two places.
    exported = export(model, tokenizer.end_of_text)
    theirs = hflm(exported, tokenizer, LENGTH, batch_size=7, logits_cache=False)
    return CeterisLM(model, tokenizer), theirs


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, some, 0, ("a_task", i, 1)) for i, some in enumerate(arguments)]


def pairs() -> dict[str, list[tuple[str, str]]]:
    """Contexts and continuations of every sort, some hundreds in all."""
    text = sentences(40, length=16)  # continuations are so long that some of their tokens remain
    long = [" ".join(text[i : i + 4]) for i in range(12)]  # more than the model sees
    return {
        "short": [(t[:20].strip(), t[20:40].rstrip()) for t in text],
        "with a space before": [(t.rsplit(" ", 3)[0], " " + t.rsplit(" ", 2)[-1]) for t in text],
        "without a space": [
            (t[: 3 * i % 25 + 1], t[3 * i % 25 + 1 :][:18]) for i, t in enumerate(text)
        ],
        "space at the end": [(t[:15].rstrip() + "  ", "is not") for t in text[:10]],
        "line ends": [(f"{t[:12]}\n\n", f"\n{t[12:20]}x") for t in text[:10]],
        "truncated": [(t, f" {u[:25]}") for t, u in zip(long, text, strict=False)],
        "exactly full": [(t, " the" * 20) for t in long],
        "empty context": [("", f" {t[:30]}") for t in text],
        "empty context, no space": [("", t[:30].strip()) for t in text],
        "repeated contexts": [
            (t[:30].rstrip(), f" {end}")
            for t in text[:12]
            for end in ("is", "is not", "the list", "None for each key", "is")
        ],
        "multi-byte": [
            (f"é 漢字 {t[:8]}", end) for t in text[:8] for end in (" 🙂", "漢", " naïve é", "字 x")
        ],
        "one a prefix of another": [(text[0][:25], text[1][:n]) for n in range(3, 24)],
    }


def test_every_log_likelihood_and_greedy_flag_is_hflms(pair: tuple[CeterisLM, Any]) -> None:
    ours, theirs = pair
    sorts = pairs()
    starts = [t[:14] for t in sentences(20)]
    first = instances("generate_until", [(t, {"max_gen_toks": 2, "until": []}) for t in starts])
    sorts["greedy"] = [
        (start, text)
        for start, text in zip(starts, theirs.generate_until(first, disable_tqdm=True), strict=True)
        if text.strip()
    ]
    asked = instances("loglikelihood", [some for sort in sorts.values() for some in sort])
    assert len(asked) > 350
    mine = ours.loglikelihood(asked)
    wanted = theirs.loglikelihood(asked, disable_tqdm=True)
    assert any(greedy for _, greedy in wanted) and not all(greedy for _, greedy in wanted)
    names = [name for name, sort in sorts.items() for _ in sort]
    for name, request, (value, greedy), (expected, is_greedy) in zip(
        names, asked, mine, wanted, strict=True
    ):
        assert value == pytest.approx(expected, abs=1e-4), (name, request.args)
        assert greedy is is_greedy, (name, request.args)
    assert ours.cut  # some contexts were longer than the model


def test_rolling_likelihoods_are_hflms(pair: tuple[CeterisLM, Any]) -> None:
    ours, theirs = pair
    text = sentences(60, length=14)
    texts = [" ".join(text[i : i + n]) for n in (1, 2, 3, 7, 20) for i in (0, 5, 11, 30)]
    texts += ["x", " ", "漢字🙂" * 40, text[0]]
    asked = instances("loglikelihood_rolling", [(t,) for t in texts])
    mine = ours.loglikelihood_rolling(asked)
    assert mine == pytest.approx(theirs.loglikelihood_rolling(asked, disable_tqdm=True), rel=1e-6)


def test_generations_are_hflms(pair: tuple[CeterisLM, Any]) -> None:
    ours, theirs = pair
    text = sentences(30, length=9)
    contexts = [t[: 5 + i] for i, t in enumerate(text)] + [" ".join(text[:4]), "é 漢", text[0]]
    kwargs = (
        {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False},
        {"until": [" the", "a", "is not"], "max_gen_toks": 20},
        {"until": [], "max_gen_toks": 5, "temperature": 0.0},
    )
    asked = instances("generate_until", [(c, dict(k)) for k in kwargs for c in contexts])
    mine = ours.generate_until(asked)
    wanted = theirs.generate_until(asked, disable_tqdm=True)
    assert mine == wanted
    assert len(set(mine)) > 20


def test_with_a_start_token_as_hflm_with_one(tokenizer: Tokenizer) -> None:
    experiment = loader.load("llama-tiny", SMALL)
    model = build(experiment, tokenizer.vocab_size, seed=1).eval()
    exported = export(model, tokenizer.end_of_text)
    how = {"add_bos_token": True, "logits_cache": False}
    theirs = hflm(exported, tokenizer, LENGTH, batch_size=7, **how)
    start = theirs.tokenizer.decode(tokenizer.end_of_text)
    theirs.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=[start, "$A"], special_tokens=[(start, tokenizer.end_of_text)]
    )
    ours = CeterisLM(model, tokenizer, add_bos_token=True)
    sorts = ("short", "truncated", "empty context", "with a space before", "space at the end")
    asked = instances("loglikelihood", [some for sort in sorts for some in pairs()[sort]])
    mine, wanted = ours.loglikelihood(asked), theirs.loglikelihood(asked, disable_tqdm=True)
    for request, (value, greedy), (expected, is_greedy) in zip(asked, mine, wanted, strict=True):
        assert value == pytest.approx(expected, abs=1e-4) and greedy is is_greedy, request.args


def test_metrics_of_whole_tasks_are_hflms(pair: tuple[CeterisLM, Any], tmp_path: Path) -> None:
    from lm_eval.evaluator import evaluate

    from experiments import tasks
    from tests.experiments.lm_tasks import write_tasks

    names = ["tiny_choice", "tiny_pairs", "tiny_last", "tiny_perplexity", "tiny_answer"]
    found = tasks.resolve(names, write_tasks(tmp_path, items=24))
    made = []
    for lm in pair:
        with tasks.quiet():
            loaded = tasks.load(found)
            made.append(evaluate(lm, loaded, bootstrap_iters=0, log_samples=False)["results"])
    ours, theirs = (json.loads(json.dumps(m, default=str)) for m in made)
    assert ours.keys() == theirs.keys() == set(names)
    for name, values in ours.items():
        for key, value in values.items():
            expected = theirs[name][key]
            if isinstance(value, float):
                expected = pytest.approx(expected, rel=1e-5)
            assert value == expected, (name, key)


def test_special_tokens_in_a_text_are_text(tokenizer: Tokenizer) -> None:
    experiment = loader.load("gpt2-tiny", [*SMALL, "model.n_heads=4"])
    lm = CeterisLM(build(experiment, tokenizer.vocab_size, seed=0), tokenizer)
    ids = lm.tok_encode("a<|endoftext|>b")
    assert tokenizer.end_of_text not in ids and len(ids) > 3


@pytest.mark.parametrize(
    ("context", "continuation", "said"),
    [
        ("a list", "", r"item 0: the continuation '' has no tokens after the context 'a list'"),
        ("", "", r"item 0: the continuation '' has no tokens"),
        ("a\ud800", " b", r"item 0: the tokenizer can't encode it"),
    ],
)
def test_what_cannot_be_scored_names_its_item(
    context: str, continuation: str, said: str, tokenizer: Tokenizer
) -> None:
    from components.registry import UserError

    experiment = loader.load("gpt2-tiny", [*SMALL, "model.n_heads=4"])
    lm = CeterisLM(build(experiment, tokenizer.vocab_size, seed=0), tokenizer)
    with pytest.raises(UserError, match=f"task 'a_task', {said}"):
        lm.loglikelihood(instances("loglikelihood", [(context, continuation)]))


def test_generation_that_cannot_be_done_names_its_task(tokenizer: Tokenizer) -> None:
    from components.registry import UserError

    experiment = loader.load("gpt2-tiny", [*SMALL, "model.n_heads=4"])
    lm = CeterisLM(build(experiment, tokenizer.vocab_size, seed=0), tokenizer)
    for kwargs, said in (
        ({"until": ["x"]}, "generates up to 256 tokens and the model sees 48"),
        ({"num_beams": 4, "max_gen_toks": 4}, "generation_kwargs: num_beams"),
    ):
        with pytest.raises(UserError, match=said):
            lm.generate_until(instances("generate_until", [("a list", kwargs)]))


def test_sampling_draws_anew_for_each_repeat_and_the_same_again(tokenizer: Tokenizer) -> None:
    experiment = loader.load("gpt2-tiny", [*SMALL, "model.n_heads=4"])
    lm = CeterisLM(build(experiment, tokenizer.vocab_size, seed=0), tokenizer)
    how = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 10, "until": []}
    asked = instances("generate_until", [("a list", how)] * 6)
    state = torch.get_rng_state()
    first = lm.generate_until(asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == lm.generate_until(asked) and len(set(first)) > 1


def test_items_with_characters_that_the_tokenizer_does_not_know_are_counted() -> None:
    characters = Characters()
    characters.train(lambda: iter(["abcdefgh a list of tuples"]))
    experiment = loader.load("gpt2-tiny", [*SMALL, "model.n_heads=4"])
    lm = CeterisLM(build(experiment, characters.vocab_size, seed=0), characters)
    lm.loglikelihood(instances("loglikelihood", [("a", " list"), ("é", " list"), ("a", " 漢")]))
    assert lm.strange == {("a_task", 1), ("a_task", 2)}


def test_a_continuation_longer_than_the_model_is_scored_in_windows(tokenizer: Tokenizer) -> None:
    experiment = loader.load("gpt2-tiny", [*SMALL, "model.n_heads=4"])
    lm = CeterisLM(build(experiment, tokenizer.vocab_size, seed=0), tokenizer)
    text = " ".join(sentences(8))
    ((value, _),) = lm.loglikelihood(instances("loglikelihood", [("", text)]))
    (rolled,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
    assert value == pytest.approx(rolled, rel=1e-6) and lm.cut == {("a_task", 0)}
