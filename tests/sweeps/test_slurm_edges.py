"""Where Slurm, what it runs in, or a person's files are not as they should be.

Nothing is trained twice or lost, and what is wrong is said in one line. Jobs that only have to be
in the queue are held there: starting Python is what makes a test slow.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.record import Run, read_json, read_rows
from sweeps import scheduler, snapshot
from tests import PATIENCE
from tests.command_line import ceteris, files, start
from tests.conftest import ROOT
from tests.slurm import PrivateSlurm
from tests.slurm_conf import version
from tests.slurm_desk import Desk, jobs_in_queue
from tests.wandb_server import WandbServer

SLOW = '''
import os
import time
from components.registry import register

@register("schedule", "slow")
class Slow:
    """Constant, at a second and a half for each step."""

    def factor(self, step: int, steps: int) -> float:
        time.sleep(float(os.environ.get("STEP_SECONDS", "1.5")))
        return 1.0
'''
HELD = {"sbatch": {"hold": True}}
SUBMIT = ("submit", "tiny-sweep.yaml", "--cluster", "cluster.yaml")


@contextlib.contextmanager
def own_slurm(**settings: Any) -> Iterator[PrivateSlurm]:
    """Another Slurm, whose commands are found instead of the shared one's."""
    with PrivateSlurm(**settings) as cluster, pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        yield cluster


@pytest.fixture
def instead(
    slurm: PrivateSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str], None]:
    """Puts a shell script before a command; `$REAL` is the command itself."""
    folder, path = tmp_path / "bin", os.environ["PATH"]
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)

    def put(command: str, script: str) -> None:
        real = shutil.which(command, path=path)
        (folder / command).write_text(f"#!/bin/sh\nREAL={real}\n{script}\n")
        (folder / command).chmod(0o755)

    return put


def attempts(here: Desk, name: str, key: str) -> list[dict[str, Any]]:
    run = Run(here.root, here.status(name)[key]["id"])
    found: list[dict[str, Any]] = read_json(run / "provenance.json")["attempts"]
    return found


def job_logs(here: Desk) -> str:
    """What Slurm and the process that starts the runs have printed."""
    return "".join(path.read_text() for path in here.root.glob("slurm/*/*.err"))


def folders(here: Desk) -> list[str]:
    """Submissions on disk."""
    return sorted(path.parent.name for path in here.root.glob("slurm/*/submission.json"))


# --- arrays and lone jobs ------------------------------------------------------------------------


def test_runs_are_split_into_arrays_that_the_site_takes(here: Desk) -> None:
    here.sweep("tiny", "tiny.yaml", seeds=(0, 1, 2))
    here.cluster(**HELD)
    with own_slurm(config={"MaxArraySize": 4}):
        made = here.submit("tiny", "--json").json["jobs"]
        assert [len(job["runs"]) for job in made] == [4, 2]
        assert {row["state"] for row in here.status("tiny").values()} == {"queued"}
        assert {row["job"] for row in here.status("tiny").values()} == {*jobs_in_queue()}
        assert here.submit("tiny", "--json").json["jobs"] == []
        assert len(jobs_in_queue()) == 6
        scheduler.ask("scancel", *(job["job"] for job in made))
        here.cluster(runs_per_job=4, cpus_per_task=4, **HELD)
        (packed,) = here.submit("tiny", "--json").json["jobs"]
        assert [len(runs) for runs in packed["runs"]] == [4, 2]
        assert len(jobs_in_queue()) == 2


def test_a_job_of_its_own_has_no_index(here: Desk) -> None:
    here.sweep("tiny", "tiny.yaml", rows=[])
    here.cluster(runs_per_job=2, cpus_per_task=2, **HELD)
    here.submit("tiny")
    (job,) = {row["job"] for row in here.status("tiny").values()}
    assert job.isdecimal() and jobs_in_queue() == [f"{job}_N/A"]
    assert here.states("tiny") == {"baseline-0": "queued", "baseline-1": "queued"}
    assert here.submit("tiny").out == ""
    scheduler.ask("scontrol", "release", job)
    here.done("tiny")
    assert [a["job"] for a in attempts(here, "tiny", "baseline-1")] == [job]
    here.sweep("tiny", "tiny.yaml", seeds=(0, 1, 2), rows=[])
    here.cluster(**HELD)
    assert "1 run\n" in here.submit("tiny").out
    lone = here.job("tiny", "baseline-2")
    scheduler.ask("scancel", lone)
    row = here.status("tiny")["baseline-2"]
    assert (row["state"], row["note"]) == ("interrupted", f"job {lone}: cancelled")


