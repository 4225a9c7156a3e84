"""What has been submitted to Slurm, and what Slurm says of it.

    runs/slurm/lock                    held by whoever submits or takes back
    runs/slurm/<sweep>-<token>/        one array: submitit's script and pickles, Slurm's logs, and
        submission.json                who submitted which runs; written before `sbatch` is called

        {"schema": 1, "sweep", "job": id or null, "tasks": [[run ids of element 0], …],
         "cluster": {…}, "slurm": its ClusterName, "snapshot", "user", "host", "time"}

The folder's name is the job's name in Slurm, so that an id that nobody came to write down (a login
node that died in the middle of `sbatch`) is found again. A run's newest submission counts.

Slurm is asked once for all: `squeue`, which knows a job until minutes after its end, then `sacct`
where there is accounting. A job that neither names is not thereby dead: `Answer.of` gives None, and
the run's own record decides (status.py).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import getpass
import os
import re
import signal
import socket
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from components.registry import UserError
from experiments.record import disk_error, read_json, write_json

SCHEMA = 1
ANSWER_SECONDS = 60  # a busy slurmctld takes long; none at all fails sooner by itself
NAMES_AT_ONCE = 200
PREFIX = "ceteris-"
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ACTIVE = {"RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"}
ACTIVE |= {"SUSPENDED", "STOPPED"}
LOCKLESS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
UNWRITABLE = ":53"  # how slurmd says that it could not open the job's output file


@dataclass(frozen=True)
class Submission:
    """One array of jobs; `tasks[i]` are the runs of its element i."""

    folder: Path
    sweep: str
    tasks: tuple[tuple[str, ...], ...]
    cluster: Mapping[str, Any]
    snapshot: str
    time: float
    slurm: str | None = None
    job: str | None = None
    user: str = field(default_factory=getpass.getuser)
    host: str = field(default_factory=socket.gethostname)

    @property
    def name(self) -> str:
        return PREFIX + self.folder.name

    def write(self, job: str | None) -> None:
        """Puts it on record, before and after Slurm has given it an id."""
        data = {k: v for k, v in vars(self).items() if k != "folder"}
        tasks = [list(runs) for runs in self.tasks]
        data |= {"schema": SCHEMA, "job": job, "tasks": tasks, "cluster": dict(self.cluster)}
        write_json(self.folder / "submission.json", data)


@dataclass(frozen=True)
class Place:
    """Where a run stands in the queue: an element of a submission."""

    submission: Submission
    index: int

    def element(self, job: str) -> str:
        return f"{job}_{self.index}" if len(self.submission.tasks) > 1 else job

    def log(self, job: str, ending: str = "err") -> Path:
        """What Slurm itself and the process that starts the runs printed."""
        return self.submission.folder / f"{self.element(job)}_0_log.{ending}"


@dataclass(frozen=True)
class Element:
    """What Slurm says of one job.

    Attributes:
        job: its id, as Slurm's commands take it (`12_3`).
        state: Slurm's long name (`PENDING`, `OUT_OF_MEMORY`).
        why: why it waits, where it is pending.
        nodes: where it runs or ran.
        code: `exit:signal` of the batch script once it has ended.
    """

    job: str
    state: str
    why: str = ""
    nodes: str = ""
    code: str = ""

    @property
    def waiting(self) -> bool:
        return self.state in WAITING

    @property
    def active(self) -> bool:
        return self.state in ACTIVE

    @property
    def ended(self) -> bool:
        return not (self.waiting or self.active)


@dataclass(frozen=True)
class Answer:
    """What Slurm said of some submissions.

    Attributes:
        jobs: array job id by the job's name, where only Slurm knew it.
        slurm: the name of the cluster that answered.
        silence: Slurm's words, where it gave no answer.
    """

    elements: Mapping[tuple[str, int], Element] = field(default_factory=dict)
    slurm: str | None = None
    jobs: Mapping[str, str] = field(default_factory=dict)
    silence: str | None = None

    def job(self, submission: Submission) -> str | None:
        return submission.job or self.jobs.get(submission.name)

    def foreign(self, submission: Submission) -> bool:
        """Whether another Slurm, which shares the folder of runs, has it."""
        return None not in (self.slurm, submission.slurm) and self.slurm != submission.slurm

    def of(self, place: Place) -> Element | None:
        return self.elements.get((place.submission.name, place.index))


@dataclass(frozen=True)
class View:
    """Where runs stand in the queue, and what Slurm says of it."""

    places: Mapping[str, Place] = field(default_factory=dict)
    answer: Answer = field(default_factory=Answer)


def view(root: Path, runs: Collection[str]) -> View:
    """Every run's place; Slurm is asked about these runs, if one of them was ever submitted."""
    found = places(root)
    asked = [found[run].submission for run in runs if run in found]
    return View(found, look(list({submission.name: submission for submission in asked}.values())))


