"""The cluster file: where runs are carried out, and how much of it each may have.

    file ─ yaml_text.read ─ overrides `a.b=c` ─ Cluster (pydantic) ─ cross-checks ─ submitit's words

Site settings only: nothing here is science, and no run's identity depends on it. Examples lie in
sweeps/clusters/ and are found by name, as presets are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from components.registry import Closed
from experiments import hints, loader
from experiments.yaml_text import ConfigError, Located, read, shown
from sweeps.grammar import check, wrong

CLUSTERS = Path(__file__).parent / "clusters"
YEAR = 366 * 24 * 3600  # seconds

# Options of sbatch that Ceteris sets itself, by the key of the cluster file that says them …
_KEYS = {
    **{key: key for key in ("partition", "account", "qos", "constraint", "nodes", "time")},
    "tasks_per_node": "ntasks ntasks-per-node tasks-per-node ntasks-per-gpu",
    "gpus_per_node": "gpus gpus-per-node gpus-per-task gpus-per-socket",
    "cpus_per_task": "cpus-per-task cpus-per-gpu",
    "memory": "mem",
    "warning_seconds": "signal",
}
_OTHERS = {  # … or with nothing to say
    "array": "it holds the runs; array_parallelism says how many jobs at a time",
    "job-name": "jobs are named after their sweep",
    "output error open-mode": "logs lie beside the submission",
    "requeue no-requeue": "jobs go on from their checkpoints",
    "chdir": "jobs start where `submit` was called",
    "wrap": "jobs run Ceteris",
    "export export-file": "write `export NAME=value` under setup",
    "parsable test-only": "`submit --dry-run` submits nothing",
    "wait": "`submit` returns at once, and `status --watch` waits",
    "clusters": "submit from a login node of that cluster",
}
OWN = {
    **{option: f"is the key {key} of the cluster file; write it there"
       for key, options in _KEYS.items() for option in options.split()},
    **{option: f"is set by Ceteris itself ({why}); remove it"
       for options, why in _OTHERS.items() for option in options.split()},
}  # fmt: skip


def _line(text: str) -> str:
    if not text.strip() or not text.replace("\t", " ").isprintable():
        raise wrong("should be one line of printable text")
    return text


def _setup_line(text: str) -> str:
    if re.match(r"\s*#\s*(SBATCH|PBS|BSUB)\b", text):
        raise wrong("is an option of sbatch; write it under sbatch: as name: value")
    return text


def _lines(value: Any) -> Any:
    if isinstance(value, str):
        raise wrong("should be a list of lines; put '- ' before each")
    return tuple(value) if isinstance(value, list) else value


def _time(value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, bool) or not _TIME.fullmatch(str(value)):
        raise wrong(
            "should be minutes, or one of M:S, H:M:S, D-H, D-H:M, D-H:M:S (4:00:00 is four hours), "
            f"got {loader.shorten(value)}"
        )
    if not 1 <= seconds(value) <= YEAR:
        raise wrong(f"should be more than nothing and at most a year, got {loader.shorten(value)}")
    return value


_TIME = re.compile(r"[0-9]{1,9}(:[0-9]{1,9}){0,2}|[0-9]{1,9}-[0-9]{1,9}(:[0-9]{1,9}){0,2}")


def _memory(value: Any) -> Any:
    if value is None:
        return None
    found = re.fullmatch(r"([1-9][0-9]{0,8})([KMGT])B?|0", str(value), re.IGNORECASE)
    if not found:
        raise wrong(
            "should be a whole number with K, M, G or T, such as 16GB, or 0 for the whole node's, "
            f"got {loader.shorten(value)}"
        )
    return found[1] + found[2].upper() if found[1] else "0"


def _option(name: str) -> str:
    """A name that sbatch may know; it takes any beginning of a long option's name for the whole."""
    plain = name.replace("_", "-")
    if not re.fullmatch(r"[a-z][a-z0-9]+(-[a-z0-9]+)*", plain):
        raise wrong("is no long name of an sbatch option; write it without dashes before it")
    if (own := next((option for option in OWN if option.startswith(plain)), None)) is not None:
        raise wrong(OWN[own] if own == plain else f"sbatch takes it for {own}, which {OWN[own]}")
    return name


def _option_value(value: Any) -> Any:
    if value is False:
        raise wrong("false is no value of a flag; write true, or leave the line out")
    if not isinstance(value, str | int | float) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        raise wrong(f"should be text, a number, or true for a flag, got {loader.shorten(value)}")
    return _line(value) if isinstance(value, str) else value


Text = Annotated[str, AfterValidator(_line)]
Count = Annotated[int, Field(ge=1, le=10**6)]


