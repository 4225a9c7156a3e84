"""A sweep's manifest, runs/sweeps/<name>.json: its rows and their runs, without the sweep file.

`table` and `status` read it, and the executors: each row holds its resolved experiment, so that a
worker or a retry needs neither the sweep file nor the base as they were. Reading needs no torch.

    {"schema": 1, "name", "file", "file_digest", "description", "baseline": label, "match", "tune",
     "overrides", "seeds": [0, 1], "tokens": budget of the baseline,
     "text": {file that a corpus reads: [bytes, time, digest]},
     "rows": [{"label", "group", "changes", "differences": [as `plan` shows them], "parameters",
               "flops_per_token", "mismatch", "solved": {path: width}, "levels", "tuned",
               "seeds": {seed: the row's own}, "runs": {seed: run id}, "experiment",
               "code": {imported file that it uses: digest}}]}

The baseline is the first row. Two rows may have a run in common. `runs` is keyed by the sweep's
seeds in every row; where a row has seeds of its own, its `seeds` says which, and else is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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


def build(
    sweep: Sweep, rows: Sequence[Sized], attempts: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The manifest of a sweep whose variants are counted and matched.

    `attempts`: the ids of its runs -> those of the attempts at them that stand for them now.
    """
    from experiments import loader
    from experiments.yaml_text import shown
    from sweeps import stale
    from sweeps.differences import differences

    return {
        "schema": SCHEMA,
        "name": sweep.name,
        "file": shown(sweep.file),
        "file_digest": digest(sweep.file),
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
                "differences": list(differences(sweep, row.variant, row.solved)),
                "parameters": row.counts.parameters,
                "flops_per_token": row.counts.flops_per_token,
                "mismatch": row.mismatch,
                "solved": dict([row.solved]) if row.solved else {},
                "levels": row.variant.levels,
                "tuned": row.variant.tuned,
                "seeds": {
                    str(seed): own
                    for seed, own in zip(sweep.seeds, row.variant.seeds, strict=False)
                },
                "runs": {
                    str(seed): (attempts or {}).get(id, id)
                    for seed, id in sweep.runs(row.variant).items()
                },
                "experiment": loader.resolved(row.variant.experiment),
                "code": stale.code_of(row.variant.experiment),
            }
            for row in rows
        ],
        "text": stale.text_of([row.variant.experiment for row in rows]),
    }


def digest(file: Path) -> str:
    """Of what a sweep file and the bases below it say; comments and order of keys aside.

    Raises:
        UserError: one of them can't be read.
    """
    from experiments import loader

    said: list[Any] = []
    seen: set[Path] = set()
    while file.resolve() not in seen:  # a base that includes itself is told where it is loaded
        seen.add(file.resolve())
        said.append(read(file).data)
        base = said[-1].get("base")
        if isinstance(base, str):
            file = loader.find_base(base, file.parent)
    text = json.dumps(said, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def changed_since(root: Path, sweep: str | Mapping[str, Any]) -> str | None:
    """One line where a sweep's file, or a base of it, says something else than when it was run.

    `sweep` is its name or its manifest. None where nothing changed, where the file is gone, and
    for manifests of before there was a digest.
    """
    data = load(root, sweep) if isinstance(sweep, str) else sweep
    file, then = Path(data["file"]), data.get("file_digest")
    if then is None or not file.is_file():
        return None
    try:
        now: str | None = digest(file)
    except UserError:  # it is not what it was, whatever is wrong with it
        now = None
    if now == then:
        return None
    return (
        f"{file} (or its base) has changed since '{data['name']}' was run; this is what was run "
        f"then, and python run.py sweep {file} runs what it says now"
    )


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
        own = row.get("seeds", {})
        if not isinstance(own, dict) or not all(isinstance(seed, int) for seed in own.values()):
            raise UserError(f"{where}: seeds are {own!r}, not a seed for each of the sweep's")
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
                own = row.get("seeds", {}).get(str(seed), seed)
                yield Job(run, own, row["label"], row["experiment"])


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


def check_id(job: Job, experiment: Experiment) -> None:
    """A job's experiment must still be the one that its run is of.

    Raises:
        UserError: the code of its own components has changed, or this program has.
    """
    from experiments.loader import own_code, run_id

    now, planned = run_id(experiment, job.seed), job.id.partition(".")[0]
    if now == planned:
        return
    if now.partition("-")[0] == planned.partition("-")[0]:
        files = ", ".join(map(str, own_code(experiment)))
        raise UserError(
            f"'{job.label}': {files} changed since the sweep was planned; put it back to go on, or "
            "train with it as it is now: run.py sweep"
        )
    raise UserError(
        f"'{job.label}': the manifest was written by another version of this program "
        f"(run {job.id} would be {now} now); run the sweep again"
    )


def experiment(job: Job) -> Experiment:
    """A job's experiment, checked again.

    Raises:
        ConfigError: this version's schema refuses what the manifest holds.
    """
    from experiments import loader
    from experiments.yaml_text import Located, Mark

    mark = Mark(f"manifest: row '{job.label}'")
    return loader.validate(Located(dict(job.experiment), {(): mark}))
