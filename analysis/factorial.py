"""A factorial sweep read as one: what each factor does, and which of them do it together.

Cells -> within each seed a contrast (mean of some cells − mean of others) -> its mean and paired t
interval over seeds -> Holm's correction over the effects. A main effect uses every cell, so it has
the precision of a sweep with that many more seeds.

Which effects can be told apart is seen from the cells that are there: effects whose contrasts are
one and the same column, up to sign, are one line: "ffn + norm×block". A design that is neither
full nor a regular fraction, since cells are missing or diverged, gives no effects: nothing is
filled in. Interactions of three and more factors are not listed. Source: Box, Hunter & Hunter
2005, Statistics for Experimenters, chapters 5 and 6.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.comparison import INCOMPARABLE, Compared, Comparison
from analysis.statistics import (
    CONFIDENCE,
    Adjusted,
    Difference,
    holm,
    paired_difference,
    t_quantile,
)

MOST_SHAPLEY = 6  # factors; 2ᵏ subsets must have been run
MOST_ALIASES = 4  # effects named on one line
Cell = tuple[str, ...]  # a level of each factor
Losses = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Effect:
    """One line: a main effect or an interaction, or several that this design can't tell apart.

    Attributes:
        label: `norm`, `norm×block`, `ffn + norm×block`; of a factor with more than two levels
            `norm=rmsnorm`.
        order: 1 for a main effect, 2 for an interaction of two factors, ….
        difference: in nats. Main effect: mean loss at the level − mean loss at the base's level,
            over all settings of the others. Interaction of two: half of how much the effect of the
            one differs between the other's level and the base's.
    """

    label: str
    order: int
    factors: tuple[str, ...]
    difference: Difference
    adjusted: Adjusted | None = None


@dataclass(frozen=True)
class Share:
    """A factor's part of the difference between all factors changed and none.

    Attributes:
        difference: Shapley value in nats: what changing the factor adds, averaged over all orders
            in which the factors could be changed one after the other.
        share: of the total, with its 95% interval over seeds by Fieller's theorem; None where the
            total's own interval does not exclude zero, so that a share has no meaning.
    """

    factor: str
    difference: Difference
    share: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Factorial:
    """What a factorial says.

    Attributes:
        levels: of each factor, by its path, the base's own first.
        cells: loss by seed of each cell that counts.
        seeds: those that every cell has; only they are used.
        missing: cells that are planned and do not count, and why: `norm=none: diverged`.
        effects: main effects first; empty where the cells do not allow them.
        shares: where all subsets of two-level factors are there, in the order of the factors.
        total: all factors changed − none; None without shares.
        notes: what a reader must know, each a sentence.
    """

    levels: Mapping[str, tuple[str, ...]]
    cells: Mapping[Cell, Losses]
    seeds: tuple[int, ...]
    missing: tuple[str, ...]
    effects: tuple[Effect, ...]
    shares: tuple[Share, ...]
    total: Difference | None
    notes: tuple[str, ...]


def factorial(comparison: Comparison) -> Factorial | None:
    """Read a sweep's factorial rows; None where it has none.

    A cell counts if none of its runs diverged and it saw the baseline's data and tokens.
    """
    rows = [(row, row.row.levels) for row in comparison.rows if row.row.levels]
    if not rows:
        return None
    levels = {}
    for name in rows[0][1]:
        own = next((at[name] for row, at in rows if name not in row.row.changes), "the base's")
        levels[name] = tuple(dict.fromkeys([own, *(at[name] for _, at in rows)]))
    cells, missing = {}, []
    for row, at in rows:
        reason = _not_counted(row)
        if reason is None:
            cells[tuple(at[name] for name in levels)] = row.losses
        else:
            missing.append(f"{row.label}: {reason}")
    return analyse(levels, cells, missing)


def _not_counted(row: Compared) -> str | None:
    if row.diverged:
        return f"diverged {len(row.diverged)}/{len(row.read.runs)}"
    if not row.losses:
        return "not run"
    if others := [key for key in INCOMPARABLE if key in row.mixed]:
        return f"other {' and '.join(others)}"
    return None


def analyse(
    levels: Mapping[str, Sequence[str]],
    cells: Mapping[Cell, Losses],
    missing: Iterable[str] = (),
) -> Factorial:
    """Effects and shares from the losses of each cell, (levels of the factors) -> seed -> loss.

    Args:
        levels: of each factor, the base's own first.
        missing: what to say of cells that are not in `cells`.
    """
    sizes = [len(values) for values in levels.values()]
    seeds = sorted(set.intersection(*(set(losses) for losses in cells.values())) if cells else ())
    two_level = all(size == 2 for size in sizes)
    full = len(cells) == math.prod(sizes)
    notes = []
    used = {seed for losses in cells.values() for seed in losses}
    if lost := sorted(used - set(seeds)):
        notes.append(
            f"Seed {', '.join(map(str, lost))} is not in every cell and not used for effects."
        )
    contrasts: list[Contrast] = []
    if not seeds:
        notes.append("No seed is in every cell: no effects.")
    elif two_level:
        contrasts, said = _two_level(levels, list(cells))
        notes += said
    elif full:
        contrasts = _many_levels(levels, list(cells))
    else:
        notes.append(
            f"{len(cells)} of {math.prod(sizes)} cells count; effects of factors with more than"
            " two levels need all of them: none are shown."
        )
    effects = _estimate(contrasts, cells, seeds)
    shares: list[Share] = []
    total = None
    if two_level and full and seeds and len(levels) <= MOST_SHAPLEY:
        shares, total = _shapley(levels, cells, seeds)
    return Factorial(
        levels={name: tuple(values) for name, values in levels.items()},
        cells=cells,
        seeds=tuple(seeds),
        missing=tuple(missing),
        effects=effects,
        shares=tuple(shares),
        total=total,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class Contrast:
    """Mean of the cells in `high` − mean of the cells in `low`."""

    label: str
    factors: tuple[str, ...]
    high: Sequence[Cell]
    low: Sequence[Cell]


def _estimate(
    contrasts: Sequence[Contrast], cells: Mapping[Cell, Losses], seeds: Sequence[int]
) -> tuple[Effect, ...]:
    effects = []
    for contrast in contrasts:
        difference = paired_difference(
            _mean(contrast.high, cells, seeds), _mean(contrast.low, cells, seeds)
        )
        assert difference is not None  # there are seeds
        effects.append(Effect(contrast.label, len(contrast.factors), contrast.factors, difference))
    adjusted = holm([effect.difference for effect in effects], len(effects))
    return tuple(replace(e, adjusted=a) for e, a in zip(effects, adjusted, strict=True))


def _mean(
    some: Sequence[Cell], cells: Mapping[Cell, Losses], seeds: Sequence[int]
) -> dict[int, float]:
    return {seed: math.fsum(cells[cell][seed] for cell in some) / len(some) for seed in seeds}


def _two_level(
    levels: Mapping[str, Sequence[str]], cells: Sequence[Cell]
) -> tuple[list[Contrast], list[str]]:
    """(contrasts, notes) of a full two-level factorial or a regular fraction of one.

    A word is a set of factors; its column is the product of theirs, −1 at the base's level and +1
    at the other. Regular means: words fall into as many classes of equal columns as there are
    cells, and each column but the constant one has as many −1 as +1. Below resolution III (a
    factor seen at one level, or two changed only together) main effects can't be told apart.
    """
    names = list(levels)
    factors = {
        name: np.array([1 if cell[i] == levels[name][1] else -1 for cell in cells])
        for i, name in enumerate(names)
    }
    classes: dict[bytes, list[tuple[tuple[str, ...], int]]] = {}
    for size in range(len(names) + 1):
        for word in itertools.combinations(names, size):
            column = np.ones(len(cells), int)
            for name in word:
                column = column * factors[name]
            sign = int(column[0])
            classes.setdefault((sign * column).tobytes(), []).append((word, sign))
    constant, *others = classes.items()  # the empty word comes first
    columns = [np.frombuffer(key, int) for key, _ in others]
    resolution = min((len(word) for word, _ in constant[1][1:]), default=len(names) + 1)
    regular = len(classes) == len(cells) and not any(column.sum() for column in columns)
    if not regular or resolution < 3:
        return [], [
            f"{len(cells)} of {2 ** len(names)} cells count; they are neither all nor a regular"
            " fraction that keeps main effects apart: no effects are shown."
        ]
    short = dict(zip(names, short_names(names), strict=True))
    notes = []
    if len(constant[1]) > 1:
        defining = [_word(word, short) for word, _ in constant[1][1:]]
        notes.append(
            f"A fraction of 1/{2 ** len(names) // len(cells)}: {', '.join(defining)} cannot be"
            " seen, and effects joined by + or − cannot be told apart."
        )
    contrasts = []
    for column, (_, words) in zip(columns, others, strict=True):
        (first, sign), *_ = words  # the smallest word gives the line its sign
        if len(first) > 2:
            continue
        column = sign * column
        label = _word(first, short)
        for word, other in words[1:MOST_ALIASES]:
            label += f" {'+' if other == sign else '−'} {_word(word, short)}"
        if len(words) > MOST_ALIASES:
            label += f" + {len(words) - MOST_ALIASES} more"
        high = [cell for cell, x in zip(cells, column, strict=True) if x > 0]
        low = [cell for cell, x in zip(cells, column, strict=True) if x < 0]
        contrasts.append(Contrast(label, first, high, low))
    return contrasts, notes


def _many_levels(levels: Mapping[str, Sequence[str]], cells: Sequence[Cell]) -> list[Contrast]:
    """Main effects and pairs of a full factorial, each level against the base's."""
    names = list(levels)
    short = dict(zip(names, short_names(names), strict=True))

    def where(wanted: Mapping[str, str]) -> list[Cell]:
        return [c for c in cells if all(c[names.index(n)] == v for n, v in wanted.items())]

    def title(name: str, level: str) -> str:
        return short[name] if len(levels[name]) == 2 else f"{short[name]}={level}"

    contrasts = [
        Contrast(title(a, x), (a,), where({a: x}), where({a: levels[a][0]}))
        for a in names
        for x in levels[a][1:]
    ]
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(levels[a][1:], levels[b][1:]):
            own, other = levels[a][0], levels[b][0]
            contrasts.append(
                Contrast(
                    f"{title(a, x)}×{title(b, y)}",
                    (a, b),
                    where({a: x, b: y}) + where({a: own, b: other}),
                    where({a: x, b: other}) + where({a: own, b: y}),
                )
            )
    return contrasts


