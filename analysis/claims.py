"""Published claims against measured sweeps: agrees, disagrees, or cannot tell at this scale.

Each claim is judged by its own 95% interval over seeds, paired by seed wherever two rows are
compared. There is no correction over the claims of a paper: each was made before our runs, and each
is reported, whatever comes of it. Only signs, orders, margins and slopes are judged. Sizes are set
beside the published ones and named, but a loss in nats per byte of a small model is another scale
than one per token of a large one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any, Literal

import numpy as np

from analysis import published
from analysis.comparison import Compared, Comparison
from analysis.published import (
    Claim,
    DifferenceClaim,
    OrderClaim,
    Paper,
    PublishedDifference,
    SameClaim,
    SlopeClaim,
    ThresholdClaim,
)
from analysis.statistics import Difference, equivalent, paired_difference, sensitivity, t_interval
from analysis.table import Cell, Column, Table, TableRow
from analysis.wording import MINUS, signed
from experiments.scores import Settings

Verdict = Literal["agrees", "disagrees", "cannot tell", "not measured"]
Size = Literal["inside", "smaller", "larger"]
LENGTH = re.compile(r"val/loss@(\d+)x")
UNLIKE = ("data", "tokens")  # rows that differ in these can't be compared by their losses


@dataclass(frozen=True)
class Measured:
    """One metric of one row. `diverged`: the seeds that have none because they diverged."""

    by_seed: Mapping[int, float]
    diverged: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Finding:
    """What became of one claim.

    Attributes:
        mean, low, high, n: measured, with its 95% interval over n seeds: a difference, a slope or
            a value, as the claim is; None where there is none.
        published: the paper's number, where it has one, in `published_unit`: of losses in nats, as
            ours are; `source` says where it stands.
        size: the published number lies inside the measured interval, or what was measured is
            smaller or larger; only where both are losses.
        sweep: the name of the sweep that was read.
        order: of rows as measured by their means, the lowest first, where the claim is of one.
        note: what stands in the way of more.
    """

    claim: Claim
    verdict: Verdict
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    published: float | None = None
    published_unit: str = "nats"
    source: str = ""
    size: Size | None = None
    sweep: str | None = None
    order: tuple[str, ...] = ()
    note: str = ""


def check(paper: Paper, comparisons: Sequence[Comparison]) -> list[Finding]:
    """Every claim of a paper against the first of these sweeps that has all its rows."""
    return [_sourced(paper, claim, _found(claim, comparisons)) for claim in paper.file.claims]


def values(row: Compared, metric: str, at: float | None = None) -> Measured:
    """A metric of a row, by seed.

    `metric` is a key of result.json (`val/loss`, `init/grad_norm_ffn`), or

        val/loss@8x         the loss at 8 times the training length, where that was evaluated
        sensitivity         Wortsman's S over the row's tries
        score:TASK          the primary metric of a task of lm-eval, scored as the experiment says

    `at`: of the try at this value of the tuned setting, with diverged ones, and losses above it,
    at the loss before training (as S has them).
    """
    if metric == "sensitivity":
        return _sensitivities(row)
    if at is not None:
        return _of_try(row, at)
    diverged = frozenset(row.diverged)
    if metric.startswith("score:"):
        return Measured(_scores(row, metric.removeprefix("score:")), diverged)
    if multiple := LENGTH.fullmatch(metric):
        metric = f"val/loss@{int(multiple[1]) * (row.read.setting('training.seq_len') or 0)}"
    return Measured(row.by_seed(metric), diverged)


def _scores(row: Compared, task: str) -> dict[int, float]:
    name = ",".join([task, *Settings.of(row.read.setting("evaluation") or {}).words])
    found = {}
    for seed, run in row.runs.items():
        record = run.scores.get(name, {"metrics": {}, "primary": None})
        metric = record["metrics"].get(record["primary"] or "")
        if metric and metric["value"] is not None:
            found[seed] = metric["value"]
    return found


def _capped(row: Compared) -> Iterator[tuple[float, dict[int, float]]]:
    """Each try's value and losses by seed; a diverged seed, and a loss above it, is the loss
    before training. Seeds of which it is not known how they ended are left out."""
    for t in row.tuning.tries if row.tuning else ():
        cap = math.inf if t.initial is None else t.initial
        losses = {seed: min(loss, cap) for seed, loss in t.losses.items()}
        if len(losses) + t.diverged == t.planned and math.isfinite(cap):
            losses |= {seed: cap for seed in row.row.runs if seed not in losses}
        yield t.value, losses


def _sensitivities(row: Compared) -> Measured:
    tries = [losses for _, losses in _capped(row)]
    seeds = set.intersection(*(set(losses) for losses in tries)) if tries else set()
    found = {s: sensitivity([losses[s] for losses in tries], math.inf) for s in sorted(seeds)}
    return Measured({s: value for s, value in found.items() if value is not None})


def _of_try(row: Compared, at: float) -> Measured:
    return Measured(next((losses for value, losses in _capped(row) if value == at), {}))


# --- verdicts ------------------------------------------------------------------------------------


def _found(claim: Claim, comparisons: Sequence[Comparison]) -> Finding:
    """The claim's finding from the sweep that measured it; where none did, the reason."""
    best = Finding(claim, "not measured", note="none of these sweeps has its rows")
    for comparison in comparisons:
        rows = {row.label: row for row in comparison.rows}
        if isinstance(claim, SlopeClaim):
            made = _slope(claim, comparison.rows)
        elif missing := [label for label in _labels(claim) if label not in rows]:
            made = Finding(claim, "not measured", note=f"no row '{missing[0]}' in this sweep")
            best = replace(made, sweep=comparison.manifest.name) if best.sweep is None else best
            continue
        elif isinstance(claim, OrderClaim):
            made = _order(claim, rows)
        elif isinstance(claim, ThresholdClaim):
            made = _threshold(claim, values(rows[claim.variant], claim.metric))
        else:
            made = _two_rows(claim, rows[claim.variant], rows[claim.than])
        if made is not None:
            return replace(made, sweep=comparison.manifest.name)
    return best


