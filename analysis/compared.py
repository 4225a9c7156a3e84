"""What a comparison consists of: `comparison.compare` fills these, all else reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from analysis.curves import Budget
from analysis.results import Manifest, Row, Run
from analysis.statistics import Adjusted, Difference, Summary, summarise
from analysis.tuning import Tuning

Verdict = Literal["baseline", "better", "worse", "cannot tell", "diverged", "not run"]
INCOMPARABLE = ("data", "tokens")  # where these differ, a difference of losses means nothing


@dataclass(frozen=True)
class Reading:
    """A row's difference with both sides read off their curves at one equal budget.

    The budget is the least that the runs of all rows reach, so that rows can be ranked at it.

    Attributes:
        budget: tokens, training FLOPs or seconds of training, per run.
        losses: the row's at the budget, by seed.
        difference: from the baseline's; None for the baseline and without pairs.
        cut: the row's curves (or the baseline's) go on beyond the budget, by more than 5% of it:
            they are read before the end of their learning-rate schedule, which flatters the
            other side.
    """

    by: Budget
    budget: float
    losses: Mapping[int, float]
    difference: Difference | None
    cut: bool


@dataclass(frozen=True)
class Gain:
    """Compute-equivalent gain: FLOPs of the baseline over FLOPs of the variant, at one loss.

    In each seed the loss is the higher of the two final ones, which both curves reach; above 1 the
    variant needs less. Geometric mean over seeds, with the t interval of the logarithms. The side
    that ends lower is read before the end of its learning-rate schedule, so the gain (or the loss)
    is rather larger than this.

    Attributes:
        ratio, low, high: None where no seed's curves say; low and high also where only one does.
        n: seeds.
        beyond: the baseline ends above the variant, so that it never reaches the variant's final
            loss: to that question ("how much compute would the baseline need for it?") there is
            only a lower bound, `at_least`, its whole compute over the variant's.
    """

    ratio: float | None
    low: float | None
    high: float | None
    n: int
    beyond: bool
    at_least: float | None


@dataclass(frozen=True)
class Compared:
    """One row. `read` is the row whose runs stand for it: itself, or its best try.

    Attributes:
        runs, diverged, waiting: by seed; those of `runs` count, those of `waiting` have no result.
        excluded: seed -> why a finished run does not count.
        losses: by seed, of the runs that count.
        loss, bpb: None where a seed diverged: the survivors are no fair sample.
        difference: from the baseline, paired by seed; None for the baseline and without pairs.
        adjusted: what Holm's procedure over the family leaves of it; None where the two are not
            comparable.
        readings: by budget; only where curves were read.
        mixed: keys of `Comparison.mixed` that concern this row.
        lr: the peak learning rate of `read`, from its experiment; None where not known.
    """

    row: Row
    read: Row
    runs: Mapping[int, Run]
    diverged: Mapping[int, Run]
    waiting: Mapping[int, Run]
    excluded: Mapping[int, str]
    losses: Mapping[int, float]
    loss: Summary | None
    bpb: Summary | None
    difference: Difference | None
    adjusted: Adjusted | None
    verdict: Verdict
    readings: Mapping[Budget, Reading] = field(default_factory=dict)
    gain: Gain | None = None
    tuning: Tuning | None = None
    mixed: tuple[str, ...] = ()
    lr: float | None = None

    @property
    def label(self) -> str:
        return self.row.label

    @property
    def planned(self) -> int:
        """Runs that the row would have with all its seeds."""
        return len(self.read.runs)

    def summary(self, key: str) -> Summary | None:
        """Mean and sd over seeds of a number of result.json; None where a seed diverged."""
        return None if self.diverged else summarise(self.by_seed(key).values())

    def by_seed(self, key: str) -> dict[int, float]:
        """A number of result.json of each run that counts."""
        found = {seed: run.number(key) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Mixed:
    """Runs of one table that are not alike in something that must be alike.

    key: code | imports | data | tokens | lm_eval | versions; `values`: value -> labels, with their
    seeds where a row has several. Code is told by the digest of its source, data by the
    fingerprint.
    """

    key: str
    values: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Flip:
    """Two rows whose order is another at an equal budget than at the end of training.

    At the end `lower` has the lower mean loss; at the budget `higher` has. At one of the two at
    least, the paired difference has a 95% interval that excludes zero.
    """

    by: Budget
    lower: str
    higher: str


@dataclass(frozen=True)
class Comparison:
    """A sweep compared; `rows[0]` is the baseline.

    Attributes:
        family: how many comparisons Holm's correction is over: the rows that are planned and not
            the baseline, whether or not they have run yet.
        noise: the baseline's loss over its seeds: the noise floor.
        started, failed, diverged, edited: runs, each counted once, tries included.
        commits: of the code that the runs were made with, shortened, `+` where it had changes.
        flips: changes of rank at equal tokens, FLOPs and time.
    """

    manifest: Manifest
    rows: tuple[Compared, ...]
    family: int
    noise: Summary | None
    started: int
    failed: int
    diverged: int
    edited: int
    mixed: tuple[Mixed, ...]
    commits: tuple[str, ...]
    flips: tuple[Flip, ...] = ()

    @property
    def baseline(self) -> Compared:
        return self.rows[0]

    def largest(self, most: int) -> Comparison:
        """With only the baseline and `most` rows, in their order: those with a verdict first, then
        those that differ most. For what can't show more; the family stays that of the whole."""

        def size(r: Compared) -> tuple[bool, float]:
            return r.verdict in ("better", "worse"), abs(r.difference.mean) if r.difference else -1

        if len(self.rows) <= most + 1:
            return self
        labels = {r.label for r in sorted(self.rows[1:], key=size, reverse=True)[:most]}
        rows = (r for r in self.rows[1:] if r.label in labels)
        return replace(self, rows=(self.baseline, *rows))