def _shapley(
    levels: Mapping[str, Sequence[str]], cells: Mapping[Cell, Losses], seeds: Sequence[int]
) -> tuple[list[Share], Difference | None]:
    """Shapley 1953, A value for n-person games: φᵢ = Σ_S |S|!(k − |S| − 1)!/k! · (v(S + i) − v(S)),
    v(S) the loss with the factors of S changed and the others as in the base."""
    names = list(levels)
    k = len(names)

    def losses(changed: Iterable[str]) -> Losses:
        return cells[tuple(levels[n][n in changed] for n in names)]

    none, every = ({seed: some[seed] for seed in seeds} for some in (losses(()), losses(names)))
    total = {seed: every[seed] - none[seed] for seed in seeds}
    zero = dict.fromkeys(seeds, 0.0)
    shares = []
    for name in names:
        rest = [other for other in names if other != name]
        value = dict(zero)
        for size in range(k):
            weight = math.factorial(size) * math.factorial(k - size - 1) / math.factorial(k)
            for before in itertools.combinations(rest, size):
                without, with_it = losses(before), losses((*before, name))
                for seed in seeds:
                    value[seed] += weight * (with_it[seed] - without[seed])
        difference = paired_difference(value, zero)
        assert difference is not None
        shares.append(Share(name, difference, *_fieller(value, total)))
    return shares, paired_difference(every, none)


