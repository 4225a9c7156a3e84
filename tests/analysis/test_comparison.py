"""Who is compared with whom, what counts, and when a verdict is due."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from analysis.comparison import Comparison, compare
from analysis.notes import footnotes
from analysis.results import Manifest, Row, Run, read_manifest, read_runs
from tests import rich_sweep

Value = float | None | str | dict[str, Any]  # a loss, none (never ran), a state, or a whole result
NOISE = (0.0, 0.021, -0.012, 0.008, -0.017, 0.013)


def row(label: str, values: list[Value], **more: Any) -> tuple[Row, dict[str, Run]]:
    ids = {seed: f"{label}-s{seed}" for seed in range(len(values))}
    runs = {}
    for seed, value in enumerate(values):
        run = ids[seed]
        if value is None:
            runs[run] = Run(run, "missing", {})
        elif isinstance(value, str):
            runs[run] = Run(run, value, {}, f"was {value}")  # type: ignore[arg-type]
        else:
            result = value if isinstance(value, dict) else {"val/loss": value}
            runs[run] = Run(run, "done", {"tokens": 1000, "seed": seed, **result})
    given: dict[str, Any] = {
        "group": "rows", "changes": {}, "parameters": 1e6, "flops_per_token": 6e6, "mismatch": 0.0,
    }  # fmt: skip
    return Row(label=label, runs=ids, **{**given, **more}), runs


def sweep(*rows: tuple[Row, dict[str, Run]]) -> Comparison:
    manifest = Manifest("s", None, (0, 1, 2, 3), 1000, tuple(row for row, _ in rows))
    return compare(manifest, {id: run for _, runs in rows for id, run in runs.items()})


def losses(mean: float, spread: float = 0.001, n: int = 4) -> list[Value]:
    """A common part of each seed, and a small one of its own."""
    return [mean + NOISE[s] + spread * NOISE[(s + 1) % n] / 0.02 for s in range(n)]


BASE = row("base", losses(2.0, 0.0))


def test_verdicts_are_those_of_holm_over_all_planned_rows() -> None:
    found = sweep(
        BASE,
        row("lower", losses(1.9)),
        row("higher", losses(2.1)),
        row("same", losses(2.0)),
        row("never", [None] * 4),
        row("broken", [2.0, 2.1, "diverged", 2.0]),
    )
    assert [r.verdict for r in found.rows] == [
        "baseline", "better", "worse", "cannot tell", "not run", "diverged",
    ]  # fmt: skip
    assert found.family == 5  # those that never ran count
    pairs = [(r.difference.p, r.adjusted.p) for r in found.rows if r.difference and r.adjusted]
    smallest, adjusted = min((p, adjusted) for p, adjusted in pairs if p is not None)
    assert adjusted == pytest.approx(5 * smallest, rel=1e-9)
    assert found.rows[5].loss is None and found.rows[5].difference is None
    assert found.noise is not None and found.noise.n == 4


def test_only_seeds_that_both_have_are_paired() -> None:
    found = sweep(BASE, row("part", [None, *losses(1.9)[1:3], "failed"]))
    part = found.rows[1]
    assert part.difference is not None and part.difference.n == 2
    assert list(part.waiting) == [0, 3]
    assert (found.started, found.failed) == (7, 1)


def test_one_seed_has_a_difference_and_no_verdict() -> None:
    found = sweep(row("base", [2.0]), row("new", [1.0])).rows[1]
    assert found.difference is not None and found.difference.mean == -1.0
    assert (found.difference.p, found.adjusted, found.verdict) == (None, None, "cannot tell")


def test_a_baseline_that_diverged_gives_no_verdict() -> None:
    found = sweep(row("base", ["diverged", *losses(2.0)[1:]]), row("new", losses(1.0)))
    assert found.rows[0].verdict == "diverged" and found.noise is None
    assert found.rows[1].verdict == "cannot tell" and found.rows[1].adjusted is None


def test_all_diverged_is_no_error() -> None:
    found = sweep(row("base", ["diverged"] * 2), row("new", ["diverged"] * 2))
    assert [r.verdict for r in found.rows] == ["diverged"] * 2 and found.diverged == 4


def test_an_edited_run_does_not_count(tmp_path: Path) -> None:
    path = rich_sweep.rows_sweep(tmp_path)
    manifest = read_manifest(path)
    swiglu = manifest.rows[2].runs[0]
    before = compare(manifest, read_runs(manifest, tmp_path))
    result = tmp_path / swiglu / "result.json"
    changed = json.loads(result.read_text())
    result.write_text(json.dumps({**changed, "val/loss": 1.0}))
    after = compare(manifest, read_runs(manifest, tmp_path))
    assert len(before.rows[2].losses) == 4 and before.edited == 0
    assert list(after.rows[2].excluded) == [0] and after.edited == 1
    assert after.rows[2].losses == {s: x for s, x in before.rows[2].losses.items() if s}


@pytest.mark.parametrize("name", ["metrics.jsonl", "experiment.yaml"])
def test_the_seal_holds_the_other_records_too(name: str, tmp_path: Path) -> None:
    manifest = read_manifest(rich_sweep.rows_sweep(tmp_path))
    run = manifest.rows[1].runs[2]
    with (tmp_path / run / name).open("a") as file:
        file.write("\n")
    assert read_runs(manifest, tmp_path)[run].state == "edited"


# --- what is not alike ---------------------------------------------------------------------------


def given(values: list[Value], **more: Any) -> list[Value]:
    return [{"val/loss": value, **more} for value in values]


@pytest.mark.parametrize("key", ["data", "tokens"])
def test_other_data_or_tokens_make_a_row_incomparable(key: str) -> None:
    mine, other = ("a", "b") if key == "data" else (1000, 2000)
    found = sweep(
        row("base", given(losses(2.0, 0), **{key: mine})),
        row("alike", given(losses(1.9), **{key: mine})),
        row("unlike", given(losses(1.5), **{key: other})),
    )
    assert [r.verdict for r in found.rows] == ["baseline", "better", "cannot tell"]
    assert [r.mixed for r in found.rows] == [(), (), (key,)]
    assert found.rows[2].adjusted is None and found.rows[2].difference is not None
    assert found.mixed[0].values[str(other)] == ("unlike",)


def test_a_step_more_or_less_is_the_same_tokens() -> None:
    found = sweep(
        row("base", given(losses(2.0, 0), tokens=100_000)),
        row("new", given(losses(1.9), tokens=100_500)),
    )
    assert found.mixed == () and found.rows[1].verdict == "better"


def test_other_code_is_marked_and_named_and_still_compared() -> None:
    def code(source: str, dirty: bool) -> dict[str, Any]:
        return {"commit": "abcdef0123456", "dirty": dirty, "source": source * 4}

    found = sweep(
        row("base", given(losses(2.0, 0), code=code("aaaa", False))),
        row("new", [
            *given(losses(1.9)[:2], code=code("aaaa", False)),
            *given(losses(1.9)[2:], code=code("bbbb", True)),
        ]),
    )  # fmt: skip
    assert found.rows[1].verdict == "better" and found.rows[1].mixed == ("code",)
    assert found.mixed[0].values == {
        "aaaaaaaa": ("base", "new s0, s1"),
        "bbbbbbbb": ("new s2, s3",),
    }
    assert found.commits == ("abcdef0", "abcdef0+")


def test_own_components_that_changed_between_runs_are_marked() -> None:
    def code(imports: str | None) -> dict[str, Any]:
        return {"commit": None, "dirty": False, "source": "aaaa", "imports": imports}

    found = sweep(
        row("base", given(losses(2.0, 0), code=code("bbbb"))),
        row("none", given(losses(1.9, 1), code=code(None))),
        row("same", given(losses(1.9, 2), code=code("bbbb"))),
        row("other", given(losses(1.9, 3), code=code("cccc"))),
    )
    assert [r.mixed for r in found.rows] == [(), (), (), ("imports",)]


def test_another_commit_with_the_same_source_is_the_same_code() -> None:
    found = sweep(*(
        row(label, given(losses(mean), code={"commit": commit * 8, "source": "aaaa"}))
        for label, mean, commit in (("base", 2.0, "1"), ("new", 1.9, "2"))
    ))  # fmt: skip
    assert found.mixed == () and found.commits == ("1111111", "2222222")


# --- tuning --------------------------------------------------------------------------------------


def tuned(label: str, by_value: Mapping[float, list[Value]], own: float) -> list[Any]:
    """A row and its tries, each value's runs given; the row's own value is one of them."""
    made: list[Any] = []
    for value, values in by_value.items():
        experiment = {"training": {"lr": value}}
        if value == own:
            made.insert(0, row(label, values, experiment=experiment))
        else:
            facts = {"of": label, "path": "training.lr", "value": value}
            name = f"{label} @ lr={value}"
            made.append(row(name, values, tuned=facts, group="tune", experiment=experiment))
    return made


def tried(reported: float, tuning: float) -> list[Value]:
    return [
        {"val/loss": reported + n, "tuning/loss": tuning + n, "init/loss": 5.0} for n in NOISE[:4]
    ]


GRID: dict[float, list[Value]] = {
    0.001: tried(2.2, 2.25),
    0.003: tried(2.0, 2.10),
    0.01: tried(1.9, 2.12),  # better on what is reported, by luck
    0.03: ["diverged"] * 4,
}


def test_a_row_stands_at_the_try_that_is_best_on_text_that_is_not_reported() -> None:
    found = sweep(*tuned("base", GRID, 0.001), *tuned("new", GRID, 0.003))
    assert [r.label for r in found.rows] == ["base", "new"] and found.family == 1
    base, new = found.rows
    for r in (base, new):
        assert r.tuning is not None and not r.tuning.on_reported and r.tuning.edge is None
        assert [t.value for t in r.tuning.tries] == [0.001, 0.003, 0.01, 0.03]
        assert (r.lr, r.losses[0]) == (0.003, 2.0)
    assert base.read.label == "base @ lr=0.003" and new.read is new.row
    assert found.diverged == 8  # tries count


def test_sensitivity_counts_a_diverged_try_as_the_loss_before_training() -> None:
    found = sweep(*tuned("base", GRID, 0.003)).rows[0].tuning
    assert found is not None and found.sensitivity is not None
    # no result.json of a diverged run here: ℓ₀ is known from the others
    luck = sum(NOISE[:4]) / 4  # in each mean, but not in the loss before training
    assert found.sensitivity == pytest.approx((0.3 + 0.1 + 0.0 + (5.0 - 1.9 - luck)) / 4)
    assert found.expected_best[0] == pytest.approx((2.2 + 2.0 + 1.9 + 3 * luck + 5.0) / 4)
    assert found.expected_best[-1] == pytest.approx(1.9 + luck)


def test_the_best_at_the_edge_of_the_grid_is_flagged() -> None:
    low = sweep(*tuned("base", {0.001: tried(1, 1), 0.01: tried(2, 2)}, 0.01)).rows[0].tuning
    high = sweep(*tuned("base", {0.001: tried(2, 2), 0.01: tried(1, 1)}, 0.01)).rows[0].tuning
    assert low is not None and high is not None and (low.edge, high.edge) == ("low", "high")


def test_without_a_tuning_loss_the_choice_is_called_optimistic() -> None:
    grid = {0.001: losses(2.2), 0.01: losses(1.9)}
    found = sweep(*tuned("base", grid, 0.001)).rows[0].tuning
    assert found is not None and found.on_reported and found.chosen == 1


def test_tries_are_compared_over_the_seeds_that_all_have() -> None:
    good, bad = tried(2.0, 2.0), tried(2.01, 2.01)
    bad[0] = None  # the hardest seed is missing
    worse = [{**x, "tuning/loss": x["tuning/loss"] + 5 * (i == 0)} if isinstance(x, dict) else x
             for i, x in enumerate(good)]  # fmt: skip
    found = sweep(*tuned("base", {0.001: worse, 0.01: bad}, 0.001)).rows[0].tuning
    assert found is not None and found.tries[found.chosen].value == 0.001


def test_a_tune_in_which_nothing_has_run_or_all_diverged_is_no_error() -> None:
    nothing = sweep(*tuned("base", {0.001: [None] * 2, 0.01: [None] * 2}, 0.01))
    assert nothing.rows[0].losses == {} and nothing.rows[0].read.label == "base"
    diverged = sweep(*tuned("base", {0.001: ["diverged"] * 2, 0.01: ["diverged"] * 2}, 0.01))
    assert diverged.rows[0].verdict == "diverged"


def test_tries_that_have_not_run_are_told() -> None:
    found = sweep(*tuned("base", {0.001: tried(1, 1), 0.01: [None] * 4, 0.1: tried(2, 2)}, 0.1))
    notes = "\n".join(footnotes(found, ()))
    assert "Tries that have not all run, so that the choice may change: base 1 of 3." in notes
    assert "Best training.lr at the edge of the grid" in notes


# --- curves --------------------------------------------------------------------------------------


def write_curve(folder: Path, points: Mapping[int, float], speed: float) -> None:
    folder.mkdir(parents=True)
    rows = [{"step": t, "tokens": t, "val/loss": loss} for t, loss in points.items()]
    times = [{"step": t, "tokens": t, "seconds": t / speed} for t in points if t]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "timing.jsonl").write_text("".join(json.dumps(r) + "\n" for r in times))


def line(end: float) -> dict[int, float]:
    """A loss that falls evenly from 5 at no tokens to `end` at 1000."""
    return {tokens: 5 + (end - 5) * tokens / 1000 for tokens in (0, 250, 500, 750, 1000)}


def curved(
    root: Path, ends: Mapping[str, float], flops: Mapping[str, float], speed: Mapping[str, float]
) -> Comparison:
    rows = []
    for label, end in ends.items():
        values: list[Value] = [end + n for n in NOISE[:3]]
        made = row(label, values, flops_per_token=flops.get(label, 1.0))
        for seed, run in made[0].runs.items():
            write_curve(root / run, line(end + NOISE[seed]), speed.get(label, 1.0))
        rows.append(made)
    manifest = Manifest("s", None, (0, 1, 2), 1000, tuple(r for r, _ in rows))
    return compare(manifest, {id: run for _, runs in rows for id, run in runs.items()}, root)


def test_differences_at_equal_compute_are_read_off_the_curves(tmp_path: Path) -> None:
    ends = {"base": 3.0, "dear": 2.8}
    found = curved(tmp_path, ends, {"dear": 2.0}, {"dear": 0.5}).rows[1]
    at_end, flops, time = (found.readings[by] for by in ("tokens", "flops", "time"))
    assert at_end.difference is not None and at_end.difference.mean == pytest.approx(-0.2)
    assert not at_end.cut and at_end.budget == 1000
    # At the baseline's whole budget the dear one is half-way down: (5 + 2.8) / 2.
    for reading in (flops, time):
        assert reading.difference is not None and reading.budget == 1000 and reading.cut
        assert reading.losses[0] == pytest.approx(3.9)
        assert reading.difference.mean == pytest.approx(0.9, abs=0.02)


def test_a_change_of_rank_at_equal_compute_is_pointed_out(tmp_path: Path) -> None:
    ends = {"base": 3.0, "dear": 2.8, "cheap": 2.9}
    found = curved(tmp_path, ends, {"dear": 2.0}, {})
    assert {(f.by, f.lower, f.higher) for f in found.flips} == {
        ("flops", "dear", "base"), ("flops", "dear", "cheap"),
    }  # fmt: skip


def test_compute_gain_is_the_ratio_of_flops_to_one_loss(tmp_path: Path) -> None:
    found = curved(tmp_path, {"base": 3.0, "new": 2.5, "worse": 3.5}, {"new": 1.25}, {})
    new, worse = (r.gain for r in found.rows[1:])
    assert new is not None and worse is not None and new.ratio is not None
    # `new` falls 2.5 in 1000 tokens, so 2.0, where the baseline ends, after 800, at 1.25 a token.
    assert new.ratio == pytest.approx(1.0, abs=0.005) and new.beyond
    assert new.at_least == pytest.approx(0.8) and new.n == 3
    assert new.low is not None and new.high is not None and new.low < new.ratio < new.high
    # The baseline needs 750 of its tokens for what `worse` reaches in 1000.
    assert worse.ratio == pytest.approx(0.75, abs=0.005) and not worse.beyond
    assert worse.at_least is None


def test_without_timing_there_is_no_reading_at_equal_time(tmp_path: Path) -> None:
    made = row("base", [2.0, 2.1])
    for run in made[0].runs.values():
        write_curve(tmp_path / run, line(2.0), 1.0)
        (tmp_path / run / "timing.jsonl").unlink()
    manifest = Manifest("s", None, (0, 1), 1000, (made[0],))
    found = compare(manifest, made[1], tmp_path).rows[0]
    assert set(found.readings) == {"tokens", "flops"}


def test_no_flops_and_no_curves_are_no_error(tmp_path: Path) -> None:
    base, new = row("base", losses(2.0, 0)), row("new", losses(1.9), flops_per_token=None)
    manifest = Manifest("s", None, (0, 1), 1000, (base[0], new[0]))
    found = compare(manifest, base[1] | new[1], tmp_path)
    assert found.rows[1].readings == {} and found.rows[1].gain is None
    assert found.rows[1].verdict == "better"


def test_a_whole_sweep_from_disk(tmp_path: Path) -> None:
    manifest = read_manifest(rich_sweep.rows_sweep(tmp_path))
    found = compare(manifest, read_runs(manifest, tmp_path), tmp_path)
    verdicts = {r.label: r.verdict for r in found.rows}
    assert (verdicts["SwiGLU"], verdicts["NoPE"]) == ("better", "not run")
    assert verdicts["RMSNorm"] == "cannot tell"
    rotary = next(r for r in found.rows if r.label == "Rotary")
    assert rotary.gain is not None and rotary.gain.ratio is not None and rotary.gain.ratio > 1
    assert all(math.isfinite(r.readings["time"].budget) for r in found.rows if "time" in r.readings)
    again = compare(replace(manifest), read_runs(manifest, tmp_path), tmp_path)
    assert again == found


def test_a_curve_that_ends_before_its_run_did_is_no_reading(tmp_path: Path) -> None:
    path = rich_sweep.make(tmp_path, "cut", [rich_sweep.Variant("a"), rich_sweep.Variant("b")])
    for folder in (folder for folder in tmp_path.iterdir() if folder.name.endswith("-s0")):
        result = json.loads((folder / "result.json").read_text())
        old = {key: value for key, value in result.items() if key not in ("seal", "code")}
        (folder / "result.json").write_text(json.dumps(old))
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / "metrics.jsonl").write_text("".join(lines[:10]))
    manifest = read_manifest(path)
    found = compare(manifest, read_runs(manifest, tmp_path), tmp_path).rows[1]
    assert found.difference is not None and found.difference.n == 4
    assert not found.readings and found.gain is not None and found.gain.n == 3
