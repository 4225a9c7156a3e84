"""What a sweep's seeds can find: before it runs, in units of the noise, and after, in nats.

Power is that of the paired t test at 80%, at the level that Holm's correction over the family
demands of its smallest p, see `statistics.chance_to_find`. The noise that counts is the sd of the
paired differences; where nothing has been compared yet it is taken from the baseline's seeds, as
if pairing removed nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from analysis.comparison import Comparison
from analysis.statistics import ALPHA, POWER, detectable, seeds_needed
from components.registry import UserError

LARGE = 2.2  # sd of the paired differences: a design should find about two at least
SUGGESTED = (6, 8, 10)  # seeds, for comparison


@dataclass(frozen=True)
class Needed:
    """One row.

    Attributes:
        sd: of the paired differences, in nats.
        n: seeds compared so far.
        detectable: the least difference found now, in nats, in the family; None for one seed.
        alone, in_family: seeds needed for the effect asked for, were the row the only comparison,
            and as one of the family's; None: more than a million.
    """

    label: str
    sd: float
    n: int
    detectable: float | None
    alone: int | None
    in_family: int | None


@dataclass(frozen=True)
class Power:
    """How many seeds a sweep's rows need for a difference of `effect` nats.

    `assumed` is set where `rows` is the baseline's noise times √2 and not measured differences;
    `silent` names the rows whose noise can't be measured: fewer than two pairs of seeds, all
    differences the same, or runs that are not to be compared.
    """

    name: str
    effect: float
    family: int
    rows: tuple[Needed, ...]
    silent: tuple[str, ...]
    assumed: bool

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "power": POWER, "alpha": ALPHA}

    def text(self) -> str:
        """A plain table and what to know of it."""
        title = f"Seeds to find a difference of {self.effect:g} nats in {self.name}"
        lines = [f"{title} ({POWER:.0%} power, α = {ALPHA:g})", ""]
        heads = ("Row", "seeds", "sd", "finds from", "seeds alone", f"seeds among {self.family}")
        table = [heads, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for label, *numbers in table if self.rows else ():
            rest = (f"{text:>{width}}" for text, width in zip(numbers, widths[1:], strict=True))
            lines.append("  ".join([f"{label:<{widths[0]}}", *rest]))
        if self.rows:
            lines.append("")
            lines.append(
                "sd: of the paired differences, in nats; finds from: the least true difference that"
                f" these seeds show after Holm over {_count(self.family, 'comparison')}."
            )
            n = min(row.n for row in self.rows)
            low, high = _spread_of_sd(n)
            lines.append(
                f"From {_count(n, 'seed')} the true sd may be {low:.2g} to {high:.2g} times the one"
                " shown (95%)."
            )
        if self.assumed:
            lines.append(
                "No row has been compared yet: the baseline's sd over seeds, times √2, as if"
                " pairing removed nothing."
            )
        if self.silent:
            lines.append(f"No noise to be measured yet: {', '.join(self.silent)}.")
        if not self.rows:
            lines.append("Run two seeds at least, then ask again.")
        return "\n".join(lines)


def report(comparison: Comparison, effect: float) -> Power:
    """Seeds that each row of a sweep needs to show a true difference of `effect` nats.

    From the measured sd of its paired differences; the text says how little few seeds tell of it.

    Raises:
        UserError: `effect` is not a finite number above 0.
    """
    if not (math.isfinite(effect) and effect > 0):
        raise UserError(f"the difference to be found is {effect:g}, not a number above 0")
    family, rows, silent = max(1, comparison.family), [], []
    for row in comparison.rows[1:]:
        difference = row.difference
        if difference is None or row.adjusted is None or not difference.sd:
            silent.append(row.label)
        else:
            rows.append(_needed(row.label, difference.sd, difference.n, effect, family))
    noise = comparison.noise
    assumed = not rows and noise is not None and bool(noise.sd)
    if assumed and noise is not None and noise.sd:
        sd = noise.sd * math.sqrt(2)
        rows.append(_needed(comparison.baseline.label, sd, noise.n, effect, family))
    return Power(comparison.manifest.name, effect, family, tuple(rows), tuple(silent), assumed)


def design_warning(seeds: int, comparisons: int) -> str | None:
    """One line where a design can't find even a large difference; None where it can.

    Large: LARGE sd of the paired differences, in each of `comparisons` rows after Holm.
    """
    if comparisons < 1:
        return None
    if seeds < 2:
        return "with 1 seed no difference can be told from noise: no intervals, no p-values"
    found = detectable(seeds, 1.0, comparisons)
    if found is None or found <= LARGE:
        return None
    more = [n for n in SUGGESTED if n > seeds][:2]
    better = ", ".join(f"{n} seeds: {detectable(n, 1.0, comparisons):.2g}" for n in more)
    after = ", after Holm" if comparisons > 1 else ""
    return (
        f"with {seeds} seeds and {_count(comparisons, 'comparison')} nothing under {found:.3g} sd"
        f" of the paired differences can be found ({POWER:.0%} power{after})"
        + (f"; {better}" if better else "")
    )


def _needed(label: str, sd: float, n: int, effect: float, family: int) -> Needed:
    return Needed(
        label=label,
        sd=sd,
        n=n,
        detectable=detectable(n, sd, family),
        alone=seeds_needed(effect, sd),
        in_family=seeds_needed(effect, sd, family),
    )


def _cells(row: Needed) -> tuple[str, ...]:
    found = "—" if row.detectable is None else f"{row.detectable:.2g}"
    needed = ("> 1,000,000" if n is None else f"{n:,}" for n in (row.alone, row.in_family))
    return (row.label, str(row.n), f"{row.sd:.2g}", found, *needed)


def _spread_of_sd(n: int) -> tuple[float, float]:
    """95% interval of the true sd over the sample's, of n normal values: by the χ² distribution."""
    from scipy.special import chdtri  # its upper tail

    low, high = (float(chdtri(n - 1, tail)) for tail in (0.025, 0.975))
    return math.sqrt((n - 1) / low), math.sqrt((n - 1) / high)


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)
