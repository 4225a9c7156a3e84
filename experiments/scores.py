"""Scores: what lm-eval's tasks gave for a run at one step, kept beside it.

    runs/<id>/scores/
        step-00000202/hellaswag.json       a task's metrics, and of what; or a group's
        step-00000202/hellaswag.parquet    one row per item, to compare two runs item by item
        step-00000202/hellaswag,5shot,first100.json     under other settings it is another score
        failure.json                       why the last attempt at scoring ended
        lock                               held by who scores the run

A task's record:

    {"schema": 2, "task", "kind": task|group|tag, "children": [...], "step", "tokens",
     "settings": {...}, "fingerprint", "version": the task's, "lm_eval": "0.4.13", "items", "of",
     "metrics": {"acc": {"value", "stderr", "higher_is_better", "chance", "chance_stderr"}, ...},
     "primary": "acc",
     "truncated": items whose context was cut, "unknown": items that hold what the tokenizer has no
     id for, "seconds"}

`stderr` is that of the items, as lm-eval gives it: how far the score would move with other items
of the same kind. How far it moves with another seed is a matter of several runs, and of analysis/.
`chance` is what guessing gives, and `chance_stderr` how far a guessed score scatters; null where
that is not known. Schema 1 counted requests for choices: see `trusted`.
Nothing here imports torch or lm-eval.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from components.registry import UserError
from experiments.record import Run, hold_file, read_json

SCHEMA = 2
SMOOTH = ("answer_bpb", "answer_probability")  # what moves where right answers stand at chance
WORSE_WHEN_HIGHER = ("answer_bpb",)
Z95 = 1.96
PROBE_ITEMS = 200
COUNTED = {
    "truncated": "whose context was cut to what the model sees",
    "unknown": "with characters that the tokenizer does not know",
}


class ScoringFailed(UserError):
    """The run is as it was, but some tasks could not be scored; `records` are the others'."""

    def __init__(self, line: str, records: Mapping[str, dict[str, Any]] | None = None) -> None:
        super().__init__(line)
        self.records = records or {}


@dataclass(frozen=True)
class Settings:
    """What decides a score besides the task and the weights; see `schema.Evaluation`."""

    num_fewshot: int | None = None
    limit: float | None = None
    max_length: int | None = None
    add_bos_token: bool = False
    precision: str = "fp32"

    @classmethod
    def of(cls, evaluation: Mapping[str, Any]) -> Settings:
        """Of the plain data of an experiment's `evaluation`."""
        known = {name: evaluation.get(name) for name in cls.__dataclass_fields__}
        return cls(**{name: value for name, value in known.items() if value is not None})

    @property
    def words(self) -> tuple[str, ...]:
        """What differs from the usual, for names and titles."""
        words = [f"{self.num_fewshot}shot"] * (self.num_fewshot is not None)
        if self.limit is not None:
            share = self.limit < 1
            words.append(f"first{100 * self.limit:g}%" if share else f"first{int(self.limit)}")
        words += [f"length{self.max_length}"] * (self.max_length is not None)
        words += ["bos"] * self.add_bos_token
        return (*words, *[self.precision] * (self.precision != "fp32"))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def folder(run: Run, step: int) -> Path:
    return run / "scores" / f"step-{step:08d}"


def path_of(run: Run, step: int, task: str, settings: Settings) -> Path:
    """The record of a task's (group's, tag's) score; a name with odd characters is quoted."""
    return folder(run, step) / (",".join([quote(task, safe=""), *settings.words]) + ".json")


def read(path: Path) -> dict[str, Any] | None:
    """A record, as far as it is to be trusted; None if there is none.

    Raises:
        UserError: it is damaged.
    """
    return trusted(read_json(path)) if path.exists() else None


