"""What a table says below itself: its caption and footnotes, written from the data."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from analysis.budgets import CUT as CUT_SHARE
from analysis.comparison import INCOMPARABLE, TOLERANCE, Compared, Comparison
from analysis.curves import Budget
from analysis.results import Run
from analysis.statistics import ALPHA, t_quantile
from analysis.wording import (
    CUT,
    DIVERGED,
    EDITED,
    MISMATCH,
    NOT_RUN,
    UNLIKE,
    listed,
    percent,
    seeds_text,
    short,
)

MATCHED = {
    "params": "parameters matched to the baseline's",
    "flops": "FLOPs per token matched to the baseline's",
    "time": "time per training step matched to the baseline's",
    None: "neither parameters nor FLOPs nor time matched",
}
OFF = {"params": "parameters", "flops": "FLOPs per token", "time": "time per step"}
EQUAL: Mapping[Budget, tuple[str, str]] = {
    "tokens": ("tokens", " tokens"),
    "flops": ("training FLOPs", " FLOPs"),
    "time": ("training time", " s"),
}
MEANINGS = {
    "delta_adjusted": "Holm's CI: at the confidence at which Holm's procedure tests the row.",
    "p_sign": "p (sign flip): exact, over all ways to sign the differences; not corrected.",
    "pairing": "sd paired/unpaired: below 1 where pairing by seed took noise away.",
    "wins": "P(lower): the share of all pairs of seeds in which the row's loss is the lower one.",
    "sensitivity": (
        "LR sensitivity: mean over the tries of the loss above the best one's, a diverged try"
        " counting as the loss before training (Wortsman et al. 2023)."
    ),
    "expected_best": (
        "Expected best: the lowest loss to be expected of as many tries as the row with the fewest"
        " has (Dodge et al. 2019)."
    ),
    "above_floor": "Above floor: validation loss less the entropy of the corpus.",
    "gain": (
        "Compute gain: training FLOPs of the baseline over the row's, to the higher of the two"
        " final losses. Not reached: the baseline never gets to the row's final loss."
    ),
}
UNLIKE_WORDS = {
    "code": "code (digest of its source)",
    "imports": "own components (digest of their files)",
    "data": "data (fingerprint)",
    "tokens": "trained tokens",
    "versions": "libraries",
}


def unfair(mismatch: float | None) -> bool:
    return mismatch is not None and abs(mismatch) > TOLERANCE


def caption(comparison: Comparison) -> str:
    """What the numbers are: unit, budget, seeds, matching rule, tests."""
    manifest, rows = comparison.manifest, comparison.rows
    planned = sorted({r.planned for r in rows})
    seeds = f"n = {planned[0]}" if len(planned) == 1 else f"n = {planned[0]} to {planned[-1]}"
    after = f" after {manifest.tokens:,} training tokens" if manifest.tokens else ""
    text = (
        f"Validation loss (nats per token) and bits per byte{after}: mean ± sd over seeds"
        f" ({seeds} planned per row), {MATCHED[manifest.match]}."
    )
    if len(rows) == 1:
        return f"{text} A lower loss is better."
    text += (
        f" Δ: mean difference from {comparison.baseline.label}, paired by seed, with the 95% t"
        " interval of the paired difference."
    )
    if any(r.adjusted for r in rows):
        of = "one comparison" if comparison.family == 1 else f"{comparison.family} comparisons"
        text += (
            f" p: paired t test, two-sided, after Holm's correction over the sweep's {of};"
            f" better or worse, and bold, where it is below {ALPHA:g}: the interval at Holm's level"
            " then excludes zero."
        )
    return f"{text} A lower loss is better."


SPEED = "Tokens/s: median over finished runs, on the hardware that each ran on."


def of_one_column() -> dict[str, str]:
    """Footnote -> key of the only column that it is about."""
    return {SPEED: "tokens_per_s", **{text: key for key, text in MEANINGS.items()}}


def footnotes(comparison: Comparison, columns: Collection[str]) -> Iterator[str]:
    """What the cells don't say. `columns` are the keys of those that are shown."""
    yield from _gaps(comparison)
    yield from _fairness(comparison)
    yield from _tuning(comparison)
    yield from _noise(comparison)
    yield from _curves(comparison, columns)
    yield from (text for key, text in MEANINGS.items() if key in columns)
    if "tokens_per_s" in columns and any(r.by_seed("tokens_per_s") for r in comparison.rows):
        yield SPEED
    yield _provenance(comparison)


