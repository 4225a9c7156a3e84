"""A table from what wandb has: a group of runs there, read as a sweep.

Whose records are elsewhere, or whose runs are another program's, gets them as the manifest and the
runs that `ablation_table` makes its table from, as it does from those on disk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from analysis import results
from components.registry import did_you_mean
from experiments import wandb_client as client
from experiments.record import FINISHED, UserError
from experiments.scores import trusted
from experiments.tracking import Place, tag

SIZES = ("parameters", "flops_per_token", "mismatch")
MATCHED = {"params": "parameters", "flops": "flops_per_token"}
OF_ROW = ("is_baseline", "row", "row_group", "mismatch", "match")  # in one sweep
OURS = ("eval", "summary")  # types of run that are not trainings
MOST_NAMED = 12
MOST_SEEN = 500  # runs, to name their groups


@dataclass(frozen=True)
class Found:
    """One run as wandb has it."""

    id: str
    name: str
    type: str
    state: str
    config: Mapping[str, Any]
    summary: Mapping[str, Any]


Facts = Mapping[str, Any]
Rows = dict[str, tuple[Facts, dict[int, list[Found]]]]  # label -> what is known of it, runs by seed


def pulled(
    place: Place,
    group: str,
    *,
    by: str | None = None,
    baseline: str | None = None,
    metric: str = "val/loss",
) -> tuple[results.Manifest, dict[str, results.Run], list[str]]:
    """A group of runs as a sweep, for `ablation_table`, and what is to be said of it, in lines.

    The rows are those that the sweep's summary run says were planned. Where there is none, or it
    is older than the runs, they are what the runs themselves say.

    Args:
        group: their group, or a sweep that they are tagged with.
        by: the key of their config, with dots, that tells variants apart; our own runs know.
        baseline: its label; our own runs know it.
        metric: the key of their summary that holds the validation loss.

    Raises:
        Unreachable: wandb can't be used.
        UserError: there is no such project or group, or nothing tells what is to be compared.
    """
    found = fetched(place, group)
    trained = [run for run in found if run.type == "train"]
    trained = trained or [run for run in found if run.type not in OURS]
    scores = {run.id: run.config.get("records") or {} for run in found if run.type == "eval"}
    runs = {run.id: outcome(run, metric, scores.get(f"{run.id}-eval", {})) for run in trained}
    notes = [f"The validation loss is what these runs call {metric}."] * (metric != "val/loss")
    notes += unread(group, trained, runs, metric)
    rows, words = rows_of(found, trained, group, by)
    own = next((label for label, (facts, _) in rows.items() if facts.get("is_baseline")), None)
    first = baseline or own
    if first is None:
        labels = ", ".join([*rows][:MOST_NAMED])
        raise UserError(f"group '{group}' names no baseline; say --baseline LABEL, of: {labels}")
    if first not in rows:
        raise UserError(f"no variant '{first}' in group '{group}'{did_you_mean(first, [*rows])}")
    made = []
    for label in sorted(rows, key=lambda label: label != first):
        facts, by_seed = rows[label]
        ids = {seed: chosen(label, seed, of, runs, words) for seed, of in sorted(by_seed.items())}
        made.append(row_of(label, facts, ids))
    facts = rows[first][0]
    match = facts.get("match") if facts.get("match") in MATCHED else None
    if match and first != own:
        goal, *_ = sizes = [getattr(row, MATCHED[match]) for row in made]
        misses = (size / goal - 1 if size and goal else None for size in sizes)
        made = [replace(row, mismatch=miss) for row, miss in zip(made, misses, strict=True)]
    seeds = tuple(sorted({seed for row in made for seed in row.runs}))
    tokens = facts["tokens"] if isinstance(facts.get("tokens"), int) else 0
    return results.Manifest(group, match, seeds, tokens, tuple(made)), runs, notes + words


def fetched(place: Place, group: str) -> list[Found]:
    """The runs of a group, or of a sweep that is tagged, in the order that they were created in."""
    api = client.api(place)
    with client.guarded(f"project '{place.project}'"):
        path = place.project
        path = path if "/" in path else f"{place.entity or api.default_entity}/{path}"
        wanted = {"$or": [{"group": group[:128]}, {"tags": tag(f"sweep:{group}")}]}
        try:
            found = []
            for run in api.runs(path, wanted, order="+created_at", lazy=False):
                known = run.state, run.config, dict(run.summary_metrics)
                found.append(Found(run.id, run.name, run.job_type or "", *known))
            if not any(run.type not in OURS for run in found):
                newest = itertools.islice(api.runs(path, order="-created_at"), MOST_SEEN)
                hint = did_you_mean(group, sorted({run.group for run in newest if run.group}))
                raise UserError(f"no runs of group '{group}' in '{path}' in wandb{hint}")
        except ValueError as error:
            if "Could not find project" not in str(error):
                raise
            raise UserError(f"no project '{path}' in wandb, or none that you may read") from None
        return found


def unread(
    group: str, trained: Sequence[Found], runs: Mapping[str, results.Run], metric: str
) -> list[str]:
    """A line where runs that have ended show no loss; an error where there is nothing else."""
    states = {run.state for run in runs.values()}
    silent = [run for run in trained if runs[run.id].state == "unfinished" and has_ended(run)]
    if silent and "done" in states:
        return [f"No {metric}, so no result: {', '.join(run.name for run in silent[:MOST_NAMED])}."]
    if silent:
        keys = sorted({k for run in silent for k, v in flat(run.summary).items() if number(v)})
        hint = did_you_mean(metric, [key for key in keys if key[0] != "_"][:MOST_NAMED])
        raise UserError(f"no run of group '{group}' has {metric}; say --metric KEY{hint}")
    if not states & {*FINISHED}:
        raise UserError(f"none of the {len(trained)} runs of group '{group}' has finished")
    return []


def rows_of(
    found: Sequence[Found], trained: Sequence[Found], group: str, by: str | None
) -> tuple[Rows, list[str]]:
    """The rows as planned, or as the runs name them; and a line where the plan is outdated."""
    plans = [r for r in found if r.type == "summary" and r.config.get("sweep") == group]
    plans = [r for r in plans if r.config.get("plan")] if by is None else []
    if plans and (rows := planned_rows(plans[-1].config["plan"], trained)):
        return rows, []
    word = "is older than its runs, so that rows without a run are not known; push the sweep anew"
    return named_rows(trained, group, by), [f"{run.name} {word}." for run in plans[-1:]]


def planned_rows(plan: Facts, trained: Sequence[Found]) -> Rows | None:
    """The rows as planned, with the runs that there are; None if there is a run of no row."""
    runs: dict[str, list[Found]] = {}
    for run in trained:
        runs.setdefault(str(run.config.get("run")), []).append(run)
    rows = plan["rows"]
    if runs.keys() - {id for row in rows for id in row["runs"].values()}:
        return None
    whole = {"match": plan["match"], "tokens": plan["tokens"]}
    return {
        row["label"]: (
            {**row, **whole, "is_baseline": i == 0},
            {int(seed): runs.get(id, []) for seed, id in row["runs"].items()},
        )
        for i, row in enumerate(rows)
    }


def named_rows(trained: Sequence[Found], group: str, by: str | None) -> Rows:
    """The rows that the runs themselves name, in the sweep's order where they know it."""
    rows: Rows = {}
    for run in trained:
        config = run.config
        label = config.get("variant") if by is None else at(config, by)
        if by is None and isinstance(config.get("sweeps"), Mapping):
            label = config["sweeps"].get(group, label)
        if label is None:
            keys = differing(trained)
            hint = did_you_mean(by, keys) if by else f", of: {', '.join(keys)}"
            lack = f"no '{by}' in its config" if by else "no variant in its config; say --by KEY"
            raise UserError(f"run '{run.name}' of group '{group}' has {lack}{hint}")
        here = config.get("sweep") in (group, None)  # else those are of another sweep's row
        facts = config if here else {k: v for k, v in config.items() if k not in OF_ROW}
        facts = {**facts, "group": config.get("row_group") or "rows"}
        _, by_seed = rows.setdefault(results.one_line(label), (facts, {}))
        seed = config.get("seed")
        if not isinstance(seed, int):
            seed = next(i for i in itertools.count() if i not in by_seed)
        by_seed.setdefault(seed, []).append(run)
    places = {label: facts.get("row") for label, (facts, _) in rows.items()}
    last = len(rows)
    order = {label: place if isinstance(place, int) else last for label, place in places.items()}
    return {label: rows[label] for label in sorted(rows, key=order.__getitem__)}


