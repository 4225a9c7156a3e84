"""A sweep in sentences: what came out of it, and what each row says.

Every sentence is written from the numbers that the table shows, and says no more than they do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from analysis.comparison import INCOMPARABLE, Compared, Comparison
from analysis.curves import Budget
from analysis.statistics import POWER, Difference, detectable
from analysis.wording import (
    decimals_for,
    difference_decimals,
    interval_text,
    p_text,
    percent,
    seeds_text,
    signed,
)

HELPED = 0.95  # sd paired over unpaired, below which pairing helped
MOST_NAMED = 4  # rows that one sentence names
SLIGHT = 0.005  # a share of cost or speed that is not worth a word
EQUAL: Mapping[Budget, str] = {
    "tokens": "equal tokens",
    "flops": "equal training FLOPs",
    "time": "equal training time",
}


def headline(comparison: Comparison) -> str:
    """The sweep in one or two sentences."""
    base, rows = comparison.baseline, comparison.rows[1:]
    if not any(row.losses for row in comparison.rows):
        if any(row.diverged for row in comparison.rows):
            return "Every run that has ended diverged, so there is nothing to compare."
        return "No run has finished yet, so there is nothing to compare."
    if not rows:
        return _noise_alone(comparison)
    if base.diverged or base.loss is None:
        why = "has no run that counts" if base.excluded else "has not run"
        why = "diverged" if base.diverged else why
        return f"The baseline, {base.label}, {why}: nothing can be compared with it."
    known = [row.difference for row in rows if row.difference is not None]
    if known and all(difference.n == 1 for difference in known):
        return (
            f"One pair of runs a row: the differences from {base.label} below may be all noise, and"
            " no verdict can come of them. More seeds are needed."
        )
    return " ".join(_outcomes(comparison))


def _outcomes(comparison: Comparison) -> Iterator[str]:
    base, rows = comparison.baseline, comparison.rows[1:]
    decimals = difference_decimals(row.difference for row in rows)
    decided = 0
    for verdict, sign in (("better", 1), ("worse", -1)):
        found = sorted(
            (row for row in rows if row.verdict == verdict), key=lambda row: sign * _mean(row)
        )
        decided += len(found)
        if not found:
            continue
        most = _amount(found[0].difference, decimals)
        if len(found) == 1:
            yield f"{found[0].label} is {verdict} than {base.label}: {most}."
        else:
            count = f"{len(found)} of {len(rows)}"
            if len(found) == len(rows):
                count = "Both" if len(rows) == 2 else f"All {len(rows)}"
            then = f", then {_and([row.label for row in found[1:]])}"
            yield (
                f"{count} changes are {verdict} than {base.label}: {_and([found[0].label])} most,"
                f" {most}{then}."
            )
    open_rows = [row for row in rows if row.verdict == "cannot tell"]
    if unclear := [row.label for row in open_rows if row.adjusted is not None]:
        every = len(unclear) == len(rows) > 1
        named = f"None of the {len(rows)} changes can" if every else f"{_and(unclear)} cannot"
        yield f"{named} be told from {base.label}."
        if not decided and (least := _findable(comparison)):
            yield (
                f"A true difference of {least} nats would have shown in {POWER:.0%} of such sweeps."
            )
    if untested := [row.label for row in open_rows if row.adjusted is None]:
        yield f"{_and(untested)} cannot be compared with {base.label}, see below."
    for verdict, words in (("diverged", "diverged"), ("not run", "has not run yet")):
        if labels := [row.label for row in rows if row.verdict == verdict]:
            yield f"{_and(labels)} {words if len(labels) == 1 else words.replace('has', 'have')}."


def _and(labels: Sequence[str]) -> str:
    """`A`, `A and B`, `A, B, C and 4 more`; in quotes where a label has a comma itself."""
    labels = [f"“{label}”" if "," in label else label for label in labels]
    if len(labels) > MOST_NAMED + 1:
        return f"{', '.join(labels[:MOST_NAMED])} and {len(labels) - MOST_NAMED} more"
    return " and ".join(filter(None, (", ".join(labels[:-1]), labels[-1])))


def _noise_alone(comparison: Comparison) -> str:
    noise = comparison.noise
    if noise is None or noise.sd is None:
        return f"One row, {comparison.baseline.label}: nothing is compared."
    return (
        f"{comparison.baseline.label} alone, over {noise.n} seeds: the sd of its loss,"
        f" {noise.sd:.4f} nats, is the noise that a change must stand out from."
    )


def _findable(comparison: Comparison) -> str | None:
    """The least difference that the typical row could have shown, after Holm's correction."""
    known = [d for row in comparison.rows[1:] if row.adjusted and (d := row.difference) and d.sd]
    if not known:
        return None
    sd, n = float(np.median([d.sd for d in known if d.sd])), min(d.n for d in known)
    least = detectable(n, sd, max(1, comparison.family))
    return None if least is None else f"{least:.2g}"


