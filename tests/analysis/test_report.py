"""One page that stands alone, says what the comparison decided, and how to make each row again."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from analysis import commands, figures, methods, reading, report
from analysis.comparison import Comparison, compare
from analysis.results import read_manifest, read_runs
from experiments.record import UserError, read_json, seal, write_json
from tests import PATIENCE, rich_sweep
from tests.conftest import ROOT
from tests.rich_sweep import Variant

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """The text of a page, its ids and links; fails where tags are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given[key] for key in ("href", "src") if key in given]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.handle_starttag(tag, attrs)
        self.open = self.open if tag in VOID else self.open[:-1]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def compared(path: Path) -> tuple[Comparison, Path]:
    manifest, root = read_manifest(path), path.parents[1]
    return compare(manifest, read_runs(manifest, root), root), root


def page(path: Path, changed: str | None = None) -> str:
    found, root = compared(path)
    return report.html(found, read_json(path), root, figures.draw(found, root), changed)


def sentence(found: Comparison, label: str) -> str:
    row = next(row for row in found.rows if row.label == label)
    return " ".join(reading.sentences(found, row))


@pytest.mark.parametrize("name", ["rows", "ladder", "tuned", "factorial"])
def test_the_page_is_whole_stands_alone_and_is_the_same_again(name: str, tmp_path: Path) -> None:
    path = getattr(rich_sweep, f"{name}_sweep")(tmp_path)
    html = page(path)
    assert name != "tuned" or html == page(path)
    read = Page(html)
    assert len(read.ids) == len(set(read.ids))
    assert not read.tags & {"script", "link", "img", "iframe"}
    for link in read.links:  # nothing from anywhere else
        assert link.startswith(("#", "figures/"))
        assert not link.startswith("#") or link[1:] in read.ids
    assert "url(http" not in html and "@import" not in html
    for row in compared(path)[0].rows:
        assert row.label in read.text
    figure, table = (
        [int(n) for n in re.findall(rf"{what} (\d+)\.", read.text)] for what in ("Figure", "Table")
    )
    assert figure == list(range(1, len(figure) + 1)) and table == list(range(1, len(table) + 1))
    for section, there in (("The ladder", "ladder"), ("Tuning", "tuned"), ("Factors", "factorial")):
        assert (f">{section}</h2>" in html) == (name == there)


def test_the_files_lie_where_the_page_looks_for_them(tmp_path: Path) -> None:
    path = rich_sweep.make(tmp_path, "two", [Variant("a"), Variant("b", -0.1)], seeds=3)
    found, root = compared(path)
    paths = report.write(found, read_json(path), root, tmp_path / "out")
    assert paths[0] == tmp_path / "out" / "index.html"
    links = [link for link in Page(paths[0].read_text("utf-8")).links if "figures/" in link]
    assert sorted(links) == sorted(f"figures/{path.name}" for path in paths[1:])
    assert all((tmp_path / "out" / link).stat().st_size for link in links)


