"""The private Slurm itself: its jobs are real, its nodes die and return, and it leaves nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import psutil
import pytest

from tests import PATIENCE
from tests.slurm import PrivateSlurm, SlurmError, wait_for

pytestmark = pytest.mark.slurm


def submit(slurm: PrivateSlurm, script: str, *options: str | Path) -> str:
    return slurm.run("sbatch", "--parsable", *options, "--wrap", script).strip()


def test_a_job_runs_on_a_node_with_the_submitters_environment(
    slurm: PrivateSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLOUR", "ultramarine")
    output = tmp_path / "out"
    submit(slurm, 'echo "$SLURMD_NODENAME $COLOUR"', "--wait", "--output", output)
    assert output.read_text() == "127.0.0.1 ultramarine\n"


def test_a_plain_subprocess_of_the_test_finds_the_cluster(slurm: PrivateSlurm) -> None:
    done = subprocess.run(["sinfo", "-h", "-o", "%P"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["main*", "low", "high", "short"]
    assert not {name for name in os.environ if name.startswith("SLURM_")} - {"SLURM_CONF"}


def test_a_refused_command_raises_slurms_own_words(slurm: PrivateSlurm) -> None:
    with pytest.raises(SlurmError, match="invalid partition specified: nowhere"):
        submit(slurm, "true", "--partition=nowhere")


def test_gpus_are_counted_and_named(slurm: PrivateSlurm, tmp_path: Path) -> None:
    output = tmp_path / "out"
    submit(slurm, "echo $CUDA_VISIBLE_DEVICES", "--wait", "--gpus-per-node=2", "--output", output)
    assert output.read_text() == "0,1\n"


def test_clearing_ends_jobs_that_ignore_sigterm_and_what_they_started(slurm: PrivateSlurm) -> None:
    submit(slurm, "trap '' TERM; setsid sleep 1000 & sleep 1000; sleep 1000")
    submit(slurm, "true", "--begin=now+1hour")
    wait_for(lambda: len(slurm.jobs_pids()) == 3, PATIENCE, lambda: slurm.run("squeue"))
    processes = [psutil.Process(pid) for pid in slurm.jobs_pids()]
    slurm.clear()
    assert slurm.jobs() == []
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_lost_node_is_noticed_and_can_return(slurm: PrivateSlurm) -> None:
    job = submit(slurm, "sleep 1000", "--nodelist=127.0.0.2")
    wait_for(lambda: bool(slurm.jobs_pids("127.0.0.2")), PATIENCE, lambda: slurm.run("squeue"))
    slurm.lose_node("127.0.0.2")
    assert slurm.jobs_pids() == []
    shown = slurm.run("scontrol", "show", "job", job)
    assert "JobState=PENDING" in shown
    assert "Restarts=1" in shown
    slurm.clear()
    assert slurm.node_states() == {"127.0.0.1": "idle", "127.0.0.2": "idle"}


def test_jobs_outlive_a_controller_that_is_away(slurm: PrivateSlurm) -> None:
    job = submit(slurm, "sleep 1000")
    wait_for(lambda: bool(slurm.jobs_pids()), PATIENCE, lambda: slurm.run("squeue"))
    before = slurm.jobs_pids()
    slurm.stop_controller()
    slurm.start_controller()
    assert slurm.jobs() == [job]
    assert slurm.jobs_pids() == before


def test_a_second_cluster_is_separate_and_leaves_nothing(slurm: PrivateSlurm) -> None:
    job = submit(slurm, "sleep 1000")
    with PrivateSlurm(nodes=1, config={"MaxArraySize": 4}) as other:
        assert other.jobs() == []
        with pytest.raises(SlurmError, match="Invalid job array specification"):
            submit(other, "true", "--array=0-4")
        submit(other, "trap '' TERM; sleep 1000; sleep 1000")
        wait_for(lambda: len(other.jobs_pids()) == 2, PATIENCE, lambda: other.run("squeue"))
        processes = [psutil.Process(pid) for pid in other.jobs_pids()]
    assert not other.folder.exists()
    assert not [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert slurm.jobs() == [job]


def test_with_accounting_a_job_is_remembered_and_limits_hold(
    slurm_accounting: PrivateSlurm,
) -> None:
    job = submit(slurm_accounting, "exit 7", "--qos=few")
    words = ("sacct", "-n", "-P", "-X", "-j", job, "-o", "State,ExitCode,Account")
    wait_for(
        lambda: "FAILED" in slurm_accounting.run(*words),
        PATIENCE,
        lambda: slurm_accounting.run("sacct"),
    )
    assert slurm_accounting.run(*words) == "FAILED|7:0|lab\n"
    with pytest.raises(SlurmError, match="QOSMaxSubmitJobPerUserLimit"):
        submit(slurm_accounting, "true", "--qos=few", "--array=0-2")
    with pytest.raises(SlurmError, match="Invalid account"):
        submit(slurm_accounting, "true", "--account=nobody")
