"""Seeds into intervals: a sample's mean and sd, and the paired difference between two variants.

Seed s gives every variant the same batches and the same initial values, so what s adds to the loss
of one it largely adds to the other. The difference within a seed removes that common part;
that is why variants are compared pair by pair and not mean by mean. How much it removed is
`Difference.pairing`. What is left of a difference among many comparisons is `holm`.

docs/statistics.md names each method's assumptions. Scipy is imported late: it costs what only a
table with seeds has to pay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
ALPHA = 0.05
POWER = 0.8
MOST_FLIPPED = 30  # pairs whose 2ⁿ sign flips are still counted one by one
FEWEST_RESAMPLED = 30  # units below which a bootstrap interval covers less than it says
MOST_SEEDS = 1_000_000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Summary:
    """Mean of n values and their sample standard deviation; sd is None when n = 1."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences, variant − baseline, and what n pairs can say of it.

    With n = 1 only the mean is known. `low`, `high` and `p` are None too where all n differences
    are one and the same number other than zero: normal differences never are, so the t test has
    nothing to say; `p_sign` still does.

    Attributes:
        low, high: the paired t interval.
        sd: of the paired differences.
        sd_unpaired: √(variance of the variant + variance of the baseline) over the same seeds:
            what `sd` would be, were the two independent.
        p: two-sided, of the paired t test.
        p_sign: two-sided, of the exact sign-flip test; None for more than MOST_FLIPPED pairs.
        smallest_p: 2^(1 − n), the least that `p_sign` can be.
        wins: P(variant < baseline) over all n² pairs of seeds, ties counting half.
    """

    n: int
    mean: float
    low: float | None
    high: float | None
    sd: float | None = None
    sd_unpaired: float | None = None
    p: float | None = None
    p_sign: float | None = None
    smallest_p: float | None = None
    wins: float | None = None

    @property
    def half_width(self) -> float | None:
        """Half the interval; None without one."""
        return None if self.high is None else self.high - self.mean

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero. Without an interval: no."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    @property
    def pairing(self) -> float | None:
        """sd / sd_unpaired: below 1 pairing by seed removed noise, above 1 it added some."""
        return self.sd / self.sd_unpaired if self.sd is not None and self.sd_unpaired else None


@dataclass(frozen=True)
class Adjusted:
    """What Holm's procedure leaves of one difference.

    Attributes:
        p: adjusted, to be held against α itself.
        low, high: the t interval at the confidence `level` at which the procedure tests this
            difference; it excludes zero exactly where `rejected`.
        rejected: p < α: the difference is not zero, at family-wise error α.
    """

    p: float
    low: float
    high: float
    level: float
    rejected: bool


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests of whether a difference is smaller than `margin` either way.

    Attributes:
        p: the larger of the two.
        low, high: the interval at 1 − 2α, which lies within ±margin exactly where p < α.
        within: it does: the two are the same as far as `margin` goes.
        beyond: the interval at 1 − α lies wholly outside ±margin: they differ by more.
    """

    margin: float
    p: float
    low: float
    high: float
    within: bool
    beyond: bool


def summarise(values: Iterable[float]) -> Summary | None:
    """Mean = Σx/n and sd = √(Σ(x − mean)²/(n − 1)); None for no values."""
    x = np.asarray(list(values), dtype=np.float64)
    if x.size == 0:
        return None
    return Summary(x.size, float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else None)


@lru_cache(maxsize=4096)
def t_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Quantile of Student's t distribution (Student 1908, The probable error of a mean)."""
    from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]

    return float(stdtrit(degrees_of_freedom, probability))


def two_sided_p(mean: float, error: float, degrees_of_freedom: float) -> float:
    """Student's t test of a mean of zero (Student 1908); its standard `error` is above 0."""
    return 2 * _t_below(-abs(mean) / error, degrees_of_freedom)


