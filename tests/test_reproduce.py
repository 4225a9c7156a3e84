"""`reproduce` and `ledger` on the command line, with a paper that trains in seconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import ceteris, desk, files

PAPER = """\
title: On Norms
authors: Somebody
year: 2020
setting: a large one
sweeps: {minutes: [pair.yaml]}
claims:
  - {says: RMS is lower, where: Figure 1, kind: difference, variant: RMS, than: LN, expect: lower}
  - {says: both are alike, where: Figure 1, kind: no difference, variant: RMS, than: LN, margin: 9}
  - {says: there is more, where: Figure 2, kind: difference, variant: DyT, than: LN, expect: lower}
"""
PAIR = """\
base: tiny.yaml
set: {training.tokens: 2560, evaluation.tokens: 512}
baseline: {label: LN}
seeds: [0, 1]
rows: [{label: RMS, set: {model.norm: rmsnorm}}]
"""


@pytest.fixture
def here(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    assert tiny_yaml.parent == tmp_path
    (tmp_path / "pair.yaml").write_text(PAIR)
    (tmp_path / "somebody2020.yaml").write_text(PAPER)
    with desk(tmp_path, monkeypatch) as folder:
        yield folder


def test_it_runs_what_is_lacking_and_sets_measured_beside_published(here: Path) -> None:
    made = ceteris("reproduce", "somebody2020.yaml", "--json")
    assert made.code == 0, made.err
    assert "4 runs (2 rows x 2 seeds), 4 to do" in made.err
    first, alike, more = made.json["claims"]
    assert (alike["verdict"], alike["n"], alike["sweep"]) == ("agrees", 2, "pair")
    assert first["verdict"] in ("agrees", "disagrees", "cannot tell")
    assert first["low"] < first["mean"] < first["high"]
    assert (more["verdict"], more["note"]) == ("not measured", "no row 'DyT' in this sweep")
    before = files(here)
    again = ceteris("reproduce", "somebody2020.yaml")
    assert again.code == 0
    assert "started" not in again.err
    assert "agrees" in again.out and "both are alike" in again.out
    assert files(here) == before
    shown = ceteris("ledger")
    assert shown.code == 0 and "RMS" in shown.out
    entries = ceteris("ledger", "--json").json["entries"]
    assert {(e["sweep"], e["variant"], e["seeds"]) for e in entries} == {
        ("pair", "LN", 2), ("pair", "RMS", 2),
    }  # fmt: skip
    csv = ceteris("ledger", "--format", "csv").out
    assert csv.splitlines()[0].startswith("group,sweep,variant,effect,")


BROKEN = """\
from components.norm import RMSNorm
from components.registry import register

@register("norm", "test_torn")
class Torn(RMSNorm):
    \"\"\"Fails in its second step, which the guard does not come to.\"\"\"
    def forward(self, x):
        if not x.is_meta and self.training and not bool((self.weight == 1).all()):
            raise RuntimeError("a part broke")
        return super().forward(x)
"""


def test_a_run_that_fails_is_named_and_the_claims_are_shown_all_the_same(here: Path) -> None:
    (here / "broken.py").write_text(BROKEN)
    tiny = (here / "tiny.yaml").read_text()
    (here / "tiny.yaml").write_text(f"imports: [broken.py]\n{tiny}")
    (here / "pair.yaml").write_text(PAIR.replace("rmsnorm", "test_torn").replace("[0, 1]", "[0]"))
    made = ceteris("reproduce", "somebody2020.yaml", "--json")
    assert made.code == 1
    assert "a part broke" in made.err
    assert {claim["verdict"] for claim in made.json["claims"]} == {"not measured"}
    entries = ceteris("ledger", "--json").json["entries"]
    assert {entry["variant"]: entry["failed"] for entry in entries} == {"LN": 0, "RMS": 1}


def test_without_runs_it_says_that_nothing_is_measured(here: Path) -> None:
    before = files(here)
    shown = ceteris("reproduce", "somebody2020.yaml", "--no-run", "--json")
    assert (shown.code, {c["verdict"] for c in shown.json["claims"]}) == (0, {"not measured"})
    assert "no sweep 'pair.yaml'" in shown.err
    planned = ceteris("reproduce", "somebody2020.yaml", "--dry-run", "--json").json["plans"]
    assert [(plan["name"], plan["missing"]) for plan in planned] == [("pair", 4)]
    empty = ceteris("ledger")
    assert (empty.code, empty.out) == (0, "")
    assert files(here) == before


def test_it_lists_the_papers(here: Path) -> None:
    listed = ceteris("reproduce")
    assert listed.code == 0
    assert "press2021" in listed.out and "arXiv 2108.12409" in listed.out
    names = [paper["name"] for paper in ceteris("reproduce", "--json").json["papers"]]
    assert {"xiong2020", "wortsman2023"} <= set(names)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("pres2021",), "error: no published ablation 'pres2021' — did you mean 'press2021'?"),
        (("somebody2020.yaml", "--budget", "gpu-hour"), "has no sweeps for the budget gpu-hour"),
        (("somebody2020.yaml", "--budget", "days"), "'days' is not one of"),
    ],
)
def test_a_mistake_is_one_line(words: tuple[str, ...], line: str, here: Path) -> None:
    made = ceteris("reproduce", *words)
    assert (made.code, made.out) == (2, "")
    assert line in made.err
    assert len(made.err.splitlines()) == 1