def _labels(claim: DifferenceClaim | SameClaim | OrderClaim | ThresholdClaim) -> tuple[str, ...]:
    if isinstance(claim, OrderClaim):
        return claim.lowest_first
    return (claim.variant,) if isinstance(claim, ThresholdClaim) else (claim.variant, claim.than)


def _unlike(rows: Iterable[Compared]) -> str:
    """Why the losses of these rows can't be compared, if they can't."""
    runs = [run for row in rows for run in row.runs.values()]
    for key in UNLIKE:
        if len({str(run.result[key]) for run in runs if run.result.get(key) is not None}) > 1:
            return f"their runs differ in {key}"
    return ""


def _two_rows(claim: DifferenceClaim | SameClaim, variant: Compared, than: Compared) -> Finding:
    at = claim.at if isinstance(claim, DifferenceClaim) else None
    other = (isinstance(claim, DifferenceClaim) and claim.than_metric) or claim.metric
    one, two = values(variant, claim.metric, at), values(than, other, at)
    if why := _unlike((variant, than)):
        return Finding(claim, "cannot tell", note=why)
    if one.diverged or two.diverged:
        return _diverged(claim, variant, than)
    d = paired_difference(one.by_seed, two.by_seed)
    if d is None:
        return Finding(claim, "not measured", note=f"no runs with {claim.metric} of both")
    made = Finding(claim, "cannot tell", d.mean, d.low, d.high, d.n, note=_why_no_interval(d))
    if isinstance(claim, SameClaim):
        same = equivalent(d, claim.margin)
        if same is not None and (same.within or same.beyond):
            return replace(made, verdict="agrees" if same.within else "disagrees")
        return made
    if d.excludes_zero:
        as_said = (d.mean < 0) == (claim.expect == "lower")
        return replace(made, verdict="agrees" if as_said else "disagrees")
    return made


def _why_no_interval(d: Difference) -> str:
    if d.low is not None:
        return ""
    return "one seed: no interval" if d.n == 1 else "the same in every seed: no interval"


def _diverged(claim: DifferenceClaim | SameClaim, variant: Compared, than: Compared) -> Finding:
    """A row that diverged in every seed is worse than one that did in none."""
    counted = [(row, len(row.diverged)) for row in (variant, than) if row.diverged]
    note = ", ".join(f"{row.label} diverged in {n} of {row.planned} seeds" for row, n in counted)
    worse, whole = counted[0][0], counted[0][1] == counted[0][0].planned > 1
    if not whole or len(counted) > 1 or variant is than:
        return Finding(claim, "cannot tell", note=note)
    if isinstance(claim, SameClaim):
        return Finding(claim, "disagrees", note=note)
    as_said = (worse is variant) == (claim.expect == "higher")
    return Finding(claim, "agrees" if as_said else "disagrees", note=note)


