"""The documentation is run: its commands, its YAML, its error messages, its links, its reference.

The words after a fence's language say how a block is used; see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from components import catalogue, registry
from components.registry import Closed
from experiments import loader
from experiments.schema import Experiment
from experiments.yaml_text import ConfigError
from sweeps import cluster, design, status
from sweeps.grammar import SweepFile
from tests import PATIENCE
from tests.conftest import ROOT
from tests.slurm import PrivateSlurm

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```(\w+)?([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


LOADERS: dict[str, Callable[[Path], Any]] = {
    "experiment": loader.load,
    "sweep": design.load,
    "cluster": cluster.load,
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, the words after that, its text, and the block after it."""

    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def file(self) -> str | None:
        return next((w.removeprefix("file=") for w in self.words if w.startswith("file=")), None)


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(text.count("\n", 0, m.start()) + 1, m[1] or "", tuple(m[2].split()), m[3])
        for m in FENCE.finditer(text)
    ]


def checked(page: Path) -> bool:
    return any(b.file or {"run", *LOADERS} & {*b.words} for b in blocks(page))


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that looks like the repository's root, with no runs in it."""
    for name in ("run.py", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (programs / "python").chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CETERIS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    registry.load_builtin()
    monkeypatch.setattr(
        registry, "_entries", dict(registry._entries)
    )  # examples stay in their page
    return tmp_path


@pytest.mark.parametrize("page", [p for p in PAGES if checked(p)], ids=lambda p: p.name)
def test_a_page_does_what_it_shows(page: Path, desk: Path) -> None:
    found = blocks(page)
    for block, after in zip(found, [*found[1:], None], strict=True):
        try:
            follow(block, after)
        except Exception as error:
            raise AssertionError(f"{page.name}:{block.line}: {error}") from error


def follow(block: Block, after: Block | None) -> None:
    """Does with one block what its words say."""
    shown = after.text.splitlines() if after and after.language == "text" else None
    if block.file:
        Path(block.file).parent.mkdir(exist_ok=True)
        Path(block.file).write_text(block.text, "utf-8")
    if block.language == "bash" and "run" in block.words:
        run(block.text)
    for word, load in LOADERS.items():
        if word not in block.words:
            continue
        file = Path(block.file or f"{word}.yaml")
        file.write_text(block.text, "utf-8")
        if "wrong" in block.words:
            with pytest.raises(ConfigError) as caught:
                load(file)
            assert list(caught.value.lines) == shown
            continue
        loaded = load(file)
        if isinstance(loaded, design.Sweep) and after and "rows" in after.words:
            assert [variant.label for variant in loaded.variants] == shown


@pytest.mark.slow
def test_the_first_sweep_of_run_on_slurm_is_what_a_real_slurm_does(
    slurm: PrivateSlurm, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without = re.compile(r"^gpus_per_node: 1\b.*\n", re.MULTILINE)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    slurm.run("scontrol", "create", "PartitionName=gpu", "Nodes=ALL", "State=UP")
    try:
        for block in blocks(ROOT / "docs" / "run-on-slurm.md"):
            if block.file:  # our nodes have no GPU that torch could use
                Path(block.file).write_text(without.sub("", block.text), "utf-8")
            if "slurm" in block.words:
                run(block.text)
                break
    finally:
        slurm.clear()
        slurm.run("scontrol", "delete", "PartitionName=gpu")
    table = (desk / "runs" / "sweeps" / "first.md").read_text("utf-8")
    assert re.findall(r"^\| (\w+) +\| (\S+)", table, re.MULTILINE)[1:] == [
        ("LayerNorm", "2/2"),
        ("RMSNorm", "2/2"),
    ]


def run(script: str) -> None:
    """A block of commands, each of which must succeed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.strip()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text("utf-8"))
    for target, anchor in re.findall(r"\]\(([^)\s#]*)(?:#([^)\s]*))?\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file = (page.parent / target) if target else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in set(anchors(file)), f"{page.name}: {target}#{anchor}"


def anchors(page: Path) -> Iterator[str]:
    """GitHub's anchors of a page's headings."""
    text = FENCE.sub("", page.read_text("utf-8"))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_reference_of_components_is_up_to_date() -> None:
    written = (ROOT / "docs" / "components.md").read_text("utf-8")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}  # by itself: other tests may register components
    command = [sys.executable, "-m", "components.catalogue"]
    made = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, check=True)
    assert made.stdout.decode() == written, (
        "write it anew: python -m components.catalogue > docs/components.md"
    )


def test_the_reference_names_every_parameter_with_its_limits() -> None:
    registry.load_builtin()
    text = catalogue.markdown(catalogue.rows("optimizer", None))
    assert "### optimizer: adamw" in text
    assert "- `betas`: [float ≥ 0 and < 1, float ≥ 0 and < 1], default `[0.9, 0.95]`" in text
    assert "FieldInfo" not in (ROOT / "docs" / "components.md").read_text("utf-8")


def sections(model: type[Closed], path: str = "") -> Iterator[tuple[str, type[Closed]]]:
    """The sections of an experiment file by their dotted names, those within others too."""
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Closed):
            yield f"{path}{name}", inner
            yield from sections(inner, f"{path}{name}.")


def test_experiment_files_names_every_field_of_every_section_with_its_default() -> None:
    page = (ROOT / "docs" / "experiment-files.md").read_text("utf-8")
    found = dict(sections(Experiment))
    assert all(f"| `{name}` |" in page for name in Experiment.model_fields.keys() - found)
    for name, section in found.items():
        table = page.split(f"**`{name}`**")[1].split("\n**")[0].split("\n## ")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", table, re.MULTILINE))
        assert list(rows) == list(section.model_fields)
        for field, told in rows.items():
            about = section.model_fields[field]
            if about.is_required():
                assert told == "required", f"{name}.{field}"
                continue
            if about.default_factory is not None:
                assert told == "as below"
                continue
            default = registry.plain_value(about.get_default())
            meant = yaml.safe_load(told.strip("`"))  # a derived default is told as its formula
            derived = default is None and meant is not None
            assert derived or meant == (list(default) if default == () else default), (
                f"{name}.{field}: {told}, in truth {default}"
            )


def test_write_a_sweep_names_every_word_in_the_order_of_the_grammar() -> None:
    page = (ROOT / "docs" / "write-a-sweep.md").read_text("utf-8")
    table: Sequence[str] = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert list(table) == list(SweepFile.model_fields)


def test_run_on_slurm_names_every_key_of_a_cluster_file_with_its_default() -> None:
    rows = table_of("run-on-slurm.md", "## The cluster file")
    assert [cells[0] for cells in rows] == [f"`{name}`" for name in cluster.Cluster.model_fields]
    missing = {keys[0] for keys, told in cluster.Cluster().problems() if "is missing" in told}
    for key, told, _ in rows:
        name = key.strip("`")
        default = registry.plain_value(cluster.Cluster.model_fields[name].get_default(
            call_default_factory=True
        ))  # fmt: skip
        if name in missing:
            assert told == "required"
        else:
            assert yaml.safe_load(told.strip("`")) == (list(default) if default == () else default)


def test_run_on_slurm_names_every_state() -> None:
    rows = table_of("run-on-slurm.md", "## Looking after it")
    assert [cells[0] for cells in rows] == [f"`{state}`" for state in status.STATES]


def test_what_ceteris_says_as_run_on_slurm_tells_it_stands_in_the_source() -> None:
    files = [path for room in ("sweeps", "experiments") for path in (ROOT / room).rglob("*.py")]
    source = re.sub(r'"\s*f?"', "", "\n".join(path.read_text("utf-8") for path in files))
    rows = table_of("run-on-slurm.md", "Ceteris' own:")
    for words in re.findall(r"`([^`]+)`", " ".join(cells[0] for cells in rows)):
        for piece in words.split("…"):  # around a value
            assert piece in source, words


def table_of(page: str, heading: str) -> list[tuple[str, ...]]:
    """Cells of the first table under a heading, its head aside."""
    text = (ROOT / "docs" / page).read_text("utf-8").split(f"\n{heading}")[1]
    lines = re.search(r"^\|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert lines is not None
    return [
        tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|")))
        for line in lines[1].splitlines()
    ]


def test_the_readme_is_short_and_has_a_place_for_the_demo() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.index("<!-- demo table -->") < text.index("<!-- /demo table -->")
    assert "docs/demo-curves.svg" in text
