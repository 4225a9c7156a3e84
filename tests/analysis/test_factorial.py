"""Effects are the textbook's, what can't be told apart is said, and nothing is filled in."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from analysis.comparison import compare
from analysis.factorial import Cell, Factorial, analyse, factorial, short_names
from analysis.results import Manifest, Row, Run
from analysis.statistics import Difference, t_interval

# Box, Hunter & Hunter 2005, section 5.4: yields of a pilot plant by temperature (fastest),
# concentration and catalyst, and their table of effects.
YIELDS = [60, 72, 54, 68, 52, 83, 45, 80]
PLANT = {"T": ("160", "180"), "C": ("20", "40"), "K": ("A", "B")}
EFFECTS = {"T": 23.0, "C": -5.0, "K": 1.5, "T×C": 1.5, "T×K": 10.0, "C×K": 0.0}


def two_level(names: str) -> dict[str, tuple[str, str]]:
    return dict.fromkeys(names, ("−", "+"))


def cells_of(
    levels: dict[str, tuple[str, str]],
    loss: Callable[[Sequence[int], int], float],
    seeds: Sequence[int] = (0, 1, 2),
    keep: Callable[[Sequence[int]], bool] = lambda x: True,
) -> dict[Cell, dict[int, float]]:
    """`loss(x, seed)` in each cell; x is 1 for each factor that is not at the base's level."""
    return {
        tuple(values[i] for values, i in zip(levels.values(), x, strict=True)): {
            seed: loss(x, seed) for seed in seeds
        }
        for x in itertools.product((0, 1), repeat=len(levels))
        if keep(x)
    }


def plant(seeds: Sequence[int] = (0,)) -> dict[Cell, dict[int, float]]:
    return cells_of(PLANT, lambda x, s: YIELDS[x[0] + 2 * x[1] + 4 * x[2]], seeds)


def means(found: Factorial) -> dict[str, float]:
    return {effect.label: effect.difference.mean for effect in found.effects}


def test_effects_of_the_pilot_plant() -> None:
    found = analyse(PLANT, plant())
    assert means(found) == pytest.approx(EFFECTS)
    assert [effect.order for effect in found.effects] == [1, 1, 1, 2, 2, 2]
    assert found.notes == () and found.missing == ()


def test_a_contrast_is_taken_within_each_seed() -> None:
    rng = np.random.default_rng(0)
    noise = {(x, s): rng.normal() for x in itertools.product((0, 1), repeat=2) for s in range(4)}
    levels = two_level("AB")
    cells = cells_of(levels, lambda x, s: 100 * s + 2 * x[0] + noise[tuple(x), s], range(4))
    found = analyse(levels, cells)
    by_seed = [
        (noise[(1, 0), s] + noise[(1, 1), s] - noise[(0, 0), s] - noise[(0, 1), s]) / 2 + 2
        for s in range(4)
    ]
    mean, low, high = t_interval(by_seed)
    first = found.effects[0]
    assert (first.label, first.factors) == ("A", ("A",))
    assert (first.difference.mean, first.difference.low, first.difference.high) == pytest.approx(
        (mean, low, high)
    )
    assert first.adjusted is not None
    assert first.adjusted.p >= first.difference.p  # type: ignore[operator]


def test_a_half_fraction_joins_what_it_cannot_tell_apart() -> None:
    # D = ABC, as −1 and +1: the cells with an even number of changed factors.
    levels = two_level("ABCD")
    cells = cells_of(levels, lambda x, s: x[0] + 0.5 * s, keep=lambda x: sum(x) % 2 == 0)
    found = analyse(levels, cells)
    assert list(means(found)) == [
        "A + B×C×D", "B + A×C×D", "C + A×B×D", "D + A×B×C",
        "A×B + C×D", "A×C + B×D", "A×D + B×C",
    ]  # fmt: skip
    assert found.effects[0].difference.mean == pytest.approx(1)
    assert found.notes == (
        "A fraction of 1/2: A×B×C×D cannot be seen, and effects joined by + or − cannot be told"
        " apart.",
    )
    assert found.shares == ()


def test_an_alias_of_opposite_sign_is_subtracted() -> None:
    # Changed C where one of A and B is changed: as −1 and +1, C = −AB.
    levels = two_level("ABC")
    cells = cells_of(
        levels, lambda x, s: 3.0 * (x[0] and x[1]) + s, keep=lambda x: (x[0] + x[1] + x[2]) % 2 == 0
    )
    found = analyse(levels, cells)
    assert list(means(found)) == ["A − B×C", "B − A×C", "C − A×B"]
    # A and B: +1.5 each; their interaction 1.5, which C shows with the other sign.
    assert means(found) == pytest.approx({"A − B×C": 1.5, "B − A×C": 1.5, "C − A×B": -1.5})


