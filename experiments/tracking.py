"""Whether wandb shows a run, and what it is called there. Nothing here imports wandb.

metrics.jsonl is the record. wandb mirrors it from a process of its own (experiments/mirror.py)
that reads what training wrote; training never calls wandb, so nothing that wandb does, or fails to
do, can stop, slow or change a run. What became of the mirror stands in the run's tracking.json:

    {"schema": 1, "id", "project", "entity", "group", "mode": online|offline, "url", "folder",
     "rows": lines of metrics.jsonl that it was given, "state": live|complete|stopped, "why",
     "online": whether it was ever begun there}
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import json
import netrc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from experiments.record import Interrupted, Run, UserError, read_json, write_json

Mode = Literal["online", "offline"]
MODES: dict[str, Mode | None] = {"disabled": None}  # as people write WANDB_MODE
MODES |= {mode: mode for mode in get_args(Mode)} | {"run": "online", "dryrun": "offline"}
PROJECT = "ceteris"
LONGEST = {"project": 128, "entity": 64}  # letters
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # wandb's own, of old and of now
LEAVE_SECONDS = 20.0  # that training, which has ended, waits for its mirror at the most
HURRY_SECONDS = 8.0  # and where it was stopped: somebody may be about to kill it
TABLE_SECONDS = 40.0
UNREADABLE = (OSError, ValueError, RuntimeError, netrc.NetrcParseError)  # a person's files
LONGEST_TAG = 64  # characters
TEMPORARY = "ceteris-wandb-"  # folders of temporary files
BUSY = 113  # exit code of a mirror that found another one at work


@dataclass(frozen=True)
class Place:
    """Where a run is mirrored to."""

    mode: Mode
    project: str
    entity: str | None = None


def place(tracking: Mapping[str, Any] | None) -> Place | None:
    """Where the plain data of an experiment's `tracking` sends a run; None: nowhere.

    WANDB_MODE wins over the file, as it is how one shell differs from another. Without either a
    run is mirrored where a project is named, or where the person is logged in to wandb.

    Raises:
        UserError: WANDB_MODE is none of wandb's modes.
    """
    wanted = (tracking or {}).get("wandb") or {}
    variable = os.environ.get("WANDB_MODE", "").strip().lower()
    if variable and variable not in MODES:
        raise UserError(f"WANDB_MODE is {variable!r}; set it to online, offline or disabled")
    if os.environ.get("WANDB_DISABLED", "").strip().lower() in ("1", "true", "yes"):
        return None
    mode = variable or wanted.get("mode")
    if not mode:
        mode = "online" if wanted.get("project") is not None or logged_in() else "disabled"
    where = MODES[mode]
    return replace(online(wanted), mode=where) if where is not None else None


def online(wanted: Mapping[str, Any]) -> Place:
    """The place that `tracking.wandb` names, whatever its mode.

    Raises:
        UserError: a variable holds a name that wandb does not take.
    """
    found: dict[str, str | None] = {"project": PROJECT, "entity": None}
    for key, most in LONGEST.items():
        variable = f"WANDB_{key.upper()}"
        value = wanted.get(key) or os.environ.get(variable) or found[key]
        if value is not None and (wrong := misnamed(value, most)):
            raise UserError(f"{key} {value!r} {wrong}; change it in {variable}, or where it is set")
        found[key] = value
    return Place("online", str(found["project"]), found["entity"])


def misnamed(name: str, most: int) -> str | None:
    """Why wandb would not take a project or an entity of this name; None: it would."""
    if not name.strip() or name != name.strip():
        return "is blank, or begins or ends with a space"
    if wrong := sorted({c for c in name if c in "/\\#?%:" or not c.isprintable()}):
        return f"has {' '.join(map(repr, wrong))}, which wandb takes in no name"
    return f"is longer than {most} letters" if len(name) > most else None


def server() -> str | None:
    """The URL of the wandb server that a variable or `wandb login --host` names; None: wandb's."""
    if url := os.environ.get("WANDB_BASE_URL"):
        return url
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(*UNREADABLE, configparser.Error):
        home = os.environ.get("WANDB_CONFIG_DIR") or Path.home() / ".config" / "wandb"
        settings.read(Path(home, "settings"))
    return settings.get("default", "base_url", fallback=None)


def logged_in() -> bool:
    """Whether wandb would find a key without asking: a variable, or what `wandb login` wrote.

    Files that can't be read hold none.
    """
    if os.environ.get("WANDB_API_KEY", "").strip() or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with contextlib.suppress(*UNREADABLE):
        url = server()
        hosts = (urlsplit(url).netloc,) if url else HOSTS
        own = os.environ.get("NETRC")
        for file in [Path(own)] if own else [Path.home() / ".netrc", Path.home() / "_netrc"]:
            if file.is_file():
                return any(host in netrc.netrc(file).hosts for host in hosts)
    return False


# --- what a run is called there ------------------------------------------------------------------