def sentences(comparison: Comparison, row: Compared) -> list[str]:
    """What a row says, the verdict first."""
    decimals = difference_decimals(r.difference for r in comparison.rows[1:])
    if row is comparison.baseline:
        return [*_baseline(comparison), *_tuned(row), *_left_out(row)]
    return [
        *_verdict(comparison, row, decimals),
        *_pairing(row),
        *_budgets(row, decimals),
        *_gain(row, comparison.baseline),
        *_costs(row, comparison.baseline),
        *_tuned(row),
        *_left_out(row),
    ]


def _baseline(comparison: Comparison) -> Iterator[str]:
    noise, label = comparison.noise, comparison.baseline.label
    if noise is None:
        yield f"{label} is the baseline. It has no mean loss, so no row has a verdict."
        return
    decimals = decimals_for([noise.sd])
    text = f"The baseline: {noise.mean:.{decimals}f} nats per token"
    if noise.sd is None:
        yield f"{text}, one seed."
    else:
        yield f"{text} over {noise.n} seeds, whose sd is {noise.sd:.{decimals}f}."


def _verdict(comparison: Comparison, row: Compared, decimals: int) -> Iterator[str]:
    base, d = comparison.baseline, row.difference
    if row.verdict == "not run":
        yield f"{row.label} has no result yet."
        return
    if row.verdict == "diverged":
        ended = ", ".join(
            f"seed {seed} at step {step}" if (step := run.result.get("diverged_step")) is not None
            else f"seed {seed}"
            for seed, run in row.diverged.items()
        )  # fmt: skip
        text = f"{row.label} diverged in {len(row.diverged)} of {row.planned} seeds ({ended})"
        if row.losses:
            low, high = min(row.losses.values()), max(row.losses.values())
            to = f" to {high:.3f}" if high > low else ""
            text += f"; those that finished ended at {low:.3f}{to}, and are no fair sample of it"
        yield f"{text}."
        return
    if d is None:
        yield f"{row.label} has no seed in common with {base.label}, so there is no difference."
        return
    of = "" if comparison.family == 1 else f" (Holm, {comparison.family} comparisons)"
    if row.verdict in ("better", "worse") and row.adjusted is not None:
        yield (
            f"{row.label} is {row.verdict}: {_amount(d, decimals)} over {d.n} seeds,"
            f" p {_p(row.adjusted.p)}{of}; {_same_sign(row, base)}."
        )
        return
    if d.n == 1:
        yield (
            f"{row.label} ended {signed(d.mean, decimals)} nats from {base.label} in the one seed"
            " that both have, which may be all noise."
        )
        return
    if row.adjusted is None:
        yield f"{row.label} can't be compared with {base.label}: {_why_not(row, base)}."
        return
    yield (
        f"{row.label} cannot be told from {base.label}: {_interval(d, decimals)} nats over {d.n}"
        f" seeds, p {_p(row.adjusted.p)}{of}."
    )
    if d.excludes_zero:
        yield (
            f"Its own 95% interval excludes zero, but one of {comparison.family} that does so by"
            " luck alone is not rare."
        )
    elif d.sd and (least := detectable(d.n, d.sd, max(1, comparison.family))) is not None:
        yield (
            f"That is no proof of sameness: a difference must be {least:.2g} nats to be found in"
            f" {POWER:.0%} of such sweeps."
        )


def _why_not(row: Compared, base: Compared) -> str:
    """Why a difference is not tested."""
    if base.diverged:
        return f"{base.label} diverged itself, and its other seeds are no fair sample of it"
    if unlike := [key for key in INCOMPARABLE if key in row.mixed]:
        return f"they saw other {' and '.join(unlike)}"
    return "the difference is the same number in each seed, of which the t test can say nothing"


def _pairing(row: Compared) -> Iterator[str]:
    d = row.difference
    if row.verdict not in ("better", "worse", "cannot tell") or d is None or d.pairing is None:
        return
    if d.sd is None or d.sd_unpaired is None:
        return
    if row.row.seeds:
        yield "Its seeds are its own, so its pairs share nothing that pairing could take away."
        return
    if d.pairing < HELPED:
        yield (
            f"Pairing by seed cut the sd of the difference from {d.sd_unpaired:.4f} to {d.sd:.4f}."
        )
    else:
        yield (
            f"Pairing by seed did not help: the differences have an sd of {d.sd:.4f}, unpaired"
            f" {d.sd_unpaired:.4f}."
        )


