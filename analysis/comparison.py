"""One sweep compared: what every table, figure and report of it is made from.

`compare` reads nothing twice and decides everything once: which of a row's tries stands for it,
which seeds count, the paired difference and its interval, what remains of it after Holm's
correction over the sweep's family, and the verdict. Renderers only choose what to show.

    rows of the manifest ─ each with its tries ─ the try that stands for it
      ─ what is not alike ─ paired differences ─ Holm ─ verdicts ─ curves: readings, gains
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from analysis.budgets import with_curves
from analysis.compared import INCOMPARABLE, Compared, Comparison, Flip, Mixed, Verdict
from analysis.results import (
    Manifest,
    Row,
    Run,
    finite,
    in_state,
    numbers,
    read_manifest,
    read_runs,
)
from analysis.statistics import Adjusted, Difference, holm, paired_difference
from analysis.tuning import tuned

__all__ = ["INCOMPARABLE", "TOLERANCE", "Compared", "Comparison", "compare", "open_sweep"]

TOLERANCE = 0.01  # what is planned to be equal may differ by so much of itself
SHORT = 7  # letters of a commit


def compare(manifest: Manifest, runs: Mapping[str, Run], root: Path | None = None) -> Comparison:
    """Compares the rows of a sweep with its baseline.

    Args:
        runs: by id, as `results.read_runs` found them.
        root: where they lie, to read their curves too; without it there are no readings, gains
            and flips.

    Raises:
        UserError: a curve's record is damaged.
    """
    rows = list(_gathered(manifest, runs))
    mixed = tuple(_mixed(rows))
    rows = [replace(r, mixed=tuple(_concerning(r, rows[0], mixed))) for r in rows]
    rows = _judged(rows)
    flips: tuple[Flip, ...] = ()
    if root is not None:
        rows, flips = with_curves(rows, root)
    known = [run for run in runs.values() if run.state != "missing"]
    states = Counter(run.state for run in known)
    return Comparison(
        manifest=manifest,
        rows=tuple(rows),
        family=len(rows) - 1,
        noise=rows[0].loss,
        started=len(known),
        failed=states["failed"],
        diverged=states["diverged"],
        edited=states["edited"],
        mixed=mixed,
        commits=tuple(sorted({c for run in known if (c := _commit(run))})),
        flips=flips,
    )


def open_sweep(name: str, root: Path) -> Comparison:
    """The sweep that was run or submitted as `name`, compared, from its records below `root`.

    Raises:
        UserError: there is no such sweep, or a record is damaged.
    """
    manifest = read_manifest(root / "sweeps" / f"{name}.json")
    return compare(manifest, read_runs(manifest, root), root)


# --- the runs of each row -------------------------------------------------------------------------


def _gathered(manifest: Manifest, runs: Mapping[str, Run]) -> Iterator[Compared]:
    """Each row of the table, not yet compared; a tune's rows are tries of others."""
    labels = {row.label for row in manifest.rows if row.tuned is None}
    tries: dict[str, list[Row]] = {label: [] for label in labels}
    for row in manifest.rows:
        if row.tuned is not None and row.tuned["of"] in labels:
            tries[row.tuned["of"]].append(row)
    for row in manifest.rows:
        if row.tuned is not None and row.tuned["of"] in labels:
            continue
        read, tuning = tuned(row, tries.get(row.label, []), runs)
        found = Compared(
            row=row,
            read=read,
            runs=in_state(read, runs, "done"),
            diverged=in_state(read, runs, "diverged"),
            waiting=in_state(read, runs, "missing", "unfinished", "failed"),
            excluded={s: run.reason for s, run in in_state(read, runs, "edited").items()},
            losses=numbers(read, runs, "val/loss"),
            loss=None,
            bpb=None,
            difference=None,
            adjusted=None,
            verdict="not run",
            tuning=tuning,
            lr=finite(read.setting("training.lr")),
        )
        yield replace(found, loss=found.summary("val/loss"), bpb=found.summary("val/bpb"))


