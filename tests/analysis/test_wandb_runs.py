"""A sweep's table goes to wandb and comes back the same; other programs' runs make a table too."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from analysis import render, results, table
from analysis.wandb_report import report
from experiments.record import UserError
from experiments.tracking import Place
from tests import PATIENCE
from tests.analysis.conftest import Outcome, write_run, write_sweep
from tests.analysis.test_scored import record, write_score
from tests.conftest import ROOT
from tests.wandb_server import Stored, WandbServer

ROWS: list[tuple[str, str, float, list[Outcome]]] = [
    ("GPT-2", "baseline", 0.0, [4.0, 4.02]),
    ("A&B_5.0% $x|<y>", "rows", 0.066, [3.95, 3.97]),
    ("LSTM", "ladder", -0.002, [4.4, "diverged"]),
    ("NoPE", "leave_one_out", 0.0, [None, "failed"]),
]
PRELUDE = """
import json, sys
from pathlib import Path
from analysis import render, results, table, wandb_report, wandb_runs, wandb_summary
from experiments import mirror
from experiments import wandb_client as client
from experiments.record import Run, UserError
from experiments.tracking import Place
root, place = Path(sys.argv[1]), Place(sys.argv[2], "lab")
sweep = json.loads((root / "sweeps" / "odd_names.json").read_text())
def pull(*args, **how):
    try:
        made, runs, notes = wandb_runs.pulled(*args, **how)
        made = table.ablation_table(made, runs)
        return {"csv": render.csv_text(made), "notes": notes, "caption": made.caption}
    except UserError as error:
        return {"error": str(error)}
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sweep with scores, a divergence, a failure and a gap, with what a push needs."""
    root = tmp_path / "runs"
    path = write_sweep(root, ROWS)
    for row in (0, 1):
        for seed in (0, 1):
            score = record(0.5 + 0.01 * seed + 0.2 * row, tokens=10000, settings={})
            write_score(root, row, seed, "quiz,5shot", score)
    for folder in root.glob("0*"):
        (folder / "experiment.yaml").write_text("model: {norm: {name: layernorm}}\n")
        provenance = {"seed": int(folder.name[-1]), "attempts": [{"time": "now"}]}
        (folder / "provenance.json").write_text(json.dumps(provenance))
        if (folder / "result.json").exists():
            result = {**json.loads((folder / "result.json").read_text()), "step": 0}
            (folder / "result.json").write_text(json.dumps(result))
    sweep = json.loads(path.read_text())
    for row in sweep["rows"]:
        row |= {"experiment": {"model": {"norm": {"name": row["label"]}}}, "changes": {}}
    path.write_text(json.dumps({**sweep, "seeds": [0, 1]}))
    return root


@pytest.fixture
def server(tmp_path: Path) -> Iterator[WandbServer]:
    with WandbServer(tmp_path / "server") as server:
        yield server
        assert not server.errors


Act = Callable[..., Any]


@pytest.fixture
def act(server: WandbServer, root: Path) -> Act:
    """Runs lines of Python in a process that has wandb; returns the last line's value."""

    def act(program: str, mode: str = "online", **env: str) -> Any:
        *before, last = program.strip().splitlines()
        code = "\n".join((PRELUDE, *before, f"print(json.dumps({last}))"))
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, str(root), mode],
            env={**server.env, "PYTHONPATH": str(ROOT), **env},
            cwd=root,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return act


def from_disk(root: Path) -> table.Table:
    manifest = results.read_manifest(root / "sweeps" / "odd_names.json")
    return table.ablation_table(manifest, results.read_runs(manifest, root))


LOG = "wandb_summary.summarise(root, sweep, place)"


def test_the_table_the_figure_and_the_curves_are_there_once_for_each_change(
    act: Act, server: WandbServer, root: Path
) -> None:
    url, config, summary, shown = act(
        f"""
url = {LOG}
run = client.api(place).run("me/lab/" + url.rpartition("/")[2])
path = run.summary_metrics["ablation"]["path"]
shown = json.load(run.file(path).download(str(root / "down")))
[url, run.config, run.summary_metrics, shown]"""
    )
    (run,) = server.runs.values()
    assert (run.name, run.group, run.job_type) == ("odd_names table", "odd_names", "summary")
    assert run.tags == ["sweep:odd_names", "summary"]
    assert url == f"{server.url}/me/lab/runs/{run.id}"
    made = from_disk(root)
    assert config["caption"] == made.caption and config["footnotes"] == list(made.footnotes)
    assert (summary["sweep/done"], summary["sweep/diverged"], summary["sweep/planned"]) == (5, 1, 8)
    assert summary["delta/A&B_5.0% $x|<y>"] == pytest.approx(-0.05)
    assert {"figure", "curves_table"} <= summary.keys()
    rows = [dict(zip(shown["columns"], row, strict=True)) for row in shown["data"]]
    assert [row["Variant"] for row in rows] == [label for label, *_ in ROWS]
    assert rows[1]["Params"] == "1.12M ≈" and rows[2]["Val loss"] == "† 1/2"
    assert rows[1]["val_loss/sd"] == made.rows[1].cells[5].details["sd"]
    assert rows[0]["quiz,5shot:acc"] == pytest.approx(0.505) and rows[3]["val_loss"] is None
    assert act(f"[{LOG}, {LOG}]") == [url, url]
    assert len(run.history) == 1
    write_run(root / "0000000003-s0", 0, 4.2)
    assert act(LOG) == url
    assert (len(run.history), run.summary["sweep/done"]) == (2, 6)
    assert len(server.runs) == 1


