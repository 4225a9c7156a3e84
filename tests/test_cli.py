"""A day's work on the command line: train, sweep, look, read, stop, fail, mend, go on."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import run as program
from experiments.record import Run, all_ids, read_json, read_rows
from sweeps import local
from tests import PATIENCE
from tests.command_line import ceteris, desk, files, start
from tests.conftest import ROOT

PARTS = """\
import time
from pathlib import Path
from components.norm import RMSNorm
from components.registry import register

def has_learnt(norm):
    return not norm.weight.is_meta and norm.training and not bool((norm.weight == 1).all())

def there(name):
    return Path(__file__).with_name(name).exists()

@register("norm", "test_patient")
class Patient(RMSNorm):
    \"\"\"From its second step on takes its time while `hold` is there, and waits while `wait` is.

    Ten steps take 20 s then: a signal meets them, however long it is on its way.
    \"\"\"
    def forward(self, x):
        while has_learnt(self) and there("wait"):
            time.sleep(0.02)
        if has_learnt(self) and there("hold"):
            time.sleep(0.2)
        return super().forward(x)

@register("norm", "test_broken")
class Broken(RMSNorm):
    \"\"\"Fails in its second step until a file `mended` is there.\"\"\"
    def forward(self, x):
        if not x.is_meta and has_learnt(self) and not there("mended"):
            raise RuntimeError("a part broke\\nin two")
        return super().forward(x)

@register("norm", "test_exploding")
class Exploding(RMSNorm):
    \"\"\"Is finite in its first step alone.\"\"\"
    def forward(self, x):
        return super().forward(x) * (float("inf") if has_learnt(self) else 1.5)
"""
PAIR = "base: small.yaml\nseeds: [0, 1]\nrows:\n  - {label: RMS, set: {model.norm: rmsnorm}}\n"


def prepare(folder: Path, tiny: Path) -> None:
    """small.yaml (10 steps), parts.py for it, and pair.yaml over it: 2 rows, 2 seeds."""
    (folder / "small.yaml").write_text(
        f"base: {tiny}\nimports: [parts.py]\n"
        "training: {tokens: 2560}\nevaluation: {tokens: 512}\n"
    )
    (folder / "parts.py").write_text(PARTS)
    (folder / "pair.yaml").write_text(PAIR)


@pytest.fixture
def here(tiny_yaml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    prepare(tmp_path, tiny_yaml)
    with desk(tmp_path, monkeypatch) as folder:
        yield folder


@pytest.fixture
def swept(here: Path) -> Path:
    """The same with pair.yaml's runs done."""
    for seed in (0, 1):
        for norm in ("layernorm", "rmsnorm"):
            made = ceteris("train", "small.yaml", f"model.norm={norm}", "--seed", seed)
            assert made.code == 0, made
    assert ceteris("sweep", "pair.yaml").code == 0
    return here


def wait_until(condition: Callable[[], Any]) -> None:
    """Waits; a test that hangs is ended here, after far longer than it takes."""
    end = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > end:
            pytest.fail("it never came to that")
        time.sleep(0.01)


def at_work(root: Path, count: int = 1) -> bool:
    return sum(Run(root, id).live() != {} for id in all_ids(root)) >= count


def counts(name: str = "pair") -> dict[str, int]:
    return dict(ceteris("status", name, "--json").json["counts"])


# --- what every command promises -----------------------------------------------------------------


def commands(group: click.Group) -> Iterator[tuple[str, click.Command]]:
    """Every command, those of a group within as `wandb push`."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from ((f"{name} {inner}", found) for inner, found in commands(command))
        else:
            yield name, command


def test_every_command_that_reads_has_json_and_every_one_that_works_a_dry_run() -> None:
    options = {
        name: {word for option in command.params for word in option.opts}
        for name, command in commands(program.cli)
    }
    assert [name for name in options if "--json" not in options[name]] == []
    assert {name for name in options if "--dry-run" in options[name]} == {
        "train", "sweep", "submit", "retry", "cancel", "reproduce",
    }  # fmt: skip


def test_json_has_a_schema_and_nothing_else_is_on_stdout_nor_written(swept: Path) -> None:
    id = all_ids(Path("runs"))[0]
    before = files(swept)
    for words in [
        ("show", "small.yaml"),
        ("components",),
        ("components", "norm", "rmsnorm"),
        ("plan", "pair.yaml"),
        ("status",),
        ("status", "pair"),
        ("table", "pair"),
        ("power", "pair", "--detect", 0.01),
        ("ledger",),
        ("reproduce",),
        ("generate", id, "--max-tokens", 3),
        ("sample", "pair", "--max-tokens", 3),
        ("train", "small.yaml"),
        ("train", "small.yaml", "--dry-run"),
        ("sweep", "pair.yaml", "--dry-run"),
        ("retry", "pair", "--dry-run"),
        ("cancel", "pair", "--dry-run"),
    ]:
        shown = ceteris(*words, "--json")
        assert (shown.code, shown.json["schema"], shown.err) == (0, 1, ""), words
    assert files(swept) == before


def test_a_dry_run_writes_nothing(here: Path) -> None:
    before = files(here)
    assert ceteris("train", "small.yaml", "--dry-run").code == 0
    plan = ceteris("sweep", "pair.yaml", "--dry-run", "--json").json
    assert (plan["runs"], plan["missing"]) == (4, 4)
    assert files(here) == before


def test_looking_on_and_helping_load_no_torch(here: Path) -> None:
    code = f"""\
