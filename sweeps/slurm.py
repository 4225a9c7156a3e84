"""Runs to Slurm, through submitit: arrays of jobs, submitted and left alone.

    runs ─ packed into tasks ─ arrays within the site's limits ─ sbatch ─ ids on record (queue.py)

The login node writes a few small files and calls `sbatch` once for each array. Whatever Slurm
refuses is told in its own words, at the cluster file's line where one is to blame; what it had
taken before stays on record.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.registry import UserError
from sweeps import queue, scheduler, snapshot
from sweeps.cluster import Cluster, ClusterFile, minutes
from sweeps.manifest import Job
from sweeps.queue import Place, Submission
from sweeps.scheduler import NoSlurm
from sweeps.task import Task

MAX_ARRAY = 1000  # where the site does not tell


@dataclass(frozen=True)
class Submitted:
    """What became of runs that were to be submitted.

    Attributes:
        left: runs that Slurm did not take; `refusal` says why, in its words.
    """

    submissions: tuple[Submission, ...]
    left: tuple[Job, ...] = ()
    refusal: str | None = None


def on_gpus(experiment: dict[str, Any], cluster: Cluster) -> dict[str, Any]:
    """Where GPUs are paid for, a run that finds none fails, and does not train on a CPU."""
    execution = experiment.get("execution", {})
    if cluster.gpus_per_node and execution.get("device") == "auto":
        return {**experiment, "execution": {**execution, "device": "cuda"}}
    return experiment


def pack(jobs: Sequence[Job], runs_per_job: int) -> list[tuple[Job, ...]]:
    """Runs in the order in which they are wanted, as many to a job as the cluster file says."""
    return [tuple(jobs[i : i + runs_per_job]) for i in range(0, len(jobs), runs_per_job)]


def submit(root: Path, sweep: str, jobs: Sequence[Job], file: ClusterFile) -> Submitted:
    """Submits these runs. To be called with `queue.lock` held.

    Raises:
        UserError: Slurm is not there, or took none of them; in its own words.
    """
    cluster = file.cluster
    if set("%\\") & set(str(root.resolve())):
        raise UserError(f"{root}: Slurm can't write logs below a path with % or \\; use another")
    scheduler.ask("sbatch", "--version")
    code = snapshot.take(root)
    seen: dict[str, str] = {}  # a file imported by many is copied once, as it is now
    kept = (snapshot.imports(job.experiment, root, seen) for job in jobs)
    frozen = [
        replace(job, experiment=on_gpus(experiment, cluster))
        for job, experiment in zip(jobs, kept, strict=True)
    ]
    waiting = pack(frozen, cluster.runs_per_job)
    size = max_array()
    done: list[Submission] = []
    while waiting:
        batch = waiting[:size]
        try:
            done.append(submit_array(root, sweep, batch, cluster, code))
        except NoSlurm as error:
            if is_full(str(error)) and len(batch) > 1:  # as many as still find room
                size = (len(batch) + 1) // 2
                continue
            refusal = blame(str(error), file)
            if not done:
                raise UserError(refusal) from error
            return Submitted(tuple(done), tuple(job for task in waiting for job in task), refusal)
        waiting = waiting[len(batch) :]
    return Submitted(tuple(done))


def is_full(words: str) -> bool:
    """Whether Slurm says that no more may be queued now, though fewer might."""
    limits = re.findall(r"(?:QOS|Assoc)\w*Limit", words)
    if limits:
        return any("MaxSubmit" in limit for limit in limits)
    return "submit limit" in words or "temporarily unable" in words


def submit_array(
    root: Path, sweep: str, tasks: Sequence[tuple[Job, ...]], cluster: Cluster, code: Any
) -> Submission:
    """One `sbatch`.

    Raises:
        NoSlurm: it was refused; nothing of it is left.
    """
    submission = Submission(
        folder=queue.folder(root.resolve()) / f"{plain(sweep)}-{secrets.token_hex(4)}",
        sweep=sweep,
        tasks=tuple(tuple(job.id for job in task) for task in tasks),
        cluster=cluster.model_dump(mode="json"),
        snapshot=code.id,
        slurm=scheduler.configured("ClusterName"),
        time=time.time(),
    )
    submission.write(None)
    words, made = io.StringIO(), None
    try:
        executor = make_executor(submission, cluster)
        calls = [task_of(root, sweep, runs, cluster) for runs in tasks]
        with (
            clean_environment(cluster, snapshot.environment(code)),
            contextlib.redirect_stderr(words),
        ):
            if len(calls) == 1:
                made = [executor.submit(calls[0])]
            else:
                with executor.batch():
                    made = [executor.submit(call) for call in calls]
    except BaseException as error:  # Ctrl-C too
        take_back(submission)
        if (known := refused_by_slurm(error)) is None:
            raise
        raise NoSlurm(scheduler.said("sbatch", known)) from error
    job = str(made[0].job_id).partition("_")[0]
    submission.write(job)
    return replace(submission, job=job)


def take_back(submission: Submission) -> None:
    """Undoes a submission that was not carried out whole: its jobs could only fail."""
    with contextlib.suppress(NoSlurm):  # there may be none; an answer that came late is one
        scheduler.ask("scancel", f"--name={submission.name}")
    shutil.rmtree(submission.folder, ignore_errors=True)


def clear_up(root: Path) -> None:
    """Brings to an end what a submitter was killed in; to be called with `queue.lock` held.

    A submission without an id that is all there is given the id that Slurm knows, others go.
    """
    for submission in queue.submissions(root):
        if submission.job is None:
            answer = scheduler.look([submission])
            if answer.silence or answer.foreign(submission):
                continue
            job = answer.job(submission)
            places = [Place(submission, i) for i in range(len(submission.tasks))]
            pickles = [submission.folder / f"{p.element(job or '')}_submitted.pkl" for p in places]
            if job and all(pickle.exists() for pickle in pickles):
                submission.write(job)
            else:
                take_back(submission)


def refused_by_slurm(error: BaseException) -> str | None:
    """sbatch's own words, if it was sbatch that failed."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    return str(error) if isinstance(error, FailedJobError | FailedSubmissionError) else None