def test_one_that_was_taken_out_of_an_array_is_submitted_again_alone(here: Desk) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    before = here.status("tiny")
    scheduler.ask("scancel", before["baseline-1"]["job"])  # which Slurm forgets at once
    now = here.states("tiny")
    assert now.pop("baseline-1") in ("stale", "interrupted") and {*now.values()} == {"queued"}
    (made,) = here.submit("tiny", "--json").json["jobs"]
    assert made["runs"] == [[before["baseline-1"]["id"]]]
    assert set(here.states("tiny").values()) == {"queued"}


def test_what_cancel_took_back_retry_submits_again(here: Desk) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    jobs = {key: row["job"] for key, row in here.status("tiny").items()}
    assert ceteris("cancel", "tiny").out.count("leaves the queue") == 4
    here.until(lambda: not jobs_in_queue())
    told = {key: (row["state"], row["note"]) for key, row in here.status("tiny").items()}
    assert told == {key: ("interrupted", f"job {job}: cancelled") for key, job in jobs.items()}
    again = ceteris("retry", "tiny", "--json")
    assert [len(job["runs"]) for job in again.json["jobs"]] == [4], again


def test_retry_trains_nothing_here_that_was_submitted(
    here: Desk, instead: Callable[[str, str], None]
) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    again = ceteris("retry", "tiny")  # of runs that are all queued
    assert (again.code, again.out) == (0, "") and "0 submitted now" in again.err
    assert set(here.states("tiny").values()) == {"queued"}
    ceteris("cancel", "tiny")
    here.until(lambda: not jobs_in_queue())
    instead("squeue", "exit 0")  # as when Slurm has forgotten them, minutes later
    assert len(ceteris("retry", "tiny", "--dry-run").out.splitlines()) == 4
    assert ": 4 runs" in ceteris("retry", "tiny").out
    instead("squeue", 'exec $REAL "$@"')
    assert set(here.states("tiny").values()) == {"queued"}


# --- a Slurm that does not answer ----------------------------------------------------------------


def test_without_a_controller_runs_run_on_and_nothing_is_said_dead(
    here: Desk, slurm: PrivateSlurm
) -> None:
    here.sweep("gated", "gated.yaml", rows=[])
    here.cluster(array_parallelism=1)
    here.submit("gated")
    here.until(here.reached.exists)
    before = here.wait("gated", lambda states: sorted(states.values()) == ["queued", "running"])
    slurm.stop_controller()
    words = ("submit", "gated-sweep.yaml", "--cluster", "cluster.yaml")
    with start(*words, cwd=here.folder) as one, start("retry", "gated", cwd=here.folder) as two:
        told = ceteris("status", "gated", "--json")
        refused = [process.communicate() for process in (one, two)]
    assert told.code == 0
    assert "DOWN" in told.json["silence"] and not {*"\n*"} & {*told.json["silence"]}
    rows = {row["state"]: row for row in told.json["runs"]}
    assert {*rows} == {"running", "stale"}
    assert rows["running"]["step"] is not None and rows["running"]["pid"] is not None
    assert rows["stale"]["note"] == told.json["silence"]
    assert [one.returncode, two.returncode] == [2, 2]
    for out, err in refused:
        assert out == "" and err.count("\n") == 1
        assert err.startswith("error: Slurm gives no answer"), err
    slurm.start_controller()
    assert here.states("gated") == before
    assert len(jobs_in_queue()) == 2 and len(folders(here)) == 1


def test_a_silent_squeue_stops_no_one_but_those_who_submit(
    here: Desk, instead: Callable[[str, str], None]
) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    instead("squeue", "echo 'squeue: error: Socket timed out' >&2; exit 1")
    shown = ceteris("status", "tiny")
    assert shown.code == 0 and "4 stale" in shown.out
    assert "Slurm gives no answer: squeue: Socket timed out" in shown.err
    assert ceteris("status").code == 0
    for words in (SUBMIT, ("retry", "tiny"), ("retry", "tiny", "--cluster", "cluster.yaml")):
        refused = ceteris(*words)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err == (
            "error: Slurm gives no answer, so nobody knows what is queued: "
            "squeue: Socket timed out\n"
        )
    cancelled = ceteris("cancel", "tiny")
    assert (cancelled.code, cancelled.out) == (2, "")
    assert "nothing is cancelled: squeue: Socket timed out" in cancelled.err
    assert ceteris("table", "tiny", "--format", "csv").code == 0
    assert ceteris("logs", "tiny", "--row", "RMSNorm", "--seed", "1").code == 0
    instead("squeue", 'exec $REAL "$@"')
    assert set(here.states("tiny").values()) == {"queued"} and len(folders(here)) == 1


