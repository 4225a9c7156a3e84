"""wandb's client, opened and closed within a time, and whatever it raises told in one line.

The only place that begins a run in wandb. Its settings are those that keep the least and lose the
least: no copy of code, console or environment, a short time between writes of its own file, and
limits on how long anything may wait for the server.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shutil
import socket
import struct
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from experiments.record import UserError
from experiments.tracking import TEMPORARY, Place, logged_in, server

if TYPE_CHECKING:
    import wandb

FLUSH_SECONDS = 2.0  # what of wandb's own file a crash may cost
SEND_SECONDS = 5.0  # between what is sent while training
TIMES = {"init_timeout": 10.0, "login_timeout": 5.0, "finish_timeout": 8.0}  # seconds, while live
PATIENT = {"init_timeout": 60.0, "login_timeout": 20.0, "finish_timeout": 120.0}  # when pushing
CONNECT_SECONDS = 4.0
COUNT_TRIES = 5  # looks at what has arrived
BLOCK = 1 << 15  # bytes
UNHEARD = (  # WANDB_MODE and WANDB_TAGS are heard elsewhere
    *("WANDB_MODE", "WANDB_RUN_ID", "WANDB_RESUME", "WANDB_RESUME_FROM", "WANDB_FORK_FROM"),
    *("WANDB_SWEEP_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_NAME", "WANDB_RUN_GROUP"),
    *("WANDB_JOB_TYPE", "WANDB_SERVICE", "WANDB_LAUNCH"),
)
KEYS = re.compile(r"\bwandb_v\d+_\w+|\b[0-9a-f]{40,}\b|(?<=://)[^/@\s]+(?=@)")


class Unreachable(UserError):
    """wandb can't be used, or did not take all of it; says why in one line.

    `again`: whether to try at once may help, as where wandb's own process died.
    """

    def __init__(self, line: str, again: bool = False) -> None:
        super().__init__(line)
        self.again = again


def masked(error: object) -> str:
    """An error in one line, without anything that may be a key."""
    text = " ".join(str(error).split()) or type(error).__name__
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if (secret := os.environ.get(name, "").strip()) and len(secret) > 3:
            text = text.replace(secret, "***")
    text = KEYS.sub("***", text)
    return text if len(text) <= 300 else text[:299] + "…"


@contextlib.contextmanager
def guarded(what: str = "") -> Iterator[None]:
    """Turns whatever wandb raises into one line.

    Raises:
        Unreachable: instead of it.
    """
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        raise Unreachable(f"{error.name} is not installed; run: pip install wandb") from error
    except TimeoutError as error:
        raise Unreachable(f"{what}{': ' * bool(what)}no answer in time ({masked(error)})") from None
    except Exception as error:
        name = type(error).__name__
        text = f"{what}{': ' * bool(what)}{name}: {masked(error)}"
        raise Unreachable(text, isinstance(error, ConnectionError)) from None


@contextlib.contextmanager
def opened(
    place: Place,
    *,
    id: str,
    name: str,
    job_type: str,
    group: str | None,
    tags: tuple[str, ...],
    config: Mapping[str, Any],
    notes: str = "",
    folder: Path,
    patient: bool = True,
    pid: int | None = None,
) -> Iterator[wandb.Run]:
    """A run in wandb, begun or gone on with; finished on leaving, within a time.

    Args:
        folder: the runs' root; wandb's files go to `wandb` in it, unless WANDB_DIR says otherwise.
        patient: there is time to wait for the server; else somebody waits for us.
        pid: the process that trains, whose use of the machine wandb shows; None: of none.

    Raises:
        Unreachable: it can't be begun, or something in the body or at the end fails.
    """
    files = files_of(folder)
    os.environ.setdefault("WANDB_DATA_DIR", str(files / "data"))
    with guarded():
        wandb = imported()
        files.mkdir(parents=True, exist_ok=True)
        if place.mode == "online":
            reach()
        settings = wandb.Settings(
            **(PATIENT if patient else TIMES),
            finish_timeout_raises=True,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
            x_disable_stats=pid is None or place.mode == "offline",
            x_stats_pid=pid or os.getpid(),
            x_disable_machine_info=pid is None,  # without which there is no use to show
            x_disable_meta=True,
            x_save_requirements=False,
            x_file_stream_transmit_interval=None if patient else SEND_SECONDS,
            disable_git=True,
            disable_code=True,
            console="off",
            silent=True,
        )
        try:
            session = wandb.init(
                dir=str(files.parent),
                project=place.project,
                entity=place.entity,
                mode=place.mode,
                id=id,
                name=name[:128],
                group=group[:128] if group else None,
                job_type=job_type,
                tags=(*tags, *filter(None, os.environ.get("WANDB_TAGS", "").split(","))),
                notes=notes or None,
                config=dict(config),
                resume="allow",
                allow_val_change=True,
                reinit="create_new",
                settings=settings,
            )
        except Exception:
            with contextlib.suppress(Exception):
                wandb.teardown()  # or this id stays taken in this process
            forget(files, id)
            raise
    with guarded():
        try:
            if session.id != id:
                raise Unreachable(f"wandb began run {session.id} instead of {id}; push it later")
            yield session
            session.finish()  # unless the body has done so, with a code of its own
        except Exception as error:
            with contextlib.suppress(Exception):
                session.finish(exit_code=1)
            if isinstance(error, ConnectionError):  # its own process is gone; the next begins anew
                with contextlib.suppress(Exception):
                    wandb.teardown()
            raise
        finally:
            forget(files, id)


def files_of(folder: Path) -> Path:
    """Where wandb's files on the runs below `folder` lie; WANDB_DIR says so to any program."""
    return Path(os.environ.get("WANDB_DIR") or folder).resolve() / "wandb"


