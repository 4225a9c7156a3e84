"""The source that runs in a queued job is the source that was submitted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.registry import UserError
from experiments import provenance
from sweeps import snapshot
from tests.conftest import ROOT

ROOMS = ("components", "experiments", "sweeps", "analysis")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of this checkout's source, to edit."""
    folder = tmp_path / "checkout"
    for room in ROOMS:
        shutil.copytree(
            ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", ".*")
        )
    shutil.copy(ROOT / "run.py", folder)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def git(folder: Path, *words: str) -> None:
    own = ("user.name=a", "user.email=a@b", "commit.gpgsign=false")
    settings = [part for setting in own for part in ("-c", setting)]
    subprocess.run(["git", "-C", str(folder), *settings, *words], check=True)


needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


def test_it_holds_the_rooms_and_their_presets_and_says_where_they_come_from(
    source: Path, tmp_path: Path
):
    (source / "notes.txt").write_text("no part of it")
    (source / "components" / "__pycache__").mkdir()
    (source / "components" / "__pycache__" / "norm.pyc").write_bytes(b"neither")
    taken = snapshot.take(tmp_path / "runs", source)
    assert taken.folder == tmp_path / "runs" / "code" / taken.id
    held = files(taken.folder)
    record = json.loads(held.pop("snapshot.json"))
    assert {"run.py", "components/norm.py", "sweeps/clusters/local.yaml"} < {*held}
    assert {Path(name).suffix for name in held} == {".py", ".yaml", ".html"}
    assert all(content == (source / name).read_bytes() for name, content in held.items())
    assert (record["schema"], record["id"], record["git"]) == (1, taken.id, None)


def test_equal_source_is_kept_once(source: Path, tmp_path: Path):
    first = snapshot.take(tmp_path / "runs", source)
    told = (first.folder / "snapshot.json").read_bytes()
    moved = source.rename(tmp_path / "elsewhere")
    assert snapshot.take(tmp_path / "runs", moved) == first
    assert (first.folder / "snapshot.json").read_bytes() == told
    assert names(tmp_path / "runs" / "code") == [first.id]


def edit(source: Path) -> None:
    with open(source / "components" / "norm.py", "a") as file:
        file.write("# a comment\n")


def rename(source: Path) -> None:
    (source / "components" / "norm.py").rename(source / "components" / "norms.py")


def preset(source: Path) -> None:
    (source / "sweeps" / "presets" / "mine.yaml").write_text("base: gpt2-tiny\n")


@pytest.mark.parametrize("change", [edit, rename, preset])
def test_an_edit_is_another_snapshot_and_the_first_stays(
    change: Callable[[Path], None], source: Path, tmp_path: Path
):
    first = snapshot.take(tmp_path / "runs", source)
    before = files(first.folder)
    change(source)
    second = snapshot.take(tmp_path / "runs", source)
    assert second.id != first.id
    assert files(first.folder) == before


@needs_git
def test_a_snapshot_of_a_snapshot_is_the_same_one_with_the_same_origin(
    source: Path, tmp_path: Path
):
    git(source, "init", "-q")
    git(source, "add", "run.py")
    git(source, "commit", "-qm", "first")
    (source / "run.py").write_text("# edited\n")
    first = snapshot.take(tmp_path / "runs", source)
    origin = json.loads((first.folder / "snapshot.json").read_text())["git"]
    assert len(origin["commit"]) == 40
    assert "+# edited" in origin["patch"]
    assert snapshot.take(tmp_path / "runs", first.folder) == first
    other = snapshot.take(tmp_path / "other", first.folder)
    assert other.id == first.id
    assert json.loads((other.folder / "snapshot.json").read_text())["git"] == origin


@needs_git
def test_source_that_merely_lies_in_a_checkout_is_not_that_checkouts(source: Path, tmp_path: Path):
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-qm", "of something else", "--allow-empty")
    assert provenance.git(source) is None


def test_what_was_kept_is_read_only_and_an_edit_of_it_is_told(source: Path, tmp_path: Path):
    taken = snapshot.take(tmp_path / "runs", source)
    file = taken.folder / "run.py"
    assert not file.stat().st_mode & 0o222
    file.chmod(0o644)
    file.write_text("# a quick fix\n")
    with pytest.raises(UserError) as caught:
        snapshot.take(tmp_path / "runs", source)
    assert str(caught.value) == (
        f"{taken.folder}: run.py: changed since it was kept for submitted runs; move this folder "
        "away and do the same again"
    )
    shutil.rmtree(taken.folder)  # read-only files are no obstacle
    assert snapshot.take(tmp_path / "runs", source) == taken


