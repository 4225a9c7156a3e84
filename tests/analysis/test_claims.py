"""Claims against sweeps on disk whose outcome is known: verdicts, sizes, what stands in the way."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from analysis import claims, published, render
from analysis.claims import Finding
from analysis.comparison import Comparison, compare
from analysis.published import Paper, PaperFile
from analysis.results import read_manifest, read_runs

Values = Sequence[float | None]  # by seed; None: diverged
Make = Callable[..., Comparison]

HEAD: dict[str, Any] = {
    "title": "T", "authors": "A", "year": 2020, "setting": "s", "sweeps": {"minutes": ["x"]},
    "tables": {
        "t": {
            "where": "Table 1", "mark": "verified",
            "columns": {"loss": {"metric": "loss", "unit": "nats", "better": "lower"},
                        "bleu": {"metric": "BLEU", "unit": "BLEU", "better": "higher"}},
            "rows": {"A": {"loss": 1.95, "bleu": 30.0}, "B": {"loss": 2.0, "bleu": 29.0}},
        }
    },
}  # fmt: skip


def paper(**claim: Any) -> Paper:
    """A paper of one claim."""
    data = {**HEAD, "claims": [{"says": "as is said", "where": "Section 1", **claim}]}
    return Paper("t2020", PaperFile.model_validate_json(json.dumps(data), strict=True))


def check(comparison: Comparison, **claim: Any) -> Finding:
    return claims.check(paper(**claim), [comparison])[0]


def difference(variant: str, than: str, expect: str = "lower", **more: Any) -> dict[str, Any]:
    return {"kind": "difference", "variant": variant, "than": than, "expect": expect, **more}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make({label: losses})`: a sweep on disk, compared.

    `results`: label -> key of result.json -> values by seed; `experiments`: label -> experiment;
    `scores`: label -> task -> values by seed; `tries`: label of a try -> {"of", "path", "value"}.
    """

    def made(
        losses: Mapping[str, Values],
        results: Mapping[str, Mapping[str, Sequence[Any]]] = {},
        experiments: Mapping[str, Mapping[str, Any]] = {},
        scores: Mapping[str, Mapping[str, Sequence[float]]] = {},
        tries: Mapping[str, Mapping[str, Any]] = {},
        folder: str = "runs",
    ) -> Comparison:
        root, rows = tmp_path / folder, []
        for i, (label, values) in enumerate(losses.items()):
            ids = {str(seed): f"{i:010x}-s{seed}" for seed in range(len(values))}
            for seed, loss in enumerate(values):
                run = root / ids[str(seed)]
                run.mkdir(parents=True)
                result = {
                    "schema": 1, "id": run.name, "seed": seed, "step": 9, "tokens": 100,
                    "status": "diverged" if loss is None else "done", "val/loss": loss,
                    **{key: by_seed[seed] for key, by_seed in results.get(label, {}).items()},
                }  # fmt: skip
                (run / "result.json").write_text(json.dumps(result))
                (run / "metrics.jsonl").write_text("")
                for task, found in scores.get(label, {}).items():
                    write_score(run, task, found[seed])
            row: dict[str, Any] = {
                "label": label,
                "group": "tune" if label in tries else "rows",
                "changes": {},
            }
            row |= {"runs": ids, "experiment": experiments.get(label, {}), "mismatch": None}
            rows.append({**row, "tuned": tries.get(label), "parameters": 1, "flops_per_token": 1})
        manifest = {"schema": 1, "name": "small", "file": "s.yaml", "match": None, "rows": rows}
        manifest |= {"seeds": [*range(len(next(iter(losses.values()))))], "tokens": 100}
        path = root / "sweeps" / "small.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(manifest))
        read = read_manifest(path)
        return compare(read, read_runs(read, root))

    return made


def write_score(folder: Path, task: str, value: float) -> None:
    metric = {"value": value, "stderr": 0.01, "higher_is_better": True, "chance": None}
    record = {"schema": 1, "task": task, "metrics": {"acc": metric}, "primary": "acc", "items": 9}
    record |= {
        "of": 9,
        "step": 9,
        "children": [],
        "truncated": 0,
        "unknown": 0,
        "settings": {},
        "kind": "task",
        "lm_eval": "0",
    }
    path = folder / "scores" / "step-00000009" / f"{task},first9.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


