"""Chance and the probability of the answer count choices, whatever lm-eval asks for besides."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from components.registry import UserError
from experiments import scores, tasks
from experiments.evaluate import _score_leaf, _together
from experiments.schema import Evaluation
from tests.experiments.lm_tasks import mean, write_task

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and datasets
WORDS = "ash bay cod dew elm fig gum hop ink jay".split()
CHOOSE = "output_type: multiple_choice\ndoc_to_text: '{{q}}'\ndoc_to_choice: choices\n"


class Guesser(LM):
    """Log-probabilities by lot for each (context, continuation), the same for the same."""

    def __init__(self) -> None:
        super().__init__()
        self.cut: set[Any] = set()
        self.strange: set[Any] = set()

    def loglikelihood(self, requests: Sequence[Instance], **how: Any) -> list[tuple[float, bool]]:
        return [(nats(*request.args), False) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance], **how: Any) -> list[float]:
        return [nats("", *request.args) for request in requests]

    def generate_until(self, requests: Sequence[Instance], **how: Any) -> list[str]:
        return ["ash" for _ in requests]


def nats(context: str, text: str) -> float:
    digest = hashlib.blake2b(f"{context}|{text}".encode()).digest()
    return -5 * (int.from_bytes(digest[:8], "big") + 1) / 2**64


def item(i: int, **more: Any) -> dict[str, Any]:
    """Four choices, two of which are right."""
    draw = random.Random(i)
    chosen = draw.sample(WORDS, 4)
    row = {"q": f"q{i}", "choices": chosen, "gold": draw.randrange(4)}
    return {**row, "golds": sorted(draw.sample(range(4), 2)), **more}


def scored(
    folder: Path, rows: Sequence[dict[str, Any]], yaml: str, code: str = "", name: str = "odd"
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The record and the columns of a task that is written, loaded and asked."""
    if code:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"code_{name}.py").write_text(code)
    write_task(folder, name, rows, yaml)
    resolved, evaluation = tasks.resolve([name], folder), Evaluation(tasks=(name,))
    return _score_leaf(cast(Any, Guesser()), resolved, name, evaluation)


def share(row: dict[str, Any], right: Sequence[int]) -> float:
    """The answer's probability from its definition."""
    p = [math.exp(nats(row["q"], f" {choice}")) for choice in row["choices"]]
    return sum(p[i] for i in right) / sum(p)


