"""What Slurm says of jobs, and how they ended, in words.

`squeue` is asked once for all submissions by their names; it knows a job until minutes after its
end. Then `sacct`, where there is accounting; then what slurmstepd wrote into the job's log. A job
that none of them names is not thereby dead: `Answer.of` gives None, and the run's own record
decides (status.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from components.registry import UserError
from experiments.record import tail
from sweeps import queue
from sweeps.queue import Place, Submission

ANSWER_SECONDS = 60  # a busy slurmctld takes long; none at all fails sooner by itself
NAMES_AT_ONCE = 200
WAITING = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
ACTIVE = {"RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "RESIZING"}
ACTIVE |= {"SUSPENDED", "STOPPED"}
UNWRITABLE = ":53"  # how slurmd says that it could not open the job's output file


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
    found = queue.places(root)
    asked = [found[run].submission for run in runs if run in found]
    return View(found, look(list({submission.name: submission for submission in asked}.values())))


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
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("SQUEUE_", "SACCT_", "SCANCEL_"))
    }
    try:
        done = subprocess.run(
            words, input=text, capture_output=True, text=True, timeout=ANSWER_SECONDS,
            encoding="utf-8", errors="replace", env=env,
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
    lines = [re.sub(rf"^{command}: (error: )?", "", line.strip("* ")) for line in text.splitlines()]
    return f"{command}: " + ("; ".join(line for line in lines if line) or "failed without a word")


def look(wanted: Sequence[Submission]) -> Answer:
    """What Slurm knows of these submissions; never raises."""
    if not wanted:
        return Answer()
    elements: dict[tuple[str, int], Element] = {}
    try:
        ask("scontrol", "ping")  # which says at once that nobody is there; squeue waits long
        slurm = configured("ClusterName")
        wanted = [s for s in wanted if s.slurm in (None, slurm)]
        jobs = {s.name: s.job for s in wanted if s.job is not None}
        known = {s.name: s for s in wanted}
        for start in range(0, len(wanted), NAMES_AT_ONCE):
            names = ",".join(s.name for s in wanted[start : start + NAMES_AT_ONCE])
            for line in ask("squeue", *SQUEUE, f"--name={names}").splitlines():
                name, job, number, state, why, nodes, status, *_ = f"{line}||||||".split("|")
                jobs.setdefault(name, job)
                if jobs[name] != job or not state:
                    continue
                rest = state, why, nodes, ending(status)
                if number.isdecimal():
                    elements[name, int(number)] = Element(f"{job}_{number}", *rest)
                    continue
                # No index: a job of its own, or what is left of an array that was taken back.
                for index in range(len(known[name].tasks)):
                    one = Place(known[name], index).element(job)
                    elements.setdefault((name, index), Element(one, *rest))
    except NoSlurm as error:
        return Answer(silence=str(error))
    forgotten = [s for s in wanted if any((s.name, i) not in elements for i in range(len(s.tasks)))]
    by_job = {jobs[s.name]: s.name for s in forgotten if s.name in jobs}
    for (job, index), found in accounted(sorted(by_job)).items():
        elements.setdefault((by_job[job], index), found)
    return Answer(elements, slurm, jobs)


def configured(name: str) -> str | None:
    """A setting of this Slurm.

    Raises:
        NoSlurm: it gives no answer.
    """
    found = re.search(rf"^{name}\s*=\s*(\S+)", ask("scontrol", "show", "config"), re.MULTILINE)
    return found[1] if found else None


_FIELDS = ("Name", "ArrayJobID", "ArrayTaskID", "State", "Reason", "NodeList", "exit_code")
SQUEUE = ("-h", "-r", "-t", "all", "-O", ",".join(f"{name}:|" for name in _FIELDS))


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