def t_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[Array, Array, Array]:
    """Mean and t interval over the last axis: mean ± t(1 − α/2; n − 1)·sd/√n.

    `values` is (..., n) with n ≥ 2; returns mean, low and high, each (...). Exact for independent
    normal values (Student 1908); raises ValueError for n < 2, where the spread is unknown.
    """
    x = np.asarray(values, dtype=np.float64)
    n = x.shape[-1]
    if n < 2:
        raise ValueError(f"an interval needs at least 2 values, got {n}")
    mean = x.mean(axis=-1)
    half = t_quantile(0.5 + confidence / 2, n - 1) * x.std(axis=-1, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half


def paired_difference(
    variant: Mapping[int, float], baseline: Mapping[int, float], confidence: float = CONFIDENCE
) -> Difference | None:
    """Mean of dₛ = variantₛ − baselineₛ over the seeds s that both have, and its two tests.

    Interval and `p` are those of the paired t test, n − 1 degrees of freedom (Fisher 1925,
    Statistical Methods for Research Workers, §24); `p_sign` is Fisher's randomisation test
    (1935, The Design of Experiments, §21); `wins` is what Bouthillier et al. 2021
    (arXiv 2103.03098) call P(A > B). No pair gives None.

    Raises:
        ValueError: a value is not finite: a diverged run has no loss to be averaged.
    """
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        return None
    x = np.array([variant[seed] for seed in seeds], dtype=np.float64)
    y = np.array([baseline[seed] for seed in seeds], dtype=np.float64)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("a paired difference needs finite values")
    n, d = len(seeds), x - y
    if n == 1:
        return Difference(1, float(d[0]), None, None)
    rounding = 4 * np.finfo(np.float64).eps * max(np.abs(x).max(), np.abs(y).max())
    mean, low, high = (float(value) for value in t_interval(d, confidence))
    p: float | None
    if np.ptp(d) > rounding:
        p = two_sided_p(mean, float(d.std(ddof=1)) / math.sqrt(n), n - 1)
    elif abs(mean) <= rounding:
        p = 1.0
    else:
        p = None
    return Difference(
        n=n,
        mean=mean,
        low=None if p is None else low,
        high=None if p is None else high,
        sd=float(d.std(ddof=1)),
        sd_unpaired=float(np.sqrt(x.var(ddof=1) + y.var(ddof=1))),
        p=p,
        p_sign=sign_flip(d),
        smallest_p=2.0 ** (1 - n),
        wins=float((np.less.outer(x, y) + 0.5 * np.equal.outer(x, y)).mean()),
    )


def sign_flip(differences: ArrayLike) -> float | None:
    """Exact two-sided p of the mean of n differences, each equally likely of either sign.

    The share of the 2ⁿ ways to sign |d| whose sum is at least as far from zero as Σd (Fisher 1935,
    The Design of Experiments, §21). Needs no distribution, only that a difference and its negative
    are equally likely under the null hypothesis; never below 2^(1 − n). None for n = 0 and for
    n > MOST_FLIPPED.

    The sums of either half of the pairs are listed, one list sorted, and the combinations
    counted: 2^(n/2) steps and numbers held.
    """
    d = np.asarray(differences, dtype=np.float64)
    n = d.size
    if not 0 < n <= MOST_FLIPPED:
        return None
    observed = abs(d.sum())
    tolerance = 1e-12 * np.abs(d).sum()  # sums that differ by rounding alone are ties
    if observed <= tolerance:
        return 1.0
    first, second = _signed_sums(d[: n // 2]), np.sort(_signed_sums(d[n // 2 :]))
    below = np.searchsorted(second, observed - tolerance - first, side="left")
    return float(2 * (second.size - below).sum() / 2.0**n)


def holm(
    differences: Sequence[Difference | None], family: int, alpha: float = ALPHA
) -> list[Adjusted | None]:
    """Holm's step-down correction of the paired t tests (Holm 1979, A simple sequentially
    rejective multiple test procedure): family-wise error ≤ α whatever the dependence.

    The k-th smallest p of a family of m is held against α/(m − k + 1) as long as all before it
    were rejected; the adjusted p is the largest (m − j + 1)·p₍ⱼ₎ of j ≤ k, at most 1. The interval
    is at confidence 1 − α/(m − k + 1), and from the first that is not rejected on at that one's:
    the interval that goes with the decision. That all of them cover at once is not promised.

    Args:
        differences: the family's, in any order; None or one without `p` stays None.
        family: m, how many comparisons were planned; those without a p count.

    Raises:
        ValueError: there are more p's than the family has members.
    """
    adjusted = holm_p([None if d is None else d.p for d in differences], family)
    known = {i: d for i, d in enumerate(differences) if d is not None and d.p is not None}
    found: list[Adjusted | None] = [None] * len(differences)
    level, stopped = 0.0, False
    for k, i in enumerate(sorted(known, key=lambda i: known[i].p or 0.0)):
        level = level if stopped else 1 - alpha / (family - k)
        d, p = known[i], adjusted[i]
        assert d.sd is not None and p is not None
        stopped = stopped or p >= alpha
        half = t_quantile(0.5 + level / 2, d.n - 1) * d.sd / math.sqrt(d.n)
        found[i] = Adjusted(p, d.mean - half, d.mean + half, level, not stopped)
    return found


def holm_p(p: Sequence[float | None], family: int) -> list[float | None]:
    """The adjusted p of each, as in `holm`; None stays None, and still counts in the family.

    Raises:
        ValueError: there are more p's than the family has members.
    """
    known = {i: value for i, value in enumerate(p) if value is not None}
    if len(known) > family:
        raise ValueError(f"{len(known)} p-values in a family of {family}")
    found: list[float | None] = [None] * len(p)
    adjusted = 0.0
    for k, i in enumerate(sorted(known, key=known.__getitem__)):
        found[i] = adjusted = max(adjusted, min(1.0, (family - k) * known[i]))
    return found


def equivalent(difference: Difference, margin: float, alpha: float = ALPHA) -> Equivalence | None:
    """Whether the true difference lies within ±margin, by two one-sided paired t tests
    (Schuirmann 1987, A comparison of the two one-sided tests procedure and the power approach).

    A difference that is not significant is no evidence of being none; this is. None where the
    difference has no interval.

    Raises:
        ValueError: `margin` is not above zero.
    """
    if not margin > 0:
        raise ValueError(f"margin is {margin}, not above 0")
    if difference.p is None or difference.sd is None:
        return None
    n, mean, error = difference.n, difference.mean, difference.sd / math.sqrt(difference.n)
    inner = t_quantile(1 - alpha, n - 1) * error
    outer = t_quantile(1 - alpha / 2, n - 1) * error
    if error:
        p = max(_t_below((mean - margin) / error, n - 1), _t_below((-margin - mean) / error, n - 1))
    else:  # all differences are zero
        p = 0.0
    return Equivalence(
        margin=margin,
        p=p,
        low=mean - inner,
        high=mean + inner,
        within=p < alpha,
        beyond=abs(mean) - outer > margin,
    )


def chance_to_find(
    effect: float, n: int, sd: float, comparisons: int = 1, alpha: float = ALPHA
) -> float:
    """Power: the probability that n seeds show a true `effect`, with its right sign.

    By the two-sided paired t test at α/comparisons: the noncentral t distribution with n − 1
    degrees of freedom and noncentrality effect·√n/sd (Cohen 1988, Statistical Power Analysis,
    ch. 2). α/comparisons is the level of Holm's first step: a bound that holds even where no other
    row of the family differs.

    Args:
        effect, sd: in one unit; sd is that of the paired differences, above 0.
    """
    from scipy.special import nctdtr

    critical = t_quantile(1 - alpha / comparisons / 2, n - 1)
    return 1 - float(nctdtr(n - 1, abs(effect) * math.sqrt(n) / sd, critical))


def detectable(
    n: int, sd: float, comparisons: int = 1, power: float = POWER, alpha: float = ALPHA
) -> float | None:
    """The least true difference that n seeds find with probability `power`, in the unit of `sd`.

    See `chance_to_find`; None for n < 2, which finds nothing.
    """
    if n < 2:
        return None
    low, high = 0.0, 1.0
    while chance_to_find(high, n, 1.0, comparisons, alpha) < power:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        enough = chance_to_find(middle, n, 1.0, comparisons, alpha) >= power
        low, high = (low, middle) if enough else (middle, high)
    return high * sd


def seeds_needed(
    effect: float, sd: float, comparisons: int = 1, power: float = POWER, alpha: float = ALPHA
) -> int | None:
    """The fewest seeds that find a true `effect` with probability `power`, see `chance_to_find`.

    None for an effect of zero, and for more than MOST_SEEDS.
    """
    if sd == 0 or effect == 0:
        return 2 if effect else None

    def enough(n: int) -> bool:
        return chance_to_find(effect, n, sd, comparisons, alpha) >= power

    high = 2
    while not enough(high):
        high *= 2
        if high > MOST_SEEDS:
            return None
    low = high // 2  # too few, or 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def expected_best(losses: Iterable[float], k: int) -> float:
    """Mean of the lowest loss over all ways to choose k of the n tries.

    The expected best of k tries of Dodge et al. 2019 (arXiv 1909.03004), by the estimator without
    bias of Tang et al. 2020 (arXiv 2004.13705): Σᵢ C(n − i, k − 1)·x₍ᵢ₎ / C(n, k), x₍ᵢ₎ the i-th
    lowest. A diverged try is infinite, or its loss before training.

    Raises:
        ValueError: k is not in 1 … n, or a loss is NaN.
    """
    x = sorted(losses)
    n = len(x)
    if not 1 <= k <= n or any(math.isnan(value) for value in x):
        raise ValueError(f"no best of {k} among {n} tries: {x}")
    weights = (math.comb(n - i, k - 1) / math.comb(n, k) for i in range(1, n + 1))
    return math.fsum(w * value for w, value in zip(weights, x, strict=True) if w)


def sensitivity(losses: Iterable[float | None], initial: float) -> float | None:
    """Learning-rate sensitivity S = E_η[min(ℓ(η), ℓ₀) − ℓ*], in the unit of the losses.

    Wortsman et al. 2023 (arXiv 2309.14322), section 2.2: ℓ* the lowest loss over the grid, ℓ₀ the
    one before training; the mean is over the grid's values, evenly spaced on a logarithmic scale
    for S to mean what theirs does. A diverged try (None, NaN or infinite) counts as ℓ₀.
    None for no losses and where all diverged.
    """
    known = [None if x is None or not math.isfinite(x) else x for x in losses]
    finite = [x for x in known if x is not None]
    if not finite:
        return None
    best = min(finite)
    kept = [initial if x is None else min(x, initial) for x in known]
    return math.fsum(kept) / len(kept) - min(best, initial)


def bootstrap_interval(
    values: ArrayLike,
    clusters: Sequence[object] | None = None,
    confidence: float = CONFIDENCE,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Interval of the mean of `values` (n,), by the BCa bootstrap over items or whole clusters.

    Units are drawn with replacement, as many as there are; with clusters the mean is the ratio of
    sums, so large ones weigh more. Bias-corrected and accelerated, second-order correct (Efron
    1987, Better bootstrap confidence intervals). The same seed gives the same interval.

    None for fewer than FEWEST_RESAMPLED units, where it would promise too much.
    """
    from scipy.special import ndtr, ndtri

    x = np.asarray(values, dtype=np.float64)
    codes = np.arange(x.size) if clusters is None else codes_of(clusters)
    units = int(codes.max()) + 1 if x.size else 0
    if units < FEWEST_RESAMPLED:
        return None
    sums, counts = np.bincount(codes, x), np.bincount(codes).astype(np.float64)
    mean = x.mean()
    draws, rng = np.empty(resamples), np.random.default_rng(seed)
    step = max(1, 2_000_000 // units)  # resamples at once: 16 MB of indices
    for start in range(0, resamples, step):
        drawn = rng.integers(units, size=(min(step, resamples - start), units))
        draws[start : start + step] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    if np.ptp(draws) == 0:
        return float(mean), float(mean)
    # What is left of the mean without each unit in turn: skewness, for the acceleration.
    without = (sums.sum() - sums) / (counts.sum() - counts)
    pull = without.mean() - without
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    below = ((draws < mean).sum() + 0.5 * (draws == mean).sum()) / resamples
    bias = ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    z = bias + ndtri(np.array([0.5 - confidence / 2, 0.5 + confidence / 2]))
    low, high = np.quantile(draws, ndtr(bias + z / (1 - acceleration * z)))
    return float(low), float(high)


def codes_of(clusters: Sequence[object]) -> NDArray[np.intp]:
    """A number for each value's cluster, 0, 1, … in the order of first appearance; (n,)."""
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in clusters], dtype=np.intp)


def _signed_sums(d: Array) -> Array:
    """Σ ±dᵢ for each of the 2ⁿ choices of signs."""
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    return sums


def _t_below(t: float, degrees_of_freedom: float) -> float:
    from scipy.special import stdtr

    return float(stdtr(degrees_of_freedom, t))
