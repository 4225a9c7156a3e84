"""Item by item: errors of seeds and of items apart, clusters whole, and no items mixed up."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis.items import compare, item_difference
from analysis.results import Run
from components.registry import UserError


def test_one_seed_without_clusters_is_the_paired_t_interval() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    x, y = rng.normal(0.1, 1, 40), rng.normal(0, 1, 40)
    found, expected = compare((x - y)[None]), stats.ttest_rel(x, y)
    assert found is not None and (found.items, found.clusters, found.seeds) == (40, 40, 1)
    assert found.error == found.error_items == pytest.approx(stats.sem(x - y))
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.error_seeds is None and found.shares is None
    assert found.items_low is not None and found.items_low < found.mean < found.items_high  # type: ignore[operator]


def test_clustered_error_is_millers_sum_over_pairs_of_items() -> None:
    rng = np.random.default_rng(1)
    clusters = ["a"] * 5 + ["b"] * 3 + ["c"] * 4 + ["d"] * 8
    x = rng.normal(size=20) + np.repeat(rng.normal(size=4), [5, 3, 4, 8])
    away = x - x.mean()
    pairs = sum(
        away[i] * away[j]
        for i in range(20)
        for j in range(20)
        if clusters[i] == clusters[j]  # i = j too: the variance of independent items
    )
    found = compare(x[None], clusters)
    assert found is not None and found.clusters == 4
    assert found.error == pytest.approx(math.sqrt(pairs / 20**2 * 4 / 3))
    assert found.items_low is None  # four clusters are too few to draw from


def test_crossed_seeds_and_items_add_up_as_in_the_analysis_of_variance() -> None:
    rng = np.random.default_rng(2)
    seeds, items = 4, 60
    d = rng.normal(size=(seeds, 1)) + rng.normal(size=items) + rng.normal(size=(seeds, items))
    of_seeds = items * d.mean(1).var(ddof=1)
    of_items = seeds * d.mean(0).var(ddof=1)
    rest = d - d.mean(1, keepdims=True) - d.mean(0) + d.mean()
    both = (rest**2).sum() / ((seeds - 1) * (items - 1))
    found = compare(d)
    assert found is not None and found.shares is not None
    assert found.error == pytest.approx(math.sqrt((of_seeds + of_items - both) / (seeds * items)))
    assert found.error_seeds == pytest.approx(math.sqrt(of_seeds / (seeds * items)))
    assert found.error_items == pytest.approx(math.sqrt(of_items / (seeds * items)))
    assert sum(found.shares.values()) == pytest.approx(1) and found.shares["seeds"] > 0.8


def test_two_variants_that_answer_alike_differ_by_nothing() -> None:
    found = compare(np.zeros((3, 50)))
    assert found is not None
    assert (found.mean, found.error, found.low, found.high, found.p) == (0, 0, 0, 0, 1)
    assert not found.excludes_zero and found.shares is None
    assert compare(np.zeros((3, 50)), ["all"] * 50) is None


def test_all_items_right_against_all_wrong_leaves_no_error_to_measure() -> None:
    found = compare(np.ones((2, 50)))
    assert found is not None and (found.mean, found.low, found.high, found.p) == (1, *[None] * 3)
    assert not found.excludes_zero


@pytest.mark.parametrize(("seeds", "sd_seeds", "sd_items"), [(1, 0.0, 1.0), (5, 0.1, 1.0)])
def test_interval_covers_new_seeds_answering_new_items(
    seeds: int, sd_seeds: float, sd_items: float
) -> None:
    # 29 clusters of 4 items, with as much noise of the cluster as of the item.
    rng = np.random.default_rng(3)
    clusters = np.repeat(np.arange(29), 4)
    covered, naive, sweeps = 0, 0, 2_000
    for _ in range(sweeps):
        d = (
            0.3
            + rng.normal(0, sd_seeds, (seeds, 1))
            + rng.normal(0, sd_items, 29)[clusters]
            + rng.normal(0, sd_items, len(clusters))
            + rng.normal(0, 0.5, (seeds, len(clusters)))
        )
        found = compare(d, list(clusters))
        assert found is not None
        covered += bool(found.low and found.high and found.low <= 0.3 <= found.high)
        half = 1.98 * d.mean(0).std(ddof=1) / math.sqrt(len(clusters))
        naive += abs(d.mean() - 0.3) <= half
    assert covered / sweeps == pytest.approx(0.95, abs=0.02)
    assert naive / sweeps < 0.85  # items taken for independent


# --- from the runs' files -----------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path: Path) -> Any:
    """`scored(id, seed, columns)` -> a finished run with its items on disk."""

    def make(name: str, columns: dict[str, list[Any]] | None, **record: Any) -> Run:
        folder = tmp_path / name / "scores" / "step-00000010"
        folder.mkdir(parents=True)
        if columns is not None:
            n = len(next(iter(columns.values())))
            known = {"item": list(range(n)), "item_hash": [f"h{i}" for i in range(n)]}
            pq.write_table(pa.table(known | columns), folder / "held_out_order.parquet")
        kept = {"kind": "task", "primary": "acc", "metrics": {}, **record}
        return Run(name, "done", {"step": 10}, scores={"held_out_order": kept})

    return make


TASK = "held_out_order"
ACC = [[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0]]


def test_items_of_two_runs_are_compared_over_the_seeds_scored_in_both(
    tmp_path: Path, scored: Any
) -> None:
    clusters = {"cluster": ["a", "a", "b", "c"]}
    variant = {s: scored(f"v{s}", {"acc": acc, **clusters}) for s, acc in enumerate(ACC)}
    baseline = {s: scored(f"b{s}", {"acc": [0.0, 0.0, 1.0, 0.0], **clusters}) for s in (1, 0)}
    baseline[2] = scored("b2", {"acc": [1.0] * 4})
    found = item_difference(tmp_path, variant, baseline, TASK)
    assert found is not None and (found.metric, found.items) == ("acc", 4)
    assert (found.seeds, found.clusters, found.mean) == (2, 3, 0.5)
    expected = compare(np.array(ACC) - [0.0, 0.0, 1.0, 0.0], clusters["cluster"], "acc")
    assert found == expected


def test_of_several_filters_the_metrics_own_is_read(tmp_path: Path, scored: Any) -> None:
    columns = {"exact_match": [1.0, 1.0, 0.0, 0.0], "filter": ["strict", "loose"] * 2,
               "item": [0, 0, 1, 1], "item_hash": ["x", "x", "y", "y"]}  # fmt: skip
    other = columns | {"exact_match": [0.0, 1.0, 0.0, 1.0]}
    runs = ({0: scored("v", columns)}, {0: scored("b", other)})
    strict = item_difference(tmp_path, *runs, TASK, "exact_match,strict")
    loose = item_difference(tmp_path, *runs, TASK, "exact_match,loose")
    assert strict is not None and loose is not None
    assert (strict.mean, loose.mean, strict.items) == (0.5, -0.5, 2)
    assert item_difference(tmp_path, *runs, TASK, "exact_match") is None  # of no filter


def test_what_is_no_number_of_each_item_is_not_compared(tmp_path: Path, scored: Any) -> None:
    whole = {"acc": [1.0, 0.0], "word_perplexity": [[1.0, 2.0], [3.0, 4.0]]}
    gap = {"acc": [1.0, None], "word_perplexity": [[1.0, 2.0], [3.0, 4.0]]}
    v, b, g = scored("v", whole), scored("b", whole), scored("g", gap)
    assert item_difference(tmp_path, {0: v}, {0: b}, TASK, "word_perplexity") is None
    assert item_difference(tmp_path, {0: v}, {0: b}, TASK, "f1") is None
    assert item_difference(tmp_path, {0: v}, {0: g}, TASK) is None
    assert item_difference(tmp_path, {0: v}, {1: b}, TASK) is None
    assert item_difference(tmp_path, {0: v}, {0: b}, "hellaswag") is None
    group = scored("group", whole, kind="group")
    assert item_difference(tmp_path, {0: group}, {0: group}, TASK) is None
    diverged = Run("x", "diverged", {"step": 10}, scores=v.scores)
    assert item_difference(tmp_path, {0: diverged}, {0: b}, TASK) is None


def test_other_items_are_an_error_that_names_both_files(tmp_path: Path, scored: Any) -> None:
    v = scored("v", {"acc": [1.0, 0.0]})
    b = scored("b", {"acc": [1.0, 0.0], "item_hash": ["h0", "other"]})
    with pytest.raises(UserError, match=r"b.scores.*holds other items than .*v.scores.*run\.py"):
        item_difference(tmp_path, {0: v}, {0: b}, TASK)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path, scored: Any) -> None:
    v, b = scored("v", {"acc": [1.0, 0.0]}), scored("b", None)
    with pytest.raises(UserError, match=r"held_out_order\.parquet: missing; .* run\.py eval b$"):
        item_difference(tmp_path, {0: v}, {0: b}, TASK)
    path = tmp_path / "b" / "scores" / "step-00000010" / "held_out_order.parquet"
    path.write_bytes(b"PAR1 cut short")
    with pytest.raises(UserError, match=r"parquet: damaged; "):
        item_difference(tmp_path, {0: v}, {0: b}, TASK)
    pq.write_table(pa.table({"acc": [1.0, 0.0]}), path)
    with pytest.raises(UserError, match=r"parquet: damaged; "):
        item_difference(tmp_path, {0: v}, {0: b}, TASK)
