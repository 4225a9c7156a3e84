"""A sweep's manifest, runs/sweeps/<name>.json: its rows and their runs, without the sweep file.

`table` and `status` read it, and the executors: each row holds its resolved experiment, so that a
worker or a retry needs neither the sweep file nor the base as they were. Reading needs no torch.

    {"schema": 1, "name", "file", "description", "baseline": label, "match", "tune", "overrides",
     "seeds": [0, 1], "tokens": budget of the baseline,
     "rows": [{"label", "group", "changes", "parameters", "flops_per_token", "mismatch",
               "solved": {path: width}, "levels", "tuned", "runs": {seed: run id}, "experiment"}]}

The baseline is the first row. Two rows may have a run in common.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.registry import UserError, did_you_mean
from experiments import scores
from experiments.record import Run, read_json, write_json
from experiments.yaml_text import read

if TYPE_CHECKING:
    from experiments.schema import Experiment
    from sweeps.design import Sweep
    from sweeps.matching import Sized

SCHEMA = 1
_KEYS = {"name": str, "file": str, "baseline": str, "seeds": list, "tokens": int, "rows": list}
_ROW_KEYS = {"label": str, "group": str, "changes": dict, "runs": dict, "experiment": dict}


@dataclass(frozen=True)
class Job:
    """One run to carry out: its id, and the resolved experiment (plain data) and seed."""

    id: str
    seed: int
    label: str
    experiment: Mapping[str, Any]


def build(sweep: Sweep, rows: Sequence[Sized]) -> dict[str, Any]:
    """The manifest of a sweep whose variants are counted and matched."""
    from experiments import loader
    from experiments.yaml_text import shown

    return {
        "schema": SCHEMA,
        "name": sweep.name,
        "file": shown(sweep.file),
        "description": sweep.description,
        "baseline": sweep.baseline.label,
        "match": sweep.match,
        "tune": sweep.tune.model_dump(mode="json") if sweep.tune else None,
        "overrides": list(sweep.overrides),
        "seeds": list(sweep.seeds),
        "tokens": sweep.baseline.experiment.training.tokens,
        "rows": [
            {
                "label": row.variant.label,
                "group": row.variant.group,
                "changes": dict(row.variant.changes),
                "parameters": row.counts.parameters,
                "flops_per_token": row.counts.flops_per_token,
                "mismatch": row.mismatch,
                "solved": dict([row.solved]) if row.solved else {},
                "levels": row.variant.levels,
                "tuned": row.variant.tuned,
                "runs": {str(seed): row.variant.run_id(seed) for seed in sweep.seeds},
                "experiment": loader.resolved(row.variant.experiment),
            }
            for row in rows
        ],
    }


def path_of(root: Path, name: str) -> Path:
    return root / "sweeps" / f"{name}.json"


def cancel_marker(root: Path, name: str) -> Path:
    """While this file is there, no executor on any host starts or goes on with the sweep's runs."""
    return root / "sweeps" / f"{name}.cancelled"


def write(root: Path, data: Mapping[str, Any]) -> Path:
    """Writes the manifest atomically; returns its path.

    Raises:
        UserError: another sweep file has that name.
    """
    path = path_of(root, data["name"])
    if path.exists():
        then, now = Path(str(read_json(path).get("file"))), Path(data["file"])
        if then.is_file() and now.is_file() and not then.samefile(now):
            raise UserError(
                f"{path}: the sweep '{data['name']}' is {then}, not {now}; "
                "give one of them another name: in its file"
            )
    write_json(path, dict(data))
    return path


