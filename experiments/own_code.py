"""Copies of the component files that a run imports: it is opened with the code it ran with.

    runs/code/imports/<id>/<name>.py    a file under `imports:`, and the modules that it imports
                                        from beside it, as they lie there; the id is a hash of all

Copies are made when a run begins. Nobody edits them by mistake: they are read-only, and a folder
whose files no longer fit its name is refused.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components import source
from experiments.record import Run, UserError, disk_error


def copies(paths: tuple[str, ...], root: Path) -> dict[str, str]:
    """Files under `imports:` -> their copies, relative to `root`; made unless they are there.

    Raises:
        UserError: a file can't be read, or the disk does not take its copy.
    """
    return {p: copy_of(Path(p), root).relative_to(root.resolve()).as_posix() for p in paths}


def kept(run: Run, known: Mapping[str, Any]) -> dict[str, str]:
    """Files under a run's `imports:` -> the copies that its provenance (`known`) names, where they
    are there."""
    found = known.get("imports") or {}
    return {path: str(run.root / c) for path, c in found.items() if (run.root / c).is_file()}


def copy_of(path: Path, root: Path) -> Path:
    """The copy below `root` of one imported file, the modules beside it with it.

    Raises:
        UserError: a file can't be read, or the disk does not take its copy.
    """
    contents = {}
    for name, file in source.closure(path).items():
        try:
            contents[name or path.name] = file.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"imports: {file}: can't be read: {reason}; put it back") from error
    folder = root.resolve() / "code" / "imports" / digest(contents)
    if not folder.exists():
        keep(folder, contents)
    check(folder, contents)
    return folder / path.name


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