def wandb_id(run: Run) -> str:
    """The run's id in wandb: ours, and six letters of this training of it.

    The same run trained anew in another folder, by other code perhaps, is another run there.
    """
    attempts = read_json(run / "provenance.json").get("attempts") or [{}]
    first = {key: attempts[0].get(key) for key in ("time", "host", "job", "command")}
    text = json.dumps(first, sort_keys=True)
    return f"{run.id}-{hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"


def known(run: Run) -> dict[str, Any]:
    """The run's tracking.json; empty if there is none, or it is damaged: it is written anew."""
    record: dict[str, Any] = {}
    with contextlib.suppress(UserError):
        record = read_json(run / "tracking.json")
    words = ("project", "entity", "group", "state", "why", "url", "folder")
    return record if all(isinstance(record.get(w), str | None) for w in words) else {}


def stopped(run: Run, why: str) -> None:
    """Writes into a run's tracking.json why it is not all in wandb, for who could not."""
    with contextlib.suppress(UserError):  # a full disk: the line that is said has it too
        record = {"schema": 1, **known(run), "state": "stopped", "why": why, "rows": None}
        write_json(run / "tracking.json", record)


def tag(text: str) -> str:
    """A tag that wandb takes; two long ones stay apart."""
    if len(text) <= LONGEST_TAG:
        return text
    return f"{text[: LONGEST_TAG - 9]}… {hashlib.blake2b(text.encode(), digest_size=3).hexdigest()}"


# --- a mirror while training ---------------------------------------------------------------------


class Mirror:
    """The process that mirrors a run, from training's side: started, told to end, waited for."""

    def __init__(self, run: Run, place: Place, facts: Mapping[str, Any]) -> None:
        self.run = run
        self.temporary = tempfile.mkdtemp(prefix=TEMPORARY)  # ours to remove, should it be killed
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "experiments.mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**environment(), "TMPDIR": self.temporary},
            start_new_session=True,  # Ctrl-C is for training, which then tells it
        )
        start = {"folder": str(run.folder.resolve()), "place": asdict(place), "pid": os.getpid()}
        self.tell(json.dumps({**start, "facts": dict(facts)}))

    def tell(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it is gone
            self.process.stdin.write(f"{line}\n".encode())
            self.process.stdin.flush()

    def end(self, word: str) -> str:
        """Waits until it has told wandb the end, not for ever; what became of it, in one line."""
        self.tell(word)
        late, seconds = False, LEAVE_SECONDS if word == "ended" else HURRY_SECONDS
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            self.process.kill()
            self.process.communicate()
            shutil.rmtree(self.temporary, ignore_errors=True)
        if self.process.returncode == BUSY:
            return "wandb: another process mirrors this run, and shows this when the run has ended"
        if self.process.returncode != 0:  # it could not say so itself
            why = "its process ended without a word"
            why = f"no answer within {seconds:.0f} s" if late else why
            stopped(self.run, why)
        return outcome(self.run)


def environment() -> dict[str, str]:
    """That of a process which is to find this code."""
    code = str(Path(__file__).parent.parent)
    paths = os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": paths}


def bring_table(root: Path, sweep: str) -> str:
    """Has a process of its own log a sweep's summary run; what became of it, in one line."""
    words = [sys.executable, "-P", "-m", "analysis.wandb_summary", str(root), sweep]
    try:
        done = subprocess.run(
            words,
            env=environment(),
            capture_output=True,
            timeout=TABLE_SECONDS,
            encoding="utf-8",
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return f"wandb: no table: no answer within {TABLE_SECONDS:.0f} s"
    except OSError as error:
        return f"wandb: no table: {error.strerror}"
    said = (done.stdout or done.stderr).strip().splitlines()
    return said[-1] if said else f"wandb: no table: its process ended with {done.returncode}"


def outcome(run: Run) -> str:
    """What became of a run's mirror, in one line."""
    record = known(run)
    rows = f"{record.get('rows')} rows in {record.get('url') or record.get('folder')}"
    complete = record.get("state") == "complete"
    if complete and not record.get("why"):
        return f"wandb: {rows}"
    why = record.get("why") or "its process could not begin"
    told = f"{rows}, not online: {why}" if complete else f"stopped: {why}"
    return f"wandb: {told}; nothing is lost, later: python run.py wandb push {run.id}"


@contextlib.contextmanager
def mirrored(
    run: Run, where: Place | None, facts: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[None]:
    """Has the run mirrored while the body runs, and says at the end what became of it.

    Args:
        facts: what is known before any record says it, such as the number of parameters.
    """
    if where is None:
        yield
        return
    try:
        mirror = Mirror(run, where, facts)
    except OSError as error:
        say(f"wandb: its process can't be started ({error.strerror}); push the run later")
        yield
        return
    word = "failed"
    try:
        yield
        word = "ended"
    except Interrupted:
        word = "interrupted"
        raise
    finally:
        say(mirror.end(word))