def task_of(root: Path, sweep: str, runs: tuple[Job, ...], cluster: Cluster) -> Task:
    return Task(
        root=str(root.resolve()),
        sweep=sweep,
        runs=runs,
        workers=cluster.workers,
        workers_per_gpu=cluster.workers_per_gpu,
        cores=cluster.cpus_per_task,
        minutes=minutes(cluster.time),
        sharding=cluster.sharding,
    )


def make_executor(submission: Submission, cluster: Cluster) -> Any:
    """submitit's executor for this submission."""
    import submitit

    executor = submitit.SlurmExecutor(submission.folder, python=PYTHON)
    executor.update_parameters(**cluster.parameters(submission.name))
    return executor


# Signals that come while Python starts would end it, and a job that ends by itself is not requeued:
# they are ignored until the task listens. Slurm sends SIGTERM again, before it kills.
PYTHON = f"""bash -c 'trap "" USR2 TERM; exec "$0" "$@"' {shlex.quote(sys.executable)}"""


def script(root: Path, sweep: str, jobs: Sequence[Job], cluster: Cluster) -> str:
    """The text that `sbatch` would get for the first array of these runs."""
    from submitit.slurm.slurm import _make_sbatch_string

    tasks = pack(jobs, cluster.runs_per_job)
    count = min(len(tasks), max_array())
    folder = queue.folder(root.resolve()) / f"{plain(sweep)}-xxxxxxxx"
    submission = Submission(folder, sweep, (), {}, "", 0.0)
    return _make_sbatch_string(
        command=f"{PYTHON} -u -m submitit.core._submit {shlex.quote(str(folder))}",
        folder=folder,
        map_count=count if count > 1 else None,
        **cluster.parameters(submission.name),
    )


def cost_text(jobs: Sequence[Job], cluster: Cluster) -> str:
    """What submitting these runs may take at the most, in one line."""
    if not jobs:
        return "nothing to submit"
    cost = cluster.cost(len(pack(jobs, cluster.runs_per_job)))
    bound = f"{cost.gpu_hours:,.1f} GPU-hours" if cost.gpu_hours else ""
    bound = bound or f"{cost.cpu_hours:,.1f} CPU-hours"
    return (
        f"{len(jobs)} runs to submit in {cost.jobs} jobs of at most {cost.hours:.2f} hours: "
        f"{bound} at most, unless a run needs more than one job"
    )