def _order(claim: OrderClaim, rows: Mapping[str, Compared]) -> Finding:
    """Agrees where each neighbouring pair is apart as said; disagrees where any pair is apart the
    other way round."""
    chosen = [rows[label] for label in claim.lowest_first]
    found = {row.label: values(row, claim.metric) for row in chosen}
    if why := _unlike(chosen):
        return Finding(claim, "cannot tell", note=why)
    if gone := [label for label, measured in found.items() if measured.diverged]:
        return Finding(claim, "cannot tell", note=f"{', '.join(gone)} diverged in some seeds")
    if lacking := [label for label, measured in found.items() if not measured.by_seed]:
        return Finding(claim, "not measured", note=f"no {claim.metric} of {', '.join(lacking)}")
    apart = {
        (a, b): paired_difference(found[b].by_seed, found[a].by_seed)
        for a, b in combinations(claim.lowest_first, 2)
    }
    means = {label: float(np.mean([*found[label].by_seed.values()])) for label in found}
    order = tuple(sorted(means, key=means.__getitem__))
    made = Finding(claim, "agrees", n=min(len(m.by_seed) for m in found.values()), order=order)
    reversed_ = [
        f"{b} < {a}" for (a, b), d in apart.items() if d and d.excludes_zero and d.mean < 0
    ]
    if reversed_:
        return replace(made, verdict="disagrees", note=f"apart: {', '.join(reversed_)}")
    unsure = [
        f"{a} and {b}"
        for a, b in pairwise(claim.lowest_first)
        if not ((d := apart[a, b]) and d.excludes_zero)
    ]
    if unsure:
        return replace(made, verdict="cannot tell", note=f"not apart: {', '.join(unsure)}")
    return made


def _threshold(claim: ThresholdClaim, measured: Measured) -> Finding:
    if measured.diverged:
        return Finding(claim, "cannot tell", note="diverged in some seeds")
    x = [measured.by_seed[seed] for seed in sorted(measured.by_seed)]
    if not x:
        return Finding(claim, "not measured", note=f"no runs with {claim.metric}")
    if len(x) == 1:
        return Finding(claim, "cannot tell", x[0], n=1, note="one seed: no interval")
    mean, low, high = (float(value) for value in t_interval(x))
    made = Finding(claim, "cannot tell", mean, low, high, len(x), published=claim.bound)
    if low > claim.bound or high < claim.bound:
        as_said = (low > claim.bound) == (claim.above is not None)
        return replace(made, verdict="agrees" if as_said else "disagrees")
    return made


def _slope(claim: SlopeClaim, rows: Sequence[Compared]) -> Finding | None:
    """Least squares within each seed, then the interval over seeds; None where no row is meant."""
    chosen = [r for r in rows if all(matches(r.row.setting(p), v) for p, v in claim.among.items())]
    points = {
        row.label: (float(x), values(row, claim.metric).by_seed)
        for row in chosen
        if isinstance(x := row.row.setting(claim.over), int | float) and x > 0
    }
    if len({x for x, _ in points.values()}) < 3:
        return None
    seeds = set.intersection(*(set(by_seed) for _, by_seed in points.values()))
    if not seeds or any(y[s] <= 0 for _, y in points.values() for s in seeds):
        return Finding(claim, "not measured", note=f"no seed has {claim.metric} of all rows")
    x = np.log([value for value, _ in points.values()])
    y = np.log([[by_seed[s] for _, by_seed in points.values()] for s in sorted(seeds)])
    x = x - x.mean()
    slopes = (y * x).sum(axis=1) / (x**2).sum()  # (seeds,)
    made = Finding(claim, "cannot tell", float(slopes.mean()), n=len(slopes), published_unit="")
    made = replace(made, published=claim.published)
    if len(slopes) == 1:
        return replace(made, note="one seed: no interval")
    _, low, high = (float(value) for value in t_interval(slopes))
    made = replace(made, low=low, high=high)
    if claim.published - claim.margin < low and high < claim.published + claim.margin:
        return replace(made, verdict="agrees")
    if high < claim.published - claim.margin or low > claim.published + claim.margin:
        return replace(made, verdict="disagrees")
    return made


def matches(actual: Any, wanted: Any) -> bool:
    """Whether a setting is what is wanted; a component agrees in what is said of it."""
    if isinstance(actual, Mapping):
        said = wanted if isinstance(wanted, Mapping) else {"name": wanted}
        return all(matches(actual.get(key), value) for key, value in said.items())
    if isinstance(wanted, Mapping):
        return wanted.keys() == {"name"} and bool(actual == wanted["name"])
    return bool(actual == wanted)


# --- beside what was published -------------------------------------------------------------------


def _sourced(paper: Paper, claim: Claim, finding: Finding) -> Finding:
    """The finding with what the paper says, and how the sizes compare."""
    if claim.beyond:
        return replace(finding, source="not of the paper")
    if not isinstance(claim, DifferenceClaim | SameClaim) or claim.published is None:
        mark = f" ({claim.mark})" if claim.mark else ""
        return replace(finding, source=f"{claim.where or 'text'}{mark}")
    known = published.difference(paper, claim)
    assert known is not None
    finding = replace(finding, published=known.mean, source=f"{known.where} ({known.mark})")
    if known.unit == "nats" and claim.metric.startswith("val/loss"):
        return replace(finding, size=_size(finding, known))
    return replace(finding, published_unit=known.unit)


