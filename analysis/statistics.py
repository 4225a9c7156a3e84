"""Seeds into intervals: a sample's mean and sd, and the paired difference between two variants.

Seed s gives every variant the same batches and the same initial values, so what s adds to the loss
of one it largely adds to the other. The difference within a seed removes that common part;
that is why variants are compared pair by pair and not mean by mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean of n values and their sample standard deviation; sd is None when n = 1."""

    n: int
    mean: float
    sd: float | None


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences and its interval; low and high are None when n = 1."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def half_width(self) -> float | None:
        """Half the interval; None without one."""
        return None if self.high is None else self.high - self.mean

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero. Without an interval: no."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def summarise(values: Iterable[float]) -> Summary | None:
    """Mean = Σx/n and sd = √(Σ(x − mean)²/(n − 1)); None for no values."""
    x = np.asarray(list(values), dtype=np.float64)
    if x.size == 0:
        return None
    return Summary(x.size, float(x.mean()), float(x.std(ddof=1)) if x.size > 1 else None)


def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Quantile of Student's t distribution (Student 1908, The probable error of a mean)."""
    # Imported late: scipy costs half a second, which only a table with seeds has to pay.
    from scipy.special import stdtrit  # type: ignore[import-untyped, unused-ignore]

    return float(stdtrit(degrees_of_freedom, probability))


def t_interval(
    values: ArrayLike, confidence: float = CONFIDENCE
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
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
    """Mean of dₛ = variantₛ − baselineₛ over the seeds s that both have, with its t interval.

    The interval is that of the paired t test, n − 1 degrees of freedom (Fisher 1925, Statistical
    Methods for Research Workers, §24). One pair has no interval; no pair gives None.
    """
    seeds = sorted(variant.keys() & baseline.keys())
    if not seeds:
        return None
    differences = np.array([variant[seed] - baseline[seed] for seed in seeds])
    if len(seeds) == 1:
        return Difference(1, float(differences[0]), None, None)
    mean, low, high = t_interval(differences, confidence)
    return Difference(len(seeds), float(mean), float(low), float(high))