@pytest.mark.parametrize("silent", ["exit 0", "echo; exit 0"], ids=["nothing", "an empty line"])
def test_queued_runs_are_not_submitted_again_for_one_silent_look(
    here: Desk, instead: Callable[[str, str], None], silent: str
) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    once = here.folder / "asked-once"
    instead("squeue", f'[ -e {once} ] || {{ touch {once}; {silent}; }}; exec $REAL "$@"')
    again = here.submit("tiny")
    assert once.exists() and again.out == ""
    assert "4 running or queued already, 0 submitted now" in again.err
    assert len(jobs_in_queue()) == 4


def test_a_controller_that_hangs_in_the_middle_of_an_answer_has_given_none(
    here: Desk, instead: Callable[[str, str], None]
) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    instead("scontrol", 'case "$*" in *config*) echo "timed out" >&2; exit 1;; esac; $REAL "$@"')
    assert ceteris("status", "tiny", "--json").json["silence"] == "scontrol: timed out"
    refused = ceteris(*SUBMIT)
    assert (refused.code, refused.out) == (2, "") and "timed out" in refused.err
    assert len(jobs_in_queue()) == 4


def test_a_submission_whose_id_was_never_written_down_is_found_by_its_name(here: Desk) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    (path,) = here.root.glob("slurm/*/submission.json")
    path.write_text(json.dumps(read_json(path) | {"job": None}))  # as after a crash within sbatch
    assert {row["job"] for row in here.status("tiny").values()} == {*jobs_in_queue()}
    assert here.submit("tiny").out == ""
    assert ceteris("cancel", "tiny").out.count("leaves the queue") == 4
    here.until(lambda: not jobs_in_queue())


# --- what a job gets along -----------------------------------------------------------------------

LEAKS = {
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_MEM_PER_CPU": "77",
    "SLURM_NTASKS": "5",
    "SLURM_EXPORT_ENV": "NONE",
    "SBATCH_EXPORT": "NONE",
    "OMP_PROC_BIND": "true",
    "GOMP_CPU_AFFINITY": "0",
    "CUDA_VISIBLE_DEVICES": "7",
    "MASTER_ADDR": "elsewhere",
    "RANK": "3",
    "WORLD_SIZE": "5",
    "PMI_RANK": "3",
    "PYTHONPATH": "/elsewhere",
}


def test_nothing_of_the_allocation_that_one_submits_from_reaches_the_jobs(
    here: Desk, slurm: PrivateSlurm
) -> None:
    here.sweep("tiny", "tiny.yaml", rows=[])
    here.cluster(memory="500MB", setup=[f"env > {here.folder}/job-$SLURM_ARRAY_TASK_ID.env"])
    submit = shlex.join([sys.executable, str(ROOT / "run.py"), *SUBMIT])
    exports = " ".join(f"export {name}={shlex.quote(value)};" for name, value in LEAKS.items())
    slurm.run("srun", "-c2", "--mem=300M", "bash", "-c", f"{exports} {submit}", cwd=here.folder)
    here.done("tiny")
    for index in "01":
        text = (here.folder / f"job-{index}.env").read_text()
        there = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
        assert not {f"{k}={v}" for k, v in LEAKS.items()} & {*text.splitlines()}
        assert not {"SLURM_MEM_PER_CPU", "SLURM_CPU_BIND", "CUDA_VISIBLE_DEVICES"} & {*there}
        assert there["SLURM_CONF"] == slurm.env["SLURM_CONF"]
        assert there["SLURM_NTASKS"] == "1" and there["SLURM_MEM_PER_NODE"] == "500"
        assert there["PYTHONPATH"].startswith(str(here.root / "code"))
        assert [a["processes"] for a in attempts(here, "tiny", f"baseline-{index}")] == [1]
    here.undisturbed("tiny")


