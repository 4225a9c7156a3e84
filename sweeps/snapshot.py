"""The code that was submitted is the code that runs: the source, kept once per content.

    runs/code/<id>/                     run.py and the rooms' .py and .yaml files, as they were
        snapshot.json                   {"schema": 1, "id", "git": commit and patch, "time"}
    runs/code/imports/<id>/<name>.py    a file under an experiment's `imports:`, as it was, and the
                                        modules beside it that it imports (experiments/own_code.py)

The id is a hash of names and contents, so that equal source is one folder. A job's environment puts
that folder before all else where Python looks: edits made while it is queued do not reach it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from experiments.own_code import check, copy_of, digest, keep
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
    seen.update({path: str(copy_of(Path(path), root)) for path in paths if path not in seen})
    return {**experiment, "imports": [seen[path] for path in paths]}


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