# --- the record ----------------------------------------------------------------------------------


def folder(root: Path) -> Path:
    return root / "slurm"


def submissions(root: Path) -> list[Submission]:
    """Every submission below `root`, oldest first.

    Raises:
        UserError: one is damaged; says which.
    """
    found = []
    for path in folder(root).glob("*/submission.json"):
        data = read_json(path)
        try:
            if data.pop("schema") != SCHEMA:
                raise ValueError("another version wrote it")
            data["tasks"] = tuple(tuple(map(str, runs)) for runs in data["tasks"])
            found.append(Submission(folder=path.parent, **data))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: can't be read ({error}); move its folder away") from error
    return sorted(found, key=lambda s: (s.time, s.folder.name))


def places(root: Path) -> dict[str, Place]:
    """The newest place of each run that was ever submitted, by the run's id."""
    return {
        run: Place(submission, index)
        for submission in submissions(root)
        for index, runs in enumerate(submission.tasks)
        for run in runs
    }


@contextlib.contextmanager
def lock(root: Path) -> Iterator[None]:
    """One submitter at a time in a folder of runs, on whichever node.

    Raises:
        UserError: the folder can't be written, or has no locks.
    """
    path = folder(root) / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise disk_error(error, path) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    except OSError as error:
        if error.errno in LOCKLESS:
            raise UserError(
                f"{path}: this file system has no locks; keep runs on one that has (--runs)"
            ) from error
        raise
    finally:
        os.close(descriptor)


# --- Slurm's answers -----------------------------------------------------------------------------


class NoSlurm(UserError):
    """A Slurm command failed; carries Slurm's own words."""


class NotInstalled(NoSlurm):
    """There is no such command here."""


def ask(*words: str) -> str:
    """What a Slurm command printed; see `call`."""
    return call(*words).stdout


def call(*words: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    """A Slurm command, with `text` to read.

    Raises:
        NoSlurm: it is not installed, gave no answer in time, or failed.
    """
    # What people set to see less of the queue must not hide jobs from us.
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_"))}
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS,
            errors="replace", env=env,
        )  # fmt: skip
    except FileNotFoundError as error:
        raise NotInstalled(f"no {words[0]} here: this needs a login node of a Slurm") from error
    except subprocess.TimeoutExpired as error:
        raise NoSlurm(f"{words[0]} gave no answer in {ANSWER_SECONDS} s") from error
    except OSError as error:
        raise NoSlurm(f"{words[0]}: {error.strerror}") from error
    if done.returncode:
        raise NoSlurm(said(words[0], done.stderr or done.stdout))
    return done


def said(command: str, text: str) -> str:
    """The words of a Slurm command in one line, its own name once."""
    lines = [re.sub(rf"^{command}: (error: )?", "", line.strip()) for line in text.splitlines()]
    return f"{command}: " + ("; ".join(line for line in lines if line) or "failed without a word")


def look(wanted: Sequence[Submission]) -> Answer:
    """What Slurm knows of these submissions; never raises."""
    if not wanted:
        return Answer()
    elements: dict[tuple[str, int], Element] = {}
    try:
        ask("scontrol", "ping")  # which says at once that nobody is there; squeue waits long
        slurm = setting("ClusterName")
        wanted = [s for s in wanted if s.slurm in (None, slurm)]
        jobs = {s.name: s.job for s in wanted if s.job is not None}
        for start in range(0, len(wanted), NAMES_AT_ONCE):
            names = ",".join(s.name for s in wanted[start : start + NAMES_AT_ONCE])
            for line in ask("squeue", *SQUEUE, f"--name={names}").splitlines():
                name, job, number, state, why, nodes, status, *_ = f"{line}||||||".split("|")
                jobs.setdefault(name, job)
                if jobs[name] == job and state:
                    found = element(job, number, state, why, nodes, ending(status))
                    elements[name, int(number) if number.isdecimal() else 0] = found
    except NoSlurm as error:
        return Answer(silence=str(error))
    forgotten = [s for s in wanted if any((s.name, i) not in elements for i in range(len(s.tasks)))]
    by_job = {jobs[s.name]: s.name for s in forgotten if s.name in jobs}
    for (job, index), found in accounted(sorted(by_job)).items():
        elements.setdefault((by_job[job], index), found)
    return Answer(elements, slurm, jobs)


