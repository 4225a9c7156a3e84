"""What lm-eval's samples say of each item: the columns of its table, and what guessing would give.

    samples of a task ─ choices, right answers ─ columns of <task>.parquet
                                              └─ the chance of each item

Chance and the probability of the answer are about an item's *choices*. They are known where lm-eval
itself makes the requests and judges the answers (`by_lm_eval`). A task whose own code does either
may ask and count as it likes: of that, only its metrics and the plain log-probabilities are kept.
"""

from __future__ import annotations

import json
import math
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from components.registry import UserError
from experiments import scores

CHOICE = "multiple_choice"
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")  # of items whose best choice is right
Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Choices:
    """The choices of one item, by the index of their request.

    Attributes:
        count: requests that stand for a choice. Those that follow are the same texts without
            their context, which `acc_mutual_info` asks for.
        distinct: the first of each text; a text that is there twice is one choice.
        answers: the right ones as the task gives them.
        right: those of `distinct` whose text is a right one.
    """

    count: int
    distinct: list[int]
    answers: list[int]
    right: list[int]

    @property
    def chance(self) -> float:
        """How often a guess among the texts is counted as right.

        Of equals lm-eval takes the first, so a right answer whose text stood before is never taken.
        """
        return len(set(self.answers) & set(self.distinct)) / len(self.distinct)


@dataclass(frozen=True)
class Items:
    """A task's items.

    Attributes:
        columns: of the Parquet file, one value for each item.
        chances: for each item, how often guessing is counted as right; None where not known.
    """

    columns: Columns
    chances: list[float] | None

    def guessing(self) -> dict[str, float | None]:
        """The score that guessing gives: its mean, and its standard error
        √(Σ cᵢ(1 − cᵢ)) / n over items of chance cᵢ."""
        if not self.chances:
            return {"chance": None, "chance_stderr": None}
        c = np.array(self.chances)
        error = math.sqrt(float((c * (1 - c)).sum())) / len(c)
        return {"chance": float(c.mean()), "chance_stderr": error}


def by_lm_eval(task: Any) -> bool:
    """Whether lm-eval's own code makes a task's requests and judges the answers to them."""
    from lm_eval.api.task import ConfigurableTask

    own = ("construct_requests", "process_results")
    if not isinstance(task, ConfigurableTask):
        return False
    filters = task.config.filter_list or []
    return (
        all(getattr(type(task), name) is getattr(ConfigurableTask, name) for name in own)
        and task.config.process_results is None
        and len(filters) <= 1
        and all(f.get("function") == "take_first" for each in filters for f in each["filter"])
    )


def has_chance(task: Any, metric: str) -> bool:
    """Whether a metric is a share of items of which it is known what guessing gives.

    Right is that the best choice by lm-eval's own rule is a right one; in a `loglikelihood` task,
    that the text is the likeliest token by token. A function or an aggregation of the task's own
    may have one of these names, too, and means something else.
    """
    from lm_eval.api.metrics import mean
    from lm_eval.api.registry import get_metric

    names = SHARES if task.OUTPUT_TYPE == CHOICE else ("acc",)
    return (
        by_lm_eval(task)
        and task.OUTPUT_TYPE in (CHOICE, "loglikelihood")
        and metric in names
        and task._metric_fn_list.get(metric) is get_metric(metric)
        and task.aggregation().get(metric) is mean
    )


def items_of(task: Any, samples: list[dict[str, Any]]) -> Items:
    """The items of a task, from lm-eval's samples of it; two rows of one where it has two filters.

    Columns `loglikelihoods`, `greedy` and `bytes` are lists, a number for each choice (for each
    request where the task makes its own); `unconditional` are the choices' log-probabilities
    without the context, where a metric asks for them. `answer` is the index of the right choice, a
    list of them where an item may have several. `answer_probability` and `answer_bpb` move smoothly
    where the share of right answers still stands at chance:

        answer_probability = Σ over right choices of exp(l) / Σ over choices of exp(l)
                             (of a single text, without other choices: exp(l))
        answer_bpb         = −log₂ exp(l) / bytes of the right choice; of several, the least

    with l in nats and texts that are there twice counted once.

    Raises:
        UserError: a right answer is none of the choices, or there is none.
    """
    columns: Columns = {"item": [s["doc_id"] for s in samples]}
    columns["item_hash"] = [s["doc_hash"][:16] for s in samples]
    if len({s["filter"] for s in samples}) > 1:
        columns["filter"] = [s["filter"] for s in samples]
    if samples and isinstance(samples[0]["doc"], dict) and "cluster" in samples[0]["doc"]:
        columns["cluster"] = [str(s["doc"]["cluster"]) for s in samples]
    for name in dict.fromkeys(name for s in samples for name in s["metrics"]):
        columns[name] = [_plain(s.get(name)) for s in samples]
    first = [[resp[0] for resp in s["resps"]] for s in samples]
    chances = None
    if task.OUTPUT_TYPE == "generate_until":
        columns["generated"] = [str(answers[0]) for answers in first]
    elif task.OUTPUT_TYPE == "loglikelihood_rolling":
        columns["loglikelihoods"] = [[float(a) for a in answers] for answers in first]
    else:
        columns["loglikelihoods"] = [[float(a[0]) for a in answers] for answers in first]
        columns["greedy"] = [[bool(a[1]) for a in answers] for answers in first]
        columns["bytes"] = [[len(a[1].encode()) for a in s["arguments"]] for s in samples]
        if by_lm_eval(task):
            chances = _with_answers(task, samples, columns)
    return Items({name: values for name, values in columns.items() if values}, chances)


