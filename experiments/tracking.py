"""Whether wandb shows a run, and what it is called there. Nothing here imports wandb.

metrics.jsonl is the record. wandb mirrors it from a process of its own (experiments/mirror.py)
that reads what training wrote; training never calls wandb, so nothing that wandb does, or fails to
do, can stop, slow or change a run. What became of the mirror stands in the run's tracking.json:

    {"schema": 1, "id", "project", "entity", "group", "mode": online|offline, "url", "folder",
     "rows": lines of metrics.jsonl that wandb has, "state": live|complete|stopped, "why"}
"""

from __future__ import annotations

import configparser
import contextlib
import hashlib
import json
import netrc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from experiments.record import Interrupted, Run, UserError, read_json

Mode = Literal["online", "offline"]
MODES: dict[str, Mode | None] = {"disabled": None}  # as people write WANDB_MODE
MODES |= {mode: mode for mode in get_args(Mode)} | {"run": "online", "dryrun": "offline"}
PROJECT = "ceteris"
HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")  # wandb's own, of old and of now
LEAVE_SECONDS = {"ended": 20.0}  # that training, which has ended, waits for its mirror at the most
HURRY_SECONDS = 8.0  # and where it was stopped: somebody may be about to kill it
LONGEST_TAG = 64  # characters
BUSY = 3  # exit code of a mirror that found another one at work


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
    asked = wanted.get("project") is not None or logged_in()
    mode = MODES[variable or wanted.get("mode") or ("online" if asked else "disabled")]
    return replace(online(wanted), mode=mode) if mode is not None else None


def online(wanted: Mapping[str, Any]) -> Place:
    """The place that `tracking.wandb` names, whatever its mode."""
    project = wanted.get("project") or os.environ.get("WANDB_PROJECT") or PROJECT
    entity = wanted.get("entity") or os.environ.get("WANDB_ENTITY") or None
    return Place("online", project, entity)


def server() -> str | None:
    """The URL of the wandb server that a variable or `wandb login --host` names; None: wandb's."""
    settings = configparser.ConfigParser(interpolation=None)
    home = Path(os.environ.get("WANDB_CONFIG_DIR", Path.home() / ".config" / "wandb"))
    with contextlib.suppress(configparser.Error, OSError, UnicodeDecodeError):
        settings.read(home / "settings")
    stored = settings.get("default", "base_url", fallback=None)
    return os.environ.get("WANDB_BASE_URL") or stored


def logged_in() -> bool:
    """Whether wandb would find a key without asking: a variable, or what `wandb login` wrote."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    url = server()
    hosts = (urlsplit(url).netloc,) if url else HOSTS
    files = (Path.home() / name for name in (".netrc", "_netrc"))
    for file in [os.environ["NETRC"]] if os.environ.get("NETRC") else files:
        with contextlib.suppress(netrc.NetrcParseError, OSError):
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
    """The run's tracking.json; empty if there is none."""
    path = run / "tracking.json"
    return read_json(path) if path.exists() else {}


def tag(text: str) -> str:
    return text if len(text) <= LONGEST_TAG else text[: LONGEST_TAG - 1] + "…"


# --- a mirror while training ---------------------------------------------------------------------


class Mirror:
    """The process that mirrors a run, from training's side: started, told to end, waited for."""

    def __init__(self, run: Run, place: Place, facts: Mapping[str, Any]) -> None:
        self.run = run
        code = str(Path(__file__).parent.parent)
        paths = os.pathsep.join(filter(None, (code, os.environ.get("PYTHONPATH"))))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "experiments.mirror"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
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
        late, seconds = False, LEAVE_SECONDS.get(word, HURRY_SECONDS)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            self.process.kill()
            self.process.communicate()
        if self.process.returncode == BUSY:
            return "wandb: another process mirrors this run, and shows this when the run has ended"
        return outcome(self.run, f"no answer within {seconds:.0f} s" if late else None)


def outcome(run: Run, why: str | None = None) -> str:
    """What became of a run's mirror, in one line."""
    try:
        record = known(run)
    except UserError as error:
        return f"wandb: {error}"
    rows = f"{record.get('rows')} rows in {record.get('url') or record.get('folder')}"
    complete = record.get("state") == "complete"
    if complete and not record.get("why"):
        return f"wandb: {rows}"
    why = why or record.get("why") or "its process ended without a word"
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
