"""One sweep compared: what every table, figure and report of it is made from.

`compare` reads nothing twice and decides everything once: which of a row's tries stands for it,
which seeds count, the paired difference and its interval, what remains of it after Holm's
correction over the sweep's family, and the verdict. Renderers only choose what to show.

    rows of the manifest ─ each with its tries ─ the try that stands for it
      ─ what is not alike ─ paired differences ─ Holm ─ verdicts ─ curves: readings, gains
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from analysis import curves
from analysis.curves import Array, Budget, Curve
from analysis.results import Manifest, Row, Run, in_state, numbers
from analysis.statistics import (
    Adjusted,
    Difference,
    Summary,
    expected_best,
    holm,
    paired_difference,
    sensitivity,
    summarise,
    t_interval,
    t_quantile,
)

Verdict = Literal["baseline", "better", "worse", "cannot tell", "diverged", "not run"]
BUDGETS: tuple[Budget, ...] = ("tokens", "flops", "time")
TOLERANCE = 0.01  # what is planned to be equal may differ by so much of itself
CUT = 0.05  # of a curve: a decaying learning rate has all but ended there
SHORT = 7  # letters of a commit
INCOMPARABLE = ("data", "tokens")  # where these differ, a difference of losses means nothing


@dataclass(frozen=True)
class Reading:
    """A row's difference with both sides read off their curves at one equal budget.

    The budget is the least that the runs of all rows reach, so that rows can be ranked at it.

    Attributes:
        budget: tokens, training FLOPs or seconds of training, per run.
        losses: the row's at the budget, by seed.
        difference: from the baseline's; None for the baseline and without pairs.
        cut: the row's curves (or the baseline's) go on beyond the budget, by more than 5% of it:
            they are read before the end of their learning-rate schedule, which flatters the
            other side.
    """

    by: Budget
    budget: float
    losses: Mapping[int, float]
    difference: Difference | None
    cut: bool


@dataclass(frozen=True)
class Gain:
    """Compute-equivalent gain: FLOPs of the baseline over FLOPs of the variant, at one loss.

    In each seed the loss is the higher of the two final ones, which both curves reach; above 1 the
    variant needs less. Geometric mean over seeds, with the t interval of the logarithms. The side
    that ends lower is read before the end of its learning-rate schedule, so the gain (or the loss)
    is rather larger than this.

    Attributes:
        ratio, low, high: None where no seed's curves say; low and high also where only one does.
        n: seeds.
        beyond: the baseline ends above the variant, so that it never reaches the variant's final
            loss: to that question ("how much compute would the baseline need for it?") there is
            only a lower bound, `at_least`, its whole compute over the variant's.
    """

    ratio: float | None
    low: float | None
    high: float | None
    n: int
    beyond: bool
    at_least: float | None


@dataclass(frozen=True)
class Try:
    """One value of the tuned setting, over seeds. The lowest mean tuning loss is chosen."""

    value: float
    label: str
    losses: Mapping[int, float]  # val/loss, by seed
    tuning: Mapping[int, float]  # tuning/loss, by seed
    diverged: int
    planned: int
    initial: float | None = None  # mean loss before the first step, Wortsman's ℓ₀


@dataclass(frozen=True)
class Tuning:
    """A row's tries, from the lowest value to the highest, and which of them stands for it.

    Attributes:
        path: of the tuned setting.
        chosen: index into `tries`: the lowest mean tuning loss over the seeds that all have;
            tries that diverged in a seed come last.
        edge: the chosen value is the lowest or the highest tried.
        on_reported: there is no tuning loss on record: chosen on the reported loss, optimistic.
        sensitivity: S of Wortsman et al. 2023 (arXiv 2309.14322, section 2.2) over the tries;
            None until all have run, and where one diverged and the loss before training is not
            on record.
        expected_best: expected lowest loss of 1, 2, … of the tries (Dodge et al. 2019, arXiv
            1909.03004); a diverged one counts as its loss before training, or as infinite.
    """

    path: str
    tries: tuple[Try, ...]
    chosen: int
    edge: Literal["low", "high"] | None
    on_reported: bool
    sensitivity: float | None
    expected_best: tuple[float, ...]


@dataclass(frozen=True)
class Compared:
    """One row. `read` is the row whose runs stand for it: itself, or its best try.

    Attributes:
        runs, diverged, waiting: by seed; those of `runs` count, those of `waiting` have no result.
        excluded: seed -> why a finished run does not count.
        losses: by seed, of the runs that count.
        loss, bpb: None where a seed diverged: the survivors are no fair sample.
        difference: from the baseline, paired by seed; None for the baseline and without pairs.
        adjusted: what Holm's procedure over the family leaves of it; None where the two are not
            comparable.
        readings: by budget; only where curves were read.
        mixed: keys of `Comparison.mixed` that concern this row.
        lr: the peak learning rate of `read`, from its experiment; None where not known.
    """

    row: Row
    read: Row
    runs: Mapping[int, Run]
    diverged: Mapping[int, Run]
    waiting: Mapping[int, Run]
    excluded: Mapping[int, str]
    losses: Mapping[int, float]
    loss: Summary | None
    bpb: Summary | None
    difference: Difference | None
    adjusted: Adjusted | None
    verdict: Verdict
    readings: Mapping[Budget, Reading] = field(default_factory=dict)
    gain: Gain | None = None
    tuning: Tuning | None = None
    mixed: tuple[str, ...] = ()
    lr: float | None = None

    @property
    def label(self) -> str:
        return self.row.label

    @property
    def planned(self) -> int:
        """Runs that the row would have with all its seeds."""
        return len(self.read.runs)

    def summary(self, key: str) -> Summary | None:
        """Mean and sd over seeds of a number of result.json; None where a seed diverged."""
        return None if self.diverged else summarise(self.by_seed(key).values())

    def by_seed(self, key: str) -> dict[int, float]:
        """A number of result.json of each run that counts."""
        found = {seed: run.number(key) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Mixed:
    """Runs of one table that are not alike in something that must be alike.

    key: code | data | tokens | lm_eval | versions; `values`: value -> labels, with their seeds
    where a row has several. Code is told by the digest of its source, data by the fingerprint.
    """

    key: str
    values: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Flip:
    """Two rows whose order is another at an equal budget than at the end of training.

    At the end `lower` has the lower mean loss; at the budget `higher` has. At one of the two at
    least, the paired difference has a 95% interval that excludes zero.
    """

    by: Budget
    lower: str
    higher: str


@dataclass(frozen=True)
class Comparison:
    """A sweep compared; `rows[0]` is the baseline.

    Attributes:
        family: how many comparisons Holm's correction is over: the rows that are planned and not
            the baseline, whether or not they have run yet.
        noise: the baseline's loss over its seeds: the noise floor.
        started, failed, diverged, edited: runs, each counted once, tries included.
        commits: of the code that the runs were made with, shortened, `+` where it had changes.
        flips: changes of rank at equal tokens, FLOPs and time.
    """

    manifest: Manifest
    rows: tuple[Compared, ...]
    family: int
    noise: Summary | None
    started: int
    failed: int
    diverged: int
    edited: int
    mixed: tuple[Mixed, ...]
    commits: tuple[str, ...]
    flips: tuple[Flip, ...] = ()

    @property
    def baseline(self) -> Compared:
        return self.rows[0]


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
        rows, flips = _with_curves(rows, root)
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


# --- the runs of each row ------------------------------------------------------------------------


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
        read, tuning = _tuned(row, tries.get(row.label, []), runs)
        lr = read.setting("training.lr")
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
            lr=lr if isinstance(lr, int | float) else None,
        )
        yield replace(found, loss=found.summary("val/loss"), bpb=found.summary("val/bpb"))


def _tuned(row: Row, others: Sequence[Row], runs: Mapping[str, Run]) -> tuple[Row, Tuning | None]:
    """The row that stands for `row`, and its tries if it has any besides itself."""
    if not others:
        return row, None
    path = str(others[0].tuned["path"]) if others[0].tuned else ""
    own = row.setting(path)
    rows = {float(other.tuned["value"]): other for other in others if other.tuned}
    if isinstance(own, int | float):
        rows[float(own)] = row
    tries = tuple(_try(value, rows[value], runs) for value in sorted(rows))
    chosen, on_reported = _chosen(tries)
    if chosen is None:  # nothing to choose by
        values = sorted(rows)
        chosen = values.index(float(own)) if isinstance(own, int | float) else 0
        edge: Literal["low", "high"] | None = None
    else:
        edge = "low" if chosen == 0 else "high" if chosen == len(tries) - 1 else None
    spread, best = _over_tries(tries)
    tuning = Tuning(path, tries, chosen, edge, on_reported, spread, best)
    return rows[tries[chosen].value], tuning


def _try(value: float, row: Row, runs: Mapping[str, Run]) -> Try:
    diverged = in_state(row, runs, "diverged")
    done = in_state(row, runs, "done")
    before = [run.number("init/loss") for run in (*done.values(), *diverged.values())]
    known = [loss for loss in before if loss is not None]
    return Try(
        value=value,
        label=row.label,
        losses=numbers(row, runs, "val/loss"),
        tuning=numbers(row, runs, "tuning/loss"),
        diverged=len(diverged),
        planned=len(row.runs),
        initial=float(np.mean(known)) if known else None,
    )


def _chosen(tries: Sequence[Try]) -> tuple[int | None, bool]:
    """The index of the best try, None where none has a result, and whether it was chosen on the
    reported loss for want of another."""
    for fair in (True, False):  # a try that diverged in a seed is only chosen if all did
        known = [i for i, t in enumerate(tries) if t.losses and not (fair and t.diverged)]
        if not known:
            continue
        on_reported = any(tries[i].losses.keys() != tries[i].tuning.keys() for i in known)
        losses = {i: tries[i].losses if on_reported else tries[i].tuning for i in known}
        shared = set.intersection(*(set(by_seed) for by_seed in losses.values()))
        means = {
            i: float(np.mean([by_seed[s] for s in shared or by_seed]))
            for i, by_seed in losses.items()
        }
        return min(means, key=means.__getitem__), on_reported
    return None, False


def _over_tries(tries: Sequence[Try]) -> tuple[float | None, tuple[float, ...]]:
    """Wortsman's S over the tries, and the expected best of each number of them."""
    before = [t.initial for t in tries if t.initial is not None]
    initial = float(np.mean(before)) if before else math.inf
    seen = [t for t in tries if t.diverged or t.losses]
    losses = [math.inf if t.diverged else float(np.mean([*t.losses.values()])) for t in seen]
    spread = None
    if len(seen) == len(tries) and (math.isfinite(initial) or not any(t.diverged for t in tries)):
        spread = sensitivity(losses, initial)
    capped = [min(loss, initial) for loss in losses]
    return spread, tuple(expected_best(capped, k) for k in range(1, len(capped) + 1))