BASE = [2.0, 2.02, 2.01, 1.99]
LOWER = [1.95, 1.966, 1.961, 1.944]  # by 0.05, within 0.005
NEAR = [2.01, 2.008, 2.013, 1.985]


# --- differences ---------------------------------------------------------------------------------


def test_a_difference_with_its_sign_agrees_and_with_the_other_disagrees(make: Make) -> None:
    found = make({"B": BASE, "A": LOWER})
    agrees = check(found, **difference("A", "B"))
    assert (agrees.verdict, agrees.n, agrees.sweep) == ("agrees", 4, "small")
    assert agrees.mean == pytest.approx(-0.04975)
    assert agrees.low is not None and agrees.high is not None and agrees.high < 0
    assert check(found, **difference("A", "B", "higher")).verdict == "disagrees"
    assert check(found, **difference("B", "A", "higher")).verdict == "agrees"


def test_two_rows_that_are_not_the_baseline_are_paired_too(make: Make) -> None:
    found = make({"base": [3.0, 3.3, 2.7, 3.1], "B": BASE, "A": LOWER})
    assert check(found, **difference("A", "B")).mean == pytest.approx(-0.04975)


def test_what_lies_within_the_noise_cannot_be_told(make: Make) -> None:
    found = make({"B": BASE, "A": NEAR})
    assert check(found, **difference("A", "B")).verdict == "cannot tell"


def test_one_seed_has_a_difference_and_no_verdict(make: Make) -> None:
    finding = check(make({"B": BASE[:1], "A": LOWER[:1]}), **difference("A", "B"))
    assert (finding.verdict, finding.low, finding.n) == ("cannot tell", None, 1)
    assert "one seed" in finding.note


def test_the_same_difference_in_every_seed_has_no_interval(make: Make) -> None:
    finding = check(make({"B": [1.0, 1.0, 1.0], "A": [0.5, 0.5, 0.5]}), **difference("A", "B"))
    assert (finding.verdict, finding.mean, finding.low) == ("cannot tell", -0.5, None)
    assert "every seed" in finding.note


def test_a_row_that_diverged_in_all_seeds_is_worse_and_one_in_some_is_unclear(make: Make) -> None:
    found = make({"B": BASE, "all": [None] * 4, "some": [None, 2.0, 2.0, 2.0]})
    assert check(found, **difference("all", "B", "higher")).verdict == "agrees"
    assert check(found, **difference("B", "all", "lower")).verdict == "agrees"
    assert check(found, **difference("all", "B", "lower")).verdict == "disagrees"
    some = check(found, **difference("some", "B", "higher"))
    assert some.verdict == "cannot tell"
    assert "some diverged in 1 of 4 seeds" in some.note
    assert check(found, **difference("some", "all", "lower")).verdict == "cannot tell"


def test_runs_on_other_data_are_not_compared(make: Make) -> None:
    found = make(
        {"B": BASE, "A": LOWER}, {"B": {"data": ["x"] * 4}, "A": {"data": ["x", "x", "x", "y"]}}
    )
    finding = check(found, **difference("A", "B"))
    assert (finding.verdict, finding.mean) == ("cannot tell", None)
    assert "data" in finding.note


def test_a_missing_row_or_metric_is_not_measured(make: Make) -> None:
    found = make({"B": BASE, "A": LOWER})
    assert check(found, **difference("C", "B")).note == "no row 'C' in this sweep"
    finding = check(found, **difference("A", "B", metric="val/loss@8x"))
    assert (finding.verdict, finding.sweep) == ("not measured", "small")
    assert claims.check(paper(**difference("A", "B")), [])[0].verdict == "not measured"


# --- sizes ---------------------------------------------------------------------------------------


def test_the_published_number_lies_inside_the_interval_or_the_effect_is_smaller_or_larger(
    make: Make,
) -> None:
    published_: dict[str, Any] = {"published": {"table": "t", "column": "loss"}}  # −0.05
    small = [1.99, 2.012, 2.0, 1.981]
    large = [1.8, 1.82, 1.812, 1.79]
    found = make({"B": BASE, "A": LOWER})
    inside = check(found, **difference("A", "B", **published_))
    assert (inside.size, inside.published_unit) == ("inside", "nats")
    assert inside.published == pytest.approx(-0.05)
    assert inside.source == "Table 1, loss (verified)"
    renamed: dict[str, Any] = {"published": {"table": "t", "column": "loss", "variant": "A"}}
    found = make(
        {"B": BASE, "small": small, "large": large, "worse": [2.1, 2.13, 2.11, 2.1]},
        folder="others",
    )
    assert check(found, **difference("small", "B", **renamed)).size == "smaller"
    assert check(found, **difference("large", "B", **renamed)).size == "larger"
    worse = check(found, **difference("worse", "B", **renamed))
    assert (worse.verdict, worse.size) == ("disagrees", None)


