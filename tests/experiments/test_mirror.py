"""wandb's real client against a stand-in for its server: what arrives, and what failures cost.

Training runs in this process, as a person's command; the mirror is a process of its own, as ever.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from experiments import tracking, wandb_client
from experiments.record import Run, UserError, read_json, read_rows
from tests import PATIENCE
from tests.command_line import Outcome, ceteris, start
from tests.slurm_desk import GATED
from tests.wandb_server import KEY, WandbServer

OWN = ("_step", "_timestamp", "_runtime", "seconds", "perf/tokens_per_s")  # beside our rows' keys


class Desk:
    """A folder with a tiny experiment, one that waits at step 12 for a sign, and a server."""

    def __init__(self, folder: Path, tiny: Path, server: WandbServer) -> None:
        self.folder, self.root, self.server = folder, folder / "runs", server
        self.gate = folder / "gate"
        (folder / "gated.py").write_text(GATED)
        schedule = {"name": "gated", "gate": str(self.gate)}
        self.gated = folder / "gated.yaml"
        self.gated.write_text(
            json.dumps(
                {"base": str(tiny), "imports": ["gated.py"], "training": {"schedule": schedule}}
            )
        )

    def train(self, *words: str) -> Outcome:
        return ceteris("train", self.gated, "--runs", self.root, *words)

    def meanwhile(self, act: Callable[[], None], *words: str) -> Outcome:
        """Trains; at step 12, and with the mirror begun, something happens. Then it goes on."""
        failed: list[BaseException] = []

        def acts() -> None:
            try:
                self.held()
                act()
            except BaseException as error:
                failed.append(error)
            finally:
                self.gate.touch()

        thread = threading.Thread(target=acts)
        thread.start()
        done = self.train(*words)
        thread.join()
        assert not failed, failed
        return done

    def held(self) -> None:
        """Waits until training is at the gate, and its mirror has begun and sent rows."""
        until(lambda: self.gate.with_suffix(".reached").exists())
        until(lambda: self.tracked().get("rows"))

    @property
    def run(self) -> Run:
        (path,) = self.root.glob("*/experiment.yaml")
        return Run(self.root, path.parent.name)

    def tracked(self) -> dict[str, Any]:
        found = list(self.root.glob("*/tracking.json"))
        return read_json(found[0]) if found else {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        return read_rows(self.run / "metrics.jsonl")

    def whole(self, done: Outcome | None = None, *words: str) -> None:
        """The run is done, and its record is what it would be without wandb."""
        assert done is None or (done.code == 0 and "val/loss" in done.out), done
        assert self.run.state == "done"
        plain = self.folder / "plain"
        os.environ["WANDB_MODE"] = "disabled"
        assert ceteris("train", self.gated, "--runs", plain, *words).code == 0
        del os.environ["WANDB_MODE"]
        theirs = (plain / self.run.id / "metrics.jsonl").read_bytes()
        assert (self.run / "metrics.jsonl").read_bytes() == theirs
        assert not list((plain / self.run.id).glob("tracking*"))

    def in_wandb(self) -> None:
        """The server has one run, with each row of the record, once and in order."""
        (stored,) = self.server.runs.values()
        assert self.tracked()["state"] == "complete", self.tracked()
        assert [clean(row) for row in stored.history] == self.rows
        assert [row["_step"] for row in stored.history] == list(range(len(self.rows)))
        assert (stored.state, stored.exit_code) == ("finished", 0)

    def push(self) -> Outcome:
        """As a person does it; in a process of its own, since it leaves wandb's end out."""
        process = start("wandb", "push", "--runs", self.root)
        out, err = process.communicate(timeout=PATIENCE)
        return Outcome(process.returncode, out, err)


def clean(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in OWN}


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to that"
        time.sleep(0.05)