def test_the_cluster_file_stands_above_what_a_profile_exports_to_sbatch(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"TIMELIMIT": "1", "JOB_NAME": "mine", "NO_REQUEUE": "1", "ARRAY_INX": "0-0"}
    for name, value in {**asked, "PARTITION": "low", "SIGNAL": "USR1@5"}.items():
        monkeypatch.setenv(f"SBATCH_{name}", value)
    here.cluster(partition="main", **HELD)
    here.submit("tiny")
    assert set(here.states("tiny").values()) == {"queued"}
    assert here.submit("tiny").out == ""
    told = scheduler.ask("squeue", "-h", "-r", "-O", "Partition:|,TimeLimit:|,Requeue:|")
    assert told.splitlines() == ["main|1:00:00|1|"] * 4
    ceteris("cancel", "tiny")
    here.cluster(**HELD)  # which leaves the partition open
    here.submit("tiny")
    assert {*scheduler.ask("squeue", "-h", "-r", "-O", "Partition:|").splitlines()} == {"low|"}


# --- the code that was submitted -----------------------------------------------------------------


def test_the_code_that_was_submitted_runs_whatever_becomes_of_it(here: Desk) -> None:
    copy = here.folder / "source"
    for room in snapshot.ROOMS:
        shutil.copytree(ROOT / room, copy / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "run.py", copy)
    here.gate.touch()
    here.sweep("gated", "gated.yaml", rows=[])
    here.cluster(**HELD)

    def submit() -> str:
        words = ("submit", "gated-sweep.yaml", "--cluster", "cluster.yaml", "--json")
        command = [sys.executable, str(copy / "run.py"), *words]
        done = subprocess.run(command, cwd=here.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (job,) = json.loads(done.stdout)["jobs"]
        return str(job["job"])

    job = submit()
    norm, own = copy / "components" / "norm.py", here.folder / "gated.py"
    sound = norm.read_text(), own.read_text()
    norm.write_text(sound[0] + "\nraise SystemExit(9)\n")
    own.write_text("raise RuntimeError('half edited')\n")
    scheduler.ask("scontrol", "release", job)
    here.done("gated")
    (first,) = (path.name for path in (here.root / "code").iterdir() if path.name != "imports")
    for key in ("baseline-0", "baseline-1"):
        assert [a["snapshot"]["id"] for a in attempts(here, "gated", key)] == [first]
    norm.write_text(sound[0] + "\n# another thought\n")
    own.write_text(sound[1])
    here.undisturbed("gated")
    here.sweep("gated", "gated.yaml", seeds=(2, 3), rows=[])
    submit()
    kept = {path.name for path in (here.root / "code").iterdir()}
    assert len(kept) == 3 and first in kept
    assert snapshot.take(here.root, copy).id in kept - {first}
    assert {path.name for path in (here.root / "code").iterdir()} == kept


# --- preemption, time limits, lost nodes ---------------------------------------------------------


def preempted(here: Desk, *, by: str = "sleep 1") -> None:
    """A gated run on partition low makes room for a job on partition high, and goes on after it."""
    here.sweep("gated", "gated.yaml", rows=[])
    here.cluster(partition="low")
    here.submit("gated")
    here.held("gated")
    high = scheduler.ask("sbatch", "--parsable", "-phigh", "-N2", "--exclusive", "-o/dev/null",
                     "--wrap", by).strip()  # fmt: skip
    here.until(lambda: job_logs(here).count("stopping:") == 2, lambda: here.told("gated"))
    here.gate.touch()
    here.wait("gated", lambda states: set(states.values()) == {"queued"})
    here.until(
        lambda: scheduler.ask("squeue", "-h", "-tall", "-j", high, "-o%T").strip() == "COMPLETED"
    )
    here.done("gated")
    for key in ("baseline-0", "baseline-1"):
        assert [a["job"] for a in attempts(here, "gated", key)] == [here.job("gated", key)] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        here.undisturbed("gated")


@pytest.mark.slow
def test_a_preempted_run_makes_room_and_goes_on_as_if_nothing_had_been(
    here: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WandbServer(tmp_path / "wandb") as server, monkeypatch.context() as patch:
        for name, value in server.env.items():
            if name.startswith("WANDB_"):
                patch.setenv(name, value)
        patch.delenv("WANDB_MODE")
        preempted(here)
        here.until(lambda: any(run.job_type == "summary" for run in server.runs.values()))
        trained = [run for run in server.runs.values() if run.job_type == "train"]
        assert len(trained) == 2 and len({run.config["jobs"][0] for run in trained}) == 2
        for run in trained:  # one run over both starts of its job, with one curve
            rows = read_rows(here.root / run.config["run"] / "metrics.jsonl")
            pairs = zip(run.history, rows, strict=True)
            assert [{key: row[key] for key in ours} for row, ours in pairs] == rows
            assert (run.state, run.group, run.config["attempts"]) == ("finished", "gated", 2)
        told = [path.read_bytes() for path in here.folder.rglob("*") if path.is_file()]
        assert len(told) > 100 and not any(server.key.encode() in text for text in told)


@pytest.mark.slow
def test_where_preemption_sends_no_warning_the_first_sigterm_is_one(here: Desk) -> None:
    option = "PreemptParameters" if version() >= (23, 2) else "SlurmctldParameters"
    with own_slurm(config={option: None}):
        preempted(here)


@pytest.mark.slow
def test_a_job_at_its_time_limit_goes_on_in_another(here: Desk) -> None:
    here.sweep("gated", "gated.yaml", rows=[])
    here.cluster(warning_seconds=60)
    here.submit("gated")
    here.held("gated")  # however long the start took, the limit comes after it
    jobs = [here.job("gated", key) for key in ("baseline-0", "baseline-1")]
    for job in jobs:
        used = scheduler.ask("squeue", "-h", "-r", "-j", job, "-o%M")
        here.limit(job, int(used.strip().split(":")[-2]) + 2)
    here.until(lambda: job_logs(here).count("stopping:") == 2, lambda: here.told("gated"))
    for job in jobs:
        here.limit(job, 60)
    here.gate.touch()
    here.done("gated")
    for key, job in zip(("baseline-0", "baseline-1"), jobs, strict=True):
        assert [a["job"] for a in attempts(here, "gated", key)] == [job] * 2
    here.undisturbed("gated")


@pytest.mark.slow
def test_a_run_longer_than_any_job_takes_as_many_as_it_needs(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here.folder / "slow.py").write_text(SLOW)
    plain = {"base": "tiny.yaml", "imports": ["slow.py"], "training": {"schedule": "slow"}}
    here.write("slow.yaml", **plain, execution={"checkpoint_minutes": 0})
    here.sweep("slow", "slow.yaml", rows=[])
    here.cluster(time=1, warning_seconds=30)
    here.submit("slow")
    here.done("slow")
    assert len(attempts(here, "slow", "baseline-0")) >= 3
    assert {a["job"] for a in attempts(here, "slow", "baseline-0")} == {
        here.job("slow", "baseline-0")
    }
    monkeypatch.setenv("STEP_SECONDS", "0")
    here.undisturbed("slow")


@pytest.mark.slow
def test_a_run_that_outlives_its_node_is_not_trained_twice(here: Desk, slurm: PrivateSlurm) -> None:
    here.sweep("gated", "gated.yaml", rows=[])
    here.submit("gated")
    here.held("gated")
    (node,) = {attempts(here, "gated", f"baseline-{n}")[0]["node"] for n in range(2)}
    slurm.kill_node(node)  # its jobs live, and Slurm gives them to another one
    slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
    here.until(lambda: job_logs(here).count("runs in another process: waiting for it") == 2)
    assert set(here.states("gated").values()) == {"running"}
    here.gate.touch()
    here.done("gated")
    for key in ("baseline-0", "baseline-1"):
        assert [a["node"] for a in attempts(here, "gated", key)] == [node]
    here.undisturbed("gated")
    here.until(lambda: not jobs_in_queue())


# --- mistakes, in one line -----------------------------------------------------------------------

SETTINGS: tuple[tuple[dict[str, Any], str], ...] = (
    ({"partition": "nowhere"}, "cluster.yaml:1:34: partition: nowhere: Slurm refuses it: "),
    ({"partition": "short", "time": 5}, "cluster.yaml:1:2: time: 5: Slurm refuses it: "),
    ({"time": "4 hours"}, "cluster.yaml:1:2: time: should be minutes, or one of M:S, "),
    ({"time": None}, "cluster.yaml:1:2: time: is missing; say how long a job may last"),
    ({"constraint": "h100"}, "cluster.yaml:1:34: constraint: h100: Slurm refuses it: "),
    ({"nodes": 9}, "cluster.yaml:1:34: nodes: 9: Slurm refuses it: "),
    ({"cpus_per_task": 99}, "cluster.yaml:1:14: cpus_per_task: 99: Slurm refuses it: "),
    ({"gpus_per_node": 9, "runs_per_job": 9, "cpus_per_task": 9}, "Slurm refuses"),
    ({"sbatch": {"foo": 1}}, "cluster.yaml:1:45: sbatch.foo: 1: Slurm refuses it: "),
    ({"sbatch": {"begin": "noon-ish"}}, "cluster.yaml:1:45: sbatch.begin: noon-ish: "),
    ({"sbatch": {"reservation": "x"}}, "cluster.yaml:1:45: sbatch.reservation: x: "),
    ({"sbatch": {"array": "0-3"}}, "cluster.yaml:1:45: sbatch.array: is set by Ceteris itself"),
    ({"partitoin": "low"}, "unknown key 'partitoin' — did you mean 'partition'?"),
)


@pytest.mark.parametrize(("settings", "words"), SETTINGS, ids=lambda value: str(value)[:40])
def test_what_slurm_or_the_schema_refuses_is_told_at_its_line(
    here: Desk, settings: dict[str, Any], words: str
) -> None:
    here.cluster(**settings)
    for more in ((), ("--dry-run",)):
        refused = ceteris(*SUBMIT, *more)
        assert refused.code == 2 and (refused.out == "" or more)
        assert words in refused.err and refused.err.startswith("error: "), refused.err
        assert refused.err.count("\n") == 1
    assert folders(here) == [] == jobs_in_queue()
    assert not list(here.root.glob("slurm/*/*"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "which cluster? write --cluster FILE"),
        (("--cluster", "nowhere.yaml"), "no cluster file 'nowhere.yaml'"),
        (("--cluster", "slrm-gpu"), "did you mean 'slurm-gpu'?"),
        (("--cluster", "cluster.yaml", "--runs", "tiny.yaml/runs"), "Not a directory"),
        (("--cluster", "cluster.yaml", "--runs", "/proc/runs"), "/proc/runs"),
    ],
    ids=str,
)
def test_a_submission_that_cannot_begin_says_why_in_one_line(
    here: Desk, more: tuple[str, ...], words: str
) -> None:
    refused = ceteris("submit", "tiny-sweep.yaml", *more)
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: ") and words in refused.err, refused.err
    assert refused.err.count("\n") == 1 and jobs_in_queue() == []
    assert not here.root.exists()


def test_without_slurm_on_a_machine_nothing_is_submitted_and_nothing_left(
    here: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setenv("PATH", str(here.folder))
        refused = ceteris(*SUBMIT)
        assert (refused.code, refused.out) == (2, "")
        assert refused.err.startswith("error: no sbatch ") and refused.err.count("\n") == 1
        assert folders(here) == [] and not (here.root / "code").exists()
        assert not list(here.root.glob("sweeps/*.json"))  # nor is a record replaced
    here.cluster(**HELD)
    here.submit("tiny")
    monkeypatch.setenv("PATH", str(here.folder))  # a copy of the runs, on a laptop
    away = ceteris("status", "tiny")
    assert away.code == 0 and "4 stale" in away.out
    assert ceteris("table", "tiny", "--format", "csv").code == 0


def test_a_job_that_cannot_write_its_log_names_folder_and_remedy(here: Desk) -> None:
    here.sweep("tiny", "tiny.yaml", rows=[])
    here.cluster(**HELD)
    here.submit("tiny")
    (folder,) = here.root.resolve().glob("slurm/tiny-*")
    array = jobs_in_queue()[0].partition("_")[0]
    for index in range(2):  # no file can be opened there, as on a disk of which nodes only read
        (folder / f"{array}_{index}_0_log.out").mkdir()
    scheduler.ask("scontrol", "release", array)
    here.wait("tiny", lambda states: set(states.values()) == {"failed"})
    note = here.status("tiny")["baseline-1"]["note"]
    assert note.startswith(f"job {array}_1 could not write to ") and "--runs" in note
    assert f"slurm/{folder.name}" in note
    assert "--runs" in ceteris("logs", "tiny", "--seed", "1").err


# --- what is printed -----------------------------------------------------------------------------


def test_a_dry_run_shows_plan_cost_and_script_and_changes_nothing(here: Desk) -> None:
    here.cluster(partition="short", time=1, warning_seconds=20, setup=["module load nothing"])
    before = files(here.folder)
    shown = ceteris(*SUBMIT, "--dry-run")
    assert shown.code == 0 and "4 to do" in shown.out
    assert "4 runs to submit in 4 jobs of at most 0.02 hours: 0.1 CPU-hours at most" in shown.out
    assert "#SBATCH --partition=short" in shown.out and "#SBATCH --array=0-3" in shown.out
    assert "\nmodule load nothing\n" in shown.out and "in partition short" in shown.err
    data = ceteris(*SUBMIT, "--dry-run", "--json").json
    assert data["missing"] == 4 and data["sbatch"].startswith("#!/bin/bash\n")
    assert files(here.folder) == before and jobs_in_queue() == []
    here.cluster(**HELD)
    here.submit("tiny")
    assert "nothing to submit" in ceteris(*SUBMIT, "--dry-run").out


def test_a_dry_run_needs_no_slurm(here: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(here.folder)
    monkeypatch.setenv("PATH", str(here.folder))
    shown = ceteris(*SUBMIT, "--dry-run")
    assert "4 runs to submit" in shown.out and "#SBATCH --time=60" in shown.out
    assert "no sbatch" in shown.err and shown.err.count("\n") == 1
    assert shown.code == 0 and files(here.folder) == before
    assert ceteris(*SUBMIT, "--dry-run", "--json").json["missing"] == 4


def test_status_tells_programs_what_it_tells_people(here: Desk) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    told = ceteris("status", "tiny", "--json").json
    assert (told["sweep"], told["counts"], told["silence"]) == ("tiny", {"queued": 4}, None)
    row = told["runs"][0]
    assert (row["label"], row["seed"], row["state"]) == ("baseline", 0, "queued")
    assert (row["step"], row["steps"], row["pid"], row["host"]) == (None, 40, None, None)
    assert row["job"] in jobs_in_queue() and "scontrol release" in row["note"]
    assert row["log"] == []
    everything = ceteris("status", "--json").json
    assert everything["counts"] == {"queued": 4} and everything["sweep"] is None
    assert [r["id"] for r in everything["runs"]] == [r["id"] for r in told["runs"]]


def test_a_log_is_asked_for_by_row_and_seed(here: Desk) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    for words, said in (
        ((), "4 runs are meant; add --row (baseline, RMSNorm) and --seed (0, 1)"),
        (("--row", "RMSNorm"), "2 runs are meant; add --seed (0, 1)"),
        (("--seed", 1), "2 runs are meant; add --row (baseline, RMSNorm)"),
        (("--row", "RMSNrm", "--seed", 1), "no row 'RMSNrm' — did you mean 'RMSNorm'?"),
        (("--row", "RMSNorm", "--seed", 7), "no seed 7 (seeds: 0, 1)"),
    ):
        refused = ceteris("logs", "tiny", *words)
        assert (refused.code, refused.out) == (2, "") and said in refused.err, refused.err
    told = ceteris("logs", "tiny", "--row", "RMSNorm", "--seed", 1)
    assert told.code == 0 and told.out == "" and "queued" in told.err and "no log yet" in told.err
    refused = ceteris("logs", "tony")
    assert refused.code == 2 and "did you mean 'tiny'?" in refused.err


def followed(here: Desk) -> str:
    """What `logs --follow` of a run prints until it ends by itself."""
    with start("logs", "gated", "--seed", 1, "--follow", cwd=here.folder) as follower:
        try:
            out, err = follower.communicate(timeout=PATIENCE)
        finally:
            follower.kill()
    assert follower.returncode == 0, err
    return str(out)


@pytest.mark.slow
def test_a_followed_log_ends_when_nobody_writes_to_it_any_more(here: Desk) -> None:
    here.sweep("gated", "gated.yaml", rows=[])
    here.submit("gated")
    here.held("gated")
    scheduler.ask("scancel", here.job("gated", "baseline-1"))
    here.gate.touch()
    here.wait("gated", lambda states: states["baseline-1"] == "interrupted")
    out = followed(here)
    assert "step 0/40" in out and "step 40/40" not in out
    assert ": 1 run\n" in ceteris("retry", "gated").out
    assert "step 40/40" in followed(here) and here.states("gated")["baseline-1"] == "done"


def test_retry_takes_the_settings_of_the_last_time_or_those_that_are_given(here: Desk) -> None:
    here.cluster(partition="low", time=7, warning_seconds=60, **HELD)
    here.submit("tiny")

    def asked() -> set[str]:
        return {*scheduler.ask("squeue", "-h", "-r", "-o", "%P %l").splitlines()}

    def cancelled() -> None:
        scheduler.ask("scancel", *{job.partition("_")[0] for job in jobs_in_queue()})
        assert set(here.states("tiny").values()) == {"interrupted"}

    assert asked() == {"low 7:00"}
    cancelled()
    dry = ceteris("retry", "tiny", "--dry-run")
    assert dry.out.count("interrupted: job") == 4 and jobs_in_queue() == []
    assert ceteris("retry", "tiny").out.endswith(": 4 runs\n")
    assert asked() == {"low 7:00"}
    cancelled()
    here.write("other.yaml", partition="high", time="2:00:00", runs_per_job=2, **HELD)
    assert ": 4 runs in 2 jobs" in ceteris("retry", "tiny", "--cluster", "other.yaml").out
    assert asked() == {"high 2:00:00"}
    cancelled()
    here.write("wrong.yaml", partition="nowhere", time=5)
    refused = ceteris("retry", "tiny", "--cluster", "wrong.yaml")
    assert refused.code == 2 and "wrong.yaml:1:2: partition: nowhere" in refused.err
    assert set(here.states("tiny").values()) == {"interrupted"}
    again = ceteris("retry", "tiny")  # what was refused is no last time
    assert again.code == 0 and asked() == {"high 2:00:00"}


def test_this_machine_is_a_cluster_too(here: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    here.sweep("tiny", "tiny.yaml", rows=[])
    monkeypatch.setenv("CETERIS_CLUSTER", "local")
    assert "2 to do" in ceteris("submit", "tiny-sweep.yaml", "--dry-run").out
    done = ceteris("submit", "tiny-sweep.yaml")
    assert done.code == 0 and "baseline" in done.out and "2/2" in done.out
    assert jobs_in_queue() == [] and folders(here) == []
    assert set(here.states("tiny").values()) == {"done"}


# --- a submitter that is stopped in the middle ---------------------------------------------------


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGINT, id="Ctrl-C", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, id="kill -9"),
    ],
)
def test_a_submitter_stopped_in_the_middle_leaves_nothing_that_the_next_does_not_mend(
    here: Desk, instead: Callable[[str, str], None], number: signal.Signals
) -> None:
    taken = here.folder / "taken"
    # Slurm has the jobs, but submitit has not heard of it, and has not put their pickles in place.
    instead(
        "sbatch", f'[ "$1" = --version ] && exec $REAL "$@"; $REAL "$@" && touch {taken}; sleep 99'
    )
    here.cluster(**HELD)
    stopped = start(*SUBMIT, cwd=here.folder, start_new_session=True)
    here.until(taken.exists)
    stopped.send_signal(number)
    if number == signal.SIGKILL:
        os.killpg(stopped.pid, number)  # the wrapper that sleeps
    stopped.wait()
    stopped.communicate()
    instead("sbatch", 'exec $REAL "$@"')
    again = here.submit("tiny", "--json").json
    assert [len(job["runs"]) for job in again["jobs"]] == [4]
    assert len(folders(here)) == 1 and len(jobs_in_queue()) == 4
    scheduler.ask("scontrol", "release", again["jobs"][0]["job"])
    here.done("tiny")


def test_a_gpu_that_is_paid_for_is_used_or_the_run_fails(here: Desk) -> None:
    here.sweep("tiny", "tiny.yaml", rows=[])
    here.cluster(gpus_per_node=1)  # which Slurm grants, and torch does not find
    here.submit("tiny")
    here.wait("tiny", lambda states: set(states.values()) == {"failed"})
    assert "execution.device: cuda is asked for" in here.status("tiny")["baseline-0"]["note"]


def test_a_folder_whose_name_slurm_would_rewrite_is_refused(here: Desk) -> None:
    refused = ceteris(*SUBMIT, "--runs", "a%j")
    assert (refused.code, refused.out) == (2, "")
    assert refused.err.startswith("error: a%j: Slurm can't write logs below a path with %")
    assert jobs_in_queue() == []


def test_what_is_queued_is_not_trained_here(here: Desk) -> None:
    here.cluster(**HELD)
    here.submit("tiny")
    here_too = ceteris("sweep", "tiny-sweep.yaml")
    assert here_too.code == 0
    assert "4 runs are queued on Slurm and left to it" in here_too.err
    assert set(here.states("tiny").values()) == {"queued"}