import sys; sys.path.insert(0, {str(ROOT)!r})
import run
for words in ["--help", "sweep --help", "status --runs {here}", "status", "components norm"]:
    sys.argv = ["run.py", *words.split()]
    try: run.main()
    except SystemExit as end: assert not end.code, words
    if not words.startswith("components"):
        assert not {{"torch", "numpy", "matplotlib"}} & set(sys.modules), words
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_runs_lie_where_the_option_or_the_environment_says(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ceteris("train", "small.yaml", "--runs", "mine")
    assert made.code == 0
    assert made.err.splitlines()[-1].endswith(" --runs mine")
    Path("also").symlink_to("mine")
    monkeypatch.setenv("CETERIS_RUNS", "also")
    again = ceteris("train", "small.yaml")
    assert (again.code, again.out) == (0, made.out)
    assert "--runs" not in again.err
    assert counts_of_all() == {"done": 1}
    assert not Path("runs").exists()


def counts_of_all() -> dict[str, int]:
    return dict(ceteris("status", "--json").json["counts"])


# --- one run -------------------------------------------------------------------------------------


def test_train_then_generate_then_show_say_the_same_experiment(here: Path) -> None:
    made = ceteris("train", "small.yaml", "--json").json
    folder = Path("runs", made["id"])
    words = ("generate", made["id"][:5], "--prompt", "naïve ", "--max-tokens", 8)
    first, by_path = ceteris(*words), ceteris("generate", folder, *words[2:])
    assert first.code == 0
    assert first.out.startswith("naïve ")
    assert by_path == first
    assert ceteris(*words, "--seed", 1).out != first.out
    assert ceteris(*words, "-s", 3, "--json").json["continuations"][2]["tokens"] <= 8
    assert ceteris("show", folder / "experiment.yaml") == ceteris("show", "small.yaml")
    plan = ceteris("train", "small.yaml", "--dry-run", "--json").json
    assert (plan["id"], plan["state"], plan["steps"]) == (made["id"], "done", made["step"])
    assert plan["parameters"] == made["parameters"]


def test_a_finished_run_is_not_trained_again(here: Path) -> None:
    made = ceteris("train", "small.yaml")
    before = {p: p.stat().st_mtime_ns for p in Path("runs").rglob("*.json*")}
    assert ceteris("train", "small.yaml").out == made.out
    assert {p: p.stat().st_mtime_ns for p in before} == before


def test_a_diverged_run_exits_1_and_says_where(here: Path) -> None:
    made = ceteris("train", "small.yaml", "model.norm=test_exploding", "--json")
    assert (made.code, made.json["status"]) == (1, "diverged")
    assert "diverged: non-finite loss or gradient at step " in made.err
    assert counts_of_all() == {"diverged": 1}


def test_ctrl_c_while_training_exits_130_and_the_same_command_goes_on(here: Path) -> None:
    Path("hold").touch()
    process = start("train", "small.yaml", "model.norm=test_patient")
    wait_until(lambda: at_work(Path("runs")))
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert err.endswith("stopped by SIGINT; what is done is saved, run the same again to go on\n")
    assert counts_of_all() == {"interrupted": 1}
    Path("hold").unlink()
    again = ceteris("train", "small.yaml", "model.norm=test_patient")
    assert again.code == 0
    assert "going on from step " in again.err


# --- sweeps --------------------------------------------------------------------------------------


def test_a_sweep_its_status_and_its_table_in_every_format(here: Path) -> None:
    made = ceteris("sweep", "pair.yaml")
    assert made.code == 0, made
    assert "RMS" in made.out
    assert counts() == {"done": 4}
    looked = ceteris("status", "pair").out
    assert looked.startswith("pair: 4 done")
    assert looked.count("RMS") == 2

    md, tex = (ceteris("table", "pair", "--format", f).out for f in ("md", "latex"))
    assert md.startswith("| Variant")
    assert r"\begin{table}" in tex
    rows = list(csv.DictReader(ceteris("table", "pair", "--format", "csv").out.splitlines()))
    cells = [row["cells"] for row in ceteris("table", "pair", "--json").json["rows"]]
    assert [row["variant"] for row in rows] == ["baseline", "RMS"]
    for row, cell in zip(rows, cells, strict=True):
        assert float(row["val_loss"]) == cell["val_loss"]["value"]
    for name, text in (("t.md", md), ("deep/t.tex", tex)):
        assert ceteris("table", "pair", "--out", name).err.endswith(f"written: {name}\n")
        assert Path(name).read_text() == text
    assert Path("runs/sweeps/pair.md").read_text() == md


def test_a_sweep_that_is_done_starts_nothing(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "Server", None)  # what would start runs
    before = files(swept)
    again = ceteris("sweep", "pair.yaml")
    assert again.code == 0
    assert files(swept) == before
    assert ceteris("sweep", "pair.yaml", "--json").json["title"] == "pair"
    assert ceteris("retry", "pair").code == 0
    assert ceteris("cancel", "pair").out == "nothing\n"


def test_only_what_an_edit_of_the_sweep_or_its_base_adds_is_run(swept: Path) -> None:
    before = all_ids(Path("runs"))
    Path("pair.yaml").write_text(
        PAIR.replace("RMS, set: {model.norm: rmsnorm}", "wide, set: {model.ffn.hidden: 64}")
    )
    plan = ceteris("plan", "pair.yaml", "--json").json
    assert (plan["runs"], plan["missing"]) == (4, 2)
    assert ceteris("sweep", "pair.yaml").code == 0
    assert len(set(all_ids(Path("runs"))) - set(before)) == 2
    assert set(before) <= set(all_ids(Path("runs")))  # nothing is lost
    assert "wide" in (table := ceteris("table", "pair", "--format", "md").out)
    assert "RMS" not in table
    base = Path("small.yaml")
    base.write_text(base.read_text() + "description: edited\n")
    assert ceteris("plan", "pair.yaml", "--json").json["missing"] == 0
    base.write_text(base.read_text().replace("2560", "2816"))
    assert ceteris("plan", "pair.yaml", "--json").json["missing"] == 4


def test_another_sweep_of_the_same_name_is_not_written_over(swept: Path) -> None:
    Path("other").mkdir()
    Path("other/pair.yaml").write_text(PAIR.replace("small.yaml", "../small.yaml"))
    refused = ceteris("sweep", "other/pair.yaml")
    assert refused.code == 2
    assert "the sweep 'pair' is pair.yaml, not other/pair.yaml; give one of them" in refused.err


def test_a_failing_run_is_named_the_others_finish_and_retry_mends(here: Path) -> None:
    Path("bad.yaml").write_text(
        "base: small.yaml\nseeds: [0]\nrows:\n"
        "  - {label: broken, set: {model.norm: test_broken}}\n"
        "  - {label: wild, set: {model.norm: test_exploding}}\n"
    )
    made = ceteris("sweep", "bad.yaml")
    assert made.code == 1
    assert counts("bad") == {"done": 1, "diverged": 1, "failed": 1}
    assert "norm 'test_broken': RuntimeError: a part broke in two" in made.err
    assert made.err.splitlines()[-1] == "next: python run.py retry bad"
    row = {r["label"]: r for r in ceteris("status", "bad", "--json").json["runs"]}["broken"]
    assert "norm 'test_broken': RuntimeError: a part broke in two" in row["note"]
    assert "Traceback" in Path("runs", row["id"], "log.txt").read_text()
    table = ceteris("table", "bad", "--format", "md").out
    assert "Failed in the last attempt: broken seed 0" in table
    assert "† diverged, so not averaged: wild 1/1" in table

    before = files(here)
    (line,) = ceteris("retry", "bad", "--dry-run").out.splitlines()
    assert line.startswith(f"{row['id']}  broken s0  failed: ") and "RuntimeError" in line
    assert files(here) == before
    Path("mended").touch()
    assert ceteris("retry", "bad").code == 0  # a diverged run is a result, not a failure
    assert counts("bad") == {"done": 2, "diverged": 1}


@pytest.mark.parametrize(
    ("outcome", "code", "last"),
    [
        ({"states": {"a": "failed"}}, 1, "next: python run.py retry pair"),
        ({"stopped": True}, 130, "stopped; nothing is lost. Go on with: python run.py retry pair"),
    ],
)
def test_a_sweep_without_one_finished_run_still_ends_as_it_should(
    here: Path, monkeypatch: pytest.MonkeyPatch, outcome: dict[str, Any], code: int, last: str
) -> None:
    monkeypatch.setattr(local, "run_manifest", lambda *_, **__: local.Outcome(**outcome))
    made = ceteris("sweep", "pair.yaml")
    assert made.code == code
    assert "0/2 —" in made.out
    assert "no figure: sweep 'pair' has no finished run to draw" in made.err
    assert made.err.splitlines()[-1] == last


@pytest.fixture
def patient(here: Path) -> Path:
    """The same with a sweep whose runs all take their time while a file `hold` is there."""
    base = Path("small.yaml")
    base.write_text(base.read_text() + "model: {norm: test_patient}\n")
    Path("pair.yaml").write_text(PAIR.replace("model.norm: rmsnorm", "model.ffn.hidden: 64"))
    Path("hold").touch()
    return here


def nobody_at_work() -> bool:
    return not any(Run(Path("runs"), id).locked for id in all_ids(Path("runs")))


def test_a_sweep_stopped_by_ctrl_c_and_then_killed_goes_on_to_the_end(patient: Path) -> None:
    process = start("sweep", "pair.yaml", "--workers", 2)
    wait_until(lambda: at_work(Path("runs")))
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.endswith("nothing is lost. Go on with: python run.py retry pair\n")
    stopped = counts()
    assert stopped.pop("interrupted") in (1, 2)
    assert set(stopped) == {"pending"}

    process = start("sweep", "pair.yaml", "--workers", 2)
    wait_until(lambda: at_work(Path("runs")))
    process.kill()
    process.communicate()
    wait_until(nobody_at_work)
    assert "done" not in counts()

    Path("hold").unlink()
    done = ceteris("sweep", "pair.yaml")
    assert done.code == 0, done
    assert counts() == {"done": 4}
    assert not [name for name in files(Path("runs")) if "tmp" in name or "running" in name]


def test_cancel_stops_the_sweep_of_another_process(patient: Path) -> None:
    said: list[tuple[str, str]] = []

    def cancel() -> None:
        wait_until(lambda: at_work(Path("runs")))
        said.extend(start("cancel", "pair", *more).communicate() for more in (["-n"], []))
        Path("wait").unlink()

    Path("wait").touch()  # the same run is at work for both
    elsewhere = threading.Thread(target=cancel)
    elsewhere.start()
    made = ceteris("sweep", "pair.yaml", "--workers", 1)
    elsewhere.join()
    assert made.code == 130
    assert said[0][0] == said[1][0]
    assert "saves a checkpoint and stops" in said[0][0]
    assert counts() == {"interrupted": 1, "pending": 3}
    assert nobody_at_work()


def test_two_sweeps_at_once_share_their_runs_and_train_each_once(patient: Path) -> None:
    Path("hold").rename("wait")
    other = start("sweep", "pair.yaml", "--workers", 1)

    def let_go() -> None:
        wait_until(lambda: at_work(Path("runs"), 2))
        Path("wait").unlink()

    letting_go = threading.Thread(target=let_go)
    letting_go.start()
    mine = ceteris("sweep", "pair.yaml", "--workers", 1)
    out, err = other.communicate()
    letting_go.join()
    assert (mine.code, other.returncode) == (0, 0), mine.err + err
    assert mine.out == out  # the same table
    for id in all_ids(Path("runs")):
        run = Run(Path("runs"), id)
        assert len(read_json(run / "provenance.json")["attempts"]) == 1
        steps = [r["step"] for r in read_rows(run / "metrics.jsonl") if "train/loss" in r]
        assert steps == sorted(set(steps))


def test_a_table_into_a_pipe_that_closes_is_no_error(swept: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, str(ROOT / "run.py"), "table", "pair", "--format", "json"],
        stdout=writer, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_table_to_a_pipe_is_written_and_the_pipe_stays(swept: Path) -> None:
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert ceteris("table", "pair", "--out", "pipe", "--format", "json").code == 0
    assert json.loads(os.read(reader, 1 << 16))["schema"] == 1
    os.close(reader)
    assert Path("pipe").is_fifo()