def test_two_processes_at_once_keep_one(source: Path, tmp_path: Path):
    root = tmp_path / "runs"
    code = (
        "import sys\nfrom pathlib import Path\nfrom sweeps import snapshot\n"
        f"print('ready', flush=True); sys.stdin.readline()\n"
        f"print(snapshot.take(Path({str(root)!r}), Path({str(source)!r})).id)\n"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in both:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    ids = [process.communicate()[0].strip() for process in both]
    assert ids == [snapshot.take(root, source).id] * 2
    assert names(root / "code") == [ids[0]]


def test_one_that_is_made_by_another_meanwhile_is_taken_as_it_is(tmp_path: Path):
    target = tmp_path / "code" / "abc"
    snapshot.keep(target, {"a.py": b"1"})
    snapshot.keep(target, {"a.py": b"2"})  # as by a process that saw no folder yet
    assert files(target) == {"a.py": b"1"}
    assert names(target.parent) == ["abc"]


def test_a_root_that_cant_be_written_is_told_in_one_line(source: Path, tmp_path: Path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(UserError) as caught:
        snapshot.take(tmp_path / "runs", source)
    assert str(caught.value).startswith(str(tmp_path / "runs" / "code"))
    assert "\n" not in str(caught.value)


# --- what a job imports ---------------------------------------------------------------------------

PROBE = """\
import json, components.registry, experiments.loader, sweeps.manifest, analysis.render, run
rooms = (components.registry, experiments.loader, sweeps.manifest, analysis.render, run)
print(json.dumps([module.__file__ for module in rooms]))
"""


def imported(cwd: Path, env: dict[str, str]) -> list[Path]:
    """Where a module started by name, as submitit's is, finds the rooms."""
    command = [sys.executable, "-m", "probe"]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=True)
    return [Path(file) for file in json.loads(done.stdout)]


def test_a_job_imports_the_snapshot_and_neither_the_checkout_nor_what_is_installed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "probe.py").write_text(PROBE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "tools"))
    taken = snapshot.take(tmp_path / "runs", source)
    inside = {**os.environ, **snapshot.environment(taken)}
    for cwd in (ROOT, source, tmp_path):
        assert all(file.is_relative_to(taken.folder) for file in imported(cwd, inside))
    without = imported(ROOT, dict(os.environ))  # the danger is real
    assert all(file.is_relative_to(ROOT) for file in without)


def test_the_environment_goes_before_what_is_inherited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    taken = snapshot.Snapshot("abc", tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert snapshot.environment(taken) == {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    monkeypatch.setenv("PYTHONPATH", "/a:/b")
    assert snapshot.environment(taken)["PYTHONPATH"] == f"{tmp_path}:/a:/b"


# --- imported files -------------------------------------------------------------------------------


def frozen(tmp_path: Path, *paths: Path) -> list[Path]:
    data: dict[str, Any] = {"imports": [str(p) for p in paths], "model": {"d_model": 8}}
    result = snapshot.imports(data, tmp_path / "runs")
    assert result == {**data, "imports": result["imports"]}
    assert data["imports"] == [str(p) for p in paths]
    return [Path(p) for p in result["imports"]]


def test_an_imported_file_is_frozen_and_an_edit_is_another_copy(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text("A = 1\n")
    (first,) = frozen(tmp_path, mine)
    mine.write_text("A = 2\n")
    (second,) = frozen(tmp_path, mine)
    assert (first.name, first.read_text()) == ("mine.py", "A = 1\n")
    assert (second.name, second.read_text()) == ("mine.py", "A = 2\n")
    assert first.is_absolute()
    assert not first.stat().st_mode & 0o222


def test_equal_content_has_one_path_and_a_copy_is_its_own_copy(tmp_path: Path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text("A = 1\n")
    one, two = frozen(tmp_path, tmp_path / "a" / "mine.py", tmp_path / "b" / "mine.py")
    assert one == two
    assert frozen(tmp_path, one) == [one]


def test_the_rows_of_a_sweep_get_one_copy_whatever_is_edited_meanwhile(tmp_path: Path):
    mine = tmp_path / "mine.py"
    mine.write_text("A = 1\n")
    seen: dict[str, str] = {}
    row = {"imports": [str(mine)]}
    first = snapshot.imports(row, tmp_path / "runs", seen)
    mine.write_text("A = 2\n")
    assert snapshot.imports(row, tmp_path / "runs", seen) == first


def test_an_imported_file_that_is_gone_is_told_in_one_line(tmp_path: Path):
    with pytest.raises(UserError) as caught:
        frozen(tmp_path, tmp_path / "gone.py")
    assert str(caught.value) == (
        f"imports: {tmp_path / 'gone.py'}: can't be read: No such file or directory; put it back"
    )


def test_an_experiment_without_imports_stays_as_it_is(tmp_path: Path):
    assert frozen(tmp_path) == []
    assert not (tmp_path / "runs").exists()
