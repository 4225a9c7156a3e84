"""With accounting: full queues, accounts that are not ours, and what sacct remembers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.record import read_json, write_json
from sweeps import scheduler
from tests.command_line import ceteris, desk
from tests.slurm import PrivateSlurm
from tests.slurm_desk import Desk


@pytest.fixture
def here(
    slurm_accounting: PrivateSlurm, tmp_path: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    with desk(tmp_path, monkeypatch):
        made = Desk(tmp_path, tiny_yaml)
        made.cluster(account="lab")
        yield made


def test_a_full_queue_takes_what_it_can_and_the_rest_later(here: Desk) -> None:
    here.cluster(account="lab", qos="few", sbatch={"hold": True})  # two jobs of a user at a time
    full = ceteris("submit", "tiny-sweep.yaml", "--cluster", "cluster.yaml")
    assert full.code == 2
    assert full.out.startswith("job ") and "2 runs" in full.out
    (error,) = [line for line in full.err.splitlines() if line.startswith("error:")]
    assert "2 runs were not taken" in error and "QOSMaxSubmitJobPerUserLimit" in error
    assert sorted(here.states("tiny").values()) == ["pending", "pending", "queued", "queued"]
    again = ceteris("submit", "tiny-sweep.yaml", "--cluster", "cluster.yaml")
    assert (again.code, again.out) == (2, "")
    assert again.err.startswith("error: ") and "QOSMaxSubmitJobPerUserLimit" in again.err
    assert len([*(here.root / "slurm").glob("*/submission.json")]) == 1  # nothing of the refused
    assert sorted(here.states("tiny").values()) == ["pending", "pending", "queued", "queued"]
    ceteris("cancel", "tiny")
    here.until(lambda: not scheduler.ask("squeue", "-h").strip())
    here.cluster(account="lab")
    assert "4 submitted now" in here.submit("tiny").err
    here.done("tiny")


@pytest.mark.parametrize("key", ["account", "qos"])
def test_what_is_not_ours_is_refused_at_its_line(here: Desk, key: str) -> None:
    here.cluster(**{"account": "lab", key: "nobodys"})
    refused = ceteris("submit", "tiny-sweep.yaml", "--cluster", "cluster.yaml")
    assert refused.code == 2
    assert refused.err.startswith("error: cluster.yaml:1:"), refused.err
    assert f": {key}: nobodys: Slurm refuses it: sbatch: " in refused.err
    assert f"Invalid {key}" in refused.err
    assert refused.err.count("\n") == 1


def test_what_squeue_has_forgotten_the_accounting_tells(
    here: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.cluster(account="lab", setup=["exit 7"])
    here.submit("tiny")
    here.wait("tiny", lambda states: set(states.values()) == {"failed"})
    job = here.job("tiny", "RMSNorm-1")
    here.until(lambda: "FAILED" in scheduler.ask("sacct", "-n", "-X", "-o", "State", "-j", job))
    silent = tmp_path / "bin" / "squeue"
    silent.parent.mkdir()
    silent.write_text("#!/bin/sh\nexit 0\n")
    silent.chmod(0o755)
    monkeypatch.setenv("PATH", f"{silent.parent}:{os.environ['PATH']}")
    row = here.status("tiny")["RMSNorm-1"]
    assert (row["state"], row["note"]) == ("failed", f"job {job}: exit code 7")


def test_the_jobs_of_another_slurm_on_the_same_folder_are_left_to_it(here: Desk) -> None:
    here.cluster(account="lab", sbatch={"hold": True})
    here.submit("tiny")
    (record,) = here.root.glob("slurm/*/submission.json")
    told = read_json(record)
    scheduler.ask("scancel", told["job"])
    write_json(record, told | {"slurm": "elsewhere"})
    row = here.status("tiny")["RMSNorm-1"]
    assert row["state"] == "queued"
    assert row["note"] == "on the Slurm elsewhere: ask there, this is another"
    assert "4 running or queued already, 0 submitted now" in here.submit("tiny").err
