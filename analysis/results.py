"""Read what training left on disk: a sweep's manifest, and the directory of each of its runs.

The manifest says what was planned; `result.json` and `failure.json` in a run's directory say what
came of it. Whatever does not belong there is an error of one line, never a silent gap:
a missing run is shown as missing, a damaged one is named.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments import record, scores
from experiments.record import FINISHED, UserError, read_json, read_rows

SCHEMA = 1
State = Literal["done", "diverged", "failed", "unfinished", "missing"]


@dataclass(frozen=True)
class Row:
    """One variant as planned. `mismatch` is relative to the baseline, in the matched quantity."""

    label: str
    group: str
    changes: Mapping[str, Any]
    parameters: float | None
    flops_per_token: float | None
    mismatch: float | None
    runs: Mapping[int, str]  # seed -> run id


@dataclass(frozen=True)
class Manifest:
    """A sweep as planned. The baseline is `rows[0]`; `tokens` is each run's training budget,
    0 where it is not known.
    """

    name: str
    match: str | None
    seeds: tuple[int, ...]
    tokens: int
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Run:
    """One run as found. `result` is empty unless it is done or diverged.

    `reason` is one line: why it diverged or failed. `scores` are the records of its last step,
    see experiments/scores.py, by task and settings: `hellaswag,5shot`.
    """

    id: str
    state: State
    result: Mapping[str, Any]
    reason: str = ""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """The finite number recorded under `key` in result.json, or None."""
        value = self.result.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        return value if math.isfinite(value) else None


def one_line(text: object) -> str:
    """Printable, on one line: what comes from a record may hold line breaks or escape codes."""
    plain = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(text))
    return " ".join("".join(c if c.isprintable() else " " for c in plain).split())


def read_manifest(path: Path) -> Manifest:
    """Read `runs/sweeps/<name>.json`. Raises UserError when it is not a manifest of this schema."""
    data = read_json(path)
    _check_schema(data, path)
    rows = tuple(_row(value, f"{path}: row {i}") for i, value in enumerate(data.get("rows", []), 1))
    if not rows:
        raise UserError(f"{path}: the sweep has no rows; write it anew with: run.py sweep FILE")
    match = data.get("match")
    if match not in (None, "params", "flops"):
        raise UserError(f"{path}: match is {match!r}, not params, flops or null")
    return Manifest(
        name=_take(data, "name", str, path),
        match=match,
        seeds=tuple(_take(data, "seeds", list, path)),
        tokens=_take(data, "tokens", int, path),
        rows=rows,
    )


def read_run(directory: Path) -> Run:
    """Read one run's directory, whose name is the run's id.

    Raises UserError when a record is damaged, of another schema or of another run.
    """
    path = directory / "result.json"
    if path.exists():
        data = read_json(path)
        _check_schema(data, path)
        if data.get("id") != directory.name:
            raise UserError(
                f"{path}: is the result of run {data.get('id')!r}, not of {directory.name!r};"
                " move it to its own directory or delete it"
            )
        status = data.get("status")
        if status not in FINISHED:
            raise UserError(f"{path}: status is {status!r}, neither done nor diverged")
        step = data.get("step")
        kept = scores.of_step(record.Run(directory.parent, directory.name), step or 0)
        run = Run(directory.name, status, data, one_line(data.get("reason") or ""), kept)
        if status == "done" and run.number("val/loss") is None:
            raise UserError(f"{path}: a finished run has no finite val/loss; delete it and rerun")
        return run
    path = directory / "failure.json"
    if path.exists():
        return Run(directory.name, "failed", {}, one_line(read_json(path).get("error", "")))
    return Run(directory.name, "unfinished" if directory.is_dir() else "missing", {})


def read_runs(manifest: Manifest, runs_root: Path) -> dict[str, Run]:
    """Every run of the manifest, by id. Raises UserError as `read_run`, and for a wrong seed."""
    runs = {}
    for row in manifest.rows:
        for seed, run_id in row.runs.items():
            run = runs[run_id] = read_run(runs_root / run_id)
            if run.result and run.result.get("seed") != seed:
                raise UserError(
                    f"{runs_root / run_id / 'result.json'}: seed is {run.result.get('seed')!r},"
                    f" but sweep {manifest.name!r} planned it as seed {seed}"
                )
    return runs


def in_state(row: Row, runs: Mapping[str, Run], *states: State) -> dict[int, Run]:
    """The row's runs that are in one of `states`, by seed, in the order of seeds."""
    by_seed = ((seed, runs[row.runs[seed]]) for seed in sorted(row.runs))
    return {seed: run for seed, run in by_seed if run.state in states}


def numbers(row: Row, runs: Mapping[str, Run], key: str) -> dict[int, float]:
    """The number under `key` of each seed that is done. Other seeds are left out."""
    found = {seed: run.number(key) for seed, run in in_state(row, runs, "done").items()}
    return {seed: value for seed, value in found.items() if value is not None}


def read_curve(directory: Path, key: str = "val/loss") -> dict[int, float]:
    """Training tokens -> finite value of `key`, in the order of tokens, from metrics.jsonl.

    A last line that a killed run left half written is ignored; other damage raises UserError.
    """
    path = directory / "metrics.jsonl"
    curve = {}
    for row in read_rows(path):
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, int | float) and math.isfinite(value):
            curve[_take(row, "tokens", int, path)] = value
    return dict(sorted(curve.items()))


def _row(data: Any, where: str) -> Row:
    if not isinstance(data, dict):
        raise UserError(f"{where}: not an object")
    label = one_line(_take(data, "label", str, where))
    runs = {}
    for seed, run_id in _take(data, "runs", dict, where).items():
        plain = isinstance(run_id, str) and re.fullmatch(r"\w[\w.-]*", run_id)
        if not (plain and seed.isdecimal()):  # an id never leaves the runs' directory
            raise UserError(f"{where}: runs: {seed!r}: {run_id!r} is not a seed and a run's id")
        runs[int(seed)] = run_id
    return Row(
        label=label,
        group=one_line(data.get("group") or "rows"),
        changes=data.get("changes") or {},
        parameters=_count(data, "parameters", where),
        flops_per_token=_count(data, "flops_per_token", where),
        mismatch=_count(data, "mismatch", where),
        runs=runs,
    )


def _check_schema(data: Mapping[str, Any], path: Path) -> None:
    if data.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema is {data.get('schema')!r}, this version reads {SCHEMA}:"
            " not one of our records, or written by another version"
        )


def _take(data: Mapping[str, Any], key: str, kind: type, where: object) -> Any:
    value = data.get(key)
    if not isinstance(value, kind):
        found = "missing" if key not in data else repr(value)
        raise UserError(f"{where}: {key} is {found}, expected {kind.__name__}")
    return value


def _count(data: Mapping[str, Any], key: str, where: object) -> float | None:
    value = data.get(key)
    if value is None or (isinstance(value, int | float) and math.isfinite(value)):
        return value
    raise UserError(f"{where}: {key} is {value!r}, expected a number or null")
