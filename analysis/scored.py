"""Columns of a table for the scores of lm-eval's tasks.

The ± of a cell is the sd over seeds: how far another seed would move the score. The standard error
of the items, how far other items would, is another thing: it stands in brackets after it. Where the
baseline is within the items' noise of guessing, the task can't tell the variants apart: its column
is marked, and the bits per byte of the right answer stand beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from analysis.comparison import Compared, Comparison
from analysis.results import Run
from analysis.statistics import Summary, summarise
from analysis.wording import UNLIKE
from experiments.scores import COUNTED, SMOOTH, at_chance

BLIND = "‡"
Records = Mapping[int, Mapping[str, Any]]  # by seed


@dataclass(frozen=True)
class ScoreColumn:
    """One metric of one task, in all rows.

    Attributes:
        key: `hellaswag,5shot:acc`.
        title: for the reader, with an arrow to where better is.
        rows: for each row of the comparison its records by seed, of the seeds that have one.
        blind: the baseline is within the noise of guessing.
        mixed: what differs between the records, if anything does: they are not one task's.
    """

    key: str
    title: str
    metric: str
    rows: Sequence[Records]
    blind: bool
    mixed: tuple[str, ...]

    def summary(self, index: int) -> Summary | None:
        """Mean and sd over the seeds of a row."""
        return summarise(values(self.rows[index], self.metric))

    @property
    def spreads(self) -> list[float | None]:
        """The sd of each row that has a score."""
        known = (self.summary(index) for index in range(len(self.rows)))
        return [summary.sd for summary in known if summary]

    def stderr(self, index: int) -> float | None:
        """The items' standard error, the mean over a row's seeds."""
        found = [record["metrics"][self.metric]["stderr"] for record in self.rows[index].values()]
        known = [error for error in found if error is not None]
        return float(np.mean(known)) if known else None


def columns(comparison: Comparison) -> list[ScoreColumn]:
    """A column for each task that a run has been scored on, in the order of their names; a group
    stands for its tasks."""
    found: list[ScoreColumn] = []
    for name in names(run for r in comparison.rows for run in r.runs.values()):
        rows = [by_seed(r, name) for r in comparison.rows]
        records = [record for row in rows for record in row.values()]
        metric = next((r["primary"] for r in records if r["primary"]), None)
        if metric is None:
            continue
        rows = [{s: r for s, r in row.items() if metric in r["metrics"]} for row in rows]
        blind = is_blind(rows[0], metric)
        mixed = differing(records)
        found.append(column(name, metric, rows, blind, mixed))
        smooth = SMOOTH[0]
        if blind and all(smooth in record["metrics"] for record in records):
            found.append(column(name, smooth, rows, False, ()))
    return found


def column(
    name: str, metric: str, rows: Sequence[Records], blind: bool, mixed: tuple[str, ...]
) -> ScoreColumn:
    first = next(record for row in rows for record in row.values())
    marks = BLIND * blind + UNLIKE * bool(mixed)
    title = f"{name.replace(',', ', ')} {measure(metric, first)}{' ' * bool(marks)}{marks}"
    return ScoreColumn(f"{name}:{metric}", title, metric, rows, blind, mixed)


def measure(metric: str, record: Mapping[str, Any]) -> str:
    """`acc ↑`: the metric, with an arrow to where better is."""
    better = {True: " ↑", False: " ↓", None: ""}[record["metrics"][metric]["higher_is_better"]]
    return {"answer_bpb": "answer bits/byte"}.get(metric, metric) + better


def names(runs: Iterable[Run]) -> list[str]:
    """Tasks and groups that runs were scored on, without the tasks of a group that is among them.

    A group without a score of its own leaves its tasks to speak for themselves.
    """
    known = {name: record for run in runs for name, record in run.scores.items()}
    below = {
        ",".join([child, *name.split(",")[1:]])
        for name, record in known.items()
        if record["primary"]
        for child in record["children"]
    }
    return sorted(known.keys() - below)


def by_seed(r: Compared, name: str) -> Records:
    return {seed: run.scores[name] for seed, run in r.runs.items() if name in run.scores}


def values(records: Records, metric: str) -> list[float]:
    found = (record["metrics"][metric]["value"] for record in records.values())
    return [value for value in found if value is not None]


def is_blind(baseline: Records, metric: str) -> bool:
    known = values(baseline, metric)
    if not known:
        return False
    first = next(iter(baseline.values()))
    return bool(at_chance(first["metrics"][metric], float(np.mean(known)), first["items"]))


def differing(records: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """In what the records are not of one task: `lm_eval 0.4.12, 0.4.13`."""
    found = []
    for key in ("lm_eval", "version", "fingerprint", "items"):
        several = sorted({str(record.get(key)) for record in records})
        if len(several) > 1:
            found.append(f"{key} {', '.join(several[:4])}")
    return tuple(found)


def footnotes(baseline: str, found: Sequence[ScoreColumn]) -> Iterable[str]:
    """What the columns don't say: versions, items, errors of the items, and what can't tell.

    `baseline` is its label.
    """
    if not found:
        return
    parts = []
    for score in found:
        record = next((r for row in score.rows for r in row.values()), None)
        if record is None or score.metric in SMOOTH:
            continue
        stderr = score.stderr(0) if score.rows[0] else None
        name = score.key.partition(":")[0].replace(",", ", ")
        version = f" version {record['version']}" if record["version"] is not None else ""
        of = f" of {record['of']:,}" if record["items"] < record["of"] else ""
        text = f"{name}{version}, {record['items']:,}{of} items"
        text += f", items' standard error {stderr:.4f}" if stderr is not None else ""
        parts.append(text)
    first = next(r for score in found for row in score.rows for r in row.values())
    yield (
        f"Tasks scored with lm-eval {first['lm_eval']}; ± is the sd over seeds, in brackets the"
        f" standard error of the items. {'; '.join(parts)}."
    )
    blind = [score for score in found if score.blind]
    if blind:
        named = ", ".join(score.key.partition(":")[0] for score in blind)
        yield (
            f"{BLIND} {baseline} is within the items' noise of guessing: {named}"
            " can't tell variants apart at this size; compare the bits per byte of the right"
            " answer, or its probability."
        )
    mixed = [
        f"{score.title.rstrip(' ‡§')} ({'; '.join(score.mixed)})" for score in found if score.mixed
    ]
    if mixed:
        yield f"{UNLIKE} not scored alike in all runs, so not to be compared: {', '.join(mixed)}."
    for key, what in COUNTED.items():
        most = {
            score.key.partition(":")[0]: max(r[key] for row in score.rows for r in row.values())
            for score in found
        }
        if some := [f"{name} {count}" for name, count in most.items() if count]:
            yield f"Items {what}: {', '.join(some)}."
