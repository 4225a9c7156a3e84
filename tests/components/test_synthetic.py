"""What made corpora promise: the same text everywhere, and to know what each token costs."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from components import synthetic
from components.corpus import Copy, Markov, PythonDocs, Recall
from components.registry import UserError

Made = Copy | Recall | Markov


def some(corpus: Made, count: int) -> list[str]:
    return list(itertools.islice(corpus.documents(), count))


@pytest.mark.parametrize("made", [Copy, Recall, Markov])
def test_a_seed_decides_the_text_and_its_fingerprint_and_each_pass_is_the_same(
    made: type[Made],
) -> None:
    first, again, other = made(documents=30), made(documents=30), made(documents=30, seed=1)
    texts = list(first.documents())
    assert texts == list(first.documents()) == list(again.documents())
    assert len(texts) == 30
    assert texts != list(other.documents())
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert all(text.isascii() for text in texts)


def test_the_text_is_the_one_that_stored_runs_were_trained_on() -> None:
    """Changes only with the version in `fingerprint`, or prepared data would be another's."""
    assert some(Copy(), 1) == ["he>he................"]
    assert some(Recall(), 1) == ["F-k9p;m0m0k9F-p;"]
    assert some(Markov(length=8), 1) == ["qobonactlbbfrbbmlde"]


def test_a_copy_is_a_string_twice_and_dots_to_the_width_of_a_window() -> None:
    corpus = Copy(alphabet=3, lengths=(2, 5))
    texts = some(corpus, 2000)
    assert corpus.window == 12
    lengths: Counter[int] = Counter()
    for text in texts:
        string, _, rest = text.partition(">")
        assert len(text) == 11
        assert set(string) <= set("abc")
        assert rest == string + "." * (10 - 2 * len(string))
        lengths[len(string)] += 1
    assert set(lengths) == {2, 3, 4, 5}
    assert all(count == pytest.approx(500, abs=5 * math.sqrt(500)) for count in lengths.values())


def test_recall_asks_for_every_key_once_in_another_order() -> None:
    corpus = Recall(pairs=3, keys=5, values=2)
    orders = set()
    for text in some(corpus, 500):
        pairs = [text[i : i + 2] for i in range(0, 12, 2)]
        given, asked = pairs[:3], pairs[3:]
        assert len(text) + 1 == corpus.window == 13
        assert len({pair[0] for pair in given}) == 3
        assert sorted(asked) == sorted(given)
        assert set(text[::2]) <= set(synthetic.SYMBOLS[:5])
        assert set(text[1::2]) <= set(synthetic.SYMBOLS[47:49])
        orders.add(tuple(given.index(pair) for pair in asked))
    assert len(orders) == 6


def exact(corpus: Made, texts: list[str]) -> None:
    """A document's surprisals are the logarithm of how often it is drawn, and sum up causally."""
    counts = Counter(texts)
    for text, count in counts.most_common(10):
        expected = len(texts) * math.exp(-sum(corpus.surprisal(text)))
        assert count == pytest.approx(expected, abs=5 * math.sqrt(expected) + 1), text
    for text in texts[:20]:
        whole = corpus.surprisal(text)
        assert len(whole) == len(text) + 1
        for cut in range(len(text)):
            assert corpus.surprisal(text[:cut])[:cut] == pytest.approx(whole[:cut])


def test_surprisals_are_the_probabilities_with_which_documents_are_drawn() -> None:
    exact(Copy(alphabet=2, lengths=(1, 2)), some(Copy(alphabet=2, lengths=(1, 2)), 6000))
    recall = Recall(pairs=2, keys=2, values=2)
    exact(recall, some(recall, 6000))
    markov = Markov(alphabet=2, length=2, documents=6000, order=2)
    exact(markov, some(markov, 6000))


def test_probabilities_of_all_documents_sum_to_one() -> None:
    copy = Copy(alphabet=2, lengths=(1, 3))
    strings = ["".join(x) for n in (1, 2, 3) for x in itertools.product("ab", repeat=n)]
    total = sum(math.exp(-sum(copy.surprisal(copy.document(string)))) for string in strings)
    assert total == pytest.approx(1.0)
    markov = Markov(alphabet=2, length=2, order=2)
    texts = ("".join(x) for n in range(1, 13) for x in itertools.product("ab", repeat=n))
    total = sum(math.exp(-sum(markov.surprisal(text))) for text in texts)
    assert total == pytest.approx(1.0 - 2.0**-12)


@pytest.mark.parametrize("order", [1, 2])
def test_a_chains_mean_surprisal_is_its_entropy_rate(order: int) -> None:
    """The closed form: documents end with probability p, so that the expected number of visits of
    each context is the start times the inverse of 1 - (1 - p) M."""
    corpus = Markov(order=order, alphabet=4, length=50, documents=3000)
    table = corpus._chain.table
    contexts, p = len(table), 1 / 50
    moves = np.zeros((contexts, contexts))
    for context, letter in np.ndindex(table.shape):
        moves[context, (context * 4 + letter) % contexts] += table[context, letter]
    visits = np.linalg.inv(np.eye(contexts) - (1 - p) * moves)[0]
    row_entropy = -(table * np.log(table)).sum(1)
    stops = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / p
    expected = (visits @ row_entropy + stops) / (1 / p + 1)
    nats = [sum(corpus.surprisal(text)) for text in corpus.documents()]
    tokens = [len(text) + 1 for text in corpus.documents()]
    assert sum(tokens) == pytest.approx(3000 * 51, rel=0.08)
    assert sum(nats) / sum(tokens) == pytest.approx(expected, abs=0.01)


def test_text_that_people_wrote_has_no_known_surprisal() -> None:
    assert PythonDocs().surprisal is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copy(lengths=(5, 2)), "the shortest goes first"),
        (lambda: Recall(pairs=9, keys=8), "9 pairs need as many keys, and there are 8"),
        (lambda: Markov(alphabet=26, order=4), "456,976 tables"),
    ],
)
def test_parameters_that_cannot_be_are_one_line(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