def check(text: str, file: ClusterFile) -> str:
    """What Slurm says to a script, without submitting it.

    Raises:
        UserError: it would refuse it.
    """
    try:
        scheduler.ask("sbatch", "--version")
        scheduler.ask("scontrol", "ping")
    except NoSlurm as error:
        return f"not checked: {error}"
    try:
        with clean_environment(file.cluster, {}):
            told = scheduler.call("sbatch", "--test-only", text=text).stderr
        found = re.search(r"Job \d+ (.+)", told)
        return "Slurm would take it" + (f", {found[1]}" if found else "")
    except NoSlurm as error:
        raise UserError(blame(str(error), file)) from error


def max_array() -> int:
    """How many jobs one array may have here."""
    found = ""
    with contextlib.suppress(NoSlurm):  # a dry run needs none
        scheduler.ask("scontrol", "ping")  # which says so at once
        found = scheduler.configured("MaxArraySize") or ""
    return int(found) if found.isdecimal() and int(found) > 0 else MAX_ARRAY


def plain(name: str) -> str:
    """A sweep's name for a job's: squeue takes lists of them, and shows little room."""
    return re.sub(r"[^\w.-]+", "-", name)[:60]


# --- what a job inherits --------------------------------------------------------------------------

_LEAKS = re.compile(
    r"(SLURM|SLURMD|SRUN|PMI|PMIX|PMI2|OMPI)_.*"  # of the allocation that somebody works in
    r"|SBATCH_.*"  # which would stand above the script
    r"|(GOMP|KMP)_.*AFFINITY|KMP_HW_SUBSET|OMP_(PLACES|PROC_BIND)"  # of its processors
    r"|(CUDA|HIP|ROCR|NVIDIA)_VISIBLE_DEVICES|GPU_DEVICE_ORDINAL|ZE_AFFINITY_MASK"
    r"|MASTER_(ADDR|PORT)|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)|LOCAL_WORLD_SIZE|TORCHELASTIC_.*"
    r"|PYTHONPATH|PYTHONSAFEPATH"  # which the snapshot sets
)
DEFAULTS = ("partition", "account", "qos", "constraint")
_KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_CONF_SERVER")  # where Slurm itself is


@contextlib.contextmanager
def clean_environment(cluster: Cluster, more: Mapping[str, str]) -> Iterator[None]:
    """Nothing of an interactive allocation reaches the jobs that are submitted from it.

    A site's or a person's SBATCH_ACCOUNT and its like count where the cluster file is silent.
    """
    defaults = {f"SBATCH_{key.upper()}" for key in DEFAULTS if getattr(cluster, key) is None}
    before = dict(os.environ)
    for name in before:
        if _LEAKS.fullmatch(name) and name not in {*_KEPT, *defaults}:
            del os.environ[name]
    os.environ.update(more)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- whose fault a refusal is ---------------------------------------------------------------------

_BLAME: tuple[tuple[str, str], ...] = (
    (r"invalid partition", "partition"),
    (r"invalid account|account.*(permission|not)", "account"),
    (r"invalid qos", "qos"),
    (r"invalid (feature|constraint)", "constraint"),
    (r"time limit|--time|time specification", "time"),
    (r"node count", "nodes"),
    (r"memory", "memory"),
    (r"generic resource|gres|--gpus", "gpus_per_node"),
    (r"cpu count|cpus?-per-task|more processors", "cpus_per_task"),
)


def blame(words: str, file: ClusterFile) -> str:
    """A refusal with the line of the cluster file that it is about, where the words tell it."""
    for option, value in file.cluster.sbatch.items():
        if re.search(rf"\b{re.escape(option.replace('_', '-'))}\b", words):
            return f"{file.mark(f'sbatch.{option}')}: {value}: Slurm refuses it: {words}"
    for pattern, key in _BLAME:
        if re.search(pattern, words, re.IGNORECASE) and getattr(file.cluster, key, None):
            value = getattr(file.cluster, key)
            shown = f": {value}" if isinstance(value, str | int) else ""
            return f"{file.mark(key)}{shown}: Slurm refuses it: {words}"
    return f"Slurm refuses: {words}"