def test_a_size_in_other_units_is_shown_and_not_judged(make: Make) -> None:
    finding = check(
        make({"B": BASE, "A": LOWER}),
        **difference("A", "B", published={"table": "t", "column": "bleu"}),
    )
    assert (finding.verdict, finding.published, finding.size) == ("agrees", 1.0, None)
    assert finding.published_unit == "BLEU"


# --- other kinds ---------------------------------------------------------------------------------


def test_no_difference_is_claimed_by_equivalence_and_not_by_silence(make: Make) -> None:
    found = make({"B": BASE, "A": LOWER, "near": NEAR})
    same = {"kind": "no difference", "than": "B"}
    assert check(found, **same, variant="near", margin=0.03).verdict == "agrees"
    assert check(found, **same, variant="near", margin=0.004).verdict == "cannot tell"
    assert check(found, **same, variant="A", margin=0.01).verdict == "disagrees"


def test_an_order_agrees_where_all_neighbours_are_apart(make: Make) -> None:
    found = make({"B": BASE, "A": LOWER, "near": NEAR})
    order = {"kind": "order"}
    assert check(found, **order, lowest_first=["A", "B"]).verdict == "agrees"
    unsure = check(found, **order, lowest_first=["A", "near", "B"])
    assert (unsure.verdict, unsure.note) == ("cannot tell", "not apart: near and B")
    assert unsure.order == ("A", "near", "B")
    wrong = check(found, **order, lowest_first=["near", "B", "A"])
    assert wrong.verdict == "disagrees"
    assert "apart: A < near, A < B" in wrong.note


def power_law(slope: float, wobble: float = 0.01) -> dict[str, list[float]]:
    """Values by depth at three seeds, around depth^slope."""
    return {
        f"{depth}": [depth**slope * math.exp(wobble * math.sin(depth + seed)) for seed in range(3)]
        for depth in (2, 4, 8, 16)
    }


def depths(make: Make, values: Mapping[str, Sequence[float]]) -> Comparison:
    return make(
        {label: [2.0] * 3 for label in values},
        {label: {"grad": by_seed} for label, by_seed in values.items()},
        {
            label: {"model": {"n_layers": int(label), "block": {"name": "pre"}, "init": "xavier"}}
            for label in values
        },
    )


SLOPE = {
    "kind": "slope", "metric": "grad", "over": "model.n_layers", "margin": 0.1,
    "among": {"model.block": "pre", "model.init": {"name": "xavier"}},
}  # fmt: skip


def test_a_slope_is_that_of_the_power_law(make: Make) -> None:
    found = depths(make, power_law(-0.5))
    finding = check(found, **SLOPE, published=-0.5)
    assert (finding.verdict, finding.n) == ("agrees", 3)
    assert finding.mean == pytest.approx(-0.5, abs=0.01)
    assert check(found, **SLOPE, published=0.0).verdict == "disagrees"
    assert check(found, **{**SLOPE, "margin": 0.001}, published=-0.501).verdict == "cannot tell"


def test_a_slope_takes_only_the_rows_that_are_meant(make: Make) -> None:
    found = depths(make, power_law(-0.5))
    elsewhere = {**SLOPE, "among": {"model.block": "post"}}
    assert check(found, **elsewhere, published=0.0).verdict == "not measured"


def test_a_value_is_above_a_threshold_with_its_whole_interval(make: Make) -> None:
    found = make(
        {"A": BASE[:3]},
        experiments={"A": {"evaluation": {"limit": 9}}},
        scores={"A": {"copy": [0.99, 1.0, 0.98], "long": [0.4, 0.9, 0.5]}},
    )
    above = {"kind": "threshold", "variant": "A"}
    assert check(found, **above, metric="score:copy", above=0.9).verdict == "agrees"
    assert check(found, **above, metric="score:copy", below=0.5).verdict == "disagrees"
    assert check(found, **above, metric="score:long", above=0.5).verdict == "cannot tell"
    assert check(found, **above, metric="score:other", above=0.5).verdict == "not measured"


