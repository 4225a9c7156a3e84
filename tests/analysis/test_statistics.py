"""The statistics are the textbook's, keep their error rates, and say nothing where they can't."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import stdtr

from analysis.statistics import (
    Adjusted,
    Difference,
    bootstrap_interval,
    chance_to_find,
    detectable,
    equivalent,
    expected_best,
    holm,
    paired_difference,
    seeds_needed,
    sensitivity,
    sign_flip,
    summarise,
    t_interval,
    t_quantile,
)

# Student 1908, hours of extra sleep under two drugs.
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]


def of(values: list[float], baseline: list[float] | None = None) -> Difference:
    """The paired difference of two lists of seeds, the baseline's zeros by default."""
    zeros = [0.0] * len(values)
    found = paired_difference(dict(enumerate(values)), dict(enumerate(baseline or zeros)))
    assert found is not None
    return found


def with_p(p: float, n: int = 5) -> Difference:
    """A difference whose t test gives p."""
    sd, error = 1.0, 1 / math.sqrt(n)
    mean = t_quantile(1 - p / 2, n - 1) * error
    half = t_quantile(0.975, n - 1) * error
    return Difference(n, mean, mean - half, mean + half, sd=sd, p=p)


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
    # mean 1.58, 95% interval 0.70 to 2.46, p = 0.0028.
    d = of(SECOND, FIRST)
    assert d.n == 10 and d.excludes_zero
    assert (d.mean, d.low, d.high) == pytest.approx((1.58, 0.7001142, 2.4598858), abs=1e-6)
    assert d.p == pytest.approx(0.00283289, abs=1e-8)