def trusted(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what its version may have got wrong.

    Records of schema 1 took each request for a choice, the first request for the right answer of
    tasks with code of their own, and 0 for the chance of any text. Which tasks these were they
    don't say, so none keeps its chance and its measures of the right answer; the task's own
    metrics are right. `evaluate.score` scores such a task again.
    """
    if record.get("schema") != 1 or not isinstance(record.get("metrics"), dict):
        return record
    kept = {key: metric for key, metric in record["metrics"].items() if key not in SMOOTH}
    plain = {k: {**m, "chance": None} if isinstance(m, dict) else m for k, m in kept.items()}
    return {**record, "metrics": plain}


def forget_groups(run: Run, step: int, task: str, settings: Settings) -> None:
    """Removes the records of groups and tags that hold a task, since its own is to change."""
    for path in folder(run, step).glob("*.json"):
        known = read(path) or {}
        if task in known.get("children", ()) and known.get("settings") == settings.as_json():
            path.unlink(missing_ok=True)
            forget_groups(run, step, known["task"], settings)


def steps(run: Run) -> list[int]:
    """Steps at which the run has been scored, oldest first."""
    found = (p.name.removeprefix("step-") for p in (run / "scores").glob("step-*"))
    return sorted(int(name) for name in found if name.isdigit())


def of_step(run: Run, step: int) -> dict[str, dict[str, Any]]:
    """Every record of a step, by file name without its ending: `hellaswag,5shot`."""
    paths = sorted(folder(run, step).glob("*.json"))
    return {path.stem: trusted(read_json(path)) for path in paths}


def of_tasks(run: Run, step: int, evaluation: Any) -> dict[str, dict[str, Any]]:
    """The records of the tasks that an `Evaluation` names, of those that there are."""
    settings = Settings.of(evaluation.model_dump())
    found = {name: read(path_of(run, step, name, settings)) for name in evaluation.tasks}
    return {name: record for name, record in found.items() if record is not None}


def lacking(run: Run, evaluation: Mapping[str, Any]) -> list[str]:
    """The tasks that `evaluation` names and that a finished run has not been scored on yet.

    A diverged run lacks none: there are no weights worth a score.
    """
    names = evaluation.get("tasks") or ()
    if not names:
        return []
    result = read_json(run / "result.json")
    if result.get("status") != "done":
        return []
    settings = Settings.of(evaluation)
    return [n for n in names if not path_of(run, result["step"], n, settings).exists()]


def failure(run: Run) -> str | None:
    """Why the last attempt at scoring ended, in one line."""
    path = run / "scores" / "failure.json"
    return str(read_json(path).get("error")) if path.exists() else None


def at_chance(metric: Mapping[str, Any], value: float, items: int) -> bool | None:
    """Whether a score is within the noise of guessing, or below it, at 95%; None: can't be said.

    `value` is the score, of one run or a mean over seeds. The noise is that of the items: a mean
    over seeds has no less of it, since all seeds answer the same items. Of a score that is better
    when lower nothing can be said.
    """
    chance, stderr = metric.get("chance"), metric.get("stderr")
    if chance is None or metric.get("higher_is_better") is False:
        return None
    by_guessing = metric.get("chance_stderr")
    if by_guessing is None:
        by_guessing = math.sqrt(chance * (1 - chance) / items) if items else math.inf
    return value - chance < Z95 * max(by_guessing, stderr or 0.0) or value <= chance


def lines(records: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The scores to be read: (task, items, score ± 95% of its items, chance, what it can tell,
    bits per byte and probability of the right answer)."""
    rows = []
    for name, record in records.items():
        metrics, items = record["metrics"], record["items"]
        leading = metrics.get(record["primary"] or "")
        score, chance, verdict = "—", "—", ""
        if leading and leading["value"] is not None:
            spread = leading["stderr"]
            score = f"{record['primary']} {leading['value']:.4f}"
            score += f" ± {Z95 * spread:.4f}" if spread is not None else ""
            if leading["chance"] is not None:
                chance = f"{leading['chance']:.4f}".rstrip("0").rstrip(".")
            blind = at_chance(leading, leading["value"], items)
            verdict = {True: "at chance", False: "above chance", None: ""}[blind]
        smooth = [metrics.get(key, {}).get("value") for key in SMOOTH]
        of = f"{items} of {record['of']}" if items < record["of"] else str(items)
        rows.append(
            (name, of, score, chance, verdict, *("—" if v is None else f"{v:.4f}" for v in smooth))
        )
    return rows


def lock(run: Run, wait: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
    """Holds the run's scores for this process, see `record.hold_file`."""
    return hold_file(run / "scores" / "lock", wait)