MANY = [item(i) for i in range(420)]
UNEVEN = [item(i, choices=WORDS[: 2 + i % 4], gold=i % 2) for i in range(420)]
TWICE = [item(i, choices=["ash", "ash", "bay", "cod"], gold=i % 4) for i in range(420)]
GUESSED: dict[str, tuple[list[dict[str, Any]], str, float]] = {
    "one right": (MANY, f"{CHOOSE}doc_to_target: gold\n{mean('acc', 'acc_norm')}", 1 / 4),
    "two right": (MANY, f"{CHOOSE}doc_to_target: golds\n{mean('acc', 'acc_bytes')}", 2 / 4),
    "one to three right": (
        [item(i, golds=list(range(1 + i % 3))) for i in range(420)],
        f"{CHOOSE}doc_to_target: golds\n{mean('acc')}",
        (1 + 2 + 3) / 3 / 4,
    ),
    "two to five choices": (
        UNEVEN, f"{CHOOSE}doc_to_target: gold\n{mean('acc')}", (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4,
    ),
    "asked without context too": (
        MANY, f"{CHOOSE}doc_to_target: gold\n{mean('acc', 'acc_mutual_info')}", 1 / 4,
    ),
    "a text twice": (TWICE, f"{CHOOSE}doc_to_target: gold\n{mean('acc')}", 1 / 4),
    "answer by its text": (
        MANY, f"{CHOOSE}doc_to_target: '{{{{choices[gold]}}}}'\n{mean('acc')}", 1 / 4,
    ),
    "choices before the text": (
        MANY,
        "output_type: multiple_choice\ndoc_to_text: gold\ndoc_to_target: q\n"
        f"doc_to_choice: choices\n{mean('acc')}",
        1 / 4,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rows", "yaml", "chance"), GUESSED.values(), ids=GUESSED)
def test_chance_is_what_a_guesser_reaches(
    rows: list[dict[str, Any]], yaml: str, chance: float, tmp_path: Path
) -> None:
    record, _ = scored(tmp_path, rows, yaml)
    for name, metric in record["metrics"].items():
        if name in scores.SMOOTH:
            continue
        assert metric["chance"] == pytest.approx(chance), name
        assert abs(metric["value"] - chance) < 4 * metric["chance_stderr"], name
        assert scores.at_chance(metric, metric["value"], record["items"]) is (
            metric["value"] - chance < 1.96 * max(metric["chance_stderr"], metric["stderr"])
        )


def test_probabilities_are_among_the_choices_alone(tmp_path: Path) -> None:
    rows = [item(i) for i in range(20)]
    both = mean("acc", "acc_mutual_info")
    record, columns = scored(tmp_path, rows, f"{CHOOSE}doc_to_target: gold\n{both}")
    assert columns["answer_probability"] == pytest.approx([share(r, [r["gold"]]) for r in rows])
    assert columns["answer"] == [r["gold"] for r in rows]
    assert {len(row) for row in columns["loglikelihoods"]} == {4}
    alone = [[nats("", f" {choice}") for choice in r["choices"]] for r in rows]
    assert columns["unconditional"] == alone
    expected = np.mean(columns["answer_probability"])
    assert record["metrics"]["answer_probability"]["value"] == pytest.approx(expected)


def test_of_several_right_answers_probabilities_add_up_and_the_cheapest_counts(
    tmp_path: Path,
) -> None:
    rows = [item(i) for i in range(20)]
    _, columns = scored(tmp_path, rows, f"{CHOOSE}doc_to_target: golds\n{mean('acc')}")
    assert columns["answer_probability"] == pytest.approx([share(r, r["golds"]) for r in rows])
    bits = [
        min(-nats(r["q"], f" {r['choices'][i]}") / math.log(2) / 4 for i in r["golds"])
        for r in rows
    ]
    assert columns["answer_bpb"] == pytest.approx(bits)
    assert columns["answer"] == [r["golds"] for r in rows]


def test_a_text_that_is_there_twice_is_one_choice(tmp_path: Path) -> None:
    rows = [item(i, choices=["ash", "bay", "ash"], gold=i) for i in range(3)]
    record, columns = scored(tmp_path, rows, f"{CHOOSE}doc_to_target: gold\n{mean('acc')}")
    once = [{**r, "choices": ["ash", "bay"]} for r in rows]
    expected = [share(r, [right]) for r, right in zip(once, (0, 1, 0), strict=True)]
    assert columns["answer_probability"] == pytest.approx(expected)
    assert record["metrics"]["acc"]["chance"] == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert columns["answer"] == [0, 1, 2]


def test_of_a_single_choice_the_share_is_one(tmp_path: Path) -> None:
    rows = [item(i, choices=WORDS[: 1 + i % 2], gold=0) for i in range(4)]
    record, columns = scored(tmp_path, rows, f"{CHOOSE}doc_to_target: gold\n{mean('acc')}")
    assert columns["answer_probability"][0] == columns["answer_probability"][2] == 1
    assert record["metrics"]["acc"]["chance"] == pytest.approx(0.75)


RESULTS = "def results(doc, results):\n    return {'acc': 1.0}\n"
TASK = """
from lm_eval.api.task import ConfigurableTask
class Own(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={k: v for k, v in config.items() if k != 'class'})
    def process_results(self, doc, results):
        return {'acc': 1.0}
"""
ASKING = """
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
class Own(ConfigurableTask):
    def __init__(self, config):
        super().__init__(config={k: v for k, v in config.items() if k != 'class'})
    def construct_requests(self, doc, ctx, **more):
        more = {k: v for k, v in more.items() if k in ('metadata', 'repeats')}
        return [Instance('loglikelihood', doc, (ctx, text), i, **more)
                for i, text in enumerate((' no', ' yes', ' maybe'))]
"""
FILTER = "filter_list:\n  - {name: best, filter: [{function: take_first}, {function: custom, filter_fn: !function code_odd.kept}]}\n"  # noqa: E501
OWN: dict[str, tuple[str, str]] = {
    "results of its own": (
        f"{CHOOSE}doc_to_target: gold\nprocess_results: !function code_odd.results\n{mean('acc')}",
        RESULTS,
    ),
    "a class of its own": (
        f"class: !function code_odd.Own\n{CHOOSE}doc_to_target: gold\n{mean('acc')}",
        TASK,
    ),
    "requests of its own": (
        "class: !function code_odd.Own\noutput_type: loglikelihood\ndoc_to_text: '{{q}}'\n"
        f"doc_to_target: ' yes'\n{mean('acc')}",
        ASKING,
    ),
    "a filter of its own": (
        f"{CHOOSE}doc_to_target: gold\n{FILTER}{mean('acc')}",
        "def kept(resps, docs):\n    return resps\n",
    ),
}


@pytest.mark.parametrize(("yaml", "code"), OWN.values(), ids=OWN)
def test_no_chance_where_a_task_computes_its_own_results(
    yaml: str, code: str, tmp_path: Path
) -> None:
    record, columns = scored(tmp_path, [item(i) for i in range(8)], yaml, code)
    for metric in record["metrics"].values():
        assert (metric["chance"], metric["chance_stderr"]) == (None, None)
        assert scores.at_chance(metric, metric["value"], 8) is None
    assert not set(record["metrics"]) & set(scores.SMOOTH)
    assert not {"answer", *scores.SMOOTH} & set(columns)
    ((*_, chance, verdict, bits, share),) = scores.lines({"odd": record})
    assert (chance, verdict, bits, share) == ("—", "", "—", "—")


def test_no_chance_for_a_metric_that_is_no_share_of_right_answers(tmp_path: Path) -> None:
    rows = [item(i) for i in range(30)]
    yaml = f"{CHOOSE}doc_to_target: gold\nmetric_list:\n"
    yaml += "  - {metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}\n"
    yaml += "  - {metric: brier_score, aggregation: brier_score, higher_is_better: false}\n"
    yaml += "  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    yaml += "  - {metric: acc, aggregation: !function code_odd.worst, higher_is_better: true}\n"
    record, _ = scored(tmp_path, rows, yaml, "def worst(values):\n    return min(values)\n")
    for name in ("mcc", "brier_score", "exact_match", "acc"):
        assert record["metrics"][name]["chance"] is None, name


def test_no_chance_for_what_is_written_freely(tmp_path: Path) -> None:
    yaml = "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{choices[0]}}'\n"
    record, _ = scored(tmp_path, [item(i) for i in range(8)], yaml + mean("exact_match"))
    assert record["metrics"]["exact_match"]["chance"] is None


@pytest.mark.parametrize(
    ("answers", "chance"),
    [(["yes", "no"] * 20, 19 / 39), (["yes"] * 30 + ["no"] * 10, 29 / 39), (WORDS, 0)],
)
def test_chance_of_a_text_is_what_always_writing_the_commonest_gives(
    answers: list[str], chance: float, tmp_path: Path
) -> None:
    rows = [{"q": f"q{i}", "a": answer} for i, answer in enumerate(answers)]
    yaml = "output_type: loglikelihood\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
    record, columns = scored(tmp_path, rows, yaml + mean("acc"))
    assert record["metrics"]["acc"]["chance"] == pytest.approx(chance)
    expected = [math.exp(nats(r["q"], r["a"])) for r in rows]
    assert columns["answer_probability"] == pytest.approx(expected)


def test_an_item_without_a_right_answer_is_named(tmp_path: Path) -> None:
    rows = [item(0), item(1, golds=[1, 9])]
    with pytest.raises(UserError, match=r"^item 1: the right answer is 9, which is none of its 4"):
        scored(tmp_path, rows, f"{CHOOSE}doc_to_target: golds\n{mean('acc')}")


def test_nothing_is_said_of_a_score_that_is_better_when_lower() -> None:
    metric = {"chance": 0.5, "stderr": 0.01, "higher_is_better": False}
    assert scores.at_chance(metric, 0.1, 400) is scores.at_chance(metric, 0.9, 400) is None


@pytest.mark.parametrize("weighted", [True, False])
def test_a_group_is_as_uncertain_as_guessing_in_all_its_tasks(
    weighted: bool, tmp_path: Path
) -> None:
    sizes = {"small": (10, "gold", 1 / 4), "large": (900, "golds", 2 / 4)}
    leaves = {}
    for name, (items, target, _) in sizes.items():
        yaml = f"{CHOOSE}doc_to_target: {target}\n{mean('acc')}"
        record, _ = scored(tmp_path, [item(i) for i in range(items)], yaml, name=name)
        leaves[name] = {**record, "step": 1, "tokens": 1, "settings": {}}
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [small, large]\n"
        f"aggregate_metric_list: [{{metric: acc, weight_by_size: {weighted}}}]\n"
    )
    made = _together("both", tasks.resolve(["both"], tmp_path), leaves)["metrics"]["acc"]
    weights = [n / 910 if weighted else 1 / 2 for n, _, _ in sizes.values()]
    cells = list(zip(weights, sizes.values(), strict=True))
    assert made["chance"] == pytest.approx(sum(w * c for w, (_, _, c) in cells))
    variance = sum(w * w * c * (1 - c) / n for w, (n, _, c) in cells)
    assert made["chance_stderr"] == pytest.approx(math.sqrt(variance))
    barely = made["chance"] + 1.9 * max(made["chance_stderr"], made["stderr"])
    assert scores.at_chance(made, barely, 910) is True


def old(metrics: dict[str, Any]) -> dict[str, Any]:
    return {"schema": 1, "primary": "acc", "metrics": metrics}


def test_of_a_record_that_counted_requests_only_the_tasks_own_metrics_are_kept() -> None:
    metric = {"value": 0.5, "stderr": 0.1, "higher_is_better": True, "chance": 0.125}
    record = old({"acc": metric, "answer_bpb": metric, "answer_probability": metric})
    assert scores.trusted(record)["metrics"] == {"acc": {**metric, "chance": None}}
    new = {**record, "schema": scores.SCHEMA}
    assert scores.trusted(new) == new
