"""A sweep's runs in wandb: all of them pushed, and what became of them while they were trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from analysis.wandb_summary import summarise
from experiments import tracking
from experiments.mirror import push as push_run
from experiments.record import Run, UserError
from experiments.tracking import Place, known
from experiments.wandb_client import Unreachable
from experiments.yaml_text import read

FAILURES = 3  # in a row, after which the rest is not tried


def place_wanted(record: Mapping[str, Any]) -> Place | None:
    """Where a sweep's own summary goes: where its baseline does."""
    return tracking.place(record["rows"][0]["experiment"].get("tracking"))


def place_of(
    root: Path, record: Mapping[str, Any], project: str | None, entity: str | None
) -> Place:
    """Where a sweep is pushed to: as asked, or as its baseline was, or as its experiment says."""
    first = Run(root, next(iter(record["rows"][0]["runs"].values())))
    return _place(first, record["rows"][0]["experiment"], project, entity)


def _place(
    run: Run, experiment: Mapping[str, Any], project: str | None, entity: str | None
) -> Place:
    before, wanted = known(run), (experiment.get("tracking") or {}).get("wandb") or {}
    usual = tracking.online(wanted)
    return Place(
        "online",
        project or before.get("project") or usual.project,
        entity or before.get("entity") or usual.entity,
    )


def push(
    runs: Sequence[Run],
    sweeps: Sequence[Mapping[str, Any]],
    project: str | None,
    entity: str | None,
    say: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Pushes each run, and the summary of each sweep; says how it goes.

    Gives for each {"name", "rows": added now, "url", "error"}.

    Raises:
        UserError: wandb can't be reached at all.
    """
    root, failures, done = runs[0].root, 0, 0
    sweep = sweeps[0] if len(sweeps) == 1 else None  # all of one goes to one place
    group = sweep["name"] if sweep else None

    def one(run: Run) -> tuple[int, str]:
        if sweep and run.id in {id for row in sweep["rows"] for id in row["runs"].values()}:
            place = place_of(root, sweep, project, entity)
        else:
            place = _place(run, read(run / "experiment.yaml").data, project, entity)
        return push_run(run, place, group), str(known(run).get("url"))

    def summary(record: Mapping[str, Any]) -> tuple[int, str]:
        return 0, summarise(root, record, place_of(root, record, project, entity))

    work: list[tuple[str, Callable[[], tuple[int, str]]]] = [
        *((run.id, partial(one, run)) for run in runs),
        *((f"{record['name']} (table)", partial(summary, record)) for record in sweeps),
    ]
    for name, act in work:
        error, rows, url = None, 0, ""
        try:
            rows, url = act()
            done, failures = done + 1, 0
            say(f"{name}: {rows} rows added, {url}")
        except UserError as problem:
            if isinstance(problem, Unreachable):
                if not done:
                    raise
                failures += 1
            error = str(problem)
            say(f"{name}: {error}")
        yield {"name": name, "rows": rows, "url": url, "error": error}
        if failures >= FAILURES:
            say("the rest is not tried")
            return


def outcome(root: Path, record: Mapping[str, Any], where: Place, table: bool = True) -> list[str]:
    """What became of a sweep's runs in wandb, and of its summary run; never an error.

    Args:
        table: whether to log the summary run.
    """
    ids = dict.fromkeys(id for row in record["rows"] for id in row["runs"].values())
    begun = [Run(root, id) for id in ids if (root / id / "provenance.json").exists()]
    records = [known(run) for run in begun]
    whole = sum(r.get("state") == "complete" and not r.get("why") for r in records)
    lines = [f"wandb: {whole} of {len(begun)} runs mirrored {where.mode}"]
    if whole < len(begun):
        others = (r for r in records if r.get("state") != "complete" or r.get("why"))
        whys = dict.fromkeys(str(r.get("why") or "trained without, or going on") for r in others)
        lines[0] += f" ({'; '.join([*whys][:2])})"
    if table:
        lines.append(tracking.bring_table(root, record["name"]))
    if whole < len(begun) or where.mode == "offline":
        lines.append(f"to bring all of it online: python run.py wandb push {record['name']}")
    return lines