def _gaps(comparison: Comparison) -> Iterator[str]:
    """Diverged, missing, failed and edited runs."""
    rows = comparison.rows
    diverged = [
        f"{r.label} {len(r.diverged)}/{r.planned}"
        f" ({'; '.join(_divergence(seed, run) for seed, run in r.diverged.items())}{_survivors(r)})"
        for r in rows
        if r.diverged
    ]
    if diverged:
        yield f"{DIVERGED} diverged, so not averaged: {listed(diverged)}."
    if comparison.baseline.diverged:
        yield (
            f"{DIVERGED} The baseline diverged: differences are from its other seeds, no fair"
            " sample of it, and so there is no verdict on any row."
        )
    never = [r.label for r in rows if r.waiting and len(r.waiting) == r.planned]
    if never:
        yield f"{NOT_RUN} rows without any result: {listed(never)}."
    partly = [f"{r.label} {seeds_text(r.waiting)}" for r in rows if 0 < len(r.waiting) < r.planned]
    if partly:
        yield f"{NOT_RUN} runs without a result: {listed(partly)}."
    failed = [
        f"{r.label} seed {seed} ({run.reason or 'no reason recorded'})"
        for r in rows
        for seed, run in r.waiting.items()
        if run.state == "failed"
    ]
    if failed:
        yield f"Failed in the last attempt: {listed(failed)}."
    edited = [f"{r.label} {seeds_text(r.excluded)}" for r in rows if r.excluded]
    if edited:
        yield (
            f"{EDITED} the run's directory was changed after it ended and no longer fits its seal,"
            f" so it does not count: {listed(edited)}. Delete it and run the sweep again."
        )


def _divergence(seed: int, run: Run) -> str:
    step = run.result.get("diverged_step")
    return f"seed {seed}" + (f" at step {step}" if step is not None else f": {run.reason}")


def _survivors(r: Compared) -> str:
    finished = ", ".join(f"seed {seed} {loss:.4f}" for seed, loss in r.losses.items())
    return f"; finished: {finished}" if finished else ""


def _fairness(comparison: Comparison) -> Iterator[str]:
    """What was to be equal and is not."""
    match = comparison.manifest.match
    off = [(r.label, r.read.mismatch) for r in comparison.rows if unfair(r.read.mismatch)]
    if off and match:
        named = [f"{label} {percent(mismatch or 0.0)}" for label, mismatch in off]
        limit = f"{TOLERANCE:.0%}"
        yield f"{MISMATCH} {OFF[match]} off the baseline's by more than {limit}: {listed(named)}."
    for mixed in comparison.mixed:
        if mixed.key not in UNLIKE_WORDS:
            continue  # lm-eval's versions are told with its scores
        values = [f"{value}: {listed(labels)}" for value, labels in mixed.values.items()]
        so = ", so no verdict" if mixed.key in INCOMPARABLE else ""
        yield f"{UNLIKE} not the same {UNLIKE_WORDS[mixed.key]}{so}: {listed(values, '; ')}."
    own = [
        f"{r.label} ({', '.join(map(str, r.row.seeds.values()))})"
        for r in comparison.rows
        if r.row.seeds
    ]
    if own:
        yield f"Seeds of their own, so that pairs have nothing in common: {listed(own)}."
    first = comparison.baseline.losses
    same = [
        r.label
        for r in comparison.rows[1:]
        if (both := r.losses.keys() & first) and all(r.losses[s] == first[s] for s in both)
    ]
    if same:
        yield f"Losses identical to the baseline's, so the change may do nothing: {listed(same)}."