@pytest.fixture
def here(tmp_path: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    with WandbServer(tmp_path / "wandb") as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        for name in ("WANDB_MODE", "WANDB_DATA_DIR"):
            monkeypatch.delenv(name, raising=False)
        for name in ("LEAVE_SECONDS", "HURRY_SECONDS"):  # on a busy machine a mirror takes longer
            monkeypatch.setattr(tracking, name, PATIENCE)
        monkeypatch.chdir(tmp_path)
        yield Desk(tmp_path, tiny_yaml, server)


READ_BACK = """
import json, sys, wandb
(run,) = wandb.Api().runs("me/lab")
rows = list(run.scan_history())
print(json.dumps({"rows": rows, "summary": dict(run.summary), "config": run.config,
                  "state": run.state, "type": run.job_type}, default=dict))
"""


def test_what_the_api_reads_is_the_record_row_for_row(here: Desk) -> None:
    here.gate.touch()
    done = here.train("tracking.wandb.project=lab")
    here.whole(done)
    here.in_wandb()
    asked = subprocess.run([sys.executable, "-c", READ_BACK], capture_output=True, check=True)
    found = json.loads(asked.stdout)
    result = read_json(here.run / "result.json")
    assert [clean(row) for row in found["rows"]] == here.rows
    speeds = {r["step"]: r["perf/tokens_per_s"] for r in read_rows(here.run / "timing.jsonl")}
    trained = [row for row in found["rows"] if "train/loss" in row]
    assert {row["step"]: row["perf/tokens_per_s"] for row in trained} == speeds
    for key in ("val/loss", "val/bpb", "best/val/loss", "status", "tokens_per_s", "tokens"):
        assert found["summary"][key] == result[key]
    assert found["config"]["model"]["norm"]["name"] == "layernorm"
    assert found["config"]["parameters"] == result["parameters"]
    assert found["config"]["flops_per_token"] == result["flops_per_token"]
    assert (found["state"], found["type"]) == ("finished", "train")
    assert here.tracked()["state"] == "complete" and here.tracked()["url"] in done.err
    (stored,) = here.server.runs.values()
    axes = stored.raw_config["_wandb"]["value"]["m"]
    named = {axis.get("1") or axis.get("2"): axis for axis in axes}
    assert named["val/*"]["5"] and axes[named["val/*"]["5"] - 1]["1"] == "tokens"
    assert not list((here.root / "wandb").glob("run-*")), "what has arrived is kept twice"


def test_no_key_is_written_anywhere(here: Desk) -> None:
    here.gate.touch()
    said = here.train("tracking.wandb.project=lab")
    here.server.key = "e" * 40  # so that ours is refused
    refused = here.push()
    assert refused.code == 2 and "401" in refused.err
    told = ceteris("train", here.gated, "--runs", here.root, f"tracking.wandb.api_key={KEY}")
    assert told.code == 2 and "api_key" in told.err
    words = [said.out, said.err, refused.out, refused.err, told.out, told.err]
    for path in here.folder.rglob("*"):
        if path.is_file():
            words.append(path.read_bytes().decode(errors="replace"))
    assert len(words) > 20 and not any(KEY in text for text in words)


def test_offline_files_hold_the_record_and_a_push_brings_it_once(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    here.gate.touch()
    here.whole(here.train())
    folder = Path(here.tracked()["folder"])
    assert folder.parent == here.root / "wandb" and here.tracked()["state"] == "complete"
    assert [clean(row) for row in inspected(folder)] == here.rows
    assert sum(wandb_client.kept_rows(next(folder.glob("*.wandb")))) == len(here.rows)
    assert not here.server.requests
    assert here.push().code == 0
    here.in_wandb()
    again = here.push()
    assert again.code == 0 and " 0 rows added" in again.err
    here.in_wandb()
    synced = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder)], capture_output=True, text=True
    )
    assert synced.returncode == 0
    here.in_wandb()


def test_rows_missing_in_wandbs_own_file_are_told(tmp_path: Path, here: Desk) -> None:
    file = tmp_path / "cut.wandb"
    here.gate.touch()
    assert here.train("tracking.wandb.mode=offline").code == 0
    whole = next(Path(here.tracked()["folder"]).glob("*.wandb")).read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    session: Any = SimpleNamespace(settings=SimpleNamespace(sync_file=str(file)))
    with pytest.raises(wandb_client.Unreachable, match=r"has \d+ of 19 rows; is its disk full"):
        wandb_client.confirm(tracking.Place("offline", "lab"), session, len(here.rows))


def synced(folder: Path) -> None:
    words = [sys.executable, "-m", "wandb", "sync", str(folder)]
    assert subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.slow
