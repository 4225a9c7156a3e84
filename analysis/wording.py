"""Numbers and lists as a reader sees them, and the marks of a table: one for all that prints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from analysis.statistics import Difference

NOT_RUN, DIVERGED, MISMATCH, UNLIKE, EDITED, CUT = "—", "†", "≈", "§", "¶", "‖"
MINUS = "−"
MOST_LISTED = 12


def difference_text(d: Difference, planned: int, decimals: int = 4) -> str:
    """`−0.0103 [−0.0150, −0.0056]`, saying so where pairs or the interval are missing."""
    text = signed(d.mean, decimals)
    if d.low is not None and d.high is not None:
        text += interval_text(d.low, d.high, decimals)
    elif d.n == 1:
        return f"{text} (1 pair)"
    return text if d.n == planned else f"{text} ({d.n} pairs)"


def interval_text(low: float, high: float, decimals: int) -> str:
    return f" [{signed(low, decimals)}, {signed(high, decimals)}]"


def p_text(p: float) -> str:
    """Three digits, and no zero: a p-value is never that."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def signed(value: float, decimals: int) -> str:
    """With its sign, a real minus; zero has none."""
    text = f"{value:+.{decimals}f}"
    return text[1:] if float(text) == 0 else text.replace("-", MINUS)


def percent(share: float, decimals: int = 1) -> str:
    return f"{signed(100 * share, decimals)}%"


def decimals_for(spreads: Iterable[float | None]) -> int:
    """Enough to show the typical spread with two digits, 3 to 5; 4 where none is known."""
    known = [spread for spread in spreads if spread]
    return min(5, max(3, 1 - math.floor(math.log10(float(np.median(known)))))) if known else 4


def difference_decimals(differences: Iterable[Difference | None]) -> int:
    """`decimals_for` the intervals of one table's differences."""
    return decimals_for(d.half_width for d in differences if d)


def short(count: float) -> str:
    """Three digits and a suffix: 790k, 1.05M, 124M."""
    for size, suffix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(count) >= 0.9995 * size:
            scaled = count / size
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(scaled) + 0.0003))}f}{suffix}"
    return f"{count:.0f}"


def listed(items: Sequence[str], between: str = ", ") -> str:
    """The first of them, and how many more there are."""
    more = len(items) - MOST_LISTED
    return between.join(items[:MOST_LISTED]) + (f" and {more} more" if more > 0 else "")


def seeds_text(seeds: Iterable[int]) -> str:
    """`seed 1`, `seeds 0, 2`."""
    known = [str(seed) for seed in seeds]
    return f"seed{'s' * (len(known) > 1)} {', '.join(known)}"
