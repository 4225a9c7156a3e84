"""Sweeps on a real Slurm: what is submitted comes back as a table, whatever happens in between.

Runs are held in the middle of their work by a `gated` schedule, see tests/slurm_desk.py.
"""

from __future__ import annotations

import json
import os
import signal

import pytest

from experiments import loader
from experiments.record import Run, read_json, read_rows
from experiments.trainer import train
from sweeps import scheduler
from tests.command_line import ceteris, start
from tests.slurm import PrivateSlurm
from tests.slurm_desk import Desk, jobs_in_queue, processes_of


def test_an_array_comes_back_as_a_table_and_is_never_submitted_twice(here: Desk) -> None:
    first = here.submit("tiny")
    assert first.out.startswith("job ") and "4 runs" in first.out
    again = here.submit("tiny")
    assert again.out == ""
    assert "0 finished before, 4 running or queued already, 0 submitted now" in again.err
    # a sweep that shares the baseline submits its own row only
    rows = [{"label": "DyT", "set": {"model.norm": "dyt"}}]
    here.sweep("other", "tiny.yaml", rows=rows)
    assert "2 running or queued already, 2 submitted now" in here.submit("other").err
    assert "still missing" in ceteris("table", "tiny", "--format", "csv").err
    here.done("tiny")
    here.done("other")
    table = ceteris("table", "tiny", "--format", "md")
    assert "| RMSNorm" in table.out and "2/2" in table.out
    assert "still missing" not in table.err
    here.undisturbed("tiny")
    run = Run(here.root, here.status("tiny")["RMSNorm-1"]["id"])
    (attempt,) = read_json(run / "provenance.json")["attempts"]
    snapshot = here.root / "code" / attempt["snapshot"]["id"]
    assert (snapshot / "sweeps" / "task.py").is_file()
    assert attempt["job"] == here.job("tiny", "RMSNorm-1")
    assert "0 running or queued already, 0 submitted now" in here.submit("tiny").err


def test_two_who_submit_at_once_submit_each_run_once(here: Desk) -> None:
    here.cluster(sbatch={"hold": True})
    words = ("submit", "tiny-sweep.yaml", "--cluster", "cluster.yaml", "--json")
    both = [start(*words, cwd=here.folder) for _ in range(2)]
    said = [json.loads(process.communicate()[0]) for process in both]
    runs = [run for one in said for job in one["jobs"] for task in job["runs"] for run in task]
    assert len(runs) == len(set(runs)) == 4
    assert len(jobs_in_queue()) == 4
    assert set(here.states("tiny").values()) == {"queued"}
    cancelled = ceteris("cancel", "tiny")
    assert cancelled.out.count("leaves the queue") == 4
    here.until(lambda: not jobs_in_queue())


def test_a_warned_job_saves_requeues_and_ends_as_if_nothing_had_been(here: Desk) -> None:
    here.submit("gated")
    here.held("gated")
    for job in jobs_in_queue():
        scheduler.ask("scancel", "--signal=USR2", job)
    here.gate.touch()
    here.done("gated")
    attempts = read_json(
        Run(here.root, here.status("gated")["RMSNorm-0"]["id"]) / "provenance.json"
    )
    assert [a["job"] for a in attempts["attempts"]] == [here.job("gated", "RMSNorm-0")] * 2
    here.undisturbed("gated")


@pytest.mark.slow
def test_killed_runs_are_told_retried_and_end_as_if_nothing_had_been(
    here: Desk, slurm: PrivateSlurm
) -> None:
    here.submit("gated")
    here.held("gated")
    rows = here.status("gated")
    os.kill(rows["RMSNorm-0"]["pid"], signal.SIGKILL)  # one run's process, as an OOM killer would
    whole = here.job("gated", "RMSNorm-1")
    for pid in processes_of(slurm, whole):  # all of a job, without a word
        os.kill(pid, signal.SIGKILL)
    scheduler.ask(
        "scancel", here.job("gated", "baseline-1")
    )  # by somebody who does not know Ceteris
    here.gate.touch()
    here.wait("gated", lambda states: not {"running", "queued"} & {*states.values()})
    rows = here.status("gated")
    assert rows["RMSNorm-0"]["state"] == "failed"
    assert "killed by signal 9 (SIGKILL)" in rows["RMSNorm-0"]["note"]
    assert rows["RMSNorm-1"]["state"] == "failed"
    assert rows["RMSNorm-1"]["note"] == f"job {whole}: killed by signal 9 (SIGKILL)"
    assert rows["baseline-1"]["state"] == "interrupted"
    assert "step" in " ".join(rows["RMSNorm-1"]["log"])
    shown = ceteris("status", "gated")
    assert "failed: RMSNorm s1: job" in shown.out
    log = ceteris("logs", "gated", "--row", "RMSNorm", "--seed", "0")
    assert "step 0/40" in log.out
    retried = ceteris("retry", "gated")
    assert retried.code == 0 and ": 3 runs" in retried.out, retried.err
    here.done("gated")
    here.undisturbed("gated")


