"""By which methods a sweep was read: only those that its report rests on, each with its source."""

from __future__ import annotations

from collections.abc import Iterator

from analysis import task_items
from analysis.comparison import Comparison
from analysis.statistics import ALPHA

TEXTS = {
    "Loss": """Mean cross-entropy over the same validation tokens for every row and seed, after the
        last step; not the best along the way.""",
    "Difference": """Within each seed, variant minus baseline: one seed gives both the same batches
        and the same initial numbers wherever they share a parameter. Mean over seeds with the 95%
        interval of the paired t test (Student 1908; Fisher 1925).""",
    "Verdict": """Better or worse where the p of the paired t test, after Holm's step-down
        correction (Holm 1979) over the {family} planned, is below {alpha:g}; otherwise
        the runs cannot tell. A row that diverged in any seed has no mean: the survivors are no fair
        sample.""",
    "Sign flip": """The exact randomisation test over all ways to sign the differences (Fisher
        1935). With n seeds its p is never below 2 to the power 1 − n.""",
    "Equal budgets": """Curves read at the most that the runs of all rows reach, on straight lines
        between evaluations.""",
    "Compute gain": """Training FLOPs of the baseline over the variant's, each up to where its curve
        reaches the higher of the two final losses; geometric mean over seeds. The side that ends
        lower is read before the end of its learning-rate schedule.""",
    "Tuning": """Each row stands at its own best value of one grid, chosen by the mean over seeds of
        the loss on validation text that no other number here is measured on. Expected best of k
        tries: Dodge et al. 2019; sensitivity: Wortsman et al. 2023.""",
    "Factors": """Contrasts within each seed, their mean and t interval over seeds, Holm's
        correction over the effects (Box, Hunter & Hunter 2005). Shares of a total: Shapley 1953,
        with Fieller's interval (1954).""",
    "Items": """Two rows on the same items: standard error over items, clusters of items taken as
        one (Miller 2024), and over seeds, the two crossed (Searle, Casella & McCulloch 1992), with
        the degrees of freedom of Satterthwaite 1946; Holm's correction within each task.""",
    "Power": """The least difference found in 80% of such sweeps, by the noncentral t distribution
        (Cohen 1988) at the level of the first step of Holm's procedure.""",
}


def methods(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """(what, how) of all that the report of this sweep uses."""
    rows = comparison.rows
    differences = [row.difference for row in rows if row.difference]
    used = {
        "Loss": True,
        "Difference": bool(differences),
        "Verdict": any(row.adjusted for row in rows),
        "Sign flip": any(d.p_sign is not None for d in differences),
        "Equal budgets": any(row.readings for row in rows[1:]),
        "Compute gain": any(row.gain for row in rows),
        "Tuning": any(row.tuning and not row.tuning.on_reported for row in rows),
        "Factors": any(row.row.levels for row in rows),
        "Items": bool(task_items.tasks(comparison)),
        "Power": any(d.sd for d in differences),
    }
    count = comparison.family
    family = "one comparison" if count == 1 else f"{count} comparisons"
    for name, text in TEXTS.items():
        if used[name]:
            plain = " ".join(text.split())
            yield name, plain.format(family=family, alpha=ALPHA)
