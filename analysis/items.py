"""Two variants on one lm-eval task, compared item by item.

    runs/<id>/scores/step-00000202/<task>.parquet     one row per item, see experiments/scores.py

Both answer the same items, so what makes an item hard is common to both and cancels in the
difference of its two scores. What is left has two sources, kept apart here: another seed would
answer differently (`error_seeds`), and other items would have been answered differently
(`error_items`). Items that share a source are not independent; where a task names what they share
(`cluster`), errors are of whole clusters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from analysis.results import Run
from analysis.statistics import CONFIDENCE, bootstrap_interval, codes_of, t_quantile, two_sided_p
from components.registry import UserError
from experiments import record, scores

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ItemDifference:
    """Mean over seeds and items of variant − baseline, in the metric's unit, and its errors.

    Attributes:
        items, clusters, seeds: how many; without clusters each item is its own.
        error_items: standard error over (clusters of) items, the seeds kept as they are.
        error_seeds: standard error over seeds, the items kept as they are; None for one seed.
        error: over both, new seeds answering new items; with one seed that of the items alone.
        low, high, p: t interval at 95% and two-sided test by `error`; None where all items of all
            seeds differ by one and the same number other than zero, so that no error is known.
        items_low, items_high: interval over items alone by the bootstrap; None for too few.
        shares: parts of error² that more seeds would lower ("seeds"), that more items would
            ("items"), and that either would ("both"); sums to 1; None for one seed, or no error.
    """

    metric: str
    items: int
    clusters: int
    seeds: int
    mean: float
    error_items: float
    error_seeds: float | None
    error: float
    low: float | None
    high: float | None
    p: float | None
    items_low: float | None
    items_high: float | None
    shares: Mapping[str, float] | None

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero. Without an interval: no."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Items:
    """One run's items on a task: what names each, the metric's value and the cluster of each.

    `values` is (items,), or None where the metric is no finite number of each item.
    """

    path: Path
    keys: list[tuple[int, str]]
    values: Array | None
    clusters: list[str] | None


def item_difference(
    root: Path,
    variant: Mapping[int, Run],
    baseline: Mapping[int, Run],
    task: str,
    metric: str | None = None,
    kept: dict[str, Items] | None = None,
) -> ItemDifference | None:
    """Compare two variants on the items of `task`, over the seeds scored in both.

    Args:
        root: the directory of the runs.
        variant, baseline: finished runs by seed.
        task: the name of its record, with its settings: `hellaswag,5shot`.
        metric: as in the record; its leading one if not given.
        kept: items of the baseline's runs, by id: those of the last call with the same `baseline`,
            `task` and `metric`, which need not be read again. Filled.

    Returns:
        None where that can't be done: no seed has both, a group (compare its tasks), a metric
        that is no number of each item (perplexity), or fewer than two clusters.

    Raises:
        UserError: an items file is missing or damaged, or two runs answered different items.
    """
    seeds = [s for s in variant if s in baseline and _scored(task, variant[s], baseline[s])]
    if not seeds:
        return None
    first = variant[seeds[0]].scores[task]
    name = metric or first["primary"]
    if first.get("kind") != "task" or name is None:
        return None
    kept = {} if kept is None else kept
    differences: list[Array] = []
    agreed: Items | None = None
    for seed in sorted(seeds):
        other = baseline[seed]
        if other.id not in kept:
            kept[other.id] = _read(root, other, task, name)
        sides = [_read(root, variant[seed], task, name), kept[other.id]]
        agreed = agreed or sides[0]
        for found in sides:
            if found.keys != agreed.keys:
                raise UserError(
                    f"{found.path}: holds other items than {agreed.path}, so the two can't be"
                    f" compared; delete the older one's record and score it anew: run.py eval RUN"
                )
        if sides[0].values is None or sides[1].values is None:
            return None
        differences.append(sides[0].values - sides[1].values)
    return compare(np.array(differences), agreed.clusters if agreed else None, metric=name)


def compare(
    differences: Array, clusters: Sequence[object] | None = None, metric: str = ""
) -> ItemDifference | None:
    """From the differences d of each seed and item, (seeds, items); None for under two clusters.

    Each item's mean over seeds gives Miller 2024's paired, clustered standard error
    (arXiv 2411.00640, sections 2.2 and 4.2), times √(G/(G − 1)) for G clusters, so that clusters
    of one item give the ordinary one. Seeds and items are crossed: what a seed does to one item
    is in the spread over seeds and in that over items, and counted once in `error` (analysis of
    variance of two crossed random effects; Searle, Casella & McCulloch 1992, Variance Components,
    ch. 4), with the degrees of freedom of Satterthwaite 1946. Parts below zero count as zero.
    """
    seeds, items = differences.shape
    codes = np.arange(items) if clusters is None else codes_of(clusters)
    groups = int(codes.max()) + 1 if items else 0
    if groups < 2:
        return None
    by_item = differences.mean(axis=0)
    by_seed = differences.mean(axis=1)
    mean = float(by_item.mean())
    # (seeds, groups): how far each cluster pulls the seed's mean, as a sum over its items
    pulls = np.array([np.bincount(codes, row - row.mean(), groups) for row in differences])
    scale = groups / (groups - 1) / items**2
    v_items = scale * float((pulls.mean(axis=0) ** 2).sum())
    v_seeds = v_both = 0.0
    if seeds > 1:
        v_seeds = float(by_seed.var(ddof=1)) / seeds
        v_both = scale * float(((pulls - pulls.mean(axis=0)) ** 2).sum()) / (seeds * (seeds - 1))
    parts = {
        "seeds": max(0.0, v_seeds - v_both),
        "items": max(0.0, v_items - v_both),
        "both": v_both,
    }
    total = sum(parts.values())
    freedom = float(groups - 1)
    if seeds > 1 and total:
        spent = v_seeds**2 / (seeds - 1) + v_items**2 / (groups - 1)
        spent += v_both**2 / ((seeds - 1) * (groups - 1))
        freedom = max(1.0, total**2 / spent)
    error = math.sqrt(total)
    half: float | None = None
    p: float | None = None
    if error:
        half = t_quantile(0.5 + CONFIDENCE / 2, freedom) * error
        p = two_sided_p(mean, error, freedom)
    elif mean == 0:
        half, p = 0.0, 1.0
    resampled = bootstrap_interval(by_item, clusters)
    return ItemDifference(
        metric=metric,
        items=items,
        clusters=groups,
        seeds=seeds,
        mean=mean,
        error_items=math.sqrt(v_items),
        error_seeds=math.sqrt(v_seeds) if seeds > 1 else None,
        error=error,
        low=None if half is None else mean - half,
        high=None if half is None else mean + half,
        p=p,
        items_low=resampled[0] if resampled else None,
        items_high=resampled[1] if resampled else None,
        shares={k: v / total for k, v in parts.items()} if seeds > 1 and total else None,
    )


def _scored(task: str, *runs: Run) -> bool:
    return all(run.state == "done" and task in run.scores for run in runs)


def _read(root: Path, run: Run, task: str, metric: str) -> Items:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = scores.folder(record.Run(root, run.id), run.result["step"]) / f"{task}.parquet"
    name, _, chosen = metric.partition(",")
    wanted = {"item", "item_hash", "filter", "cluster", name}
    try:
        with pq.ParquetFile(path) as file:
            columns = file.read([c for c in file.schema_arrow.names if c in wanted]).to_pydict()
        keys = list(zip(columns["item"], columns["item_hash"], strict=True))
    except (OSError, KeyError, pa.ArrowException) as error:
        said = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise UserError(
            f"{path}: {said}; delete {path.stem}.json beside it and score the run anew with:"
            f" run.py eval {run.id}"
        ) from error
    # An item stands there once for each filter, where the task has several.
    chosen = chosen or "none"
    filters = columns.get("filter", [chosen] * len(keys))
    rows = [i for i, kept in enumerate(filters) if kept == chosen]
    column = [columns[name][i] for i in rows] if name in columns else []
    whole = column and all(isinstance(v, float) and math.isfinite(v) for v in column)
    return Items(
        path=path,
        keys=[keys[i] for i in rows],
        values=np.array(column) if whole else None,
        clusters=[columns["cluster"][i] for i in rows] if "cluster" in columns else None,
    )