def _budgets(row: Compared, decimals: int) -> Iterator[str]:
    told = []
    for by in ("flops", "time"):
        reading = row.readings.get(by)
        d = reading.difference if reading is not None else None
        if reading is None or d is None or row.difference is None or not reading.cut:
            continue  # nothing to add to what the end of training says
        if abs(d.mean - row.difference.mean) < 10**-decimals:
            continue
        turned = d.mean * row.difference.mean < 0
        told.append(f"at {EQUAL[by]} {_interval(d, decimals)}{', the other way' * turned}")
    if told:
        text = "; ".join(told)
        yield (
            f"{text[:1].upper()}{text[1:]} (read from the curves, in part before the end of the"
            " schedule)."
        )


def _gain(row: Compared, baseline: Compared) -> Iterator[str]:
    gain = row.gain
    if gain is None or gain.ratio is None or row.verdict not in ("better", "worse"):
        return
    first, second = (row, baseline) if gain.beyond else (baseline, row)  # who ended lower, first
    ratios = [gain.ratio, *((gain.low, gain.high) if gain.low and gain.high else ())]
    shares = [1 / ratio if gain.beyond else ratio for ratio in ratios]
    interval = f" [{min(shares):.0%}, {max(shares):.0%}]" if len(shares) > 1 else ""
    yield (
        f"{first.label} reaches {second.label}'s final loss with {shares[0]:.0%}{interval} of"
        f" {second.label}'s training FLOPs."
    )


def _costs(row: Compared, baseline: Compared) -> Iterator[str]:
    told = []
    for words, mine, theirs in (
        ("parameters", row.read.parameters, baseline.read.parameters),
        ("FLOPs per token", row.read.flops_per_token, baseline.read.flops_per_token),
        ("tokens per second", _speed(row), _speed(baseline)),
    ):
        if mine and theirs and abs(mine / theirs - 1) > SLIGHT:
            told.append(f"{percent(mine / theirs - 1, 0 if abs(mine / theirs - 1) > 0.1 else 1)}"
                        f" {words}")  # fmt: skip
    if told:
        yield f"Against the baseline: {', '.join(told)}."


def _speed(row: Compared) -> float | None:
    speeds = list(row.by_seed("tokens_per_s").values())
    return float(np.median(speeds)) if speeds else None


def _tuned(row: Compared) -> Iterator[str]:
    tuning = row.tuning
    if tuning is None:
        return
    chosen = tuning.tries[tuning.chosen]
    if all(attempt.diverged for attempt in tuning.tries):
        yield (
            f"No value of {tuning.path} worked for it: each of the {len(tuning.tries)} tried"
            f" diverged in a seed at least; shown is {chosen.value:g}."
        )
        return
    text = f"At its own best {tuning.path}, {chosen.value:g}, of {len(tuning.tries)} tried"
    if tuning.edge:
        text += f"; the {tuning.edge}est of them, so a better one may lie beyond"
    yield f"{text}."


def _left_out(row: Compared) -> Iterator[str]:
    if row.waiting and row.verdict != "not run":
        yield f"Without {seeds_text(row.waiting)}, which {_have(len(row.waiting))} no result."
    for why in dict.fromkeys(row.excluded.values()):
        seeds = [seed for seed, other in row.excluded.items() if other == why]
        yield f"Without {seeds_text(seeds)}: {why}."


def _have(count: int) -> str:
    return "has" if count == 1 else "have"


def _same_sign(row: Compared, base: Compared) -> str:
    """`lower in each of the 4 pairs`."""
    pairs = [row.losses[seed] - base.losses[seed] for seed in row.losses.keys() & base.losses]
    where = "lower" if _mean(row) < 0 else "higher"
    count = sum(value * _mean(row) > 0 for value in pairs)
    return f"{where} in {'each' if count == len(pairs) else count} of the {len(pairs)} pairs"


def _mean(row: Compared) -> float:
    return row.difference.mean if row.difference else 0.0


def _amount(d: Difference | None, decimals: int) -> str:
    """`0.0397 nats lower [0.0343, 0.0450]`, of a difference whose interval may hold zero."""
    assert d is not None
    text = f"{abs(d.mean):.{decimals}f} nats {'lower' if d.mean < 0 else 'higher'}"
    if d.low is None or d.high is None:
        return text
    if not d.excludes_zero:
        return text + interval_text(d.low, d.high, decimals)
    low, high = sorted((abs(d.low), abs(d.high)))
    return f"{text} [{low:.{decimals}f}, {high:.{decimals}f}]"


def _interval(d: Difference, decimals: int) -> str:
    text = signed(d.mean, decimals)
    if d.low is None or d.high is None:
        return text
    return text + interval_text(d.low, d.high, decimals)


def _p(p: float) -> str:
    text = p_text(p)
    return f"< {text[1:]}" if text.startswith("<") else f"= {text}"
