"""The plan of a sweep: what would run, what is done already, and what the rest will take.

    sweep ─ matching.sized ─ rows with counts ─ states of their runs ─ Plan (text or JSON)

Nothing is started. A stored run whose defaults have changed since is an error here, before any
new run is compared with it.
"""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.registry import UserError
from experiments import budget, loader
from experiments.attempts import Attempts
from experiments.record import FINISHED, Run, all_ids, read_json
from experiments.yaml_text import read, shown
from sweeps import manifest, matching, stale
from sweeps.design import Sweep, Variant, value_at
from sweeps.differences import differences
from sweeps.probe import Probes

if TYPE_CHECKING:
    from rich.console import RenderableType

    from experiments.data import Dataset


@dataclass(frozen=True)
class PlanRow:
    """One variant: how it differs from the base, what it is made of, the states of its runs.

    `try_of` is set on the tries of `tune`: the label of the variant that each is a try of.
    `tries` is set on those variants: the values tried, their own among them, in order.
    `epochs` are training tokens over tokens of the training split; None until it is prepared.
    """

    label: str
    group: str
    differences: tuple[str, ...]
    parameters: int
    flops_per_token: float
    mismatch: float | None
    states: Mapping[int, str]  # the sweep's seed -> Run.state
    try_of: str | None = None
    tries: tuple[float, ...] = ()
    epochs: float | None = None


@dataclass(frozen=True)
class Plan:
    """A sweep's rows and totals. Runs that two rows share are counted once.

    Attributes:
        flops: training FLOPs of all runs; `missing_flops` of those not finished.
        seconds: what the missing runs would take one after another, at the median speed of the
            runs finished below the same root; None if there are none.
        notes: what is to be known of the design, line by line: a fraction and its aliases, what
            text or budget cut short.
        stale: rows whose runs so far are of other code or text than now, a line each.
        manifest: what `manifest.write` writes.
    """

    name: str
    match: str | None
    tune: str | None
    seeds: tuple[int, ...]
    rows: tuple[PlanRow, ...]
    runs: int
    missing: int
    flops: float
    missing_flops: float
    seconds: float | None
    notes: tuple[str, ...]
    manifest: Mapping[str, Any]
    stale: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """All but the manifest, as plain data."""
        plain = {key: value for key, value in asdict(self).items() if key != "manifest"}
        for row in plain["rows"]:
            row["states"] = {str(seed): state for seed, state in row["states"].items()}
        return {"schema": 1, **plain}


def plan(sweep: Sweep, root: Path, *, here: bool = True, redo: Collection[str] = ()) -> Plan:
    """The plan of a sweep whose runs lie below `root`. Writes nothing but probes of `match: time`,
    and prepared text where only that tells whether finished runs are of the text as it is now.

    Args:
        here: its runs will be carried out on this machine, so that their time can be measured.
        redo: ids of runs that are to be done again, as new attempts.

    Raises:
        UserError: a stored run was made with other defaults, or a record is damaged; the time of a
            step is not known and can't be measured.
    """
    check_tasks(sweep)
    sized = matching.sized(sweep, root / "data", Probes(root / "probes", measuring=here))
    rows, states, costs = [], {}, {}
    texts = Texts(root / "data")
    changed: list[str] = []
    attempts = Attempts(root)
    chosen: dict[str, str] = {}  # id -> that of the attempt
    for item in sized:
        variant = item.variant
        training = variant.experiment.training
        runs: dict[int, Run] = {}
        for seed, id in sweep.runs(variant).items():
            if id not in chosen:
                chosen[id] = attempts.choose(variant.experiment, id, redo=id in redo).id
            runs[seed] = Run(root, chosen[id])
        for run in runs.values():
            if run.id not in states:
                evaluation = variant.experiment.evaluation
                states[run.id] = manifest.scored_state(run, evaluation.model_dump())
                costs[run.id] = (
                    item.counts.flops_per_token * training.steps * training.tokens_per_step
                )
                changed += changed_defaults(run, variant)
        rows.append(
            PlanRow(
                variant.label,
                variant.group,
                differences(sweep, variant, item.solved),
                item.counts.parameters,
                item.counts.flops_per_token,
                item.mismatch,
                {seed: states[run.id] for seed, run in runs.items()},
                variant.tuned["of"] if variant.tuned else None,
                tries(sweep, variant),
                texts.epochs(variant),
            )
        )
    if changed:
        raise UserError("\n".join(changed))
    missing = [run for run, state in states.items() if state not in FINISHED]
    missing_flops = sum(costs[run] for run in missing if states[run] != "unscored")
    speed = measured_speed(root) if missing else None
    seconds = missing_flops / speed if speed else None
    return Plan(
        name=sweep.name,
        match=sweep.match,
        tune=sweep.tune.over if sweep.tune else None,
        seeds=sweep.seeds,
        rows=tuple(rows),
        runs=len(states),
        missing=len(missing),
        flops=sum(costs.values()),
        missing_flops=missing_flops,
        seconds=0.0 if not missing else seconds,
        notes=(*notes(sweep), *texts.notes()),
        manifest=(record := manifest.build(sweep, sized, chosen)),
        stale=tuple(stale.replaced(root, record)),
    )


