"""The tasks of a sweep item by item: each row against the baseline, corrected over the rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis import scored
from analysis.comparison import INCOMPARABLE, Comparison
from analysis.items import ItemDifference, Items, item_difference
from analysis.statistics import ALPHA, holm_p
from analysis.wording import decimals_for, interval_text, listed, signed
from components.registry import UserError
from experiments.scores import SMOOTH


@dataclass(frozen=True)
class TaskItems:
    """One metric of one task.

    Attributes:
        task: the name of its record, with its settings: `hellaswag,5shot`.
        measure: the metric for the reader, with an arrow to where better is.
        rows: label -> difference from the baseline, in the metric's unit; None where its items
            can't be compared: no number of each, or fewer than two clusters.
        p: label -> after Holm's correction over the sweep's family, within this task.
        unread: label -> why a row's items don't count: one line.
    """

    task: str
    metric: str
    measure: str
    rows: Mapping[str, ItemDifference | None]
    p: Mapping[str, float]
    unread: Mapping[str, str]

    @property
    def key(self) -> str:
        return f"items:{self.task}:{self.metric}"

    @property
    def title(self) -> str:
        return f"{self.task.replace(',', ', ')} {self.measure}"

    @property
    def decimals(self) -> int:
        """Enough for the typical interval."""
        halves = (d.high - d.mean for d in self.rows.values() if d and d.high is not None)
        return min(4, decimals_for(halves))

    def told_apart(self, label: str) -> bool:
        """Whether the row's p after Holm's correction is below 0.05."""
        return label in self.p and self.p[label] < ALPHA


def text(d: ItemDifference, decimals: int) -> str:
    """`+0.042 [+0.011, +0.073]`."""
    known = d.low is not None and d.high is not None
    interval = interval_text(d.low, d.high, decimals) if known else ""  # type: ignore[arg-type]
    return signed(d.mean, decimals) + interval


def tasks(comparison: Comparison) -> list[str]:
    """The tasks, by name, on which the baseline and another row were scored; no groups."""
    first, *others = (
        {
            name
            for run in ({} if r.diverged else r.runs).values()
            for name, record in run.scores.items()
            if record.get("kind") == "task" and record["primary"]
        }
        for r in comparison.rows
    )
    return sorted(first & set().union(*others))


def read(comparison: Comparison, root: Path, names: Sequence[str]) -> list[TaskItems]:
    """The items of `names`, each by its leading metric; and where the baseline is within the noise
    of guessing by the bits per byte of the right answer too.

    Args:
        root: where the runs lie. Reads each run's items of each task once.
    """
    found = []
    for name in names:
        records = scored.by_seed(comparison.baseline, name)
        record = next(iter(records.values()))
        metrics = [record["primary"]]
        smooth = SMOOTH[0]
        if scored.is_blind(records, record["primary"]) and smooth in record["metrics"]:
            metrics.append(smooth)
        found += [_task(comparison, root, name, metric) for metric in metrics]
    return found


def _task(comparison: Comparison, root: Path, name: str, metric: str) -> TaskItems:
    baseline, *others = comparison.rows
    records = scored.by_seed(baseline, name)
    kept: dict[str, Items] = {}  # of the baseline's runs: all rows are held against them
    rows: dict[str, ItemDifference | None] = {}
    unread: dict[str, str] = {}
    for r in others:
        mine = scored.by_seed(r, name)
        if r.diverged or not mine:
            continue
        if unlike := scored.differing([*records.values(), *mine.values()]):
            unread[r.label] = f"not scored alike ({'; '.join(unlike)})"
            continue
        try:
            rows[r.label] = item_difference(root, r.runs, baseline.runs, name, metric, kept)
        except UserError as error:
            unread[r.label] = str(error)
    tested = {
        r.label: d.p
        for r in others
        if (d := rows.get(r.label)) and not set(r.mixed) & set(INCOMPARABLE)
    }
    adjusted = holm_p([*tested.values()], comparison.family)
    return TaskItems(
        task=name,
        metric=metric,
        measure=scored.measure(metric, next(iter(records.values()))),
        rows=rows,
        p={label: p for label, p in zip(tested, adjusted, strict=True) if p is not None},
        unread=unread,
    )


def method(comparison: Comparison) -> str:
    """How the differences are made, for captions and footnotes."""
    count = comparison.family
    return (
        "Item by item: mean over seeds and items of the row's score minus the baseline's, with the"
        " 95% t interval over both, items of one cluster taken together (Miller 2024); p after"
        f" Holm's correction over {count} comparison{'s' * (count != 1)} within each task"
    )


def sentences(comparison: Comparison, found: Sequence[TaskItems]) -> Iterable[str]:
    """Which rows can be told from the baseline on which tasks, and what `unread` says."""
    apart = [
        f"{r.label} on {task.title} ({signed(d.mean, task.decimals)})"
        for task in found
        for r in comparison.rows
        if task.told_apart(r.label) and (d := task.rows[r.label])
    ]
    if apart:
        yield f"Told apart from {comparison.baseline.label}: {listed(apart, '; ')}."
    elif any(task.p for task in found):
        yield f"On none of these tasks can a row be told from {comparison.baseline.label}."
    yield from unread(found)


def unread(found: Sequence[TaskItems]) -> Iterable[str]:
    """What could not be compared, and why."""
    lines = [f"{task.task}, {label}: {why}" for task in found for label, why in task.unread.items()]
    if lines := list(dict.fromkeys(lines)):
        yield f"Not compared item by item: {listed(lines, '; ')}."