def imported() -> Any:
    """The wandb package, told to be quiet, and what it is not to hear; it leaves nothing in /tmp.

    The first import in a process reads its variables. Those that name a run are ours to choose.
    """
    for name, value in (("WANDB_SILENT", "true"), ("WANDB_ERROR_REPORTING", "false")):
        os.environ.setdefault(name, value)
    for name in UNHEARD:
        os.environ.pop(name, None)
    if key := os.environ.get("WANDB_API_KEY"):
        os.environ["WANDB_API_KEY"] = key.strip()
    if not Path(tempfile.gettempdir()).name.startswith(TEMPORARY):
        own = tempfile.mkdtemp(prefix=TEMPORARY)
        tempfile.tempdir = os.environ["TMPDIR"] = own
        atexit.register(tidy)
    try:
        import wandb
    except SystemExit as end:
        raise Unreachable(f"wandb can't be imported: it exits with {end.code}") from None
    return wandb


def tidy() -> None:
    """Removes what wandb left among temporary files; for who ends a process without its end."""
    if Path(tempfile.gettempdir()).name.startswith(TEMPORARY):
        shutil.rmtree(tempfile.gettempdir(), ignore_errors=True)


def reach() -> None:
    """Sees that wandb's server can be reached, since its own client tries for long.

    Raises:
        Unreachable: nobody is logged in, or nothing answers at its address.
    """
    if not logged_in():
        raise Unreachable("not logged in to wandb; run: wandb login (or set WANDB_API_KEY)")
    url = server() or str(imported().Settings().base_url)
    try:
        to = urlsplit(url)
    except ValueError:
        raise Unreachable(f"{masked(url)} is no server's address; mend WANDB_BASE_URL") from None
    if to.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(to.netloc):
        return  # only the proxy can tell
    try:
        port = to.port or (443 if to.scheme == "https" else 80)
        socket.create_connection((to.hostname or "", port), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise Unreachable(f"{masked(url)} can't be reached ({why})") from None


def forget(files: Path, id: str) -> None:
    """Removes what the client kept of an online run: what of it did not arrive is in our records,
    and synced besides it would be there twice."""
    for left in files.glob(f"run-*-{id}"):
        shutil.rmtree(left, ignore_errors=True)
    for link in (files / "latest-run", *files.glob("debug*.log")):
        if link.is_symlink() and not link.exists():
            link.unlink(missing_ok=True)


def offline_of(files: Path, id: str) -> tuple[list[Path], list[Path]]:
    """The folders of a run's offline files: those to be synced, and those that are."""
    found = sorted(files.glob(f"offline-run-*-{id}"))
    synced = [folder for folder in found if any(folder.glob("*.synced"))]
    return [folder for folder in found if folder not in synced], synced


def leave_to_push(files: Path, session: wandb.Run, was_online: bool) -> None:
    """Has `wandb sync` pass over an offline run that has been online, as we know or a sync's mark
    says: what of it is there would be there twice."""
    if session.offline and (was_online or offline_of(files, session.id)[1]):
        file = Path(session.settings.sync_file)
        file.with_name(f"{file.name}.synced").touch()


def settle(files: Path, session: wandb.Run) -> None:
    """What becomes of a run's offline files once `session` has it whole.

    Those of an online run are marked as synced, or `wandb sync` would add their rows again; those
    that another offline run has taken the place of are removed.
    """
    open_ones, synced = offline_of(files, session.id)
    if not session.offline:
        for file in (file for folder in open_ones for file in folder.glob("run-*.wandb")):
            file.with_name(f"{file.name}.synced").touch()
        return
    for folder in (*open_ones, *synced):
        own = folder.resolve() == Path(session.settings.sync_dir).resolve()
        if not own and not any(folder.glob("*.syncstate")):  # which `wandb sync` itself leaves
            shutil.rmtree(folder, ignore_errors=True)


def confirm(place: Place, session: wandb.Run, rows: int) -> None:
    """Asks the server, or reads in wandb's own file, whether as many rows are there.

    A refused upload is told in no other way, nor is a disk that was full.

    Raises:
        Unreachable: they are not, or nobody says.
    """
    found, offline = 0, place.mode == "offline"
    reader = None if offline or not rows else api(place)
    for attempt in range(COUNT_TRIES if rows else 0):
        time.sleep(attempt and attempt / 2)  # the server counts, and the file grows, a little later
        if reader is None:
            with guarded("its own file can't be read"):
                found = sum(kept_rows(Path(session.settings.sync_file)))
        else:
            with guarded("its server does not say what it has"):
                path = f"{session.entity}/{session.project}/{session.id}"
                found = int(reader.run(path).lastHistoryStep) + 1
                with contextlib.suppress(OSError):  # the reader leaves an empty folder there
                    os.removedirs(Path(os.environ.get("WANDB_DIR") or tempfile.gettempdir(), path))
        if found >= rows:
            return
    if rows and offline:
        raise Unreachable(
            f"{session.settings.sync_file} has {found} of {rows} rows; is its disk full?"
        )
    if rows:
        raise Unreachable(f"its server took {found} of {rows} rows")


def kept_rows(file: Path) -> Iterator[bool]:
    """For each record of a .wandb file whether it is a row: LevelDB's log format, of protobufs.

    Blocks of 32 KiB hold pieces of records: 4 bytes of checksum, 2 of length, 1 of kind (1: whole,
    2: first, 3: middle, 4: last). wandb's file begins with 7 bytes of its own.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    text, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(text):
        left = BLOCK - place % BLOCK
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", text, place + 4)
        piece = text[place + 7 : place + 7 + length]
        place += 7 + length
        record = piece if kind in (1, 2) else record + piece
        if kind in (1, 4) and len(piece) == length:
            yield Record.FromString(record).HasField("history")


def api(place: Place) -> wandb.Api:
    """wandb's reader.

    Raises:
        Unreachable: nobody is logged in, or the server can't be reached.
    """
    with guarded():
        wandb = imported()
        reach()
        return wandb.Api(timeout=15, overrides={"entity": place.entity} if place.entity else None)
