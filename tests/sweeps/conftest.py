"""A desk on the private Slurm, for the tests that submit to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command_line import desk
from tests.slurm import PrivateSlurm
from tests.slurm_desk import Desk


@pytest.fixture
def here(
    slurm: PrivateSlurm, tmp_path: Path, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Desk]:
    with desk(tmp_path, monkeypatch):
        yield Desk(tmp_path, tiny_yaml)