class Cluster(Closed):
    """The words of a cluster file. Of a Slurm job, but for the first and the last two."""

    executor: Annotated[
        Literal["slurm", "local"], Field(description="who runs them: Slurm, or this machine")
    ] = "slurm"
    partition: Annotated[Text | None, Field(description="null: the site's default")] = None
    account: Annotated[Text | None, Field(description="who pays")] = None
    qos: Annotated[Text | None, Field(description="quality of service")] = None
    constraint: Annotated[Text | None, Field(description="features that nodes must have")] = None
    nodes: Annotated[Count, Field(description="nodes of one job")] = 1
    tasks_per_node: Annotated[
        Count, Field(description="processes of one run on each node; with GPUs, one for each")
    ] = 1
    gpus_per_node: Annotated[int, Field(ge=0, le=1000, description="GPUs on each node")] = 0
    cpus_per_task: Annotated[Count, Field(description="CPUs of each process")] = 1
    memory: Annotated[
        str | None, BeforeValidator(_memory), Field(description="of each node; 0: all it has")
    ] = None
    time: Annotated[
        str | int | None, BeforeValidator(_time), Field(description="how long a job may last")
    ] = None
    warning_seconds: Annotated[
        int, Field(ge=1, le=65535, description="warned so long before the limit, runs save")
    ] = 120
    setup: Annotated[
        tuple[Annotated[Text, AfterValidator(_setup_line)], ...],
        BeforeValidator(_lines),
        Field(description="shell lines before Python starts: modules, variables"),
    ] = ()
    array_parallelism: Annotated[Count | None, Field(description="jobs at a time")] = None
    runs_per_job: Annotated[Count, Field(description="runs that share a job")] = 1
    sharding: Annotated[
        Literal["ddp", "fsdp2"],
        Field(description="of a run over several processes: whole copies, or shards"),
    ] = "ddp"
    sbatch: Annotated[
        dict[
            Annotated[str, AfterValidator(_option)],
            Annotated[str | int | float | bool, BeforeValidator(_option_value)],
        ],
        Field(description="more options of sbatch, by their long names; true: a flag"),
    ] = Field(default_factory=dict)
    workers: Annotated[Count | None, Field(description="runs at a time on CPUs")] = None
    workers_per_gpu: Annotated[Count, Field(description="runs that share a GPU")] = 1

    @property
    def tasks(self) -> int:
        """Processes of one job."""
        return self.nodes * self.tasks_per_node

    @property
    def gpus(self) -> int:
        """GPUs of one job."""
        return self.nodes * self.gpus_per_node

    @property
    def cpus(self) -> int:
        """CPUs of one job."""
        return self.tasks * self.cpus_per_task

    @property
    def runs_at_once(self) -> int:
        """How many of its runs a job works on at a time, at most."""
        places = self.gpus_per_node * self.workers_per_gpu or self.workers or self.cpus_per_task
        return min(self.runs_per_job, places)

    def cost(self, jobs: int) -> Cost:
        """What so many jobs may take if each lasts to its time limit."""
        hours = seconds(self.time) / 3600
        return Cost(jobs, hours, jobs * self.gpus * hours, jobs * self.cpus * hours)

    def parameters(self, name: str) -> dict[str, Any]:
        """What submitit's SlurmExecutor.update_parameters takes, for jobs of that name.

        None leaves an option out, wckey above all, for which submitit would put its own name.
        """
        options = {key.replace("_", "-"): value for key, value in self.sbatch.items()}
        typed = self.gpus_per_node == 0 or _gpus_in(options.get("gres")) is not None
        return {
            "job_name": name,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "nodes": self.nodes,
            "ntasks_per_node": self.tasks_per_node,
            "gpus_per_node": None if typed else self.gpus_per_node,
            "cpus_per_task": self.cpus_per_task,
            "mem": self.memory,
            "time": minutes(self.time),
            "signal_delay_s": self.warning_seconds,
            "setup": list(self.setup),
            "array_parallelism": self.array_parallelism or 10**6,
            "wckey": None,
            # A rank that dies ends the others; and a step gets the CPUs of its job, which srun has
            # not taken from sbatch since Slurm 22.05.
            "srun_args": ["--kill-on-bad-exit=1", f"--cpus-per-task={self.cpus_per_task}"],
            "additional_parameters": {"requeue": True, **options},
        }

    def problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        """What no single field can tell: (keys it is about, the first to be blamed; message)."""
        return self._local_problems() if self.executor == "local" else self._slurm_problems()

    def _local_problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        for key in self.model_fields_set - {"executor", "workers", "workers_per_gpu"}:
            yield (key,), "is of a Slurm job, and executor: local has none; remove it"
        if self.workers is not None and self.workers_per_gpu > 1:
            yield ("workers_per_gpu", "workers"), "workers says it already; keep one of the two"

    def _slurm_problems(self) -> Iterator[tuple[tuple[str, ...], str]]:
        processes = f"nodes {self.nodes} x tasks_per_node {self.tasks_per_node}"
        gpus, runs = self.gpus_per_node, self.runs_per_job
        if self.time is None:
            yield ("time",), "is missing; say how long a job may last, such as 4:00:00"
        elif self.warning_seconds >= seconds(self.time):
            yield (
                ("warning_seconds", "time"),
                f"a warning {self.warning_seconds} s before the end leaves none of the "
                f"{seconds(self.time)} s of a job; set warning_seconds below that, or more time",
            )
        if self.tasks > 1 and runs > 1:
            yield (
                ("runs_per_job", "tasks_per_node", "nodes"),
                f"{runs} runs can't share a job of {processes}: each needs all its processes",
            )
        if self.tasks > 1 and gpus and self.tasks_per_node != gpus:
            yield (
                ("tasks_per_node", "gpus_per_node"),
                f"one process for each GPU: got tasks_per_node {self.tasks_per_node} for "
                f"gpus_per_node {gpus}",
            )
        if self.sharding == "fsdp2" and not (gpus and self.tasks > 1):
            yield (
                ("sharding",),
                f"fsdp2 shards a run over several GPUs, got {processes} with gpus_per_node {gpus}",
            )
        if self.workers_per_gpu > 1 and not (gpus and runs > 1):
            yield (
                ("workers_per_gpu",),
                f"runs share a GPU where a job has several runs and a GPU, got runs_per_job {runs} "
                f"with gpus_per_node {gpus}",
            )
        if self.workers is not None and (gpus or runs == 1):
            yield (
                ("workers",),
                "is for jobs of several runs on CPUs; "
                + ("with GPUs, set workers_per_gpu" if gpus else "set runs_per_job too"),
            )
        if self.tasks == 1 and runs < gpus:
            yield (
                ("gpus_per_node",),
                f"{gpus - runs} of {gpus} GPUs would idle: raise runs_per_job to share them among "
                "runs, or tasks_per_node for one run over all",
            )
        if self.tasks == 1 and self.runs_at_once > self.cpus_per_task:
            yield (
                ("cpus_per_task", "workers", "workers_per_gpu", "runs_per_job"),
                f"{self.runs_at_once} runs at a time need a CPU each: set cpus_per_task to "
                f"{self.runs_at_once} or more",
            )
        for key, value in self.sbatch.items():
            name = key.replace("_", "-")
            if name in ("mem-per-cpu", "mem-per-gpu") and self.memory is not None:
                yield (f"sbatch.{key}", "memory"), f"{name} and memory exclude each other"
            asked = _gpus_in(value) if name == "gres" else None
            if asked is not None and asked != gpus:
                yield (
                    (f"sbatch.{key}", "gpus_per_node"),
                    f"gres asks for {asked} GPUs on each node, gpus_per_node for {gpus}: set both "
                    "to the same",
                )


