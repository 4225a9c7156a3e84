"""`match: time`: widths follow measured step times, are measured once, and never drift."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.registry import UserError
from experiments import loader
from experiments.record import read_json, write_json
from experiments.schema import Experiment
from sweeps import design, matching, plan, probe

BASE = """\
model: {d_model: 64, n_layers: 2, n_heads: 4}
training: {tokens: 20480, seq_len: 32, global_batch_size: 8, lr: 1e-3}
"""
SWEEP = """\
base: base.yaml
seeds: [0, 1]
match: time
rows:
  - {label: again, seeds: [100, 101]}
  - {label: slow, set: {model.mixer.qk_norm: true}}
  - {label: none, set: {model.ffn: none}}
tune: {over: training.lr, values: [2e-3]}
"""


class Stopwatch:
    """Stands in for real steps: a step takes a microsecond for each parameter, and `qk_norm` 20%
    more; counts how often it was set up."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.factor = 1.2

    def __call__(self, experiment: Experiment, vocabulary: int) -> Callable[[int], float]:
        parameters = matching.measure(experiment, Path("cache"), flops=False).parameters
        slower = bool(experiment.model.mixer.params.get("qk_norm"))
        seconds = parameters * 1e-6 * (self.factor if slower else 1.0)
        self.made.append(loader.identity(experiment))
        return lambda count: count * seconds


@pytest.fixture
def watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("s.yaml").write_text(SWEEP)
    stopwatch = Stopwatch()
    monkeypatch.setattr(probe, "stepper", stopwatch)
    monkeypatch.setattr(probe, "_machine", lambda *_: {"device": "a desk", "threads": 1})
    return stopwatch


def planned(here: bool = True) -> plan.Plan:
    return plan.plan(design.load("s.yaml"), Path("runs"), here=here)


def test_a_slower_variant_is_narrowed_until_its_step_takes_as_long(watch: Stopwatch):
    rows = {row.label: row for row in planned().rows}
    goal = rows["baseline"].parameters
    assert rows["slow"].parameters * 1.2 == pytest.approx(goal, rel=0.01)
    assert rows["slow"].mismatch == pytest.approx(rows["slow"].parameters * 1.2 / goal - 1)
    assert "(solved)" in rows["slow"].differences[-1]
    assert rows["none"].mismatch == pytest.approx(rows["none"].parameters / goal - 1)  # no width
    assert rows["again"].mismatch == rows["baseline"].mismatch == 0.0


def test_a_second_plan_reads_what_the_first_measured(watch: Stopwatch):
    first = planned().manifest
    watch.made.clear()
    watch.factor = 1.7  # the machine is in another mood
    assert planned().manifest == first
    assert watch.made == []


def test_tries_take_the_width_of_their_variant_and_a_new_row_alone_is_measured(watch: Stopwatch):
    rows = {row["label"]: row for row in planned().manifest["rows"]}
    assert rows["slow @ lr=0.002"]["solved"] == rows["slow"]["solved"] != {}
    watch.made.clear()
    Path("s.yaml").write_text(
        SWEEP.replace("tune", "include: [{label: A, set: {model.norm: none}}]\ntune")
    )
    again = {row["label"]: row for row in planned().manifest["rows"]}
    assert again["slow"] == rows["slow"]
    base = design.load("s.yaml").baseline.identity
    assert set(watch.made) - {base} == {design.load("s.yaml").variants[4].identity}


def test_jobs_on_other_machines_need_what_was_measured_there(watch: Stopwatch):
    with pytest.raises(UserError, match=r"the time of a step is not measured yet.*run\.py plan s"):
        planned(here=False)
    assert watch.made == []
    planned()
    (file,) = Path("runs/probes").iterdir()
    other = file.with_name(file.name.replace("-", "-0"))
    file.rename(other)  # of another machine
    assert planned(here=False).rows[2].mismatch == pytest.approx(0, abs=0.01)
    third = other.with_name("x".join(other.name.rsplit("-", 1)).replace("x", "-1"))
    third.write_text(other.read_text())
    with pytest.raises(UserError, match=r"measured on several machines: .* \(a desk\), "):
        planned(here=False)


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"rows": []},
        {"machine": None},
        {"rows": {"a": {"ratio": "fast", "width": None, "path": None}}},
    ],
)
def test_damaged_probes_are_named(watch: Stopwatch, change: dict[str, Any]):
    planned()
    (file,) = Path("runs/probes").iterdir()
    write_json(file, {**read_json(file), **change})
    with pytest.raises(UserError, match=r"probes/.*\.json: holds no probes of this version"):
        planned()


def test_noise_does_not_lead_the_search_astray(watch: Stopwatch):
    """Ratios that are off by up to half a per cent, by turns: the width still comes out right."""
    variant = design.load("s.yaml").variants[2]
    noise = iter([1.004, 0.997, 1.005, 0.996, 1.003])

    def ratio(experiment: Experiment) -> float:
        watch_baseline = watch(loader.load("base.yaml"), 257)(1)
        return watch(experiment, 257)(1) / watch_baseline * next(noise)

    base = matching.measure(loader.load("base.yaml"), Path("cache"))
    row = probe.solve(variant, ratio, base.flops_per_token, Path("cache"))
    width = matching.with_width(variant.experiment, row["path"], row["width"])
    parameters = matching.measure(width, Path("cache")).parameters
    assert parameters * 1.2 == pytest.approx(base.parameters, rel=0.02)


def test_the_ratio_is_the_median_over_alternating_blocks():
    calls: list[str] = []

    def steps(name: str, seconds: float) -> Callable[[int], float]:
        def some(count: int) -> float:
            calls.append(name)
            jam = 50.0 if len(calls) == 9 else 0.0  # somebody else on the machine, for a moment
            return count * seconds + jam

        return some

    ratio, seconds = probe.compare(steps("a", 0.02), steps("b", 0.03))
    assert (ratio, seconds) == (pytest.approx(1.5), pytest.approx(0.02))
    assert calls[4:12] == ["b", "a", "a", "b", "b", "a", "a", "b"]


def test_real_steps_train_and_leave_the_threads_as_they_were(tmp_path: Path):
    experiment = Path(tmp_path / "e.yaml")
    experiment.write_text(BASE)
    before = torch.get_num_threads()
    with probe._threads(1):
        checked = loader.load(experiment, ["execution.micro_batch_size=4"])
        steps = probe.stepper(checked, 257)
        assert steps(1) > 0
    assert torch.get_num_threads() == before


def test_the_key_of_a_probe_ignores_what_takes_no_time(watch: Stopwatch):
    def key(*overrides: str) -> str:
        return probe._key(design.load("s.yaml", overrides).baseline, 257)

    assert key("training.tokens=40960") == key("training.lr=3e-3") == key()
    for change in ("model.n_layers=3", "training.seq_len=16", "execution.threads=2"):
        assert key(change) != key()


def test_what_is_kept_says_where_and_how_it_was_measured(watch: Stopwatch):
    planned()
    (file,) = Path("runs/probes").iterdir()
    kept = json.loads(file.read_text())
    assert kept["machine"] == {"device": "a desk", "threads": 1}
    assert kept["step_seconds"] == pytest.approx(planned().rows[0].parameters * 1e-6)
    slow = next(row for row in kept["rows"].values() if row["label"] == "slow")
    assert slow["tried"][0][1] == pytest.approx(
        1.2 * slow["tried"][0][0] / planned().rows[0].parameters
    )