def test_a_failure_is_shown_with_its_log_and_cancel_saves(here: Desk) -> None:
    broken = here.gate.with_suffix(".broken")
    broken.touch()
    here.submit("gated")
    here.wait("gated", lambda states: set(states.values()) == {"failed"})
    row = here.status("gated")["baseline-0"]
    assert "schedule 'gated': RuntimeError: the sky fell" in row["note"]
    assert "RuntimeError: the sky fell" in row["log"][-1]
    broken.unlink()
    here.until(lambda: not jobs_in_queue())  # a job ends a moment after its run has failed
    here.cluster(array_parallelism=2)
    assert "4 submitted now" in here.submit("gated").err  # as `sweep` takes up failed runs
    here.wait("gated", lambda states: list(states.values()).count("running") == 2)
    here.until(lambda: len([*here.folder.glob("gate.held-*")]) == 2)  # both can save by now
    dry = ceteris("cancel", "gated", "--dry-run")
    assert len(jobs_in_queue()) == 4
    real = ceteris("cancel", "gated")
    assert real.out == dry.out, real.err
    assert real.out.count("leaves the queue") == 2
    here.gate.touch()
    here.until(lambda: not jobs_in_queue())
    states = here.states("gated")
    assert sorted(states.values()) == ["failed", "failed", "interrupted", "interrupted"], states
    assert ": 4 runs" in ceteris("retry", "gated").out
    here.done("gated")
    here.undisturbed("gated")


@pytest.mark.slow
def test_a_run_on_a_lost_node_goes_on_elsewhere(here: Desk, slurm: PrivateSlurm) -> None:
    here.sweep("one", "gated.yaml", seeds=(0, 1), rows=[])
    here.submit("one")
    here.held("one")
    row = here.status("one")["baseline-0"]
    node = read_json(Run(here.root, row["id"]) / "provenance.json")["attempts"][0]["node"]
    slurm.lose_node(node)
    here.gate.touch()
    here.done("one")
    here.undisturbed("one")
    attempts = read_json(Run(here.root, row["id"]) / "provenance.json")["attempts"]
    assert [a["job"] for a in attempts] == [row["job"]] * 2
    assert attempts[1]["node"] != node


@pytest.mark.slow
def test_a_pack_shares_one_job_and_goes_back_with_what_it_lacks(here: Desk) -> None:
    here.cluster(runs_per_job=4, cpus_per_task=2)
    assert "4 runs in 1 job" in here.submit("gated").out
    here.until(here.reached.exists)
    here.wait("gated", lambda states: list(states.values()).count("running") == 2)
    states = here.states("gated")
    assert sorted(states.values()) == ["queued", "queued", "running", "running"]
    (job,) = {row["job"] for row in here.status("gated").values()}
    scheduler.ask("scancel", "--signal=USR2", job)
    here.gate.touch()
    here.done("gated")
    here.undisturbed("gated")


@pytest.mark.parametrize(
    "layout", [{"tasks_per_node": 2}, pytest.param({"nodes": 2}, marks=pytest.mark.slow)], ids=str
)
def test_several_tasks_give_one_processes_curve(here: Desk, layout: dict[str, int]) -> None:
    here.sweep("one", "tiny.yaml", seeds=(0, 1), rows=[])
    here.cluster(**layout)
    here.submit("one")
    here.done("one")
    for row in here.status("one").values():
        run = Run(here.root, row["id"])
        attempt = read_json(run / "provenance.json")["attempts"][0]
        assert attempt["processes"] == 2
        experiment = loader.load(here.folder / "tiny.yaml")
        alone = train(experiment, row["seed"], here.folder / "alone", progress="none")
        curves = [
            [
                r["val/loss"]
                for r in read_rows(Run(root, alone["id"]) / "metrics.jsonl")
                if "val/loss" in r
            ]
            for root in (here.root, here.folder / "alone")
        ]
        assert curves[0] == pytest.approx(curves[1], rel=2e-5)