def test_part_offline_then_online_then_a_sync_of_everything_adds_no_row(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    process = start("train", here.gated, "--runs", here.root, "execution.checkpoint_minutes=0")
    here.held()
    process.send_signal(signal.SIGTERM)
    here.gate.touch()
    process.communicate(timeout=PATIENCE)
    here.server.key = "e" * 40  # so that a push fails, and what is offline is still known after
    assert here.push().code == 2
    here.server.key = KEY
    shutil.copytree(here.root, here.folder / "copy", symlinks=True)
    monkeypatch.delenv("WANDB_MODE")
    assert here.train().code == 0
    here.in_wandb()
    synced(here.root / "wandb")
    here.in_wandb()
    (kept,) = (here.root / "wandb").glob("offline-run-*")
    # a copied folder has its own files, and leaves these alone
    monkeypatch.setenv("WANDB_MODE", "offline")
    done = ceteris("train", here.gated, "--runs", here.folder / "copy")
    assert done.code == 0 and kept.is_dir(), done.err
    (own,) = (here.folder / "copy" / "wandb").glob("offline-run-*")
    assert len(inspected(own)) == len(here.rows)


@pytest.mark.slow
def test_what_goes_on_offline_after_it_was_online_is_left_to_push(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = start("train", here.gated, "--runs", here.root, "execution.checkpoint_minutes=0")
    here.held()
    process.kill()
    process.communicate()
    until(lambda: here.tracked()["state"] == "complete")
    here.gate.touch()
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert here.train().code == 0
    assert [clean(row) for row in inspected(Path(here.tracked()["folder"]))] == here.rows
    (stored,) = here.server.runs.values()
    part = len(stored.history)
    synced(here.root / "wandb")
    assert len(stored.history) == part < len(here.rows)
    assert here.push().code == 0
    here.in_wandb()


def test_ctrl_c_of_a_push_to_a_silent_server_is_heard_at_once(here: Desk) -> None:
    here.gate.touch()
    assert here.train("tracking.wandb.mode=disabled").code == 0
    here.server.fail("graphql", "hang")
    process = start("wandb", "push", "--runs", here.root)
    until(lambda: here.server.operations)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130 and err.count("\n") == 1


def test_rows_that_others_added_are_told(here: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    here.gate.touch()
    assert here.train().code == 0
    (stored,) = here.server.runs.values()
    stored.history.append({**stored.history[-1], "_step": len(here.rows)})
    told = here.push()
    assert told.code == 1 and "20 rows in wandb, and our record 19" in told.err


def inspected(folder: Path) -> list[dict[str, Any]]:
    """An offline run's rows by wandb's own reader."""
    words = [sys.executable, "-m", "wandb", "leet", "inspect", str(folder), "--json"]
    told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    records = [json.loads(line) for line in told.splitlines()]
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    return [{k: json.loads(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]


@pytest.mark.slow
def test_more_training_is_pushed_after_what_is_there(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    process = start("train", here.gated, "--runs", here.root)
    until(lambda: here.gate.with_suffix(".reached").exists())
    process.send_signal(signal.SIGTERM)
    here.gate.touch()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    part = len(here.rows)
    assert here.push().code == 0
    (stored,) = here.server.runs.values()
    assert len(stored.history) == part and stored.preempting and stored.exit_code
    assert here.train().code == 0
    done = here.push()
    assert f" {len(here.rows) - part} rows added" in done.err and part < len(here.rows)
    here.in_wandb()


@pytest.mark.parametrize(
    "checkpoints",
    [
        pytest.param(True, id="an older checkpoint"),
        pytest.param(False, id="none", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_on_behind_its_last_row_is_one_curve(here: Desk, checkpoints: bool) -> None:
    often = ["execution.log_every=1", f"execution.checkpoint_minutes={0 if checkpoints else 60}"]
    process = start("train", here.gated, "--runs", here.root, *often)
    here.held()
    (stored,) = here.server.runs.values()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    until(lambda: here.tracked()["state"] == "complete")  # its mirror ends with it
    assert stored.state == "failed"
    before = [clean(row) for row in stored.history]
    assert before == here.rows and before[-1]["step"] == 12
    for newest in sorted((here.run / "checkpoints").glob("step-*"))[-1:]:
        shutil.rmtree(newest)
    here.gate.touch()
    done = here.train(*often)
    assert done.code == 0 and ("going on from step 11" in done.err) == checkpoints
    here.in_wandb()
    assert here.rows[: len(before)] == before


# --- what fails ----------------------------------------------------------------------------------


def test_no_server_at_the_start(here: Desk) -> None:
    here.server.stop()
    here.gate.touch()
    done = here.train()
    here.whole(done)
    assert "can't be reached" in done.err and "wandb push" in done.err
    assert [clean(row) for row in inspected(Path(here.tracked()["folder"]))] == here.rows
    here.server.start()
    assert here.push().code == 0
    here.in_wandb()


def test_nobody_is_logged_in(here: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    here.gate.touch()
    done = here.train("tracking.wandb.project=lab")
    here.whole(done)
    assert "wandb login" in done.err and here.tracked()["mode"] == "offline"
    refused = here.push()
    assert refused.code == 2 and len(refused.err.splitlines()) == 1


def gone(server: WandbServer) -> None:
    server.stop()


def failing(what: str, how: int | str, times: int | None = None) -> Callable[[WandbServer], None]:
    return lambda server: server.fail(what, how, times)


slow = pytest.mark.slow
LAST = "training.schedule.at=39"  # the gate stands before the last step
MIDWAY = [  # what happens to the server, and whether all arrives nevertheless
    pytest.param([], gone, False, id="gone", marks=slow),
    pytest.param([LAST], gone, False, id="gone at the end", marks=slow),
    pytest.param([], failing("file_stream", "hang"), False, id="silent", marks=slow),
    pytest.param([], failing("file_stream", 401), False, id="401"),
    pytest.param([], failing("file_stream", 404), False, id="404", marks=slow),
    pytest.param([], failing("file_stream", 429, 1), True, id="429 for a while"),
    pytest.param([], failing("file_stream", 500, 1), True, id="500 for a while", marks=slow),
    pytest.param([], failing("file_stream", 500), False, id="500", marks=slow),
]


@pytest.mark.parametrize(("words", "fail", "arrives"), MIDWAY)
def test_a_server_that_fails_midway_costs_the_run_nothing(
    here: Desk, words: list[str], fail: Callable[[WandbServer], None], arrives: bool
) -> None:
    done = here.meanwhile(lambda: fail(here.server), *words)
    here.whole(done, *words)
    record = here.tracked()
    assert (record["state"] == "complete") == arrives, record
    assert arrives or (record["why"] and record["why"] in done.err and "wandb push" in done.err)
    here.server.heal()
    if here.server.listener is None:
        here.server.start()
    assert here.push().code == 0
    here.in_wandb()


@pytest.mark.parametrize(
    "status", [401, pytest.param(500, marks=slow), pytest.param(429, marks=slow)]
)
def test_a_server_that_refuses_to_begin(here: Desk, status: int) -> None:
    here.server.fail("graphql", status)
    here.gate.touch()
    done = here.train()
    here.whole(done)
    assert here.tracked()["mode"] == "offline" and here.tracked()["why"] in done.err
    here.server.heal()
    assert here.push().code == 0
    here.in_wandb()


def mirrors(name: str) -> list[psutil.Process]:
    """The mirror (`experiments.mirror`) or wandb's own process (`wandb-core`) of this process."""
    family = psutil.Process().children(recursive=True)
    return [child for child in family if name in " ".join(child.cmdline())]


def test_wandbs_own_process_killed(here: Desk) -> None:
    def kill() -> None:
        (core,) = mirrors("wandb-core")
        core.kill()

    here.whole(here.meanwhile(kill))
    here.in_wandb()  # it was begun again


def test_the_mirror_killed(here: Desk) -> None:
    def kill() -> None:
        (process,) = mirrors("experiments.mirror")
        process.kill()

    done = here.meanwhile(kill)
    here.whole(done)
    assert "without a word" in done.err and "wandb push" in done.err
    assert here.push().code == 0
    here.in_wandb()


@pytest.mark.slow
def test_a_full_disk_for_wandbs_files(here: Desk, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = f"mount -t tmpfs -o size=300k none {small}"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no private mount of a small disk: needs root")
    here.gate.touch()
    words = [sys.executable, str(Path(tracking.__file__).parent.parent / "run.py"), "train"]
    words += [str(here.gated), "--runs", str(here.root), "execution.log_every=1"]
    words += ["training.tokens=204800"]
    fill = f'{mount}; exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", fill, "sh", *words],
        env={**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(small)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert here.run.state == "done" and len(here.rows) > 800
    why = here.tracked()["why"]
    assert ("disk full" in why or "No space left" in why) and why in done.stderr
    assert here.push().code == 0
    here.in_wandb()


# --- whether, and where --------------------------------------------------------------------------

CASES: list[tuple[dict[str, Any], dict[str, str], tuple[str, str] | None]] = [
    ({}, {}, None),
    ({"project": "lab"}, {}, ("online", "lab")),
    ({"mode": "offline"}, {}, ("offline", "ceteris")),
    ({"project": "lab", "mode": "disabled"}, {}, None),
    ({}, {"WANDB_API_KEY": "k" * 40}, ("online", "ceteris")),
    ({}, {"WANDB_API_KEY": "k" * 40, "WANDB_MODE": "disabled"}, None),
    ({"mode": "online"}, {"WANDB_MODE": "offline"}, ("offline", "ceteris")),
    ({}, {"WANDB_MODE": "dryrun", "WANDB_PROJECT": "other"}, ("offline", "other")),
    ({"project": "lab"}, {"WANDB_PROJECT": "other"}, ("online", "lab")),
    ({"project": "lab"}, {"WANDB_DISABLED": "true"}, None),
    ({}, {"NETRC": "netrc"}, ("online", "ceteris")),
    ({}, {"NETRC": "netrc", "WANDB_BASE_URL": "http://elsewhere:8080"}, None),
]


@pytest.mark.parametrize(("wanted", "variables", "expected"), CASES)
def test_whether_and_where_a_run_is_mirrored(
    wanted: dict[str, Any],
    variables: dict[str, str],
    expected: tuple[str, str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {'k' * 40}\n")
    monkeypatch.chdir(tmp_path)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    place = tracking.place({"wandb": wanted})
    assert (place and (place.mode, place.project)) == expected


ODD: list[dict[str, str]] = [
    {"NETRC": "damaged"},
    {"WANDB_BASE_URL": "http://[bad"},
    {"WANDB_CONFIG_DIR": "config"},
]


@pytest.mark.parametrize("variables", ODD, ids=lambda v: next(iter(v)))
def test_a_login_that_cannot_be_read_is_none(
    variables: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged").write_bytes(b"machine caf\xe9.org login a password b\n")
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "settings").write_bytes(b"[default\nbase_url = \xff")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tracking.place({}) is None
    assert tracking.place({"wandb": {"mode": "disabled"}}) is None


def test_variables_that_name_a_run_are_ours_to_choose(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID", "WANDB_RUN_GROUP", "WANDB_NAME"):
        monkeypatch.setenv(name, "other")
    monkeypatch.setenv("WANDB_RESUME", "must")
    monkeypatch.setenv("WANDB_TAGS", "mine")
    monkeypatch.setenv("WANDB_API_KEY", f" {KEY}\n")
    here.gate.touch()
    assert here.train().code == 0
    here.in_wandb()
    (stored,) = here.server.runs.values()
    assert (stored.id, stored.project) == (here.tracked()["id"], "ceteris")
    assert (stored.group, stored.name, stored.tags) == ("", here.run.id, ["mine"])


@pytest.mark.parametrize("damage", ['{"a"', "[1]", '{"group": {}, "online": 0}'])
def test_a_damaged_tracking_record_is_written_anew(here: Desk, damage: str) -> None:
    here.gate.touch()
    assert here.train("tracking.wandb.mode=disabled").code == 0
    (here.run / "tracking.json").write_text(damage)
    assert here.push().code == 0
    here.in_wandb()


def test_a_mode_that_is_none_is_told_before_anything_runs(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "on-line")
    told = here.train()
    assert (told.code, told.err.count("\n")) == (2, 1) and "WANDB_MODE" in told.err
    assert not here.root.exists() or not list(here.root.glob("*/provenance.json"))
    with pytest.raises(UserError, match="WANDB_MODE"):
        tracking.place({})


@pytest.mark.parametrize("name", ["a/b", "why?", "a" * 129, "' '"])
def test_a_project_that_wandb_refuses_is_told_with_its_place(here: Desk, name: str) -> None:
    told = here.train(f"tracking.wandb.project={name}")
    assert told.code == 2 and "tracking.wandb.project" in told.err
