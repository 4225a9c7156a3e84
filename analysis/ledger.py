"""The ledger: every variant ever run below a folder of runs, what it did, and what failed.

A result that is only kept where it pleased is no result. The ledger is read from the manifests of
all sweeps and the run directories; nothing has to be written into it, and nothing can be left out.
Runs that no sweep holds are listed too, by their ids.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from analysis import results
from analysis.comparison import Compared, Comparison, compare
from analysis.results import Run
from analysis.table import Cell, Column, Table, TableRow
from analysis.wording import interval_text, p_text, signed
from components.registry import UserError
from experiments.record import all_ids

DECIMALS = 4  # of effects: sweeps of every size stand below one another
RECORDS = ("result.json", "failure.json", "experiment.yaml")  # the last written first


@dataclass(frozen=True)
class Entry:
    """One variant of one sweep, or one run that no sweep holds.

    Attributes:
        sweep: None for such a run.
        changes: what sets it apart from its base, to be read.
        effect, low, high: difference of the validation loss from the baseline (nats), with its
            95% interval, paired by seed; None without one.
        p: adjusted by Holm's procedure over the sweep.
        loss: mean over seeds; None where a seed diverged.
        seeds: runs that count, of `planned`; `tries` of a tuned variant.
        time: when the newest of its records was written, UTC.
    """

    sweep: str | None
    variant: str
    changes: tuple[str, ...]
    verdict: str
    effect: float | None
    low: float | None
    high: float | None
    p: float | None
    loss: float | None
    seeds: int
    planned: int
    tries: int
    diverged: int
    failed: int
    edited: int
    time: str


def read(root: Path) -> tuple[list[Entry], list[str]]:
    """Every variant with at least one run below `root`, the newest last; and what can't be read,
    a line each."""
    found: list[tuple[float, Entry]] = []
    wrong: list[str] = []
    held: set[str] = set()
    for path in sorted((root / "sweeps").glob("*.json")):
        try:
            manifest = results.read_manifest(path)
            held |= {run for row in manifest.rows for run in row.runs.values()}
            comparison = compare(manifest, results.read_runs(manifest, root))
        except UserError as error:
            wrong += str(error).splitlines()
            continue
        found += _variants(root, comparison)
    for run_id in all_ids(root):
        if run_id in held:
            continue
        try:
            run = results.read_run(root / run_id)
        except UserError as error:
            wrong += str(error).splitlines()
            continue
        found.append(_dated(root, (run_id,), _lone(run)))
    return [entry for _, entry in sorted(found, key=lambda item: item[0])], wrong


def _variants(root: Path, comparison: Comparison) -> Iterator[tuple[float, Entry]]:
    runs_of: dict[str, list[str]] = {}
    for row in comparison.manifest.rows:
        label = row.tuned["of"] if row.tuned is not None else row.label
        runs_of.setdefault(label, []).extend(row.runs.values())
    for row_ in comparison.rows:
        ids = runs_of[row_.label]
        if any((root / run).is_dir() for run in ids):
            yield _dated(root, ids, _entry(comparison, row_))


def _entry(comparison: Comparison, row: Compared) -> dict[str, Any]:
    d = row.difference
    failed = sum(run.state == "failed" for run in row.waiting.values())
    return {
        "sweep": comparison.manifest.name,
        "variant": row.label,
        "changes": row.row.differences,
        "verdict": row.verdict,
        "effect": d.mean if d else None,
        "low": d.low if d else None,
        "high": d.high if d else None,
        "p": row.adjusted.p if row.adjusted else None,
        "loss": row.loss.mean if row.loss else None,
        "seeds": len(row.losses),
        "planned": row.planned,
        "tries": len(row.tuning.tries) if row.tuning else 1,
        "diverged": len(row.diverged),
        "failed": failed,
        "edited": len(row.excluded),
    }


def _lone(run: Run) -> dict[str, Any]:
    return {
        "sweep": None,
        "variant": run.id,
        "changes": (),
        "verdict": "one run" if run.state == "done" else run.state,
        "effect": None,
        "low": None,
        "high": None,
        "p": None,
        "loss": run.number("val/loss"),
        "seeds": int(run.state == "done"),
        "planned": 1,
        "tries": 1,
        "diverged": int(run.state == "diverged"),
        "failed": int(run.state == "failed"),
        "edited": int(run.state == "edited"),
    }


def _dated(root: Path, ids: Sequence[str], entry: Mapping[str, Any]) -> tuple[float, Entry]:
    """The entry with the time of the newest record of its runs, and that time in seconds."""
    newest = max((_written(root / run) for run in ids), default=0.0)
    stamp = datetime.datetime.fromtimestamp(newest, datetime.UTC)
    return newest, Entry(**entry, time=stamp.isoformat(timespec="seconds"))


def _written(directory: Path) -> float:
    for name in RECORDS:
        if (directory / name).exists():
            return (directory / name).stat().st_mtime
    return 0.0


def as_json(entry: Entry) -> dict[str, Any]:
    """An entry as plain data."""
    return {**asdict(entry), "changes": list(entry.changes)}


COLUMNS = (
    Column("sweep", "Sweep", "left"),
    Column("variant", "Variant", "left"),
    Column("effect", "Δ val loss [95% CI]", "left", ("low", "high")),
    Column("p", "p (Holm)", "left", (), 2),
    Column("verdict", "Verdict", "left"),
    Column("seeds", "Seeds", "left", ("planned", "tries"), 1),
    Column("failures", "Failures", "left", ("diverged", "failed", "edited")),
    Column("loss", "Val loss", "left", (), 3),
    Column("changes", "Changes", "left", (), 5),
    Column("time", "Time (UTC)", "left", (), 4),
)


def table(entries: Sequence[Entry], root: Path) -> Table:
    """The ledger for a renderer of analysis/render.py, the newest last."""
    sweeps = {entry.sweep for entry in entries if entry.sweep}
    caption = (
        f"Every variant run below {root.name}: {len(entries)} in {len(sweeps)} sweeps, the newest "
        "last. Differences are from each sweep's own baseline, paired by seed; verdicts after "
        "Holm's correction within the sweep."
    )
    rows = tuple(TableRow("rows", _cells(entry)) for entry in entries)
    return Table("ledger", COLUMNS, rows, caption, ())


def _cells(e: Entry) -> tuple[Cell, ...]:
    effect = Cell("") if e.effect is None else Cell(signed(e.effect, DECIMALS), e.effect)
    if e.effect is not None and e.low is not None and e.high is not None:
        text = signed(e.effect, DECIMALS) + interval_text(e.low, e.high, DECIMALS)
        decided = e.verdict in ("better", "worse")
        effect = Cell(text, e.effect, {"low": e.low, "high": e.high}, bold=decided)
    gone = {"diverged": e.diverged, "failed": e.failed, "edited": e.edited}
    tries = f" × {e.tries} tries" if e.tries > 1 else ""
    return (
        Cell(e.sweep or "—", e.sweep),
        Cell(e.variant, e.variant),
        effect,
        Cell("" if e.p is None else p_text(e.p), e.p),
        Cell(e.verdict, e.verdict),
        Cell(f"{e.seeds}/{e.planned}{tries}", e.seeds, {"planned": e.planned, "tries": e.tries}),
        Cell(", ".join(f"{n} {what}" for what, n in gone.items() if n), sum(gone.values()), gone),
        Cell("" if e.loss is None else f"{e.loss:.4f}", e.loss),
        Cell("; ".join(e.changes), "; ".join(e.changes)),
        Cell(e.time, e.time),
    )