def _tuning(comparison: Comparison) -> Iterator[str]:
    tuned = [(r, r.tuning) for r in comparison.rows if r.tuning]
    if not tuned:
        return
    path = tuned[0][1].path
    counts = sorted({len(t.tries) for _, t in tuned})
    of = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    reported = [r.label for r, t in tuned if t.on_reported]
    by = ", by the mean loss on validation text that the table does not report"
    yield f"Each row at its own best {path} of {of} tried{by * (len(reported) < len(tuned))}."
    if reported:
        yield (
            f"Chosen on the reported loss itself, for want of another, which flatters rows with"
            f" many tries: {listed(reported)}."
        )
    edges = [
        f"{r.label} ({t.tries[t.chosen].value:g}, the {t.edge}est)" for r, t in tuned if t.edge
    ]
    if edges:
        yield f"Best {path} at the edge of the grid, so it may lie beyond: {listed(edges)}."
    open_tries = [
        f"{r.label} {lacking} of {len(t.tries)}"
        for r, t in tuned
        if (lacking := sum(len(x.losses) + x.diverged < x.planned for x in t.tries))
    ]
    if open_tries:
        yield f"Tries that have not all run, so that the choice may change: {listed(open_tries)}."
    alone = [r.label for r in comparison.rows if not r.tuning]
    if alone:
        yield f"Not tuned, since the row sets {path} itself: {listed(alone)}."


def _noise(comparison: Comparison) -> Iterator[str]:
    """What n allows, and how large the noise is that differences stand against."""
    noise, differences = comparison.noise, [r.difference for r in comparison.rows[1:]]
    known = [d for d in differences if d is not None]
    if known and max(d.n for d in known) == 1:
        yield (
            "One seed per row: differences may be all noise. No interval, no p-value and no verdict"
            " can come of it; give the sweep more seeds."
        )
    elif any(d.n == 1 for d in known):
        yield "A single pair of runs has no interval: its difference may be all noise."
    if any(d.n == 2 for d in known):
        factor = t_quantile(0.975, 1)
        yield f"Fewer than 3 seeds: intervals are wide (±{factor:.1f} standard errors at n = 2)."
    if any(d.n > 1 and d.p is None for d in known):
        yield "A difference that is the same number in each seed has no t interval."
    if noise is not None and noise.sd is not None:
        text = (
            f"Noise: the sd of {comparison.baseline.label}'s loss is {noise.sd:.4f} over"
            f" {noise.n} seeds"
        )
        paired = [d.sd for d in known if d.sd is not None]
        ratios = [d.pairing for d in known if d.pairing is not None]
        if paired and ratios:
            text += (
                f"; that of the paired differences {np.median(paired):.4f} (median),"
                f" {np.median(ratios):.2f} of what it would be unpaired"
            )
        yield f"{text}."
    most = max((d.n for d in known), default=0)
    if 1 < most < 6:
        yield (
            f"With {most} pairs no exact sign-flip test gives a p below {2.0 ** (1 - most):g}: p"
            " rests on the t test, which takes differences to be normal."
        )


def _curves(comparison: Comparison, columns: Collection[str]) -> Iterator[str]:
    for by, (words, unit) in EQUAL.items():
        shown = f"delta_at_{by}" in columns
        budgets = [r.readings[by].budget for r in comparison.rows if by in r.readings]
        flips = [f"{f.higher} is ahead of {f.lower}" for f in comparison.flips if f.by == by]
        if budgets and (shown or flips):
            text = f"At equal {words} ({short(budgets[0])}{unit}, the least that all rows reach)"
            yield f"{text} ranks are others than at the end: {listed(flips)}." * bool(flips) or (
                f"{text} no two rows that can be told apart change places."
            )
    if any(key.startswith("delta_at_") for key in columns):
        yield (
            f"{CUT} read from the curves more than {CUT_SHARE:.0%} before the end of this row's or"
            " the baseline's learning-rate schedule, which flatters the other. Between evaluations"
            " curves are taken to be straight."
        )


def _provenance(comparison: Comparison) -> str:
    c = comparison
    parts = [f"{c.started} runs started"]
    parts += [f"{count} {word}" for count, word in _ended(c) if count]
    text = ", ".join(parts)
    return f"{text}; code {listed(c.commits)}." if c.commits else f"{text}."


def _ended(c: Comparison) -> Iterable[tuple[int, str]]:
    return (c.diverged, "diverged"), (c.failed, "failed"), (c.edited, "edited since")