def _size(finding: Finding, known: PublishedDifference) -> Size | None:
    if finding.mean is None or finding.low is None or finding.high is None:
        return None
    if finding.verdict == "disagrees" and isinstance(finding.claim, DifferenceClaim):
        return None  # of the other sign
    if finding.low <= known.mean <= finding.high:
        return "inside"
    return "smaller" if abs(finding.mean) < abs(known.mean) else "larger"


def table(paper: Paper, findings: Sequence[Finding]) -> Table:
    """Measured beside published, claim by claim."""
    columns = (
        Column("claim", "Claim", "left"),
        Column("published", "Published", "left", ("value",)),
        Column("measured", "Measured [95% CI]", "left", ("low", "high", "n")),
        Column("verdict", "Verdict", "left"),
        Column("size", "Size", "left", (), 1),
        Column("source", "Where", "left"),
    )
    noted: dict[str, list[str]] = {}
    for i, f in enumerate(findings, 1):
        noted.setdefault(f.note, []).append(str(i))
    notes = [f"{', '.join(numbers)}: {note}" for note, numbers in noted.items() if note]
    rows = [
        TableRow(
            "beyond the paper" if f.claim.beyond else "rows",
            (
                Cell(f"{i}. {f.claim.says}", f.claim.says),
                Cell(_published_text(f), f.published, {"value": f.published}),
                _measured_cell(f),
                Cell(f.verdict, f.verdict, bold=f.verdict in ("agrees", "disagrees")),
                Cell(f.size or "", f.size),
                Cell(f.source, f.source),
            ),
        )
        for i, f in enumerate(findings, 1)
    ]
    counted = {v: sum(f.verdict == v for f in findings) for v in _VERDICTS}
    told = ", ".join(f"{verdict} {n}" for verdict, n in counted.items() if n)
    sweeps = ", ".join(dict.fromkeys(f.sweep for f in findings if f.sweep))
    caption = (
        f"{paper.source}, against {sweeps or 'no sweep'}: {told}. "
        f"Published: {paper.file.setting}. "
        "Each claim by its own 95% interval over seeds, paired by seed. Size: whether the "
        "published number lies inside the measured interval, or what was measured is smaller or "
        "larger; ours are losses of a small model on other text, so only signs, orders, margins "
        "and slopes are judged."
    )
    title = f"{paper.key}: measured beside published"
    return Table(title, columns, tuple(rows), caption, tuple(notes))


_VERDICTS: tuple[Verdict, ...] = ("agrees", "disagrees", "cannot tell", "not measured")


def _published_text(f: Finding) -> str:
    claim = f.claim
    if isinstance(claim, ThresholdClaim):
        return f"{'above' if claim.above is not None else 'below'} {_plain(claim.bound)}"
    if isinstance(claim, OrderClaim):
        return " < ".join(claim.lowest_first)
    if isinstance(claim, SlopeClaim):
        return f"slope {_signed(claim.published)} ± {claim.margin:g}"
    margin = f"within ±{claim.margin:g}" if isinstance(claim, SameClaim) else ""
    if f.published is None:
        return margin or (claim.expect if isinstance(claim, DifferenceClaim) else "")
    number = f"{_signed(f.published)} {f.published_unit}"
    return f"{number}; {margin}" if margin else number


def _measured_cell(f: Finding) -> Cell:
    if f.order:
        return Cell(" < ".join(f.order), None, {"low": None, "high": None, "n": f.n})
    if f.mean is None:
        return Cell("", mark="—") if f.verdict == "not measured" else Cell("see notes")
    form = _plain if isinstance(f.claim, ThresholdClaim) else _signed
    text = form(f.mean)
    if f.low is not None and f.high is not None:
        text += f" [{form(f.low)}, {form(f.high)}]"
    return Cell(f"{text}, n={f.n}", f.mean, {"low": f.low, "high": f.high, "n": f.n})


def _signed(value: float) -> str:
    return signed(value, 3)


def _plain(value: float) -> str:
    return f"{value:.3f}".replace("-", MINUS)


def as_json(finding: Finding) -> dict[str, Any]:
    """A finding as plain data: the claim's words, then what became of it."""
    kept = {k: v for k, v in vars(finding).items() if k != "claim"}
    return {"claim": finding.claim.model_dump(mode="json", exclude_none=True), **kept}