# --- metrics -------------------------------------------------------------------------------------


def test_lengths_are_multiples_of_the_length_of_training(make: Make) -> None:
    experiment = {"training": {"seq_len": 64}}
    found = make(
        {"A": BASE},
        {"A": {"val/loss@512": [1.9, 1.93, 1.92, 1.9], "val/loss@64": BASE}},
        {"A": experiment},
    )
    longer = difference("A", "A", metric="val/loss@8x", than_metric="val/loss@1x")
    finding = check(found, **longer)
    assert finding.verdict == "agrees"
    assert finding.mean == pytest.approx(1.9125 - 2.005)


def test_scores_of_other_settings_do_not_count(make: Make) -> None:
    scores = {"A": {"copy": [0.9, 0.8]}}
    found = make({"A": [2.0, 2.1]}, experiments={"A": {"evaluation": {"limit": 7}}}, scores=scores)
    assert claims.values(found.rows[0], "score:copy").by_seed == {}


def tuned(make: Make) -> Comparison:
    """Two rows at three learning rates; at 0.3 the first one diverged in seed 1."""
    losses: dict[str, Values] = {
        "plain": [2.0, 2.0], "normed": [2.0, 2.1],
        "plain @ 0.1": [3.0, 3.1], "plain @ 0.3": [9.0, None],
        "normed @ 0.1": [2.1, 2.2], "normed @ 0.3": [2.2, 2.35],
    }  # fmt: skip
    tries = {
        label: {"of": label.split(" @ ")[0], "path": "training.lr", "value": float(label[-3:])}
        for label in losses
        if "@" in label
    }
    return make(
        losses,
        {label: {"init/loss": [5.0, 5.0]} for label in losses},
        {"plain": {"training": {"lr": 0.01}}, "normed": {"training": {"lr": 0.01}}},
        tries=tries,
    )


def test_sensitivity_is_wortsmans_in_each_seed(make: Make) -> None:
    found = tuned(make)
    plain, normed = found.rows
    assert claims.values(plain, "sensitivity").by_seed == pytest.approx(
        {0: (0 + 1 + 3) / 3, 1: (0 + 1.1 + 3) / 3}  # 9.0 and the diverged one count as 5.0
    )
    assert claims.values(normed, "sensitivity").by_seed == pytest.approx(
        {0: (0 + 0.1 + 0.2) / 3, 1: (0 + 0.1 + 0.25) / 3}
    )
    assert check(found, **difference("normed", "plain", metric="sensitivity")).verdict == "agrees"


def test_a_try_is_compared_at_its_value_a_diverged_one_at_the_loss_before_training(
    make: Make,
) -> None:
    found = tuned(make)
    assert claims.values(found.rows[0], "val/loss", 0.3).by_seed == {0: 5.0, 1: 5.0}
    finding = check(found, **difference("normed", "plain", at=0.3))
    assert finding.mean == pytest.approx((2.2 + 2.35) / 2 - 5.0)
    assert claims.values(found.rows[0], "val/loss", 0.7).by_seed == {}


# --- shown ---------------------------------------------------------------------------------------


def test_the_table_has_a_row_for_each_claim_in_every_format(make: Make) -> None:
    found = make({"B": BASE, "A": LOWER})
    said = r"A is *better* <by> 50% & $x_1$ | so"
    whole = paper(**{**difference("A", "B"), "says": said})
    findings = claims.check(whole, [found])
    table = claims.table(whole, findings)
    assert "agrees 1" in table.caption
    for name in ("markdown", "latex", "html", "csv", "json"):
        text = render.RENDERERS[name](table)
        assert "agrees" in text
        assert name in ("csv", "json") or said not in text
    plain = json.loads(json.dumps(claims.as_json(findings[0]), allow_nan=False))
    assert (plain["verdict"], plain["claim"]["says"]) == ("agrees", said)


@pytest.mark.parametrize("name", published.names())
def test_every_shipped_paper_shows_what_is_not_measured_yet(name: str) -> None:
    whole = published.load(name)
    findings = claims.check(whole, [])
    assert {f.verdict for f in findings} == {"not measured"}
    assert len(claims.table(whole, findings).rows) == len(whole.file.claims)