# --- what is not alike ---------------------------------------------------------------------------


def _mixed(rows: Sequence[Compared]) -> Iterator[Mixed]:
    for key in ("code", "data", "tokens", "versions", "lm_eval"):
        values: dict[str, list[str]] = {}
        for r in rows:
            by_value: dict[str, list[int]] = {}
            for seed, run in r.runs.items():
                for value in _facts(run, key):
                    by_value.setdefault(value, []).append(seed)
            for value, seeds in by_value.items():
                named = f"{r.label} s{', s'.join(map(str, seeds))}"
                values.setdefault(value, []).append(named if len(by_value) > 1 else r.label)
        if len(values) > 1 and not (key == "tokens" and _near(map(float, values))):
            yield Mixed(key, {value: tuple(labels) for value, labels in values.items()})


def _concerning(r: Compared, baseline: Compared, mixed: Sequence[Mixed]) -> Iterator[str]:
    """The keys in which the row's runs differ from one another or from the baseline's."""
    for m in mixed:
        both = (*r.runs.values(), *baseline.runs.values())
        values = {value for run in both for value in _facts(run, m.key)}
        if len(values) > 1 and not (m.key == "tokens" and _near(map(float, values))):
            yield m.key


def _facts(run: Run, key: str) -> Iterable[str]:
    """What the run says of `key`, as text; nothing where it doesn't."""
    known: Any = run.result.get(key)
    if key == "code":  # commits differ in much that no run depends on
        return [str(known["source"])[:8]] if known and known.get("source") else []
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


