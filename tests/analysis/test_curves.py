"""Curves are read as they were written, and only where they are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from analysis import curves
from experiments.record import UserError


def write(folder: Path, losses: dict[int, float], seconds: dict[int, float]) -> None:
    rows = [{"tokens": t, "val/loss": loss} for t, loss in losses.items()]
    rows.insert(1, {"tokens": 1, "val/loss": None})  # type: ignore[dict-item]
    times = [{"tokens": t, "seconds": s, "perf/tokens_per_s": 1.0} for t, s in seconds.items()]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "timing.jsonl").write_text("".join(json.dumps(r) + "\n" for r in times))


def test_seconds_are_those_at_each_evaluation(tmp_path: Path) -> None:
    write(tmp_path, {0: 5.0, 15: 4.0, 40: 3.0}, {10: 1.0, 20: 3.0, 40: 5.0})
    curve = curves.read(tmp_path)
    assert curve is not None and curve.seconds is not None
    assert curve.tokens.tolist() == [0, 15, 40] and curve.losses.tolist() == [5, 4, 3]
    assert curve.seconds.tolist() == [0, 2, 5]
    flops = curve.axis("flops", 2.0)
    assert flops is not None and flops.tolist() == [0, 30, 80]
    assert curve.axis("flops", None) is None


def test_a_long_record_of_times_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    write(tmp_path, {5000: 4.0, 10_000: 3.0}, {t: t / 100 for t in range(10, 10_001, 10)})
    curve = curves.read(tmp_path)
    assert curve is not None and curve.seconds is not None
    assert curve.seconds == pytest.approx(np.array([50, 100]), rel=1e-9)


def test_times_that_end_before_the_curve_are_unknown(tmp_path: Path) -> None:
    write(tmp_path, {10: 4.0, 20: 3.0}, {10: 1.0})
    curve = curves.read(tmp_path)
    assert curve is not None and curve.seconds is None


def test_no_evaluation_is_no_curve_and_damage_is_named(tmp_path: Path) -> None:
    assert curves.read(tmp_path) is None
    write(tmp_path, {10: 4.0}, {10: 1.0})
    (tmp_path / "timing.jsonl").write_text('{"tokens": 1, "seconds": 2}\n{"tok\n')
    with pytest.raises(UserError, match=r"timing\.jsonl:2: not a JSON row"):
        curves.read(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        {"seconds": 1.0},
        {"tokens": "10", "seconds": 1.0},
        {"tokens": 10, "seconds": None},
        {"tokens": 10, "seconds": float("nan")},
        {"tokens": 10, "seconds": float("inf")},
        {"tokens": 10, "seconds": -1.0},
        {"tokens": 10**400, "seconds": 1.0},
    ],
)
def test_a_time_that_is_no_number_is_named_and_never_a_reading(
    row: dict[str, object], tmp_path: Path
) -> None:
    write(tmp_path, {10: 4.0}, {20: 1.0})
    (tmp_path / "timing.jsonl").write_text(f'{json.dumps(row)}\n{{"tokens": 20, "seconds": 2}}\n')
    with pytest.raises(UserError, match=r"timing\.jsonl: damaged"):
        curves.read(tmp_path)


def test_a_loss_between_two_evaluations_is_on_the_line_between_them() -> None:
    axis, losses = np.array([0.0, 10.0, 20.0]), np.array([5.0, 4.0, 2.0])
    assert curves.at(axis, losses, 15) == 3.0
    assert curves.at(axis, losses, 20) == 2.0
    assert curves.at(axis, losses, 20.1) is None
    assert curves.at(axis[1:], losses[1:], 5) is None


def test_tokens_to_a_loss_are_those_of_the_first_time() -> None:
    curve = curves.Curve(np.array([0.0, 10, 20, 30]), np.array([5.0, 3.0, 4.0, 2.0]), None)
    assert curve.tokens_to(4.0) == 5
    assert curve.tokens_to(2.5) == 27.5
    assert curve.tokens_to(1.0) is None
    assert curve.tokens_to(5.0) is None  # it was there before it began