@pytest.mark.slow
def test_what_the_server_refused_is_logged_the_next_time(act: Act, server: WandbServer) -> None:
    server.fail("file_stream", 404)
    lines = (
        "client.COUNT_TRIES = 1",
        f"try: {LOG}",
        "except UserError as error: said = str(error)",
        "said",
    )
    assert "0 of 1 rows" in act("\n".join(lines))
    server.heal()
    act(LOG)
    (run,) = server.runs.values()
    assert len(run.history) == 1 and run.summary["sweep/done"] == 5


@pytest.mark.slow
def test_offline_the_newest_files_take_the_place_of_the_earlier(act: Act, root: Path) -> None:
    first = Path(act(LOG, "offline"))
    assert first.parent == root / "wandb" and Path(act(LOG, "offline")) == first
    text = subprocess.run(
        [sys.executable, "-m", "wandb", "leet", "inspect", first, "--json"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (row,) = (r["history"]["item"] for r in map(json.loads, text.splitlines())
              if r["type"] == "history")  # fmt: skip
    assert row["ablation.nrows"] == 4 and row["figure.format"] == "png"
    write_run(root / "0000000003-s0", 0, 4.2)
    second = Path(act(LOG, "offline"))
    assert second.is_dir() and not first.exists()
    for mark in ("synced", "syncstate"):  # as `wandb sync` leaves them
        (second / f"run-{second.name.split('-', 3)[-1]}.wandb.{mark}").touch()
    (root / "0000000003-s1" / "failure.json").unlink()
    assert Path(act(LOG, "offline")).is_dir() and second.is_dir()  # it is the server's, too


PUSH = """
runs = [Run(root, id) for row in sweep["rows"] for id in row["runs"].values()]
pushed = [mirror.push(run, place, "odd_names") for run in runs if run.folder.exists()]
alone = pull(place, "odd_names")
wandb_summary.summarise(root, sweep, place)
[alone, pull(place, "odd_names"), pull(place, "odd_names", baseline="LSTM")]
"""


def test_a_pulled_table_is_that_from_disk(act: Act, server: WandbServer, root: Path) -> None:
    alone, whole, other = act(PUSH)
    made = from_disk(root)
    assert whole == {"csv": render.csv_text(made), "notes": [], "caption": made.caption}
    lines = whole["csv"].splitlines()
    rest = [line.partition(",")[2] for line in lines[:-1]]  # but the last, with a run not begun
    assert [line.partition(",")[2] for line in alone["csv"].splitlines()[:-1]] == rest
    assert other["csv"].splitlines()[1].startswith("ladder,LSTM,1,2,1,1051078,0.0,")
    add(server, "new", 3.0, variant="new", run="f", group_="odd_names", type_="train")
    outdated = act('pull(place, "odd_names")')
    assert "odd_names table is older than its runs" in outdated["notes"][1]
    assert "rows,new,0," in outdated["csv"]


def add(
    server: WandbServer, id: str, loss: Any = None, state: str = "finished", group_: str = "G",
    type_: str = "", **config: Any,
) -> None:  # fmt: skip
    run = Stored("me", "lab", id, len(server.runs), id, group_, type_, state=state)
    run.raw_config = {key: {"value": value} for key, value in config.items()}
    run.summary = {"eval": {"loss": loss}, "_step": 5} if loss is not None else {}
    server.projects.add(("me", "lab"))
    server.runs["me", "lab", id] = run


def test_the_runs_of_other_programs_make_a_table(act: Act, server: WandbServer) -> None:
    for seed in range(60):  # more than a page
        for name, loss in (("sgd", 3.0), ("adam", 2.5)):
            add(server, f"{name}{seed}", loss + seed / 100, optimizer={"name": name}, lr=seed)
    add(server, "lion0", "NaN", optimizer={"name": "lion"}, seed=7)
    add(server, "lion1", 2.0, "crashed", optimizer={"name": "lion"}, seed=8)
    add(server, "muon0", 2.2, optimizer={"name": "muon"}, seed=3)
    add(server, "muon1", 2.1, optimizer={"name": "muon"}, seed=3)
    add(server, "muon2", 9.9, "running", optimizer={"name": "muon"}, seed=3)
    add(server, "table", None, type_="summary")
    found = act('pull(place, "G", by="optimizer.name", baseline="sgd", metric="eval.loss")')
    lines = [line.split(",") for line in found["csv"].splitlines()]
    assert [line[1:5] for line in lines[1:]] == [
        ["sgd", "60", "60", "0"], ["adam", "60", "60", "0"],
        ["lion", "0", "2", "1"], ["muon", "1", "1", "0"],
    ]  # fmt: skip
    at = lines[0].index("delta_val_loss")
    assert float(lines[2][at]) == pytest.approx(-0.5) and float(lines[4][at - 6]) == 2.1
    assert "bits per byte: mean" in found["caption"]
    assert "muon seed 3: of 3 runs muon1 is taken" in found["notes"][1]


def test_what_can_not_be_pulled_is_said_in_one_line(act: Act, server: WandbServer) -> None:
    for name in ("sgd", "adam"):
        add(server, name, 3.0, optimizer={"name": name}, seed=0, same=1)
    add(server, "fresh", None, "running", group_="H", variant="a")
    loss = 'metric="eval.loss"'
    calls = {
        'Place("online", "lap"), "G"': "no project 'me/lap'",
        'place, "F"': "no runs of group 'F' in 'me/lab' in wandb (known: G, H)",
        'place, "H"': "none of the 1 runs of group 'H' has finished",
        'place, "G"': "has val/loss; say --metric KEY — did you mean 'eval.loss'?",
        f'place, "G", {loss}': "say --by KEY, of: optimizer.name",
        f'place, "G", {loss}, by="optimiser.name"': "did you mean 'optimizer.name'",
        f'place, "G", {loss}, by="optimizer.name"': "--baseline LABEL, of: sgd, adam",
        f'place, "G", {loss}, by="optimizer.name", baseline="sdg"': "did you mean 'sgd'",
    }
    asked = ", ".join(f"pull({call})" for call in calls)
    for found, words in zip(act(f"[{asked}]"), calls.values(), strict=True):
        assert words in found["error"] and "\n" not in found["error"]
    assert "not logged in" in act('pull(place, "G")', WANDB_API_KEY="")["error"]
    server.stop()
    assert "\n" not in act('pull(place, "G")')["error"]


@pytest.mark.slow
def test_a_report_saved_again_is_the_same_one_and_keeps_what_people_wrote(
    act: Act, server: WandbServer, root: Path
) -> None:
    server.projects.add(("me", "lab"))
    save = "wandb_report.report(root, sweep, place)"
    first, second = act(f"[{save}, {save}]")
    assert first == second and len(server.reports) == 1
    write_run(root / "0000000003-s0", 0, 4.2)
    act(
        f"""
page = wandb_report.library().Report.from_url({first!r})
page.blocks = [*page.blocks, wandb_report.library().P("It is the norm.")]
page.save()
{save}"""
    )
    (view,) = server.reports.values()
    text, blocks = view["spec"], json.loads(view["spec"])["blocks"]
    assert view["displayName"] == "odd_names" and text.count("It is the norm.") == 1
    (shown,) = (block["content"] for block in blocks if block["type"] == "markdown-block")
    assert shown == render.markdown(from_disk(root))
    sets = [b["metadata"]["runSets"][0] for b in blocks if b["type"] == "panel-grid"]
    wanted = [(f["key"]["name"], f["op"], f["value"]) for f in sets[0]["filters"]["filters"]]
    assert wanted == [("tags", "IN", ["sweep:odd_names"]), ("jobType", "=", "train")]
    assert sets[0]["grouping"] == [{"section": "config", "name": "variant.value"}]
    server.reports.clear()  # deleted in the browser
    act(save)
    assert len(server.reports) == 1


def test_a_report_without_its_extra_says_what_to_install(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.reports.v2", None)
    with pytest.raises(UserError, match=r"pip install 'ceteris\[report\]'"):
        report(root, {"name": "odd_names"}, Place("online", "lab"))
    with pytest.raises(UserError, match="offline"):
        report(root, {"name": "odd_names"}, Place("offline", "lab"))