def _fieller(
    part: Mapping[int, float], whole: Mapping[int, float]
) -> tuple[float | None, float | None, float | None]:
    """Ratio of two paired means and its 95% interval (Fieller 1954, Some problems in interval
    estimation); nothing where the interval of `whole` does not exclude zero, nor for one seed."""
    n = len(part)
    if n < 2:
        return None, None, None
    a, b = np.array(list(part.values())), np.array(list(whole.values()))
    (aa, ab), (_, bb) = np.cov(a, b)
    t = t_quantile(0.5 + CONFIDENCE / 2, n - 1) ** 2 / n
    x, y, z = b.mean() ** 2 - t * bb, a.mean() * b.mean() - t * ab, a.mean() ** 2 - t * aa
    if not x > 0:
        return None, None, None
    root = math.sqrt(max(0.0, y * y - x * z))
    return float(a.mean() / b.mean()), float((y - root) / x), float((y + root) / x)


def short_names(paths: Sequence[str]) -> list[str]:
    """The shortest endings of dotted paths that tell them apart: `model.norm` is `norm`."""
    parts = [path.split(".") for path in paths]
    for size in range(1, max(map(len, parts)) + 1):
        names = [".".join(part[-size:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def _word(word: Sequence[str], short: Mapping[str, str]) -> str:
    return "×".join(short[name] for name in word)