def chosen(
    label: str, seed: int, of: Sequence[Found], runs: dict[str, results.Run], notes: list[str]
) -> str:
    """The id of the run that stands for a seed: the newest that has finished."""
    if not of:
        missing = f"{label} s{seed}"
        runs[missing] = results.Run(missing, "missing", {})
        return missing
    best = max(enumerate(of), key=lambda item: (runs[item[1].id].state in FINISHED, item[0]))[1].id
    if len(of) > 1:
        word = "newest that has finished" if runs[best].state in FINISHED else "newest"
        notes.append(f"{label} seed {seed}: of {len(of)} runs {best} is taken, the {word}.")
    return best


def row_of(label: str, facts: Facts, ids: dict[int, str]) -> results.Row:
    size, flops, mismatch = (facts.get(k) if number(facts.get(k)) else None for k in SIZES)
    return results.Row(
        label=results.one_line(label),
        group=results.one_line(facts.get("group") or "rows"),
        changes={},
        parameters=size,
        flops_per_token=None if flops is None else float(flops),  # wandb drops the .0
        mismatch=None if mismatch is None else float(mismatch),
        runs=ids,
    )


def outcome(run: Found, metric: str, records: Mapping[str, Any]) -> results.Run:
    """What came of a run: as its summary says, or for other programs' runs as wandb does."""
    loss, status = at(run.summary, metric), run.summary.get("status")
    reason = run.summary.get("reason") or ""
    if status is None and has_ended(run) and loss is not None:
        status = "done" if number(loss) else "diverged"
        reason = f"{metric} is {loss}"
    if status == "diverged" or (status == "done" and number(loss)):
        step = run.summary.get("step")
        here = {name: r for name, r in records.items() if r.get("step", step) == step}
        kept = {name: trusted(r) for name, r in here.items()}
        result = {**run.summary, "status": status, "val/loss": loss}
        return results.Run(run.id, status, result, results.one_line(reason), kept)
    failed = run.state in ("failed", "crashed")
    return results.Run(run.id, "failed" if failed else "unfinished", {}, run.state * failed)


def has_ended(run: Found) -> bool:
    status = run.summary.get("status")
    return run.state == "finished" if status is None else status in FINISHED


def number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def at(data: Any, key: str) -> Any:
    """What stands under a key, or under its parts between dots."""
    if isinstance(data, Mapping) and key in data:
        return data[key]
    for part in key.split("."):
        data = data.get(part) if isinstance(data, Mapping) else None
    return data


def flat(data: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in data.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{before}{key}.") if nested else {f"{before}{key}": value}
    return found


def differing(runs: Sequence[Found]) -> list[str]:
    """Keys of the config in which runs differ: what may tell variants apart."""
    configs = [flat(run.config) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "seed")
    several = (key for key in keys if len({str(config.get(key)) for config in configs}) > 1)
    return [*itertools.islice(several, MOST_NAMED)]
