"""The files that a private Slurm reads (tests/slurm.py): functions from its sizes to their text.

Lines that are there for a reason that does not show say so; Debian's Slurm 22.05 is what they were
tried on, and a few lines differ for newer ones.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

CLUSTER = "lab"
SYSTEM_FOLDERS = "/usr/sbin:/sbin"
# Character devices that every machine has stand for GPUs: Slurm opens none of them.
FAKE_GPUS = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
PARTITIONS = """\
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=5
PartitionName=main Default=YES PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high PriorityTier=10 PreemptMode=OFF
PartitionName=short MaxTime=1 PreemptMode=OFF
"""


def which(name: str) -> str | None:
    """A program's path, daemons' folders included."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_FOLDERS}")


def user() -> str:
    """Daemons and jobs all run as the person who runs the tests."""
    return pwd.getpwuid(os.getuid()).pw_name


def version() -> tuple[int, int]:
    """From "slurm-wlm 22.05.8"."""
    words = subprocess.run([which("sbatch") or "", "--version"], capture_output=True, text=True)
    found = re.search(r"(\d+)\.(\d+)", words.stdout)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def own_name_is_loopback() -> bool:
    """Then Slurm can be told to listen there alone; otherwise it must listen everywhere."""
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return False


def slurm_conf(
    folder: Path,
    nodes: Sequence[str],
    ports: Mapping[str, int],
    *,
    cpus: int,
    gpus: int,
    accounting: bool,
    first_job_id: int,
    config: Mapping[str, str | int | None],
    partitions: str,
) -> str:
    settings: dict[str, str | int | None] = {
        "ClusterName": CLUSTER,
        "SlurmctldHost": "localhost(127.0.0.1)",
        "SlurmUser": user(),
        "SlurmdUser": user(),
        "SlurmctldPort": ports["slurmctld"],
        "AuthType": "auth/munge",
        "CredType": "cred/munge",
        # A requeued job waits until its old credential has expired: 120 s unless said otherwise.
        # A step that starts later than that fails, as it may where the machine is busy.
        "AuthInfo": f"socket={folder}/run/munge.sock,cred_expire=15",
        "StateSaveLocation": f"{folder}/state",
        "SlurmdSpoolDir": f"{folder}/spool/%n",
        "SlurmctldPidFile": f"{folder}/run/slurmctld.pid",
        "SlurmdPidFile": f"{folder}/run/slurmd.%n.pid",
        "SlurmctldLogFile": f"{folder}/log/slurmctld.log",
        "SlurmdLogFile": f"{folder}/log/slurmd.%n.log",
        "MailProg": "/bin/true",
        "ProctrackType": "proctrack/linuxproc",
        "TaskPlugin": "task/none",
        "JobAcctGatherType": "jobacct_gather/none",
        "SelectType": "select/cons_tres",
        "SelectTypeParameters": "CR_Core_Memory",
        "MpiDefault": "none",
        "SwitchType": "switch/none",
        "SchedulerType": "sched/backfill",
        "SchedulerParameters": "batch_sched_delay=0,sched_interval=1,bf_interval=1,"
        "sched_min_interval=100000",
        "PreemptType": "preempt/partition_prio",
        "PreemptMode": "REQUEUE",
        "EnforcePartLimits": "ALL",  # otherwise what exceeds them waits for ever
        "ReturnToService": 2,
        "SlurmctldTimeout": 30,
        # Longer than a busy machine lets anyone wait; the usual 10, 10, 2 and 30 are not always.
        "SlurmdTimeout": 30,
        "BatchStartTimeout": 300,
        "MessageTimeout": 60,
        "TCPTimeout": 30,
        "KillWait": 5,
        "MinJobAge": 86400,
        "SlurmdParameters": "config_overrides",  # nodes larger than the machine
        "DefMemPerCPU": 100,  # otherwise each job takes all memory of its node
        "FirstJobId": first_job_id,
    }
    if version() >= (23, 2):
        settings["PreemptParameters"] = "send_user_signal"
    else:
        settings["SlurmctldParameters"] = "preempt_send_user_signal"
    if own_name_is_loopback():
        settings["CommunicationParameters"] = "NoInAddrAny,NoCtldInAddrAny"
    if gpus:
        settings["GresTypes"] = "gpu"
    if accounting:
        settings |= {
            "AccountingStorageType": "accounting_storage/slurmdbd",
            "AccountingStorageHost": "127.0.0.1",
            "AccountingStoragePort": ports["slurmdbd"],
            "AccountingStoragePass": f"socket={folder}/run/munge.sock",
            "AccountingStorageEnforce": "associations,limits,qos",
        }
    settings |= config
    gres = f" Gres=gpu:fake:{gpus}" if gpus else ""
    lines = [f"{key}={value}" for key, value in settings.items() if value is not None]
    # One address and a port each: loopback's other addresses are not where Slurm would listen.
    lines += [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[name]}"
        f" CPUs={cpus} RealMemory=20000{gres} State=UNKNOWN"
        for name in nodes
    ]
    return "\n".join(lines) + "\n" + PARTITIONS + partitions + "\n"


def cgroup_conf() -> str:
    # Nothing here uses cgroups, yet slurmd loads the plugin; before 23.02 it can't be disabled.
    return f"CgroupPlugin={'disabled' if version() >= (23, 2) else 'cgroup/v1'}\n"


def gres_conf(gpus: int) -> str:
    return "".join(f"Name=gpu Type=fake File={device}\n" for device in FAKE_GPUS[:gpus])


def slurmdbd_conf(folder: Path, port: int) -> str:
    settings = {
        "AuthType": "auth/munge",
        "AuthInfo": f"socket={folder}/run/munge.sock",
        "DbdHost": "localhost",
        "DbdAddr": "127.0.0.1",
        "DbdPort": port,
        "SlurmUser": user(),
        "LogFile": f"{folder}/log/slurmdbd.log",
        "PidFile": f"{folder}/run/slurmdbd.pid",
        "StorageType": "accounting_storage/mysql",
        "StorageHost": "localhost",  # means: by the socket that MYSQL_UNIX_PORT names
        "StorageUser": user(),
        "StorageLoc": "slurm_acct_db",
        "CommitDelay": 0,
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())


def mariadb_command(folder: Path) -> list[str]:
    """A database in `folder`/db on a socket alone, made for speed: nothing has to survive."""
    return [
        *("mariadbd", "--no-defaults", f"--user={user()}", f"--datadir={folder}/db"),
        *(f"--socket={folder}/run/mariadb.sock", f"--pid-file={folder}/run/mariadb.pid"),
        *("--skip-networking", "--skip-grant-tables", f"--init-file={folder}/init.sql"),
        *("--performance-schema=0", "--innodb-flush-method=nosync", "--innodb-log-file-size=4M"),
        *("--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=32M"),
        *("--aria-log-file-size=8M", "--innodb-lock-wait-timeout=900"),
    ]


def mariadb_init() -> str:
    """The system tables that slurmdbd's stored procedures need, of the many there could be."""
    statements = ["CREATE DATABASE IF NOT EXISTS mysql;", "USE mysql;"]
    for path in sorted(Path("/usr/share/mysql").glob("*_system_tables.sql"))[:1]:
        wanted = re.compile(r"CREATE TABLE IF NOT EXISTS (proc|procs_priv|func|event) ")
        statements += [line for line in path.read_text().splitlines() if wanted.match(line)]
    return "\n".join(statements) + "\n"