def test_many_aliases_are_counted() -> None:
    # 2^(7−4): 8 cells, 16 words to a line.
    levels = two_level("ABCDEFG")
    generators = {3: (0, 1), 4: (0, 2), 5: (1, 2), 6: (0, 1, 2)}
    cells = cells_of(
        levels,
        lambda x, s: float(x[0]),
        keep=lambda x: all(x[i] == sum(x[j] for j in g) % 2 for i, g in generators.items()),
    )
    found = analyse(levels, cells)
    assert len(found.effects) == 7
    assert found.effects[0].label == "A − B×D − C×E − F×G + 12 more"


def test_missing_cells_give_no_effects_and_say_so() -> None:
    cells = plant((0, 1))
    cells.pop(("180", "40", "B"))
    found = analyse(PLANT, cells, missing=["all changed: diverged 1/2"])
    assert found.effects == () and found.shares == () and found.total is None
    assert found.missing == ("all changed: diverged 1/2",)
    assert "7 of 8 cells count" in found.notes[0]
    # Half of the cells, but not a regular half: a factor would be seen at one level only.
    some = {cell: losses for cell, losses in plant().items() if cell[0] == "160"}
    assert analyse(PLANT, some).effects == ()


def test_only_seeds_that_every_cell_has_are_used() -> None:
    cells = plant((0, 1, 2))
    cells["160", "20", "A"].pop(2)
    found = analyse(PLANT, cells)
    assert found.seeds == (0, 1) and found.effects[0].difference.n == 2
    assert found.notes == ("Seed 2 is not in every cell and not used for effects.",)
    assert found.total is not None and found.total.n == 2
    parts = math.fsum(share.difference.mean for share in found.shares)
    assert parts == pytest.approx(found.total.mean)
    cells["160", "20", "A"] = {7: 60}
    nothing = analyse(PLANT, cells)
    assert nothing.effects == () and nothing.notes[-1] == "No seed is in every cell: no effects."
    assert analyse(PLANT, {}).effects == ()


def test_levels_of_larger_factors_stand_each_against_the_bases() -> None:
    levels = {"model.norm": ("ln", "rms", "none"), "model.ffn": ("mlp", "gated")}
    losses = {
        ("ln", "mlp"): 4.0, ("rms", "mlp"): 4.1, ("none", "mlp"): 5.0,
        ("ln", "gated"): 3.8, ("rms", "gated"): 3.9, ("none", "gated"): 4.4,
    }  # fmt: skip
    found = analyse(levels, {cell: {0: loss, 1: loss + 1} for cell, loss in losses.items()})
    assert means(found) == pytest.approx(
        {"norm=rms": 0.1, "norm=none": 0.8, "ffn": -1 / 3,
         "norm=rms×ffn": 0.0, "norm=none×ffn": (4.4 - 3.8 - (5.0 - 4.0)) / 2}
    )  # fmt: skip
    losses.pop(("none", "gated"))
    lacking = analyse(levels, {cell: {0: loss} for cell, loss in losses.items()})
    assert lacking.effects == () and "5 of 6 cells count" in lacking.notes[0]


def test_a_pair_means_the_same_with_two_levels_and_with_more() -> None:
    three = {"A": ("−", "+", "x"), "B": ("−", "+")}
    losses = {("−", "−"): 4.0, ("+", "−"): 3.0, ("−", "+"): 3.5, ("+", "+"): 2.0}
    pair = analyse(two_level("AB"), {cell: {0: loss} for cell, loss in losses.items()})
    more = losses | {("x", "−"): 9.0, ("x", "+"): 1.0}
    wide = analyse(three, {cell: {0: loss} for cell, loss in more.items()})
    assert means(wide)["A=+×B"] == means(pair)["A×B"] == pytest.approx(-0.25)


# --- Shapley ------------------------------------------------------------------------------------


def test_shapley_values_by_hand_and_their_sum() -> None:
    # Orders A, B and B, A: A adds −1 or −3, B adds −0.5 or −2.5.
    losses = {("−", "−"): 5.0, ("+", "−"): 4.0, ("−", "+"): 4.5, ("+", "+"): 1.5}
    found = analyse(
        two_level("AB"),
        {cell: {s: loss + 0.01 * s * (cell == ("+", "+")) for s in range(3)}
         for cell, loss in losses.items()},
    )  # fmt: skip
    assert found.total is not None and found.total.mean == pytest.approx(-3.49)
    assert [s.factor for s in found.shares] == ["A", "B"]
    assert [s.difference.mean for s in found.shares] == pytest.approx([-1.995, -1.495])
    assert [s.share for s in found.shares] == pytest.approx([1.995 / 3.49, 1.495 / 3.49])


def test_shapley_values_are_the_mean_over_all_orders() -> None:
    rng = np.random.default_rng(5)
    levels = two_level("ABCD")
    loss = {x: rng.normal() for x in itertools.product((0, 1), repeat=4)}
    found = analyse(levels, cells_of(levels, lambda x, s: loss[tuple(x)], (0,)))
    gains = np.zeros(4)
    orders = list(itertools.permutations(range(4)))
    for order in orders:
        x = [0, 0, 0, 0]
        for i in order:
            before = loss[tuple(x)]
            x[i] = 1
            gains[i] += (loss[tuple(x)] - before) / len(orders)
    assert [s.difference.mean for s in found.shares] == pytest.approx(list(gains))
    assert all(s.share is None for s in found.shares)  # one seed


