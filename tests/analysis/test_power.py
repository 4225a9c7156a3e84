"""A design says before and after it runs what it can find."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from analysis.comparison import compare
from analysis.power import design_warning, report
from analysis.statistics import chance_to_find
from components.registry import UserError

BASE = [4.0, 4.02, 4.013, 3.99]


def test_three_seeds_and_ten_rows_find_nothing_under_ten_sd() -> None:
    assert design_warning(3, 10) == (
        "with 3 seeds and 10 comparisons nothing under 10.4 sd of the paired differences can be "
        "found (80% power, after Holm); 6 seeds: 2.5, 8 seeds: 1.8"
    )
    assert "Holm" not in str(design_warning(3, 1))


def test_a_design_that_finds_large_differences_is_not_warned_of() -> None:
    assert design_warning(5, 1) is design_warning(6, 4) is design_warning(10, 20) is None
    assert design_warning(1, 0) is None  # only a baseline
    assert "1 seed" in str(design_warning(1, 3))
    assert design_warning(5, 2) is None and design_warning(5, 3) is not None


def test_needed_seeds_follow_from_the_measured_sd(make_sweep: Any) -> None:
    rows = {"GPT-2": BASE, "RMSNorm": [3.99, 4.03, 4.011, 3.98], "NoPE": [4.1, None, None, None]}
    found = report(compare(*make_sweep(rows)), 0.005)
    (row,) = found.rows
    assert (row.label, row.n, found.family, found.silent) == ("RMSNorm", 4, 2, ("NoPE",))
    assert row.sd == pytest.approx(0.0094516, abs=1e-7)
    assert row.alone is not None and row.in_family is not None and row.alone < row.in_family
    assert chance_to_find(0.005, row.in_family, row.sd, 2) >= 0.8
    assert row.detectable is not None
    assert chance_to_find(row.detectable, 4, row.sd, 2) == pytest.approx(0.8)
    text = found.text()
    assert "0.005 nats" in text and f"{row.in_family}" in text and "NoPE" in text
    assert "0.57 to 3.7 times" in text  # what an sd from 4 seeds is worth
    assert json.loads(json.dumps(found.as_json()))["rows"][0]["alone"] == row.alone


def test_before_any_row_has_run_the_baselines_noise_stands_in(make_sweep: Any) -> None:
    found = report(compare(*make_sweep({"GPT-2": BASE, "NoPE": [None] * 4})), 0.01)
    assert found.assumed and found.rows[0].sd == pytest.approx(0.0133760 * 2**0.5, abs=1e-6)
    assert "as if pairing removed nothing" in found.text()


def test_without_two_seeds_there_is_no_noise_to_plan_with(make_sweep: Any) -> None:
    found = report(compare(*make_sweep({"GPT-2": [4.0], "NoPE": [4.1]})), 0.01)
    assert found.rows == () and not found.assumed and found.silent == ("NoPE",)
    assert "two seeds" in found.text()


@pytest.mark.parametrize("effect", [math.nan, math.inf, 0.0, -0.1])
def test_an_effect_that_is_no_positive_number_is_one_line(effect: float, make_sweep: Any) -> None:
    with pytest.raises(UserError, match="not a number above 0"):
        report(compare(*make_sweep({"base": [4.0, 4.1], "new": [3.9, 4.2]})), effect)