def test_labels_are_text_and_never_markup(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script> \"q\" & 'x' {{ 7*7 }}"
    path = rich_sweep.make(tmp_path, "odd", [Variant(bad), Variant("<img src=x>", 0.1)],
                           description=bad)  # fmt: skip
    html = page(path, changed=bad)
    read = Page(html)
    assert not read.tags & {"script", "img"}
    assert "{{ 7*7 }}" in read.text and "49" not in re.findall(r"\{\{.*?\}\}", read.text)


def test_each_row_reads_as_the_table_decided(tmp_path: Path) -> None:
    found, _ = compared(rich_sweep.rows_sweep(tmp_path))
    rotary = sentence(found, "Rotary")
    row = next(row for row in found.rows if row.label == "Rotary")
    d = row.difference
    assert d is not None and d.low is not None and d.high is not None
    assert rotary.startswith(
        f"Rotary is better: {-d.mean:.4f} nats lower [{-d.high:.4f}, {-d.low:.4f}] over 4 seeds,"
        " p < 0.001"
    )
    assert "lower in each of the 4 pairs" in rotary
    assert "−10.0% tokens per second" in rotary
    assert "cannot be told from GPT-2" in sentence(found, "RMSNorm")
    assert "Without seed 2, which has no result." in sentence(found, "Post-LN")
    assert "diverged in 1 of 4 seeds (seed 1 at step" in sentence(found, rich_sweep.ODD)
    assert sentence(found, "NoPE") == "NoPE has no result yet."
    assert reading.headline(found).startswith("3 of 7 changes are better than GPT-2: Rotary most,")
    assert "Rotary reaches GPT-2's final loss with" in rotary


def test_a_row_that_pairing_did_not_help_says_so(tmp_path: Path) -> None:
    rows = [Variant("base"), Variant("loose", -0.5, noise=0.3)]
    found, _ = compared(rich_sweep.make(tmp_path, "loose", rows, seeds=6))
    d = found.rows[1].difference
    assert d is not None and d.pairing is not None and d.pairing > reading.HELPED
    assert "Pairing by seed did not help" in sentence(found, "loose")


def test_null_results_say_what_could_have_been_found(tmp_path: Path) -> None:
    rows = [Variant("base"), Variant("again"), Variant("once more")]
    found, _ = compared(rich_sweep.make(tmp_path, "null", rows))
    headline = reading.headline(found)
    assert headline.startswith("None of the 2 changes can be told from base.")
    assert re.search(r"A true difference of 0\.0\d+ nats would have shown in 80%", headline)


@pytest.mark.parametrize(
    ("rows", "seeds", "said"),
    [
        ([Variant("a"), Variant("b", -1.0)], 1, "One pair of runs a row"),
        ([Variant("a")], 4, "a alone, over 4 seeds: the sd of its loss"),
        ([Variant("a", diverged=[0, 1]), Variant("b")], 2, "The baseline, a, diverged"),
        ([Variant("a", missing=[0, 1]), Variant("b")], 2, "The baseline, a, has not run"),
        ([Variant("a", missing=[0]), Variant("b", missing=[0])], 1, "No run has finished yet"),
        ([Variant("a"), Variant("b", diverged=[0, 1])], 2, "b diverged."),
        ([Variant("a"), Variant("b", missing=[0, 1])], 2, "b has not run yet."),
    ],
)
def test_sweeps_that_decide_nothing_have_a_page_that_says_so(
    rows: list[Variant], seeds: int, said: str, tmp_path: Path
) -> None:
    path = rich_sweep.make(tmp_path, "poor", rows, seeds=seeds)
    assert said in reading.headline(compared(path)[0])
    assert said in Page(page(path)).text
    assert not re.findall('chip (better|worse)"', page(path))


def test_an_edited_run_is_named_among_what_failed(tmp_path: Path) -> None:
    path = rich_sweep.make(tmp_path, "edited", [Variant("a"), Variant("b", -0.1)], seeds=3)
    result = tmp_path / read_json(path)["rows"][1]["runs"]["2"] / "result.json"
    write_json(result, {**read_json(result), "val/loss": 1.0})
    text = " ".join(Page(page(path)).text.split())
    assert "seed 2 does not count: its result, metrics or experiment changed" in text
    assert "1 edited since" in text


def test_only_methods_that_were_used_are_named(tmp_path: Path) -> None:
    alone, _ = compared(rich_sweep.make(tmp_path / "a", "alone", [Variant("a")]))
    assert [name for name, _ in methods.methods(alone)] == ["Loss"]
    tuned, _ = compared(rich_sweep.tuned_sweep(tmp_path / "b"))
    named = dict(methods.methods(tuned))
    assert "Tuning" in named and "Factors" not in named
    assert "over the 1 comparisons" not in named["Verdict"]


def test_a_row_on_other_data_is_not_compared(tmp_path: Path) -> None:
    path = rich_sweep.make(tmp_path, "mixed", [Variant("a"), Variant("b", -0.3)], seeds=3)
    for run in read_json(path)["rows"][1]["runs"].values():
        result = {**read_json(tmp_path / run / "result.json"), "data": "other"}
        write_json(tmp_path / run / "result.json",
                   {**result, "seal": seal(tmp_path / run, result)})  # fmt: skip
    found, _ = compared(path)
    assert sentence(found, "b").startswith("b can't be compared with a: they saw other data.")
    assert "Not alike: data" in Page(page(path)).text


def test_the_commands_write_and_print_without_torch(tmp_path: Path) -> None:
    path = rich_sweep.make(tmp_path, "two", [Variant("a"), Variant("b", -0.1)], seeds=2)
    runs = list(read_json(path)["rows"][1]["runs"].values())
    code = (
        "import sys, run\n"
        "for words in (['report', 'two', '--json'], ['compare', *sys.argv[2:], '--json']):\n"
        "    run.cli([*words, '--runs', sys.argv[1]], standalone_mode=False)\n"
        "assert not {'torch', 'accelerate'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), *runs], cwd=ROOT, text=True,
                          capture_output=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, done.stderr
    decoder = json.JSONDecoder()
    made, end = decoder.raw_decode(done.stdout)
    against = decoder.decode(done.stdout[end:].strip())
    assert made["page"] == str(tmp_path / "sweeps" / "two-report" / "index.html")
    assert all(Path(name).is_file() for name in (made["page"], *made["figures"]))
    assert [run["id"] for run in against["runs"]] == runs
    assert list(against["differences"]) == ["seed"]
    assert all(Path(name).is_file() for name in against["figures"])


# --- commands ------------------------------------------------------------------------------------

SWEEP = """\
base: gpt2-tiny
name: small
set: {training: {tokens: 20e3}, data.validation_fraction: 0.02}
baseline: {label: GPT-2, set: {model.position: none}}
match: params
seeds: [3, 4]
rows:
  - {label: SwiGLU, set: {model.ffn: {name: swiglu, bias: true}}}
  - {label: A/A, seeds: [100, 101]}
tune: {over: training.lr, values: [3e-4, 1e-3]}
"""


def test_each_rows_command_makes_the_very_run(tmp_path: Path, monkeypatch: Any) -> None:
    from experiments import loader
    from sweeps import design
    from sweeps import plan as planning

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "small.yaml"
    file.write_text(SWEEP)
    sweep = design.load(file, ["training.grad_clip=0.7"])
    record = planning.plan(sweep, tmp_path).manifest
    assert len(record["rows"]) > 3
    for row in record["rows"]:
        command = commands.train(record, row, tmp_path)
        head, words, (_, seed) = (words := shlex.split(command))[:3], words[3:-2], words[-2:]
        assert head == ["python", "run.py", "train"]
        name, *overrides = words
        assert loader.run_id(loader.load(name, overrides), int(seed)) == row["runs"]["3"]
    assert commands.again(record) == "python run.py sweep small.yaml training.grad_clip=0.7"
    # Without the sweep file as it was, the run's own experiment is what there is.
    row = record["rows"][1]
    own = f"{tmp_path / row['runs']['3'] / 'experiment.yaml'} --seed 3"
    assert commands.train(record, row, tmp_path, changed=True).endswith(own)
    file.unlink()
    assert commands.train(record, row, tmp_path).endswith(own)


@pytest.mark.parametrize("value", ["yes", "1e-3", 1e-5, True, None, {"name": "swiglu", "a": [1, 2]},
                                   "~", "a b: {c}", 0.1, "Ünï"])  # fmt: skip
def test_a_value_on_the_command_line_is_read_back_as_it_was(value: Any) -> None:
    from experiments.loader import override_value
    from experiments.yaml_text import Mark

    assert override_value(commands.flow(value), Mark("test")) == value


# --- compare -------------------------------------------------------------------------------------


def test_runs_side_by_side_show_only_what_differs(tmp_path: Path) -> None:
    from analysis import runs_compared
    from experiments.record import Run

    rich_sweep.rows_sweep(tmp_path)
    ids = [
        read_json(tmp_path / "sweeps" / "recipe.json")["rows"][i]["runs"]["1"] for i in (0, 2, 6)
    ]
    done, path = Run(tmp_path, ids[0]), tmp_path / ids[1] / "experiment.yaml"
    text = path.read_text().replace('"d_model": 128', '"d_model": 256')
    path.write_text(text)  # its seal does not fit any more
    found = runs_compared.compare([done, *(Run(tmp_path, id) for id in ids[1:])])
    assert dict(found.differences) == {"model.d_model": (128, 256, 128)}
    states = [run["state"] for run in found.as_json()["runs"]]
    assert states == ["done", "edited", "diverged"]
    assert found.as_json()["runs"][1].get("val/loss") is None
    assert any("Edited" in note for note in found.notes)
    paths = runs_compared.write(found, tmp_path / "figures")
    assert [path.suffix for path in paths] == [".svg", ".pdf", ".png", ".csv"]
    assert all(path.name.startswith("compared-") for path in paths)


def test_runs_that_cannot_be_compared_are_errors_of_one_line(tmp_path: Path) -> None:
    from analysis import runs_compared
    from experiments.record import Run

    rich_sweep.make(tmp_path, "two", [Variant("a"), Variant("b")], seeds=1)
    run = Run(tmp_path, read_json(tmp_path / "sweeps" / "two.json")["rows"][0]["runs"]["0"])
    with pytest.raises(UserError, match="two runs or more"):
        runs_compared.compare([run])
    with pytest.raises(UserError, match="named twice"):
        runs_compared.compare([run, run])


def test_a_run_without_a_result_or_a_curve_is_shown_as_it_is(tmp_path: Path) -> None:
    from analysis import runs_compared
    from experiments.record import Run

    for id in ("aaaa-s0", "bbbb-s1"):
        (tmp_path / id).mkdir()
        (tmp_path / id / "experiment.yaml").write_text("model: {d_model: 8}")
    found = runs_compared.compare([Run(tmp_path, "aaaa-s0"), Run(tmp_path, "bbbb-s1")])
    assert dict(found.differences) == {"seed": (0, 1)}
    assert runs_compared.write(found, tmp_path) == []
    assert [run["state"] for run in found.as_json()["runs"]] == ["unfinished", "unfinished"]


def test_of_many_rows_those_with_a_verdict_and_the_largest_are_shown_and_the_page_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "MOST_ROWS", 3)
    path = rich_sweep.rows_sweep(tmp_path)
    found, root = compared(path)
    some = found.largest(3)
    assert [r.label for r in some.rows] == ["GPT-2", "SwiGLU", "Rotary", "ALiBi"]
    assert some.family == found.family == 7 and found.largest(7) is found
    made = figures.draw(found, root)
    forest = next(drawing for drawing in made if drawing.name == "differences")
    assert "Of the 7 rows beside the baseline those 3 that differ most" in forest.caption
    html = report.html(found, read_json(path), root, made)
    assert "The sweep has 7 rows beside the baseline." in Page(html).text
    before, _, after = html.partition('id="row-by-row"')
    rows = after.partition('id="noise"')[0]
    assert "Rotary" in rows and "Post-LN" not in rows
    assert "Post-LN" in before  # in the table


def test_of_an_edited_run_neither_result_nor_curve_is_shown(tmp_path: Path) -> None:
    from analysis import runs_compared
    from experiments.record import Run

    path = rich_sweep.make(tmp_path, "two", [Variant("a"), Variant("b")], seeds=1)
    ids = [row["runs"]["0"] for row in read_json(path)["rows"]]
    with (tmp_path / ids[1] / "metrics.jsonl").open("a") as file:
        file.write('{"tokens": 2000000, "val/loss": 1.0}\n')
    found = runs_compared.compare([Run(tmp_path, id) for id in ids])
    drawn = runs_compared.drawn(found)
    assert drawn is not None and {row[0] for row in drawn.rows} == {ids[0]}
    assert found.notes == (
        f"Edited after it ended, so neither result nor curve is shown: {ids[1]}.",
    )
