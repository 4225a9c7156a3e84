"""Read what training left on disk: a sweep's manifest, and the directory of each of its runs.

The manifest says what was planned; `result.json` and `failure.json` in a run's directory say what
came of it. Whatever does not belong there is an error of one line, never a silent gap:
a missing run is shown as missing, a damaged one is named. A directory that was edited after its
run ended no longer fits its seal, and counts for nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from experiments import record, scores
from experiments.record import FINISHED, UserError, read_json

SCHEMA = 1
MATCHES = (None, "params", "flops", "time")
EDITED = "its result, metrics or experiment changed after it ended"
State = Literal["done", "diverged", "failed", "unfinished", "missing", "edited"]


@dataclass(frozen=True)
class Row:
    """One variant as planned.

    Attributes:
        mismatch: relative to the baseline, in the matched quantity.
        runs: the sweep's seed -> run id.
        levels: of a factorial's rows: the level of each factor, as text.
        tuned: of one try of a `tune:`: {"of": the row's label, "path", "value": a number}.
        experiment: resolved, as plain data; empty where it is not known.
        differences: what is changed from the base, a line each, to be read.
        seeds: the sweep's seed -> the seed of the run, where the row has seeds of its own.
    """

    label: str
    group: str
    changes: Mapping[str, Any]
    parameters: float | None
    flops_per_token: float | None
    mismatch: float | None
    runs: Mapping[int, str]
    levels: Mapping[str, str] | None = None
    tuned: Mapping[str, Any] | None = None
    experiment: Mapping[str, Any] = field(default_factory=dict)
    differences: tuple[str, ...] = ()
    seeds: Mapping[int, int] = field(default_factory=dict)

    def setting(self, path: str) -> Any:
        """What stands at a dotted path of the experiment; None if nothing does."""
        value: Any = self.experiment
        for key in path.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Manifest:
    """A sweep as planned. The baseline is `rows[0]`.

    Attributes:
        tokens: each run's training budget, 0 where it is not known.
        file, overrides: what it was made from on the command line.
        tune: {"over": path, "values": [...]}, or None.
    """

    name: str
    match: str | None
    seeds: tuple[int, ...]
    tokens: int
    rows: tuple[Row, ...]
    description: str = ""
    file: str = ""
    overrides: tuple[str, ...] = ()
    tune: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """One run as found.

    Attributes:
        result: result.json, empty unless the run is done or diverged; what results of earlier
            versions lack of `code`, `data` and `versions` is taken from provenance.json.
        reason: one line: why it diverged or failed, or does not count.
        scores: the records of its last step, see experiments/scores.py, by task and settings:
            `hellaswag,5shot`.
    """

    id: str
    state: State
    result: Mapping[str, Any]
    reason: str = ""
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def number(self, key: str) -> float | None:
        """The finite number recorded under `key` in result.json, or None."""
        return finite(self.result.get(key))


def finite(value: Any) -> float | None:
    """The value where it is a finite number, or else None: records hold NaN, null and text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # of whole numbers without end
        return None


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
    _check_rows(rows, path)
    match = data.get("match")
    if match not in MATCHES:
        raise UserError(f"{path}: match is {match!r}, not params, flops, time or null")
    return Manifest(
        name=_take(data, "name", str, path),
        match=match,
        seeds=tuple(_take(data, "seeds", list, path)),
        tokens=_take(data, "tokens", int, path),
        rows=rows,
        description=one_line(data.get("description") or ""),
        file=str(data.get("file") or ""),
        overrides=tuple(map(str, _optional(data, "overrides", list, path) or ())),
        tune=_optional(data, "tune", dict, path) or None,
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
        sealed = "code" in data  # what says which code it was made with was sealed, too
        if (sealed or "seal" in data) and not _fits(directory, data):
            return Run(directory.name, "edited", {}, EDITED)
        status = data.get("status")
        if status not in FINISHED:
            raise UserError(f"{path}: status is {status!r}, neither done nor diverged")
        if not {"code", "data", "versions"} <= data.keys():
            data = {**_provenance(directory / "provenance.json"), **data}
        for key, kind in (("code", dict), ("versions", dict), ("step", int), ("tokens", int)):
            if data.get(key) is not None:
                _take(data, key, kind, path)
        kept: Mapping[str, Mapping[str, Any]] = {}
        if (directory / "scores").is_dir():
            step = data.get("step") or 0
            kept = scores.of_step(record.Run(directory.parent, directory.name), step)
            for name, score in kept.items():
                _check_score(score, f"{directory / 'scores'}: {name}")
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
    runs: dict[str, Run] = {}
    for row in manifest.rows:
        for seed, run_id in row.runs.items():
            if run_id not in runs:
                runs[run_id] = read_run(runs_root / run_id)
            result, planned = runs[run_id].result, row.seeds.get(seed, seed)
            if result and result.get("seed") != planned:
                raise UserError(
                    f"{runs_root / run_id / 'result.json'}: seed is {result.get('seed')!r},"
                    f" but sweep {manifest.name!r} planned it as seed {planned}"
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
    for row in rows_with(path, key):
        value = finite(row.get(key))
        if value is None:
            continue
        tokens = _take(row, "tokens", int, path)
        if finite(tokens) is None:
            raise UserError(f"{path}: tokens is a number of {len(str(tokens))} digits")
        curve[tokens] = value
    return dict(sorted(curve.items()))


def rows_with(path: Path, key: str, most: int | None = None) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that hold `key`; only those are parsed, which is what costs time.

    With `most`, about so many of them, evenly chosen, the last among them. A last line without its
    end is ignored. Raises UserError for another that is no row.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path}: can't be read: {error.strerror}") from error
    word = json.dumps(key).encode()
    chosen = [line for line in lines if word in line or line[-1:] != b"}"]
    step = max(1, len(chosen) // most) if most else 1
    chosen = chosen[::-1][::step][::-1]
    try:
        rows = json.loads(b"[" + b",".join(chosen) + b"]")  # at once: four times as fast
        if len(rows) == len(chosen) and all(isinstance(row, dict) for row in rows):
            return rows
    except ValueError:
        pass
    wrong = (i for i, line in enumerate(lines, 1) if line in chosen and not _is_row(line))
    number = next(wrong, 1)  # each by itself is one: a byte order mark stands before the first
    raise UserError(f"{path}:{number}: not a JSON row; is this a run's record?")


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _check_score(score: Mapping[str, Any], where: str) -> None:
    """Raises UserError for what is no record of a score; see experiments/scores.py."""
    metrics, children = score.get("metrics"), score.get("children")
    primary = score.get("primary", 0)  # null where it has none, but said
    whole = (
        all(_is_count(score.get(key)) for key in ("items", "of", *scores.COUNTED))
        and isinstance(score.get("kind"), str)
        and isinstance(children, list)
        and isinstance(metrics, dict)
        and all(_is_metric(metric) for metric in metrics.values())
        and (primary is None or (isinstance(primary, str) and primary in metrics))
    )
    if not whole:
        raise UserError(f"{where}: not the record of a score; remove it and score the run again")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_metric(metric: Any) -> bool:
    return (
        isinstance(metric, dict)
        and metric.get("higher_is_better") in (True, False, None)
        and all(
            metric.get(key) is None or finite(metric[key]) is not None
            for key in ("value", "stderr", "chance")
        )
        and metric.keys() >= {"value", "stderr", "chance", "higher_is_better"}
    )


def _fits(directory: Path, data: Mapping[str, Any]) -> bool:
    """Whether the result's seal is that of the directory as it is."""
    try:
        return bool(data.get("seal") == record.seal(directory, data))
    except ValueError:  # NaN, which is never sealed
        return False


def _provenance(path: Path) -> dict[str, Any]:
    """What results of earlier versions did not say of a run's code, data and libraries."""
    known = read_json(path) if path.exists() else {}
    attempts = known.get("attempts")
    attempt = _mapping(attempts[-1]) if isinstance(attempts, list) and attempts else {}
    git = _mapping(attempt.get("git"))
    commit, patch = git.get("commit"), git.get("patch") or ""
    source = hashlib.blake2b(f"{commit} {patch}".encode(), digest_size=16).hexdigest()
    return {
        "code": {"commit": commit, "dirty": bool(patch), "source": source if commit else None},
        "data": _mapping(known.get("data")).get("fingerprint"),
        "versions": {"torch": _mapping(attempt.get("versions")).get("torch")},
    }


def _check_rows(rows: Sequence[Row], path: Path) -> None:
    first: dict[str, int] = {}
    for i, row in enumerate(rows, 1):
        if (other := first.setdefault(row.label, i)) != i:  # they differ in what can't be seen
            raise UserError(
                f"{path}: rows {other} and {i} both read '{row.label}'; change a label in the sweep"
                " file and run it again: no training is repeated"
            )
    if len({frozenset(row.levels) for row in rows if row.levels}) > 1:
        raise UserError(f"{path}: levels are not of the same factors in all rows")


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


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
    tuned = _optional(data, "tuned", dict, where)
    if tuned is not None:
        if finite(tuned.get("value")) is None:
            raise UserError(f"{where}: tuned to {tuned.get('value')!r}, which is no number")
        path = _take(tuned, "path", str, where)
        tuned = {**tuned, "of": one_line(_take(tuned, "of", str, where)), "path": path}
    levels = _optional(data, "levels", dict, where)
    own = _optional(data, "seeds", dict, where) or {}
    if not all(seed.isdecimal() for seed in own):
        raise UserError(f"{where}: seeds: {own!r} does not give a seed for each of the sweep's")
    return Row(
        label=label,
        group=one_line(data.get("group") or "rows"),
        changes=_optional(data, "changes", dict, where) or {},
        parameters=_count(data, "parameters", where),
        flops_per_token=_count(data, "flops_per_token", where),
        mismatch=_count(data, "mismatch", where),
        runs=runs,
        levels=levels and {factor: str(level) for factor, level in levels.items()},
        tuned=tuned,
        experiment=_optional(data, "experiment", dict, where) or {},
        differences=tuple(map(str, _optional(data, "differences", list, where) or ())),
        seeds={int(seed): mine for seed, mine in own.items()},
    )


def _check_schema(data: Mapping[str, Any], path: Path) -> None:
    if data.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema is {data.get('schema')!r}, this version reads {SCHEMA}:"
            " not one of our records, or written by another version"
        )


def _take(data: Mapping[str, Any], key: str, kind: type, where: object) -> Any:
    value = data.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "missing" if key not in data else repr(value)
        raise UserError(f"{where}: {key} is {found}, expected {kind.__name__}")
    return value


def _optional(data: Mapping[str, Any], key: str, kind: type, where: object) -> Any:
    return None if data.get(key) is None else _take(data, key, kind, where)


def _count(data: Mapping[str, Any], key: str, where: object) -> float | None:
    value = data.get(key)
    number = finite(value)
    if value is None or (number is not None and (key == "mismatch" or number > 0)):
        return number
    raise UserError(f"{where}: {key} is {value!r}, expected a number or null")
