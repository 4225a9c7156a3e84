"""The intervals are the textbook's, and cover what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from analysis.statistics import paired_difference, summarise, t_interval, t_quantile


def test_quantiles_are_those_of_students_table() -> None:
    for degrees_of_freedom, expected in ((1, 12.7062), (2, 4.3027), (4, 2.7764), (9, 2.2622)):
        assert t_quantile(0.975, degrees_of_freedom) == pytest.approx(expected, abs=5e-5)


def test_mean_and_sample_sd() -> None:
    summary = summarise([2, 4, 4, 4, 5, 5, 7, 9])
    assert summary is not None and (summary.n, summary.mean) == (8, 5)
    assert summary.sd == pytest.approx((32 / 7) ** 0.5)
    assert summarise([3.0]).sd is None  # type: ignore[union-attr]
    assert summarise([]) is None


def test_paired_interval_on_students_sleep_data() -> None:
    # Student 1908, hours of extra sleep under two drugs: mean 1.58, 95% interval 0.70 to 2.46.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    d = paired_difference(dict(enumerate(second)), dict(enumerate(first)))
    assert d is not None and d.n == 10 and d.excludes_zero
    assert (d.mean, d.low, d.high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-6)


def test_only_seeds_of_both_are_paired_and_one_pair_has_no_interval() -> None:
    d = paired_difference({0: 1.0, 2: 3.0}, {2: 2.5, 1: 9.0})
    assert d is not None and (d.n, d.mean, d.low, d.high) == (1, 0.5, None, None)
    assert not d.excludes_zero
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([1.0])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interval_covers_the_true_difference_in_95_percent_of_sweeps(n: int) -> None:
    rng = np.random.default_rng(0)
    seed_effect = rng.normal(3.9, 0.05, size=(20_000, n))  # shared by both, so it must cancel
    baseline = seed_effect + rng.normal(0, 0.01, size=seed_effect.shape)
    variant = seed_effect - 0.02 + rng.normal(0, 0.01, size=seed_effect.shape)
    _, low, high = t_interval(variant - baseline)
    assert np.mean((low <= -0.02) & (high >= -0.02)) == pytest.approx(0.95, abs=0.01)