def load(root: Path, name: str) -> dict[str, Any]:
    """The manifest of the sweep `name`, or of the sweep in the file `name`.

    Raises:
        UserError: there is none, or it is damaged, or no manifest.
    """
    path = path_of(root, name)
    if Path(name).name != name or not path.is_file():
        path = path_of(root, _name_in(Path(name)))
    if not path.is_file():
        known = sorted(p.stem for p in (root / "sweeps").glob("*.json"))
        raise UserError(
            f"no sweep '{name}' in {root}{did_you_mean(Path(name).stem, known)}; "
            "make it with: run.py sweep FILE, or submit FILE"
        )
    data = read_json(path)
    if data.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema is {data.get('schema')!r}, this version reads {SCHEMA}; "
            "write it anew with: run.py sweep FILE"
        )
    _check(data, _KEYS, str(path))
    if data["name"] != path.stem:  # markers and tables are named by it
        raise UserError(f"{path}: name is {data['name']!r}; give the file its name back")
    if not all(isinstance(seed, int) for seed in data["seeds"]):
        raise UserError(
            f"{path}: seeds are {data['seeds']!r}; write it anew with: run.py sweep FILE"
        )
    if not data["rows"]:
        raise UserError(f"{path}: has no rows; write it anew with: run.py sweep FILE")
    for number, row in enumerate(data["rows"], 1):
        where = f"{path}: row {number}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: is {type(row).__name__}, not a mapping")
        _check(row, _ROW_KEYS, where)
        for seed, run in row["runs"].items():
            plain = isinstance(run, str) and Path(run).name == run and run not in ("", ".", "..")
            if not (plain and seed.isdecimal()):
                raise UserError(f"{where}: runs: {seed!r}: {run!r} is not a seed and a run's id")
    return data


def _name_in(file: Path) -> str:
    """A sweep file's own `name`, or its stem."""
    data = read(file).data if file.suffix in (".yaml", ".yml") and file.is_file() else {}
    return Path(str(data.get("name", file.stem))).name


def all_of(root: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every manifest below `root`, and what is wrong with those that are none."""
    good, wrong = [], []
    for path in sorted((root / "sweeps").glob("*.json")):
        try:
            good.append(load(root, path.stem))
        except UserError as error:
            wrong.append(str(error))
    return good, wrong


def _check(data: Mapping[str, Any], keys: Mapping[str, type], where: str) -> None:
    for key, kind in keys.items():
        if not isinstance(data.get(key), kind):
            found = repr(data[key]) if key in data else "missing"
            raise UserError(f"{where}: {key} is {found}; write it anew with: run.py sweep FILE")


def jobs(data: Mapping[str, Any]) -> Iterator[Job]:
    """Every run of a manifest once: all rows at the first seed, then at the next.

    So that a sweep stopped halfway has whole tables of fewer seeds, not half a table.
    """
    seen: set[str] = set()
    for seed in data["seeds"]:
        for row in data["rows"]:
            run = row["runs"].get(str(seed))
            if run is not None and run not in seen:
                seen.add(run)
                yield Job(run, seed, row["label"], row["experiment"])


def state(root: Path, job: Job) -> str:
    """A run's state as its sweep sees it: `unscored` where it is trained and a task that its
    experiment names is not scored yet, `running` while somebody scores it.

    Raises:
        UserError: its result is damaged.
    """
    return scored_state(Run(root, job.id), job.experiment.get("evaluation") or {})


def scored_state(run: Run, evaluation: Mapping[str, Any]) -> str:
    """`state` of a run whose experiment has this `evaluation`."""
    known = run.state
    if known != "done" or not scores.lacking(run, evaluation):
        return known
    return "running" if run.locked else "unscored"


def finished(root: Path, job: Job) -> bool:
    """Whether nothing is left to do; a damaged result is told where it is read."""
    if not (root / job.id / "result.json").exists():
        return False
    with contextlib.suppress(UserError):
        return not scores.lacking(Run(root, job.id), job.experiment.get("evaluation") or {})
    return True


def experiment(job: Job) -> Experiment:
    """A job's experiment, checked again.

    Raises:
        ConfigError: this version's schema refuses what the manifest holds.
    """
    from experiments import loader
    from experiments.yaml_text import Located, Mark

    mark = Mark(f"manifest: row '{job.label}'")
    return loader.validate(Located(dict(job.experiment), {(): mark}))