@dataclass(frozen=True)
class Cost:
    """Upper bounds: what jobs take that all last to their time limit.

    Attributes:
        hours: of one job.
    """

    jobs: int
    hours: float
    gpu_hours: float
    cpu_hours: float


@dataclass(frozen=True)
class ClusterFile:
    """Settings and where they were written, for what only Slurm can find wrong with them."""

    cluster: Cluster
    path: Path | None = None  # None: stored with a submission
    located: Located = field(default_factory=lambda: Located({}))

    def mark(self, key: str) -> str:
        """`file:line:col: key` where a key was written, or else the file's name."""
        place = self.located.marks.get(tuple(key.split(".")))
        if place is not None:
            return f"{place}: {key}"
        return shown(self.path) if self.path else f"the settings of the last submission: {key}"


def load(name: str | Path, overrides: Iterable[str] = ()) -> ClusterFile:
    """The cluster in a file, or an example by its name, with `a.b=c` overrides.

    Raises:
        ConfigError: everything that is wrong with it, one line each.
    """
    path = loader.find(name, CLUSTERS, "cluster file")
    located = read(path)
    hints.expect(located, "a cluster file")
    loader.apply_overrides(located, overrides)
    cluster = check(Cluster, located)
    problems = []
    for keys, message in cluster.problems():
        written = [k for k in keys if tuple(k.split(".")) in located.marks] or [keys[0]]
        key = min(written, key=lambda k: located.mark(tuple(k.split("."))).line > 0)
        problems.append((located.mark(tuple(key.split("."))), f"{key}: {message}"))
    if problems:
        problems.sort(key=lambda problem: problem[0].order)
        raise ConfigError(*(f"{mark}: {text}" for mark, text in problems))
    return ClusterFile(cluster, path, located)


def seconds(time: str | int | None) -> int:
    """A time as Slurm reads it: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; 0 for None."""
    if time is None:
        return 0
    days, dash, clock = str(time).rpartition("-")
    numbers = [int(word) for word in clock.split(":")]
    units = (3600, 60, 1) if dash or len(numbers) == 3 else (60, 1)
    whole = sum(number * unit for number, unit in zip(numbers, units, strict=False))
    return int(days or 0) * 86400 + whole


def minutes(time: str | int | None) -> int:
    """The same in minutes; Slurm rounds up too."""
    return math.ceil(seconds(time) / 60)


def _gpus_in(gres: Any) -> int | None:
    """How many GPUs a `gres` asks for: `gpu:2`, `gpu:a100:2,tmp:10`; None where it names none."""
    words = [part.split(":") for part in str(gres).split(",")]
    counts = [w[-1] if w[-1].isdecimal() else "1" for w in words if w[0] in ("gpu", "gres/gpu")]
    return sum(map(int, counts)) if counts else None