# --- differences and verdicts --------------------------------------------------------------------


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


# --- from the curves -----------------------------------------------------------------------------


def _with_curves(rows: Sequence[Compared], root: Path) -> tuple[list[Compared], tuple[Flip, ...]]:
    found = [
        {seed: curve for seed, run in r.runs.items() if (curve := curves.read(root / run.id))}
        for r in rows
    ]
    by_budget = [(by, _readings(rows, found, by)) for by in BUDGETS]
    filled = [
        replace(
            r,
            readings={by: readings[i] for by, readings in by_budget if i in readings},
            gain=_gain(r, rows[0], found[i], found[0]) if i else None,
        )
        for i, r in enumerate(rows)
    ]
    flips = tuple(flip for by, _ in by_budget for flip in _flips(filled, by))
    return filled, flips


def _readings(
    rows: Sequence[Compared], found: Sequence[Mapping[int, Curve]], by: Budget
) -> dict[int, Reading]:
    """Readings by index of row, of those whose curves say what was spent. Empty without the
    baseline's."""
    axes = {}
    for i, r in enumerate(rows):
        each = {s: curve.axis(by, r.read.flops_per_token) for s, curve in found[i].items()}
        known = {seed: axis for seed, axis in each.items() if axis is not None}
        if known and len(known) == len(r.losses) and not r.diverged:
            axes[i] = known
    if 0 not in axes:
        return {}
    ends = {i: [axis[-1] for axis in each.values()] for i, each in axes.items()}
    budget = float(min(map(min, ends.values())))
    losses = {
        i: {
            seed: loss
            for seed, axis in each.items()
            if (loss := curves.at(axis, found[i][seed].losses, budget)) is not None
        }
        for i, each in axes.items()
    }

    def difference(i: int) -> Difference | None:
        if losses[i] == rows[i].losses and losses[0] == rows[0].losses:
            return rows[i].difference  # at the end of both: known already
        return paired_difference(losses[i], losses[0]) if i else None

    return {
        i: Reading(
            by=by,
            budget=budget,
            losses=losses[i],
            difference=difference(i),
            cut=bool(max(*ends[i], *ends[0]) > (1 + CUT) * budget),
        )
        for i in axes
    }


