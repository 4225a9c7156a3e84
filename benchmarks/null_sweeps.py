"""How often tables claim a difference where there is none, and how often intervals hold the truth.

    python -m benchmarks.null_sweeps [--sweeps 20000] [--rows 10] [--seeds 5]

Draws sweeps in which no row differs: the loss of a run is its seed's luck, shared by all rows, plus
its own, both normal. Each goes through the same functions as a table.
"""

from __future__ import annotations

import argparse

import numpy as np

from analysis.statistics import CONFIDENCE, holm, paired_difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--sweeps", type=int, default=20_000)
    parser.add_argument("--rows", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    claimed = uncorrected = held = 0
    for _ in range(options.sweeps):
        luck = rng.normal(size=options.seeds)
        losses = luck + rng.normal(size=(options.rows + 1, options.seeds))
        baseline, *rows = (dict(enumerate(row.tolist())) for row in losses)
        differences = [paired_difference(row, baseline) for row in rows]
        adjusted = holm(differences, options.rows)
        wrong = [d for d in differences if d is not None and d.excludes_zero]
        claimed += any(a.rejected for a in adjusted if a is not None)
        uncorrected += bool(wrong)
        held += options.rows - len(wrong)
    error = np.sqrt(0.05 * 0.95 / options.sweeps)
    print(
        f"{options.sweeps:,} sweeps of {options.rows} rows that do nothing, {options.seeds} seeds"
    )
    print(f"some row better or worse: {claimed / options.sweeps:.1%} (± {2 * error:.1%})")
    print(f"the same without Holm's correction: {uncorrected / options.sweeps:.1%}")
    print(f"{CONFIDENCE:.0%} intervals that hold 0: {held / options.sweeps / options.rows:.1%}")


if __name__ == "__main__":
    main()
