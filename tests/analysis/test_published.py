"""Published tables are whole, and every claim is one that its sweeps can put to the test."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import pytest

from analysis import claims, published
from analysis.published import DifferenceClaim, OrderClaim, Paper, SameClaim, SlopeClaim
from components.registry import UserError
from experiments import loader
from sweeps import design
from sweeps.design import Sweep, value_at

PAPERS = published.names()
PRESETS = {path.stem for path in design.PRESETS.glob("*.yaml")}


@cache
def sweep(name: str) -> Sweep:
    return design.load(name)


def labels(paper: Paper, budget: published.Budget) -> set[str]:
    return {v.label for name in paper.file.sweeps[budget] for v in sweep(name).variants}


def test_the_eleven_that_everybody_quotes_are_there() -> None:
    assert set(PAPERS) >= {
        *("shazeer2020", "narang2021", "xiong2020", "zhang2019", "press2021", "eleutherai2021"),
        *("ainslie2023", "shazeer2019", "wortsman2023", "kazemnejad2023", "arora2023"),
    }
    assert [published.load(name).file.year for name in PAPERS] == sorted(
        published.load(name).file.year for name in PAPERS
    )


@pytest.mark.parametrize("name", PAPERS)
def test_every_paper_has_sweeps_that_load_at_both_budgets(name: str) -> None:
    paper = published.load(name)
    assert set(paper.file.sweeps) == set(published.BUDGETS)
    for budget, names in paper.file.sweeps.items():
        assert set(names) <= PRESETS
        assert all(each.endswith("-gpu") == (budget == "gpu-hour") for each in names)
        assert labels(paper, budget)


@pytest.mark.parametrize("name", PAPERS)
def test_every_claim_has_its_rows_in_the_sweeps_for_a_gpu_and_most_in_those_for_minutes(
    name: str,
) -> None:
    paper = published.load(name)
    lacking = dict.fromkeys(published.BUDGETS, 0)
    for claim in paper.file.claims:
        for budget in published.BUDGETS:
            if isinstance(claim, SlopeClaim):
                experiments = [
                    loader.resolved(variant.experiment)
                    for each in paper.file.sweeps[budget]
                    for variant in sweep(each).variants
                ]
                points = {
                    value_at(experiment, claim.over)
                    for experiment in experiments
                    if all(
                        claims.matches(value_at(experiment, p), v) for p, v in claim.among.items()
                    )
                }
                assert len(points) >= 4
                continue
            wanted = (
                set(claim.lowest_first)
                if isinstance(claim, OrderClaim)
                else {claim.variant, getattr(claim, "than", claim.variant)}
            )
            lacking[budget] += not wanted <= labels(paper, budget)
    assert lacking["gpu-hour"] == 0
    assert lacking["minutes"] <= len(paper.file.claims) / 2


@pytest.mark.parametrize("name", PAPERS)
def test_a_claim_says_what_the_published_numbers_say(name: str) -> None:
    """A lower loss is expected where the paper's variant is the better one, and never else."""
    paper = published.load(name)
    for claim in paper.file.claims:
        if isinstance(claim, DifferenceClaim) and claim.published:
            known = published.difference(paper, claim)
            assert known is not None
            assert claim.metric.startswith("val/loss")
            assert known.improves == (claim.expect == "lower"), claim.says
        if isinstance(claim, SameClaim) and claim.published:
            known = published.difference(paper, claim)
            assert known is not None
            if known.unit == "nats":
                assert abs(known.mean) < claim.margin


@pytest.mark.parametrize("name", PAPERS)
def test_every_claim_says_where_it_stands(name: str) -> None:
    for claim in published.load(name).file.claims:
        assert getattr(claim, "published", None) or claim.where or claim.beyond, claim.says


def test_published_differences_are_those_of_the_tables() -> None:
    glu = published.load("shazeer2020")
    first = next(c for c in glu.file.claims if isinstance(c, DifferenceClaim))
    found = published.difference(glu, first)
    assert found is not None
    assert (found.variant, found.than, found.unit) == (1.942, 1.997, "nats")
    assert found.mean == pytest.approx(-0.055)
    assert found.error == pytest.approx(math.sqrt(0.004**2 / 4 + 0.005**2 / 4))  # Welch
    assert found.mark == "second-hand"


def test_perplexities_are_compared_by_their_logarithms() -> None:
    paper = published.load("press2021")
    claim = next(c for c in paper.file.claims if c.metric == "val/loss@8x")
    assert isinstance(claim, DifferenceClaim)
    found = published.difference(paper, claim)
    assert found is not None
    assert found.mean == pytest.approx(math.log(18.40) - math.log(178.97))
    assert (found.unit, found.improves) == ("nats", True)


def test_the_less_sure_of_two_rows_decides_how_sure_a_difference_is() -> None:
    paper = published.load("narang2021")
    table_2 = next(
        c
        for c in paper.file.claims
        if isinstance(c, DifferenceClaim) and c.published and c.published.table == "table 2"
    )
    found = published.difference(paper, table_2)
    assert found is not None
    assert paper.file.tables["table 2"].mark == "verified"
    assert found.mark == "second-hand"


GOOD = """\
title: On Something
authors: Somebody
year: 2020
setting: a small one
sweeps: {minutes: [norms]}
tables:
  t:
    where: Table 1
    mark: verified
    columns: {loss: {metric: loss, unit: nats, better: lower, n: 3}}
    rows: {A: {loss: 1.0}, B: {loss: [1.1, 0.1]}}
claims:
  - says: A is better
    kind: difference
    variant: A
    than: B
    expect: lower
    published: {table: t, column: loss}
"""


def test_a_file_of_ones_own_is_a_paper_too(tmp_path: Path) -> None:
    path = tmp_path / "somebody2020.yaml"
    path.write_text(GOOD)
    paper = published.load(str(path))
    assert paper.key == "somebody2020"
    assert paper.source == "Somebody 2020, On Something"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("column: loss}", "column: los}"), "no column 'los' — did you mean 'loss'?"),
        (("table: t,", "table: T2,"), "no table 'T2'"),
        (("than: B", "than: C"), "no row 'C'"),
        (("A: {loss: 1.0}", "A: {lost: 1.0}"), "no column 'lost'"),
        (("mark: verified", "mark: sure"), "mark"),
        (("year: 2020", "year: soon"), "year"),
        (("expect: lower", "expect: lower\n    hope: yes"), "hope"),
        (("kind: difference", "kind: wish"), "claims.0"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_line_that_names_its_place(
    change: tuple[str, str], line: str, tmp_path: Path
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(UserError) as caught:
        published.load(str(path))
    assert all("wrong.yaml:" in each for each in str(caught.value).splitlines())
    assert line in str(caught.value)


def test_an_unknown_paper_is_guessed() -> None:
    with pytest.raises(UserError, match="did you mean 'press2021'"):
        published.load("press201")