def test_both_tests_are_scipys() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 8, 11):
        x, y = rng.normal(size=n), rng.normal(0.5, 1, size=n)
        d, expected = of(list(x), list(y)), stats.ttest_rel(x, y)
        interval = expected.confidence_interval()
        assert (d.p, d.low, d.high) == pytest.approx((expected.pvalue, *interval), rel=1e-9)
        flipped = stats.permutation_test(
            (x - y,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert d.p_sign == pytest.approx(flipped.pvalue, rel=1e-12)
        assert d.p_sign is not None and d.smallest_p == 2.0 ** (1 - n) <= d.p_sign


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_sign_flips_are_all_counted_ties_too(values: list[int]) -> None:
    sums = [sum(map(math.prod, zip(values, signs, strict=True)))
            for signs in itertools.product((-1, 1), repeat=len(values))]  # fmt: skip
    expected = np.mean([abs(total) >= abs(sum(values)) for total in sums])
    assert sign_flip([0.1 * v for v in values]) == pytest.approx(expected)


def test_five_pairs_allow_no_sign_flip_p_under_one_sixteenth() -> None:
    assert of([1.0, 1.1, 1.2, 1.3, 1.4]).p_sign == 0.0625
    assert sign_flip(np.linspace(1, 2, 30)) == 2.0**-29
    assert sign_flip(np.ones(31)) is None and sign_flip([]) is None


def test_pairing_is_the_ratio_of_the_two_sds_and_wins_are_over_all_pairs_of_seeds() -> None:
    d = of([1.0, 2.0, 3.0], [1.1, 2.0, 3.3])
    assert d.sd == pytest.approx(np.std([0.1, 0, 0.3], ddof=1))
    assert d.sd_unpaired == pytest.approx(math.sqrt(1 + np.var([1.1, 2, 3.3], ddof=1)))
    assert d.pairing == pytest.approx(d.sd / d.sd_unpaired)  # type: ignore[operator]
    # 1 < all three; 2 < 3.3 and ties with 2; 3 < 3.3
    assert d.wins == pytest.approx((3 + 1.5 + 1) / 9)


def test_only_seeds_of_both_are_paired_and_one_pair_has_no_interval() -> None:
    d = paired_difference({0: 1.0, 2: 3.0}, {2: 2.5, 1: 9.0})
    assert d == Difference(1, 0.5, None, None)
    assert not d.excludes_zero and d.half_width is None and d.pairing is None
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([1.0])


def test_differences_that_are_all_the_same_are_no_normal_sample() -> None:
    # As accuracies of exactly 1 and 0 are: no spread is known, and p = 0 would be a lie.
    d = of([1.0, 1.0, 1.0])
    assert (d.p, d.low, d.high, d.p_sign) == (None, None, None, 0.25)
    assert of([4.1, 4.2, 4.3], [4.0, 4.1, 4.2]).p is None  # the same but for rounding
    same = of([4.1, 4.2], [4.1, 4.2])
    assert (same.p, same.p_sign, same.low, same.high, same.wins) == (1.0, 1.0, 0, 0, 0.5)
    assert not same.excludes_zero


def test_a_value_that_is_not_finite_is_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            of([1.0, bad])


def test_intervals_tests_and_holm_do_without_scipys_slow_half() -> None:
    code = (
        "import sys; from analysis.statistics import holm, paired_difference\n"
        "assert 'scipy' not in sys.modules\n"
        "d = paired_difference({0: 1.0, 1: 2.0}, {0: 1.1, 1: 2.3})\n"
        "assert holm([d], 4)[0].p <= 1 and not {'scipy.stats', 'torch'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- Holm ---------------------------------------------------------------------------------------


def adjusted(ps: list[float | None], family: int | None = None) -> list[Adjusted | None]:
    return holm([None if p is None else with_p(p) for p in ps], family or len(ps))


def test_holm_by_hand() -> None:
    # Sorted: 0.005·4 = 0.02; 0.01·3 = 0.03; 0.03·2 = 0.06; 0.04·1, but no less than 0.06.
    found = [a for a in adjusted([0.01, 0.04, 0.03, 0.005]) if a]
    assert [a.p for a in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [a.rejected for a in found] == [True, False, False, True]
    levels = [1 - 0.05 / left for left in (3, 2, 2, 4)]
    assert [a.level for a in found] == pytest.approx(levels)


def test_rows_that_have_not_run_count_in_the_family() -> None:
    alone, none = adjusted([0.012, None], family=5)
    assert none is None and alone is not None
    assert alone.p == pytest.approx(0.06) and not alone.rejected and alone.low < 0 < alone.high
    assert holm([Difference(1, 0.1, None, None)], 1) == [None]
    assert holm([], 0) == []
    with pytest.raises(ValueError, match="2 p-values in a family of 1"):
        adjusted([0.1, 0.2], family=1)


@given(st.lists(st.floats(1e-9, 1), min_size=1, max_size=12), st.integers(0, 5))
def test_rejected_means_p_below_alpha_means_an_interval_without_zero(
    ps: list[float], more: int
) -> None:
    found = adjusted(list(ps), family=len(ps) + more)
    for p, a in zip(ps, found, strict=True):
        assert a is not None and p <= a.p <= 1
        if abs(a.p - 0.05) > 1e-9:
            assert a.rejected == (a.p < 0.05) == (a.low > 0 or a.high < 0)
    # The order of p is kept.
    order = np.argsort(ps, kind="stable")
    assert all(np.diff([found[i].p for i in order]) >= 0)


# --- equivalence --------------------------------------------------------------------------------


def test_equivalence_is_the_two_one_sided_tests() -> None:
    from scipy import stats

    values = [0.001, -0.002, 0.003, 0.0005, -0.001]
    found = equivalent(of(values), 0.01)
    upper = stats.ttest_1samp(values, 0.01, alternative="less").pvalue
    lower = stats.ttest_1samp(values, -0.01, alternative="greater").pvalue
    assert found is not None and found.p == pytest.approx(max(upper, lower), rel=1e-9)
    assert found.within and not found.beyond and -0.01 < found.low < found.high < 0.01


def test_a_difference_can_be_beyond_the_margin_or_neither() -> None:
    far = equivalent(of([0.05, 0.051, 0.052]), 0.01)
    vague = equivalent(of([0.05, -0.06, 0.02]), 0.01)
    assert far is not None and far.beyond and not far.within and far.p > 0.95
    assert vague is not None and not vague.beyond and not vague.within
    same = equivalent(of([0.0, 0.0]), 0.01)
    assert same is not None and same.within and same.p == 0
    assert equivalent(of([0.05]), 0.01) is None
    with pytest.raises(ValueError, match="not above 0"):
        equivalent(of([0.0, 1.0]), 0.0)


# --- power --------------------------------------------------------------------------------------


def test_power_of_small_designs_is_the_published() -> None:
    # Paired t test, 80%: Cohen's tables and G*Power give 1.68 for n = 5, 1.00 for n = 10.
    expected = {3: 3.26, 5: 1.68, 6: 1.43, 8: 1.16, 10: 1.00, 20: 0.66}
    for n, effect in expected.items():
        assert detectable(n, 1.0) == pytest.approx(effect, abs=0.006)
    assert detectable(3, 0.01, comparisons=10) == pytest.approx(0.1036, abs=1e-4)
    assert seeds_needed(0.5, 1.0) == 34
    assert detectable(1, 1.0) is None


def test_seeds_needed_are_the_fewest() -> None:
    for effect, comparisons in ((3.0, 1), (1.0, 4), (0.3, 10), (0.01, 1)):
        n = seeds_needed(effect, 1.0, comparisons)
        assert n is not None and chance_to_find(effect, n, 1.0, comparisons) >= 0.8
        assert chance_to_find(effect, n - 1, 1.0, comparisons) < 0.8
        assert seeds_needed(-effect * 7, 7.0, comparisons) == n
    assert seeds_needed(100.0, 1.0) == 2 == seeds_needed(0.1, 0.0)
    assert seeds_needed(0.0, 1.0) is None is seeds_needed(1e-9, 1.0)


def test_power_is_how_often_simulated_sweeps_find_the_effect() -> None:
    rng = np.random.default_rng(1)
    for n, effect, comparisons in ((3, 2.0, 1), (5, 1.5, 1), (6, 2.0, 5)):
        x = rng.normal(effect, 1.0, size=(20_000, n))
        _, low, _ = t_interval(x, 1 - 0.05 / comparisons)
        expected = chance_to_find(effect, n, 1.0, comparisons)
        assert np.mean(low > 0) == pytest.approx(expected, abs=0.012)


# --- tuned rows ---------------------------------------------------------------------------------


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=7), st.data())
def test_expected_best_is_the_mean_over_all_choices(
    losses: list[float], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(losses)))
    every = [min(chosen) for chosen in itertools.combinations(losses, k)]
    assert expected_best(losses, k) == pytest.approx(np.mean(every), abs=1e-9)


def test_expected_best_with_a_diverged_try() -> None:
    assert expected_best([2.0, math.inf, 3.0], 1) == math.inf
    assert expected_best([2.0, math.inf, 3.0], 3) == 2.0
    for losses, k in (([1.0], 0), ([1.0], 2), ([1.0, math.nan], 1)):
        with pytest.raises(ValueError, match="no best"):
            expected_best(losses, k)


def test_sensitivity_of_the_measured_sweep() -> None:
    # papers.md, M6: S without and with QK-norm, over Wortsman's seven learning rates.
    plain = [2.572, 2.426, 2.377, 2.404, 2.573, 3.168, 3.108]
    normed = [2.536, 2.325, 2.333, 2.402, 2.464, 2.515, 2.575]
    assert sensitivity(plain, 5.5) == pytest.approx(0.284, abs=5e-4)
    assert sensitivity(normed, 5.5) == pytest.approx(0.125, abs=5e-4)


def test_a_diverged_try_counts_as_the_loss_before_training() -> None:
    assert sensitivity([2.0, None, math.nan, 9.0], 5.0) == pytest.approx((0 + 3 + 3 + 3) / 4)
    assert sensitivity([None, math.inf], 5.0) is None is sensitivity([], 5.0)
    assert sensitivity([6.0, 7.0], 5.0) == 0  # never better than untrained


# --- bootstrap ----------------------------------------------------------------------------------


def test_bootstrap_is_scipys_bca() -> None:
    from scipy import stats

    x = np.random.default_rng(3).exponential(size=60)
    expected = stats.bootstrap((x,), np.mean, n_resamples=40_000, rng=1).confidence_interval
    assert bootstrap_interval(x, resamples=40_000) == pytest.approx(tuple(expected), abs=0.01)
    assert bootstrap_interval(x) == bootstrap_interval(x)
    assert bootstrap_interval(np.ones(40)) == (1.0, 1.0)


def test_bootstrap_of_clusters_is_wider_where_their_items_are_alike() -> None:
    rng = np.random.default_rng(4)
    clusters = np.repeat(np.arange(50), 8)
    x = rng.normal(size=50)[clusters] + 0.1 * rng.normal(size=400)
    alone, whole = bootstrap_interval(x), bootstrap_interval(x, [f"c{c}" for c in clusters])
    assert alone is not None and whole is not None
    assert np.ptp(whole) / np.ptp(alone) == pytest.approx(math.sqrt(8), rel=0.15)


def test_bootstrap_is_silent_for_few_units() -> None:
    assert bootstrap_interval(np.arange(29.0)) is None
    assert bootstrap_interval(np.arange(300.0), clusters=[i % 29 for i in range(300)]) is None
    assert bootstrap_interval([]) is None


# --- error rates --------------------------------------------------------------------------------


def simulated(
    rng: np.random.Generator, sweeps: int, rows: int, n: int, effects: np.ndarray | float = 0.0
) -> np.ndarray:
    """Paired differences (sweeps, rows, n) as sweeps make them: all against one baseline."""
    common = rng.normal(0, 0.05, size=(sweeps, 1, n))  # of the seed, shared by all rows
    baseline = common + rng.normal(0, 0.01, size=(sweeps, 1, n))
    variants = common + rng.normal(0, 0.01, size=(sweeps, rows, n))
    return variants + np.reshape(effects, (1, -1, 1)) - baseline


@pytest.mark.parametrize("n", [2, 3, 5])
def test_interval_covers_the_true_difference_in_95_percent_of_sweeps(n: int) -> None:
    differences = simulated(np.random.default_rng(0), 20_000, 1, n, -0.02)
    _, low, high = t_interval(differences)
    assert np.mean((low <= -0.02) & (high >= -0.02)) == pytest.approx(0.95, abs=0.01)


def differences_of(paired: np.ndarray) -> list[list[Difference]]:
    """(sweeps, rows, n) -> the differences of each sweep, as `paired_difference` gives them."""
    n = paired.shape[-1]
    mean, low, high = t_interval(paired)
    sd = paired.std(axis=-1, ddof=1)
    p = stdtr(n - 1, -np.abs(mean) / (sd / math.sqrt(n))) * 2
    return [
        [Difference(n, mean, low, high, sd=sd, p=p) for mean, low, high, sd, p in sweep.tolist()]
        for sweep in np.stack([mean, low, high, sd, p], axis=-1)
    ]


def test_simulated_differences_are_those_of_the_function() -> None:
    paired = simulated(np.random.default_rng(1), 3, 2, 5)
    for sweep, differences in zip(paired, differences_of(paired), strict=True):
        for values, d in zip(sweep, differences, strict=True):
            expected = of(list(values))
            assert (d.mean, d.low, d.p) == pytest.approx((expected.mean, expected.low, expected.p))


@pytest.mark.parametrize(("rows", "n"), [(4, 3), (10, 5)])
def test_null_sweeps_have_a_wrong_verdict_in_at_most_5_percent(rows: int, n: int) -> None:
    sweeps = 6_000
    simulations = differences_of(simulated(np.random.default_rng(rows), sweeps, rows, n))
    wrong = sum(any(a and a.rejected for a in holm(sweep, rows)) for sweep in simulations)
    unadjusted = sum(any(d.excludes_zero for d in sweep) for sweep in simulations)
    assert wrong / sweeps <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / sweeps)
    assert unadjusted / sweeps > 0.10  # what a table without the correction would claim


def test_among_real_effects_the_null_rows_keep_the_family_wise_error() -> None:
    sweeps, n, effects = 6_000, 6, np.array([-0.1, -0.1, 0.1, 0, 0])
    wrong = found = 0
    for sweep in differences_of(simulated(np.random.default_rng(7), sweeps, 5, n, effects)):
        rejected = [bool(a and a.rejected) for a in holm(sweep, 5)]
        wrong += any(rejected[3:])
        found += sum(rejected[:3])
    assert wrong / sweeps <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / sweeps)
    assert found / (3 * sweeps) > 0.9
