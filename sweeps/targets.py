"""What a word on the command line means, for a command that was given something of another kind."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from components.registry import UserError
from experiments import loader
from experiments.hints import file_kind
from experiments.record import all_ids
from experiments.schema import PRESETS
from experiments.yaml_text import read
from sweeps import design, manifest
from sweeps.cluster import CLUSTERS

EXPERIMENT, SWEEP, RUN = "an experiment", "a sweep", "a run"
MADE = "a sweep that was run or submitted"
CLUSTER, PAPER = "a cluster file", "a published ablation"
PAPERS = Path(__file__).parents[1] / "analysis" / "published"
YAML = (".yaml", ".yml")
SHORTEST = 4  # letters of a run's id that are taken for one


@dataclass(frozen=True)
class Thing:
    """One meaning of a word: its kind, and what a person may do with it."""

    kind: str
    advice: str


def expect(root: Path, name: str, wanted: Collection[str], command: str) -> None:
    """Passes a word that may mean something of a `wanted` kind, or that nobody knows.

    Args:
        wanted: kinds that the command takes, such as `RUN`; the first names what it needs.
        command: as typed, `generate`.

    Raises:
        UserError: it means something else; says what, and which command takes that.
    """
    others: list[Thing] = []
    with contextlib.suppress(OSError, ValueError):  # a name too long, or with a NUL in it
        for thing in things(root, name) if name else ():
            if thing.kind in wanted:
                return
            others.append(thing)
    if others:
        first = others[0]
        needs = " or ".join(kind for kind in wanted if kind != MADE or SWEEP not in wanted)
        raise UserError(f"'{name}' is {first.kind}, and {command} takes {needs}: {first.advice}")


def things(root: Path, name: str) -> Iterator[Thing]:
    """Everything that a word can mean: a path, a preset, a sweep or a run below `root`."""
    path = Path(name).expanduser()
    if path.is_dir():
        yield _folder(path)
    elif path.is_file():
        yield from _file(root, path)
    if Path(name).name != name:
        return
    for kind, folder in (
        (EXPERIMENT, PRESETS),
        (SWEEP, design.PRESETS),
        (CLUSTER, CLUSTERS),
        (PAPER, PAPERS),
    ):
        if (folder / f"{name}.yaml").is_file():
            yield Thing(kind, _advice(kind, name))
    made = manifest.path_of(root, name)
    with contextlib.suppress(UserError):
        if made.is_file():
            yield Thing(MADE, f"its file is {manifest.load(root, name)['file']}")
    ids = [name] if (root / name / "experiment.yaml").is_file() else all_ids(root)
    found = [i for i in ids if i.startswith(name)] if len(name) >= SHORTEST else []
    if len(found) == 1:
        yield _run(root, found[0])


def _folder(path: Path) -> Thing:
    if (path / "experiment.yaml").is_file():
        return _run(path.resolve().parent, path.resolve().name)
    if (path / "sweeps").is_dir() or any(path.glob("*/experiment.yaml")):
        return Thing("a folder of runs", f"give it as --runs {path}")
    return Thing("a folder", "give a file in it")


def _file(root: Path, path: Path) -> Iterator[Thing]:
    """What a file holds, and the run in whose folder it lies."""
    known = True
    if path.suffix in YAML:
        known = False
        with contextlib.suppress(UserError):  # what is wrong in it is for its reader to say
            kind = file_kind(read(path).data)
            known = kind is not None
            if kind is not None:
                yield Thing(kind, _advice(kind, str(path), root))
    elif path.suffix == ".py":
        yield Thing(
            "a Python file",
            f"name it under imports: in an experiment; what it registers: "
            f"run.py components --import {path}",
        )
    elif path.parent.name == "sweeps" and path.suffix in (".json", ".md", ".tex", ".csv"):
        yield Thing("a record of a sweep", f"give the sweep's name, {path.stem}")
    elif not (path.parent / "experiment.yaml").is_file():
        yield Thing(f"a {path.suffix or 'nameless'} file", "experiments and sweeps are .yaml files")
    if known and (path.parent / "experiment.yaml").is_file():
        run = path.resolve().parent
        if path.name == "experiment.yaml" or (run / "provenance.json").is_file():
            yield Thing(f"a file of run {run.name}", f"give the run's id, {run.name}")


def _advice(kind: str, name: str, root: Path | None = None) -> str:
    if kind == EXPERIMENT:
        runs = _runs_of(root, name) if root is not None else []
        made = f" (its runs: {', '.join(runs)})" if runs else ""
        return f"train it with: run.py train {name}{made}"
    return {
        SWEEP: f"run it with: run.py sweep {name}",
        CLUSTER: f"use it with: run.py submit SWEEP --cluster {name}",
        PAPER: f"repeat it with: run.py reproduce {name}",
    }[kind]


def _runs_of(root: Path, file: str) -> list[str]:
    """Ids of the runs below `root` that were made of an experiment as it is now."""
    with contextlib.suppress(UserError):
        head = loader.run_id(loader.load(file), 0).removesuffix("0")
        return [run for run in all_ids(root) if run.startswith(head)]
    return []


def _run(root: Path, run: str) -> Thing:
    sweeps = [
        record["name"]
        for record in manifest.all_of(root)[0]
        if any(job.id == run for job in manifest.jobs(record))
    ]
    if sweeps:
        return Thing(RUN, f"give its sweep: {' or '.join(sweeps)}")
    return Thing(RUN, f"what it was made of: {root / run / 'experiment.yaml'}")