class Texts:
    """The prepared text of a sweep's rows, opened once each, and what it is too short for."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self.found: dict[str, Dataset | None] = {}
        self.said: dict[str, list[str]] = {}

    def epochs(self, variant: Variant) -> float | None:
        """How often a row goes through its training split; None where that is not prepared."""
        experiment = variant.experiment
        key = json.dumps(loader.dump(experiment.data, everything=True), sort_keys=True)
        if key not in self.found:
            self.found[key] = budget.prepared(experiment.data, self.cache)
        data = self.found[key]
        for line in budget.warnings(experiment, data):
            self.said.setdefault(line, []).append(variant.label)
        return None if data is None else budget.epochs(budget.trained_tokens(experiment), data)

    def notes(self) -> list[str]:
        """Each warning once, with the rows that it concerns."""
        return [
            f"{line} ({labels[0]}{f' and {len(labels) - 1} more' if len(labels) > 1 else ''})"
            for line, labels in self.said.items()
        ]


def tries(sweep: Sweep, variant: Variant) -> tuple[float, ...]:
    """The values at which a variant is tried, its own among them; empty where it has no tries."""
    others = [
        v.tuned["value"] for v in sweep.variants if v.tuned and v.tuned["of"] == variant.label
    ]
    if not others or sweep.tune is None:
        return ()
    own = value_at(loader.resolved(variant.experiment), sweep.tune.over)
    return tuple(sorted([*others, *([own] if isinstance(own, int | float) else [])]))


def notes(sweep: Sweep) -> tuple[str, ...]:
    """What is to be known of the design before anything is spent."""
    fraction = sweep.fraction
    if fraction is None:
        return ()
    head, *aliases = fraction.lines
    cells = sum(v.levels is not None and v.tuned is None for v in sweep.variants)
    of_each = max(1, len(tries(sweep, sweep.baseline))) * len(sweep.seeds)
    return (f"{head}; {(2 ** len(fraction.names) - cells) * of_each} runs saved", *aliases)


def at_edges(rows: Iterable[tuple[str, str, Sequence[float], str | None]]) -> list[str]:
    """A line for each edge of a grid at which some rows are best, with the next value beyond.

    `rows`: label, path, the values tried in order, and `low` or `high` where the best is at one.
    A grid without negative values ends at 0.
    """
    best: dict[tuple[str, str, tuple[float, ...]], list[str]] = {}
    for label, path, values, edge in rows:
        if edge is not None and len(values) > 1:
            best.setdefault((path, edge, tuple(values)), []).append(label)
    return [
        f"best at the {'highest' if edge == 'high' else 'lowest'} {path} tried, "
        f"{values[-1] if edge == 'high' else values[0]:g}: {', '.join(labels)}; "
        f"to look beyond it, add {beyond(values, edge):g} to tune.values"
        for (path, edge, values), labels in best.items()
        if beyond(values, edge) >= 0 or values[0] < 0
    ]


def beyond(values: Sequence[float], edge: str) -> float:
    """The value that continues a grid past its edge, by the ratio of its last two, or by their
    difference where they are not both above 0; to two digits."""
    inner, last = values[-2:] if edge == "high" else (values[1], values[0])
    following = last * last / inner if min(inner, last) > 0 else 2 * last - inner
    return float(f"{following:.1e}")


def changed_defaults(run: Run, variant: Variant) -> list[str]:
    """One line if the run was begun when some default was another."""
    path = run / "experiment.yaml"
    if not path.is_file():
        return []
    found = loader.changed_defaults(variant.experiment, read(path).data)
    return [
        f"{shown(path)}: '{variant.label}' has this run's id, but a default has changed since: "
        f"{'; '.join(found)}; write the stored value into the experiment, or delete the run"
    ] * bool(found)


def check_data(sweep: Sweep) -> None:
    """Looks for each row's text and tokenizer, before any of its runs would miss them.

    Raises:
        UserError: one is not there; names the row.
    """
    from experiments.data import cache_key

    check_tasks(sweep, fetch=True)
    seen = set()
    for variant in sweep.variants:
        data = variant.experiment.data
        key = json.dumps(loader.dump(data, everything=True), sort_keys=True)
        if key in seen:
            continue
        seen.add(key)
        try:
            cache_key(data)
        except UserError as error:
            raise UserError(f"{variant.mark}: '{variant.label}': {error}") from error


def check_tasks(sweep: Sweep, *, fetch: bool = False) -> None:
    """Looks for each row's tasks of lm-eval and their data; with `fetch`, gets it from the hub.

    Raises:
        UserError: one is unknown, or its data is not there; names the row.
    """
    seen = set()
    for variant in sweep.variants:
        evaluation = variant.experiment.evaluation
        key = (evaluation.tasks, evaluation.include_path)
        if key in seen or not evaluation.tasks:
            continue
        seen.add(key)
        from experiments import evaluate

        try:
            evaluate.check(evaluation, fetch=fetch)
        except UserError as error:
            raise UserError(f"{variant.mark}: '{variant.label}': {error}") from error


def measured_speed(root: Path) -> float | None:
    """Median training FLOPs per second of the finished runs below `root`."""
    speeds = []
    for run in all_ids(root):
        path = root / run / "result.json"
        with contextlib.suppress(UserError):  # another run's damage is no matter here
            result = read_json(path)
            cost, rate = result.get("flops_per_token"), result.get("tokens_per_s")
            if isinstance(cost, int | float) and isinstance(rate, int | float) and cost * rate > 0:
                speeds.append(cost * rate)
    return statistics.median(speeds) if speeds else None


def render(plan: Plan) -> RenderableType:
    """The plan for a terminal: one line per row, then the totals."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{plan.name}: plan", title_justify="left", box=None, pad_edge=False)
    table.add_column("row", overflow="fold")
    table.add_column("differs from the base in", overflow="fold", ratio=1)
    table.add_column("params", justify="right")
    table.add_column("FLOPs/token", justify="right")
    if plan.match:
        table.add_column(f"Δ {plan.match}", justify="right")
    repeated = any(row.epochs is not None for row in plan.rows)
    if repeated:
        table.add_column("epochs", justify="right")
    table.add_column("runs")
    group = plan.rows[0].group
    for row in plan.rows:
        if row.try_of is not None:
            continue
        if row.group != group:
            table.add_section()
            group = row.group
        lines = list(row.differences)
        if row.tries:
            lines.append(f"{len(row.tries)} tries of {plan.tune}: {', '.join(map(str, row.tries))}")
        cells = [Text(row.label), Text("\n".join(lines) or "—")]
        cells += [Text(short(row.parameters)), Text(short(row.flops_per_token))]
        if plan.match:
            off = row.mismatch or 0.0
            style = "yellow" if abs(off) > matching.TOLERANCE else ""
            cells.append(Text(f"{off:+.2%}".replace("-", "−"), style=style))
        if repeated:
            cells.append(Text("?" if row.epochs is None else budget.times(row.epochs)))
        counted = Counter(row.states.values())
        counted.update(s for r in plan.rows if r.try_of == row.label for s in r.states.values())
        cells.append(Text(", ".join(f"{n} {state}" for state, n in counted.items())))
        table.add_row(*cells)
    said = [*plan.notes, *plan.stale, totals(plan)]
    return Group(table, Text(), *map(Text, said))


def totals(plan: Plan) -> str:
    """`12 runs (4 rows x 3 seeds), 9 to do: 1.2 PFLOP of training, about 12 min on one worker`."""
    seeds = f"{len(plan.seeds)} seed{'s' * (len(plan.seeds) != 1)}"
    more = sum(row.try_of is not None for row in plan.rows)
    rows = f"{len(plan.rows) - more} rows{f' and {more} more tries,' if more else ''}"
    line = f"{plan.runs} runs ({rows} x {seeds}), {plan.missing} to do"
    if not plan.missing:
        return line
    line += f": {short(plan.missing_flops)} training FLOPs"
    if plan.seconds is None:
        return f"{line}; time unknown until a run has finished"
    return f"{line}, about {duration(plan.seconds)} one after another"


def short(count: float) -> str:
    """Three digits and a suffix: 790k, 1.05M, 124M."""
    for size, suffix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * size:
            value = count / size
            return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f}{suffix}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{max(1, seconds):.0f} s"
