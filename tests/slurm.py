"""A real Slurm of one's own: controller, nodes and munge in a folder under /tmp, on loopback.

    with PrivateSlurm(nodes=2) as slurm:
        slurm.run("sbatch", "--wrap", "hostname", env={...})

It reads nothing of a Slurm that the machine may have, and leaves nothing behind. All nodes are this
machine, under the names 127.0.0.1, 127.0.0.2, … that torch can resolve as MASTER_ADDR, with as many
CPUs as asked for, whatever there are. Partitions: `main` (default), `low` (jobs of `high` preempt
its jobs: signal, 30 s of grace, requeue), `high`, and `short` (at most one minute).

What is as in production: every Slurm command, arrays, requeueing, preemption, time limits (checked
every 30 s, by the minute), lost nodes. What is not: memory and devices are booked, never fenced.
With `accounting=True` there is also slurmdbd, so that sacct answers and limits hold: account `lab`,
and a QOS `few` that takes two jobs of a user at once. Its start takes seconds instead of a blink.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

import psutil

from tests import PATIENCE
from tests import slurm_conf as conf

NEEDED = ("slurmctld", "slurmd", "sbatch", "munged", "mungekey")
NEEDED_FOR_ACCOUNTING = ("slurmdbd", "mariadbd")
HOW = "as root on Debian or Ubuntu, tests/slurm_packages.sh installs it"


class SlurmError(RuntimeError):
    """A Slurm command failed; its message is what the command wrote to stderr."""

    def __init__(self, words: Iterable[str], code: int, stdout: str, stderr: str) -> None:
        super().__init__(f"{' '.join(words)}: exit code {code}: {stderr.strip() or stdout.strip()}")
        self.code, self.stdout, self.stderr = code, stdout, stderr


def missing(accounting: bool = False) -> str | None:
    """Why no private Slurm can run here, in one line; None where one can."""
    needed = NEEDED + (NEEDED_FOR_ACCOUNTING if accounting else ())
    absent = [name for name in needed if not conf.which(name)]
    if absent:
        return f"no {', '.join(absent)} here; {HOW}"
    addresses = [a for card in psutil.net_if_addrs().values() for a in card]
    if not any(a.family == socket.AF_INET and a.address[:4] != "127." for a in addresses):
        return "Slurm needs an IPv4 address beside loopback, say: ip addr add 192.0.2.77/32 dev lo"
    return None


class PrivateSlurm:
    """A cluster that exists inside a `with` block.

    `config` lays settings over slurm.conf's (None takes one away), `partitions` appends lines to
    it. `gpus` per node are make-believe: scheduled, and named in CUDA_VISIBLE_DEVICES.
    """

    def __init__(
        self,
        nodes: int = 2,
        cpus: int = 8,
        partitions: str | None = None,
        accounting: bool = False,
        config: Mapping[str, str | int | None] | None = None,
        gpus: int = 0,
    ) -> None:
        self.nodes = [f"127.0.0.{i}" for i in range(1, nodes + 1)]
        self.cpus, self.gpus, self.accounting = cpus, gpus, accounting
        self.partitions, self.config = partitions or "", dict(config or {})
        self.folder = Path()
        self.env: dict[str, str] = {}
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    # ------------------------------------------------------------------ use

    def run(
        self,
        *words: str | Path,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        timeout: float = PATIENCE,
    ) -> str:
        """What a command (Slurm's or any other) prints, run as a user of this cluster would."""
        command = [str(word) for word in words]
        done = subprocess.run(
            command,
            env={**self.clean_environment(), **(env or {})},
            cwd=cwd or self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if done.returncode:
            raise SlurmError(command, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def clean_environment(self) -> dict[str, str]:
        """os.environ as on a login node: this cluster's, and free of any job we are inside of."""
        inherited = {k: v for k, v in os.environ.items() if not is_slurms(k)}
        return {**inherited, **self.env}

    def jobs(self) -> list[str]:
        """Ids of the jobs that wait, run or are being ended; one per array, not per element."""
        return sorted(set(self.run("squeue", "-h", "-o", "%A").split()))

    def wait_idle(self, timeout: float = PATIENCE) -> None:
        """Until no job is left and every node would take one."""

        def idle() -> bool:
            return not self.jobs() and set(self.node_states().values()) == {"idle"}

        wait_for(idle, timeout, lambda: self.run("squeue") + self.run("sinfo", "-N", "-l"))

    def node_states(self) -> dict[str, str]:
        """Slurm's word for each node: idle, mixed, down*, draining, …"""
        lines = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def jobs_pids(self, node: str | None = None) -> list[int]:
        """Processes of this cluster's jobs (on one node), Slurm's stepds aside."""
        return [
            pid
            for pid, variables in self._processes()
            if "SLURM_JOB_ID" in variables and node in (None, variables.get("SLURMD_NODENAME"))
        ]

    def kill_node(self, name: str, steps: bool = False) -> None:
        """The node's slurmd dies at once; with `steps`, all that its jobs run there as well.

        The controller notices after SlurmdTimeout (30 s), or when it is told.
        """
        slurmd = self._daemons.pop(name)
        slurmd.kill()
        slurmd.wait()
        if steps:
            _kill(self._stepds(name))  # first, so that none reports how its processes ended
            _kill(self.jobs_pids(name))

    def lose_node(self, name: str) -> None:
        """The node dies with all that runs on it, and the controller is told so at once."""
        self.kill_node(name, steps=True)
        self.run("scontrol", "update", f"NodeName={name}", "State=DOWN", "Reason=test")

    def start_node(self, name: str) -> None:
        """A node that was killed, or a new start of one."""
        spool = self.folder / "spool" / name
        spool.mkdir(parents=True, exist_ok=True)
        self._daemon(name, "slurmd", "-D", "-N", name, "-f", self.folder / "slurm.conf")

    def stop_controller(self) -> None:
        """slurmctld ends as for maintenance: what it knows is saved, and jobs run on."""
        _end(self._daemons.pop("slurmctld"))

    def start_controller(self) -> None:
        """The controller, for the first time or again."""
        self._daemon("slurmctld", "slurmctld", "-D", "-i", "-f", self.folder / "slurm.conf")
        self._wait_for_port("slurmctld", self._ports["slurmctld"])

    def clear(self) -> None:
        """Ends all jobs and repairs all nodes, so that the next test finds a new cluster."""
        if "slurmctld" not in self._daemons:
            self.start_controller()
        for name in self.nodes:
            (self.folder / "spool" / name).mkdir(exist_ok=True)  # gone: a way to fail at launch
            if name not in self._daemons:
                self.start_node(name)
        if jobs := self.jobs():
            with contextlib.suppress(SlurmError):  # some may have ended by themselves
                self.run("scancel", *jobs)
            try:
                wait_for(lambda: not self.jobs(), 0.3, str)
            except TimeoutError:  # they ignore SIGTERM; Slurm would take 7 s over it
                _kill(self.jobs_pids())
        for name, state in self.node_states().items():
            if state.rstrip("*") in ("down", "drained", "draining"):
                with contextlib.suppress(SlurmError):  # a down node may come back by itself
                    self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
        self.wait_idle()
        _kill(self.jobs_pids())

    # ---------------------------------------------------------- start, stop

    def __enter__(self) -> PrivateSlurm:
        if reason := missing(self.accounting):
            raise RuntimeError(reason)
        # Short, because a socket's path may have 108 characters; for nobody else to enter.
        self.folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
        self.env = {
            "SLURM_CONF": str(self.folder / "slurm.conf"),
            "PATH": f"{os.environ.get('PATH', os.defpath)}:{conf.SYSTEM_FOLDERS}",
        }
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends every process of this cluster, and no other, and removes its folder."""
        # Nodes first, so that none reports its jobs' end and has them requeued; munge last.
        order = dict.fromkeys([*self.nodes, *reversed(self._daemons)])
        for name in filter(self._daemons.__contains__, order):
            _end(self._daemons[name], signal.SIGKILL if name == "mariadbd" else signal.SIGTERM)
        self._daemons.clear()
        while pids := [pid for pid, _ in self._processes()]:
            _kill(pids)
            time.sleep(0.02)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        for name in ("run", "log", "state", "spool"):
            (self.folder / name).mkdir()
        self._ports = dict(zip(("slurmctld", "slurmdbd", *self.nodes), free_ports(), strict=False))
        self._start_munge()
        files = {
            "slurm.conf": conf.slurm_conf(
                self.folder,
                self.nodes,
                self._ports,
                cpus=self.cpus,
                gpus=self.gpus,
                accounting=self.accounting,
                first_job_id=random.randrange(1000, 60_000_000),  # no id twice, across clusters
                config=self.config,
                partitions=self.partitions,
            ),
            "cgroup.conf": conf.cgroup_conf(),
            "gres.conf": conf.gres_conf(self.gpus),
        }
        for name, text in files.items():
            (self.folder / name).write_text(text)
        if self.accounting:
            self._start_accounting()
        # Nodes that start before the controller listens would try again a second later.
        self.start_controller()
        for name in self.nodes:
            self.start_node(name)
        self.wait_idle()

    def _start_munge(self) -> None:
        """Signs what the daemons say to each other: without it, any local user could run jobs."""
        home = self.folder / "munge"
        home.mkdir()
        self.run("mungekey", "--create", "--keyfile", home / "key")
        socket_file = self.folder / "run" / "munge.sock"
        # --force: munge would have its socket where every user can reach it; here there is one.
        self._daemon(
            "munged",
            *("munged", "--foreground", "--force", "--num-threads=2"),
            *(f"--socket={socket_file}", f"--key-file={home / 'key'}"),
            *(f"--log-file={home / 'log'}", f"--pid-file={home / 'pid'}"),
            f"--seed-file={home / 'seed'}",
        )
        self._wait_for("munged", socket_file.exists)

    def _start_accounting(self) -> None:
        """slurmdbd on a database of its own, and who may submit: this user, in account `lab`."""
        (self.folder / "db").mkdir()
        (self.folder / "init.sql").write_text(conf.mariadb_init())
        settings = self.folder / "slurmdbd.conf"
        settings.touch(mode=0o600)  # or slurmdbd refuses it
        settings.write_text(conf.slurmdbd_conf(self.folder, self._ports["slurmdbd"]))
        database = self.folder / "run" / "mariadb.sock"
        self._daemon("mariadbd", *conf.mariadb_command(self.folder))
        self._wait_for("mariadbd", database.exists)
        self._daemon("slurmdbd", "slurmdbd", "-D", env={"MYSQL_UNIX_PORT": str(database)})
        self._wait_for_port("slurmdbd", self._ports["slurmdbd"])
        for words in (
            f"cluster {conf.CLUSTER}",
            "qos few MaxSubmitJobsPerUser=2",
            "account lab QOS=normal,few DefaultQOS=normal",
            f"user {conf.user()} Account=lab DefaultAccount=lab",
        ):
            self.run("sacctmgr", "--immediate", "add", *words.split())

    # ------------------------------------------------------------ processes

    def _daemon(self, name: str, *words: str | Path, env: Mapping[str, str] | None = None) -> None:
        # Should this process be killed, the daemons die with it.
        leash = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with open(self.folder / "log" / f"{name}.out", "ab") as out:
            self._daemons[name] = subprocess.Popen(
                [*leash, *map(str, words)],
                env={**self.clean_environment(), **(env or {})},
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # ^C is for us
            )

    def _wait_for(self, name: str, ready: Callable[[], bool]) -> None:
        def ready_or_dead() -> bool:
            if self._daemons[name].poll() is not None:
                raise RuntimeError(f"{name} did not start:\n{self._log(name)}")
            return ready()

        wait_for(ready_or_dead, PATIENCE, lambda: f"{name} does not answer:\n{self._log(name)}")

    def _wait_for_port(self, name: str, port: int) -> None:
        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                return True
            return False

        self._wait_for(name, answers)

    def _log(self, name: str) -> str:
        files = sorted((self.folder / "log").glob(f"*{name}*"))
        return "\n".join(f.read_text(errors="replace")[-2000:] for f in files)

    def _processes(self) -> list[tuple[int, dict[str, str]]]:
        """Processes that were started in this cluster's environment, with it; daemons aside."""
        ours = {daemon.pid for daemon in self._daemons.values()} | {os.getpid()}
        ours |= {parent.pid for parent in psutil.Process().parents()}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            pid = int(path.parent.name)
            with contextlib.suppress(OSError):
                words = path.read_bytes().decode(errors="replace").split("\0")
                variables = dict(w.split("=", 1) for w in words if "=" in w)
                if variables.get("SLURM_CONF") == self.env.get("SLURM_CONF") and pid not in ours:
                    found.append((pid, variables))
        return found

    def _stepds(self, node: str) -> list[int]:
        """Slurm's own keepers of the jobs on a node: what its job processes descend from."""
        found = set()
        for pid in self.jobs_pids(node):
            with contextlib.suppress(psutil.Error):
                found |= {p.pid for p in psutil.Process(pid).parents() if "slurmstepd" in p.name()}
        return sorted(found)


def is_slurms(variable: str) -> bool:
    """Does this environment variable steer Slurm, or come from a job?"""
    return variable.startswith(
        ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SQUEUE_", "SINFO_", "SACCT_", "SCANCEL_")
    )


def wait_for(true: Callable[[], bool], timeout: float, message: Callable[[], str]) -> None:
    """Returns when `true()` is; after `timeout` seconds, a TimeoutError that says more."""
    end = time.monotonic() + timeout
    while not true():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {timeout:g} s:\n{message()}")
        time.sleep(0.05)


def free_ports() -> Iterator[int]:
    """Below those that the system hands out to clients, which may take them at any moment."""
    for port in random.sample(range(15_000, 32_000), 17_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            yield port


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _end(daemon: subprocess.Popen[bytes], by: signal.Signals = signal.SIGTERM) -> None:
    daemon.send_signal(by)
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