def _gain(
    r: Compared, baseline: Compared, mine: Mapping[int, Curve], theirs: Mapping[int, Curve]
) -> Gain | None:
    """None where the two can't be compared: no curves, no FLOPs, other data, or a divergence."""
    cost, base_cost = r.read.flops_per_token, baseline.read.flops_per_token
    pairs = sorted(mine.keys() & theirs.keys())
    if "data" in r.mixed or not (pairs and cost and base_cost and r.loss and baseline.loss):
        return None
    logs, ratios = [], []
    for seed in pairs:
        a, b = mine[seed], theirs[seed]
        loss = float(max(a.losses[-1], b.losses[-1]))
        needs, base_needs = a.tokens_to(loss), b.tokens_to(loss)
        if needs and base_needs:
            logs.append(math.log(base_needs * base_cost / (needs * cost)))
        ratios.append(b.tokens[-1] * base_cost / (a.tokens[-1] * cost))
    ends = [float(np.mean([side[seed].losses[-1] for seed in pairs])) for side in (mine, theirs)]
    beyond = ends[1] > ends[0]
    at_least = float(np.exp(np.mean(np.log(ratios)))) if beyond else None
    low = high = None
    if len(logs) > 1:
        _, low, high = (math.exp(float(value)) for value in t_interval(logs))
    ratio = math.exp(float(np.mean(logs))) if logs else None
    return Gain(ratio, low, high, len(logs), beyond, at_least)


def _flips(rows: Sequence[Compared], by: Budget) -> Iterator[Flip]:
    """Vectorised: among thousands of rows there are millions of pairs."""
    known = [r for r in rows if by in r.readings and r.readings[by].losses]
    if all(r.readings[by].losses == r.losses for r in known):
        return
    seeds = sorted({seed for r in known for seed in r.losses})
    ends = _by_seed([r.losses for r in known], seeds)
    reads = _by_seed([r.readings[by].losses for r in known], seeds)
    end_means, read_means = (np.nanmean(losses, axis=1) for losses in (ends, reads))
    for i in range(len(known) - 1):
        others = slice(i + 1, None)
        end, read = end_means[i] - end_means[others], read_means[i] - read_means[others]
        apart = _apart(ends[i] - ends[others]) | _apart(reads[i] - reads[others])
        for j in np.flatnonzero((end * read < 0) & apart) + i + 1:
            lower, higher = (i, j) if end_means[i] < end_means[j] else (j, i)
            yield Flip(by, known[lower].label, known[higher].label)


def _by_seed(losses: Sequence[Mapping[int, float]], seeds: Sequence[int]) -> Array:
    """(rows, seeds), NaN where a row lacks a seed."""
    found = [[each.get(seed, math.nan) for seed in seeds] for each in losses]
    return np.array(found, dtype=np.float64).reshape(len(losses), len(seeds))


def _apart(d: Array) -> NDArray[np.bool_]:
    """Whether the 95% t interval of each row's mean excludes zero; `d` is (rows, seeds)."""
    n = np.isfinite(d).sum(axis=1)
    mean = np.nansum(d, axis=1) / np.maximum(n, 1)
    spread = np.sqrt(np.nansum((d - mean[:, None]) ** 2, axis=1) / np.maximum(n - 1, 1))
    quantile = np.array([math.inf] * 2 + [t_quantile(0.975, k) for k in range(1, d.shape[1])])
    with np.errstate(invalid="ignore"):  # infinite times no spread, of a single pair
        return np.abs(mean) > quantile[n] * spread / np.sqrt(np.maximum(n, 1))