# --- what is not alike ----------------------------------------------------------------------------


def _mixed(rows: Sequence[Compared]) -> Iterator[Mixed]:
    for key in ("code", "imports", "data", "tokens", "versions", "lm_eval"):
        values: dict[str, list[str]] = {}
        for r in rows:
            by_value: dict[str, list[int]] = {}
            for seed, run in r.runs.items():
                for value in _facts(run, key):
                    by_value.setdefault(value, []).append(seed)
            for value, seeds in by_value.items():
                named = f"{r.label} s{', s'.join(map(str, seeds))}"
                values.setdefault(value, []).append(named if len(by_value) > 1 else r.label)
        if _differ(key, values):
            yield Mixed(key, {value: tuple(labels) for value, labels in values.items()})


def _concerning(r: Compared, baseline: Compared, mixed: Sequence[Mixed]) -> Iterator[str]:
    """The keys in which the row's runs differ from one another or from the baseline's."""
    for m in mixed:
        both = (*r.runs.values(), *baseline.runs.values())
        if _differ(m.key, {value for run in both for value in _facts(run, m.key)}):
            yield m.key


def _differ(key: str, values: Collection[str]) -> bool:
    """Whether facts of several runs are not of one and the same. Rows may import other files than
    the baseline does: what counts is one file in two versions."""
    if key == "imports":
        files = [value.rpartition(" ")[0] for value in values]
        return len(set(files)) < len(files)
    return len(values) > 1 and not (key == "tokens" and _near(map(float, values)))


def _facts(run: Run, key: str) -> Iterable[str]:
    """What the run says of `key`, as text; nothing where it doesn't."""
    known: Any = run.result.get(key)
    if key == "code":  # commits differ in much that no run depends on
        return [str(known["source"])[:8]] if known and known.get("source") else []
    if key == "imports":
        own = (run.result.get("code") or {}).get("imports") or {}  # a row may well have none
        if isinstance(own, str):  # of all files together, as earlier versions wrote it
            return [own[:8]]
        return [f"{name} {str(code)[:8]}" for name, code in own.items()]
    if key == "versions":
        given = sorted((name, version) for name, version in (known or {}).items() if version)
        return [", ".join(f"{name} {version}" for name, version in given)] * bool(given)
    if key == "lm_eval":
        return sorted({str(record.get("lm_eval")) for record in run.scores.values()})
    return [] if known is None else [str(known)]


def _commit(run: Run) -> str | None:
    code = run.result.get("code") or {}
    commit = code.get("commit")
    return f"{str(commit)[:SHORT]}{'+' * bool(code.get('dirty'))}" if commit else None


def _near(values: Iterable[float]) -> bool:
    known = list(values)
    return max(known) - min(known) <= TOLERANCE * max(known)


# --- differences and verdicts ---------------------------------------------------------------------


def _judged(rows: Sequence[Compared]) -> list[Compared]:
    baseline = rows[0]
    differences = [
        None if r is baseline or r.diverged else paired_difference(r.losses, baseline.losses)
        for r in rows
    ]
    tested = [
        None if baseline.diverged or set(r.mixed) & set(INCOMPARABLE) else d
        for r, d in zip(rows, differences, strict=True)
    ]
    family = max(1, len(rows) - 1)
    return [
        replace(r, difference=d, adjusted=a, verdict=_verdict(r, r is baseline, d, a))
        for r, d, a in zip(rows, differences, holm(tested, family), strict=True)
    ]


def _verdict(
    r: Compared, is_baseline: bool, d: Difference | None, adjusted: Adjusted | None
) -> Verdict:
    if r.diverged:
        return "diverged"
    if is_baseline:
        return "baseline"
    if not r.losses:
        return "not run"
    if d is None or adjusted is None or not adjusted.rejected:
        return "cannot tell"
    return "better" if d.mean < 0 else "worse"
