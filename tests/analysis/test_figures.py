"""The figure holds the runs' own numbers, and drawing it again changes no byte."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.figures import _spread, loss_curves
from analysis.results import read_manifest
from experiments.record import UserError


def test_figure_is_byte_identical_on_rerun_and_its_csv_holds_every_point(
    manifest_path: Path, tmp_path: Path
) -> None:
    manifest, root = read_manifest(manifest_path), manifest_path.parents[1]
    first = loss_curves(manifest, root, tmp_path / "a" / "odd.v1")
    again = loss_curves(manifest, root, tmp_path / "b" / "odd.v1")
    assert [path.name for path in first] == ["odd.v1.svg", "odd.v1.png", "odd.v1.csv"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    rows = list(csv.DictReader(first[2].read_text().splitlines()))
    curves = [row for row in rows if row["panel"] == "curve"]
    assert len(curves) == 12 * 10 + 3  # 12 finished runs, and the diverged one up to its end
    assert {row["label"] for row in curves if row["state"] == "diverged"} == {"LSTM"}
    differences = [row for row in rows if row["panel"] == "difference"]
    assert [row["state"] for row in differences] == ["n=3", "n=3", "n=1"]  # LSTM has none


def test_a_sweep_of_which_nothing_ran_is_an_error_of_one_line(
    make_sweep: Any, tmp_path: Path
) -> None:
    manifest, _ = make_sweep({"base": [None], "new": [None]})
    with pytest.raises(UserError, match="no finished run to draw"):
        loss_curves(manifest, tmp_path / "other", tmp_path / "figure")


def test_a_place_that_cannot_be_written_is_an_error_of_one_line(manifest_path: Path) -> None:
    inside_a_file = manifest_path / "figure"
    with pytest.raises(UserError, match="can't be written"):
        loss_curves(read_manifest(manifest_path), manifest_path.parents[1], inside_a_file)


def test_labels_are_spread_to_a_gap_and_stay_in_order() -> None:
    spread = _spread([0.0, 0.5, 0.5, 0.51, 0.9], 0.1)
    assert np.diff(spread).min() == pytest.approx(0.1)
    assert spread[0] == 0.0 and spread[-1] == 0.9  # labels with room stay where they are
    assert _spread([-1.0, -1.0], 0.1) == pytest.approx([0.0, 0.1])
