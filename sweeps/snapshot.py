"""The code that was submitted is the code that runs: the source, kept once per content.

    runs/code/<id>/                     run.py and the rooms' .py and .yaml files, as they were
        snapshot.json                   {"schema": 1, "id", "git": commit and patch, "time"}
    runs/code/imports/<id>/<name>.py    a file under an experiment's `imports:`, as it was

The id is a hash of names and contents, so that equal source is one folder. A job's environment puts
that folder before all else where Python looks: edits made while it is queued do not reach it.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.registry import UserError
from experiments.provenance import git
from experiments.record import disk_error, read_json

SCHEMA = 1
SOURCE = Path(__file__).parent.parent
ROOMS = ("components", "experiments", "sweeps", "analysis")
KINDS = (".py", ".yaml", ".html")
RECORD = "snapshot.json"


@dataclass(frozen=True)
class Snapshot:
    """Kept source: its id, and the absolute folder that it lies in."""

    id: str
    folder: Path


def take(root: Path, source: Path = SOURCE) -> Snapshot:
    """Keeps the source of the running code (or another's) below `root`, unless it is there already.

    Raises:
        UserError: the disk does not take it, or somebody has changed what was kept before.
    """
    contents = read_source(source)
    snapshot = Snapshot(digest(contents), root.resolve() / "code" / digest(contents))
    if not snapshot.folder.exists():
        record = source / RECORD  # where the running code is a snapshot itself
        origin = read_json(record).get("git") if record.is_file() else git(source)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        told = {"schema": SCHEMA, "id": snapshot.id, "git": origin, "time": now}
        keep(snapshot.folder, {**contents, RECORD: json.dumps(told, indent=1).encode()})
    check(snapshot.folder, contents)
    return snapshot


def imports(
    experiment: Mapping[str, Any], root: Path, seen: dict[str, str] | None = None
) -> dict[str, Any]:
    """A resolved experiment whose `imports:` are copies below `root`, which nobody edits.

    `seen`, shared by the rows of a sweep, holds each file's copy: an edit meanwhile reaches none.

    Raises:
        UserError: a file is not there, or the disk does not take its copy.
    """
    seen = {} if seen is None else seen
    paths = experiment.get("imports", ())
    seen.update({path: kept(Path(path), root) for path in paths if path not in seen})
    return {**experiment, "imports": [seen[path] for path in paths]}


def kept(path: Path, root: Path) -> str:
    """The path of a copy of one imported file, made unless there is one."""
    try:
        contents = {path.name: path.read_bytes()}
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"imports: {path}: can't be read: {reason}; put it back") from error
    folder = root.resolve() / "code" / "imports" / digest(contents)
    if not folder.exists():
        keep(folder, contents)
    check(folder, contents)
    return str(folder / path.name)


def environment(snapshot: Snapshot) -> dict[str, str]:
    """Variables that make Python import the snapshot: before what is installed and inherited.

    Without PYTHONSAFEPATH, `python -m` would look in the current folder first: in the checkout.
    """
    inherited = os.environ.get("PYTHONPATH")
    folders = [str(snapshot.folder), *([inherited] if inherited else [])]
    return {"PYTHONPATH": os.pathsep.join(folders), "PYTHONSAFEPATH": "1"}


# --- contents and folders ------------------------------------------------------------------------


def read_source(folder: Path) -> dict[str, bytes]:
    """The source below a folder: contents by name, relative, in the order of the names.

    Raises:
        UserError: a file can't be read.
    """
    files = [folder / "run.py"]
    for room in ROOMS:
        files += (p for p in (folder / room).rglob("[!.]*") if p.suffix in KINDS)
    contents = {}
    for file in files:
        try:
            contents[file.relative_to(folder).as_posix()] = file.read_bytes()
        except FileNotFoundError:
            continue  # an editor's, and gone since
        except OSError as error:
            raise disk_error(error, file) from error
    return dict(sorted(contents.items()))


def digest(contents: Mapping[str, bytes]) -> str:
    """A hash of names and contents."""
    whole = hashlib.blake2b(digest_size=6)
    for name, content in contents.items():
        whole.update(f"{name}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()


def keep(target: Path, contents: Mapping[str, bytes]) -> None:
    """Makes a folder of these files, whole or not at all; nobody edits them by mistake.

    Where another process was quicker, what it has made stays: both are the same.

    Raises:
        UserError: the disk does not take it.
    """
    temporary = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    try:
        for name, content in contents.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            path.chmod(path.stat().st_mode & 0o555)
        temporary.rename(target)
    except OSError as error:
        if not target.is_dir():
            raise disk_error(error, target) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check(folder: Path, contents: Mapping[str, bytes]) -> None:
    """That kept files still hold what their folder is named after.

    Raises:
        UserError: they don't, or can't be read; says which.
    """
    changed = []
    for name, content in contents.items():
        try:
            same = (folder / name).read_bytes() == content
        except FileNotFoundError:
            same = False
        except OSError as error:
            raise disk_error(error, folder / name) from error
        changed += [] if same else [name]
    if changed:
        told = ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if changed[3:] else "")
        raise UserError(
            f"{folder}: {told}: changed since it was kept for submitted runs; move this folder "
            "away and do the same again"
        )
