"""The command line as a person uses it, called in this process or started in one of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import run
from components import registry
from tests.conftest import ROOT


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it said where."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def ceteris(*words: object) -> Outcome:
    """`python run.py WORDS` in this process. A traceback would be an exception here."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["run.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run.main()
    except SystemExit as end:
        return Outcome(int(end.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = before
    raise AssertionError("main returned instead of exiting")


def start(*words: object, **options: Any) -> subprocess.Popen[str]:
    """`python run.py WORDS` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "run.py"), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


@contextlib.contextmanager
def desk(folder: Path, patch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory to type commands in; what is registered there is forgotten after."""
    registry.load_builtin()
    with patch.context() as patched:
        patched.chdir(folder)
        patched.delenv("CETERIS_RUNS", raising=False)
        patched.setattr(registry, "_entries", dict(registry._entries))
        yield folder


def files(folder: Path) -> set[str]:
    """Every file below a folder, by its path from there."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir()}