def _with_answers(task: Any, samples: list[dict[str, Any]], columns: Columns) -> list[float]:
    """Adds what the right answers cost to the columns; returns each item's chance."""
    if task.OUTPUT_TYPE == CHOICE:
        choices = [_choices(task, sample) for sample in samples]
        chances = [item.chance for item in choices]
    else:
        choices = [Choices(1, [0], [0], [0])] * len(samples)
        chances = [_commonest([s["arguments"][0][1] for s in samples])] * len(samples)
    counts = [item.count for item in choices]
    rows = columns["loglikelihoods"]
    if any(len(row) > count for row, count in zip(rows, counts, strict=True)):
        columns["unconditional"] = [row[n:] for row, n in zip(rows, counts, strict=True)]
        for name in ("loglikelihoods", "greedy", "bytes"):
            columns[name] = [row[:n] for row, n in zip(columns[name], counts, strict=True)]
        rows = columns["loglikelihoods"]
    several = any(len(item.answers) > 1 for item in choices)
    columns["answer"] = [item.answers if several else item.answers[0] for item in choices]
    columns["answer_bpb"] = [
        min(-row[i] / math.log(2) / max(size[i], 1) for i in item.right)
        for row, size, item in zip(rows, columns["bytes"], choices, strict=True)
    ]
    share = _share if task.OUTPUT_TYPE == CHOICE else _alone
    columns["answer_probability"] = [
        share(row, item) for row, item in zip(rows, choices, strict=True)
    ]
    return chances


def _choices(task: Any, sample: Mapping[str, Any]) -> Choices:
    texts = task.doc_to_choice(sample["doc"])
    given = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
    answers = [_index(a, texts, sample) for a in (given if isinstance(given, list) else [given])]
    if not answers:
        raise UserError(f"item {sample['doc_id']}: none of its choices is said to be right")
    requests = [tuple(a[:2]) for a in sample["arguments"][: len(texts)]]
    first: dict[Any, int] = {}
    for i, request in enumerate(requests):
        first.setdefault(request, i)
    right = sorted({first[requests[i]] for i in answers})
    return Choices(len(texts), list(first.values()), sorted(set(answers)), right)


def _index(answer: Any, texts: Sequence[str], sample: Mapping[str, Any]) -> int:
    """The index of a right answer, which is given by its index or its text.

    Raises:
        UserError: it is none of the choices, which lm-eval would count as answered wrongly.
    """
    index = texts.index(answer) if isinstance(answer, str) and answer in texts else answer
    try:
        index = operator.index(index)
    except TypeError:
        index = -1
    if not 0 <= index < len(texts):
        raise UserError(
            f"item {sample['doc_id']}: the right answer is {answer!r}, which is none of its "
            f"{len(texts)} choices (give its index, or its text)"
        )
    return int(index)


def _commonest(texts: Sequence[str]) -> float:
    """How often an item's text is that of the commonest other item: what always saying that gives.

    (m − 1) / (n − 1) for n texts of which m are the same: 0 where each is another.
    """
    most = max(Counter(texts).values(), default=1)
    return (most - 1) / max(len(texts) - 1, 1)


def _share(loglikelihoods: Sequence[float], item: Choices) -> float:
    highest = max(loglikelihoods[i] for i in item.distinct)
    weights = {i: math.exp(loglikelihoods[i] - highest) for i in item.distinct}
    return sum(weights[i] for i in item.right) / sum(weights.values())


def _alone(loglikelihoods: Sequence[float], item: Choices) -> float:
    return math.exp(loglikelihoods[0])


def _plain(value: Any) -> Any:
    """A metric's value for one item as Parquet holds it: a number, a list of numbers, or text."""
    if value is None or isinstance(value, bool | int | float | np.number):
        return None if value is None else float(value)
    if isinstance(value, tuple | list) and all(isinstance(v, int | float) for v in value):
        return [float(v) for v in value]
    return json.dumps(value, default=str)


def answer_metric(columns: Columns, key: str) -> dict[str, Any]:
    """The record of `answer_bpb` or `answer_probability`: the mean over items."""
    x = np.array(columns[key])
    return {
        "value": float(x.mean()),
        "stderr": float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else None,
        "higher_is_better": key not in scores.WORSE_WHEN_HIGHER,
        "chance": None,
        "chance_stderr": None,
    }