def setting(name: str) -> str | None:
    """A setting of this Slurm; None if it gives no answer."""
    with contextlib.suppress(NoSlurm):
        found = re.search(rf"^{name}\s*=\s*(\S+)", ask("scontrol", "show", "config"), re.MULTILINE)
        return found[1] if found else None
    return None


_FIELDS = ("Name", "ArrayJobID", "ArrayTaskID", "State", "Reason", "NodeList", "exit_code")
SQUEUE = ("-h", "-r", "-t", "all", "-O", ",".join(f"{name}:|" for name in _FIELDS))


def element(job: str, index: str, *rest: str) -> Element:
    """An element of an array; without an index, a job of its own."""
    return Element(f"{job}_{index}" if index.isdecimal() else job, *rest)


def ending(status: str) -> str:
    """squeue's exit code, which is that of wait(2), as the others write it: `exit:signal`."""
    number = int(status) if status.isdecimal() else 0
    return f"{number >> 8 & 255}:{number & 127}"


def accounted(jobs: Sequence[str]) -> dict[tuple[str, int], Element]:
    """What the accounting, where there is one, knows of these arrays: by array and index."""
    found: dict[tuple[str, int], Element] = {}
    with contextlib.suppress(NoSlurm):
        words = ("-o", "JobID,State,ExitCode,NodeList", "-j", ",".join(jobs))
        for line in ask("sacct", "-n", "-P", "-X", *words).splitlines() if jobs else ():
            one, state, code, nodes = line.split("|", 3)
            job, _, index = one.partition("_")
            state, _, why = state.partition(" ")
            if index.isdecimal() or not index:
                found[job, int(index or 0)] = Element(one, state, why, nodes, code)
    return found


# --- how a job ended, in words -------------------------------------------------------------------

ENDINGS = {
    "OUT_OF_MEMORY": "out of memory: give it more with memory: in the cluster file",
    "TIMEOUT": "time limit reached",
    "DEADLINE": "its deadline passed",
    "NODE_FAIL": "node {nodes} failed",
    "BOOT_FAIL": "node {nodes} did not boot",
    "CANCELLED": "cancelled",
    "PREEMPTED": "preempted",
    "REVOKED": "revoked",
}


def cause(element: Element, submission: Submission) -> str:
    """Why a job ended without the results it was for, as Slurm tells it."""
    if element.code.endswith(UNWRITABLE):
        return (
            f"job {element.job} could not write to {submission.folder}: is the folder of runs "
            "on a file system that compute nodes can write? (--runs)"
        )
    text = ENDINGS.get(element.state, "").format(nodes=element.nodes or "?")
    if element.state == "CANCELLED" and element.why.startswith("by "):
        text += " " + element.why
    if not text:
        number, _, killed = element.code.partition(":")
        text = f"ended as {element.state}"
        if killed.isdecimal() and int(killed):
            text = f"killed by signal {named(int(killed))}"
        elif number.isdecimal() and int(number) > 128:
            text = f"killed by signal {named(int(number) - 128)}"
        elif number.isdecimal() and int(number):
            text = f"exit code {number}"
    return f"job {element.job}: {text}"


def named(number: int) -> str:
    with contextlib.suppress(ValueError):
        return f"{number} ({signal.Signals(number).name})"
    return str(number)


_LAST_WORDS = (  # what slurmstepd writes into a job's log, where nobody else remembers its end
    (re.compile(r"DUE TO TIME LIMIT"), "TIMEOUT"),
    (re.compile(r"DUE TO NODE FAILURE"), "NODE_FAIL"),
    (re.compile(r"oom[-_ ]kill"), "OUT_OF_MEMORY"),
    (re.compile(r"DUE TO PREEMPTION"), "PREEMPTED"),
    (re.compile(r"\*\*\* (JOB|STEP) .* CANCELLED AT"), "CANCELLED"),
)


def last_words(place: Place, job: str) -> Element | None:
    """How a job ended by what slurmstepd wrote into its log, once Slurm has forgotten it."""
    for line in reversed(tail(place.log(job), 20)):
        if "DUE TO JOB REQUEUE" in line:
            return None
        for pattern, state in _LAST_WORDS:
            if pattern.search(line):
                return Element(place.element(job), state)
    return None


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log that say something; none if it can't be read."""
    most = 8192 + 200 * lines  # bytes
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - most))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-lines:]