def test_a_share_is_bounded_where_the_ratio_stops_being_credible() -> None:
    rng = np.random.default_rng(6)
    levels = two_level("AB")
    cells = cells_of(levels, lambda x, s: -2 * x[0] - x[1] + 0.3 * rng.normal(), seeds=range(6))
    first = analyse(levels, cells).shares[0]
    # At either end of Fieller's interval the t interval of part − ratio·total touches zero.
    none, a, b, both = (
        np.array([cells[cell][s] for s in range(6)])
        for cell in (("−", "−"), ("+", "−"), ("−", "+"), ("+", "+"))
    )
    part, total = (a - none + both - b) / 2, both - none
    assert first.low is not None and first.high is not None and first.share is not None
    assert first.low < first.share < first.high
    for ratio in (first.low, first.high):
        _, low, high = t_interval(part - ratio * total)
        assert min(abs(low), abs(high)) == pytest.approx(0, abs=1e-9)


def test_no_shares_of_a_total_that_may_be_zero() -> None:
    rng = np.random.default_rng(9)
    levels = two_level("AB")
    found = analyse(levels, cells_of(levels, lambda x, s: rng.normal(), seeds=range(4)))
    assert found.total is not None and not found.total.excludes_zero
    assert [share.share for share in found.shares] == [None, None]
    assert all(share.difference.low is not None for share in found.shares)


# --- from a sweep -------------------------------------------------------------------------------


def sweep(outcomes: dict[str, tuple[dict[str, str], list[float | None]]]) -> Factorial | None:
    """A sweep of rows with levels; None is a diverged run."""
    rows, runs = [], {}
    for label, (levels, losses) in outcomes.items():
        ids = {seed: f"{label}-{seed}" for seed in range(len(losses))}
        for seed, loss in enumerate(losses):
            result = {"id": ids[seed], "seed": seed, "tokens": 1000, "val/loss": loss}
            runs[ids[seed]] = Run(ids[seed], "diverged" if loss is None else "done", result)
        changes = {path: level for path, level in levels.items() if level not in ("ln", "mlp")}
        rows.append(Row(label, "factorial", changes, 1.0, 1.0, None, ids, levels=levels or None))
    manifest = Manifest("both", None, (0, 1), 1000, tuple(rows))
    return factorial(compare(manifest, runs))


NORM, FFN = "model.norm", "model.ffn"
ROWS: dict[str, tuple[dict[str, str], list[float | None]]] = {
    "GPT-2": ({NORM: "ln", FFN: "mlp"}, [4.0, 4.1]),
    "gated": ({NORM: "ln", FFN: "gated"}, [3.8, 3.91]),
    "rms": ({NORM: "rms", FFN: "mlp"}, [4.01, 4.1]),
    "both": ({NORM: "rms", FFN: "gated"}, [3.81, 3.9]),
}


def test_a_sweeps_rows_with_levels_are_its_cells() -> None:
    found = sweep(ROWS | {"other": ({}, [9.0, 9.0])})
    assert found is not None
    assert found.levels == {NORM: ("ln", "rms"), FFN: ("mlp", "gated")}
    assert [effect.label for effect in found.effects] == ["norm", "ffn", "norm×ffn"]
    assert found.effects[1].difference.mean == pytest.approx(-0.1975)
    assert isinstance(found.total, Difference)
    assert sweep({"GPT-2": ({}, [4.0, 4.1]), "other": ({}, [9.0, 9.0])}) is None


def test_a_cell_with_a_diverged_seed_does_not_count() -> None:
    found = sweep(ROWS | {"both": (ROWS["both"][0], [3.81, None])})
    assert found is not None and found.effects == ()
    assert found.missing == ("both: diverged 1/2",) and "3 of 4 cells" in found.notes[0]


def test_the_bases_level_comes_first_even_if_the_baseline_is_no_cell() -> None:
    rows = dict(reversed(ROWS.items()))
    first: dict[str, tuple[dict[str, str], list[float | None]]] = {"tuned": ({}, [3.0, 3.0])}
    found = sweep(first | rows)
    assert found is not None
    assert found.levels == {NORM: ("ln", "rms"), FFN: ("mlp", "gated")}
    assert found.effects[1].difference.mean == pytest.approx(-0.1975)


def test_without_any_cell_at_the_bases_level_there_are_no_effects() -> None:
    found = sweep({label: row for label, row in ROWS.items() if row[0][NORM] == "rms"})
    assert found is not None and found.effects == () and found.notes


def test_short_names_are_the_shortest_that_differ() -> None:
    assert short_names(["model.norm", "model.ffn"]) == ["norm", "ffn"]
    assert short_names(["a.name", "b.name"]) == ["a.name", "b.name"]
