"""What a run is called in wandb, and what it carries there: so that an ablation can be read.

One project; a group for each sweep; a name such as `RMSNorm s0`; tags for sweep, variant and axis;
the resolved experiment nested by component, with what sets the run apart from the baseline in one
field. Grouping by `variant` shows the ablation, `diff` says what each variant is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import scores
from experiments.loader import flatten
from experiments.record import Run, UserError, read_json
from experiments.tracking import known, tag
from experiments.yaml_text import read

SECTIONS = ("model", "data", "training", "evaluation")
SIZES = ("parameters", "parameters_non_embedding", "flops_per_token")
ROW = ("match", "mismatch", "parameters", "flops_per_token")


@dataclass(frozen=True)
class Described:
    """For `wandb.init`; `group` is the sweep's name."""

    name: str
    group: str | None
    tags: tuple[str, ...]
    notes: str
    config: dict[str, Any]


def described(run: Run, sweep: str | None = None) -> Described:
    """A run as its records and the sweeps that hold it describe it.

    Args:
        sweep: the group to show it in; else the one it is in already, or the newest.

    Raises:
        UserError: a record of the run is damaged.
    """
    experiment = read(run / "experiment.yaml").data
    provenance = read_json(run / "provenance.json")
    attempts = provenance.get("attempts") or [{}]
    seed = provenance.get("seed", 0)
    config: dict[str, Any] = {key: experiment.get(key) for key in SECTIONS}
    config |= {
        "run": run.id,
        "seed": seed,
        "host": attempts[-1].get("host"),
        "jobs": list(dict.fromkeys(a["job"] for a in attempts if a.get("job"))),
        "attempts": len(attempts),
        "device": attempts[-1].get("device"),
        "processes": attempts[-1].get("processes"),
        "code": code_of(attempts[-1]),
        "versions": attempts[-1].get("versions"),
        "data_fingerprint": provenance.get("data", {}).get("fingerprint"),
        "description": experiment.get("description") or None,
    }
    result = read_json(run / "result.json") if (run / "result.json").exists() else {}
    config |= {key: result[key] for key in SIZES if key in result}
    places = sweeps_with(run)
    wanted = sweep or str(known(run).get("group"))
    group = wanted if wanted in places else next(iter(places), None)
    if group is None:
        notes = str(experiment.get("description") or "")
        return Described(run.id, None, (), notes, config)
    manifest, index = places[group]
    row, baseline = manifest["rows"][index], manifest["rows"][0]
    config |= {
        "sweep": group,
        "variant": row["label"],
        "sweeps": {name: m["rows"][i]["label"] for name, (m, i) in places.items()},
        "axis": ", ".join(row["changes"]) or "baseline",
        "is_baseline": index == 0,
        "row": index,
        "row_group": row["group"],
        "tokens": manifest["tokens"],
        "diff": "; ".join(difference(baseline["experiment"], row["experiment"])) or "baseline",
    }
    config |= {key: {**row, "match": manifest.get("match")}.get(key) for key in ROW}
    tags = [f"sweep:{name}" for name in places]
    tags += [f"variant:{row['label']}", *(f"axis:{path}" for path in row["changes"])]
    tags += ["baseline"] * (index == 0)
    return Described(
        f"{row['label'][:100]} s{seed}",
        group,
        tuple(dict.fromkeys(map(tag, tags))),
        str(manifest.get("description") or ""),
        config,
    )


def code_of(attempt: Mapping[str, Any]) -> dict[str, Any]:
    """The commit that an attempt ran from, and whether it was changed; not the changes."""
    git = attempt.get("git") or {}
    snapshot = (attempt.get("snapshot") or {}).get("id")
    return {"commit": git.get("commit"), "changed": bool(git.get("patch")), "snapshot": snapshot}


def sweeps_with(run: Run) -> dict[str, tuple[Mapping[str, Any], int]]:
    """The sweeps that hold a run: manifest and index of its row by name, the newest first."""
    found = []
    for path in (run.root / "sweeps").glob("*.json"):
        try:
            changed = path.stat().st_mtime_ns
            manifest, rows = _rows(path, changed)
        except (OSError, UserError):  # which is told where that sweep is read
            continue
        if run.id in rows:
            found.append((changed, path.stem, manifest, rows[run.id]))
    found.sort(key=lambda item: item[:2], reverse=True)
    return {name: (manifest, index) for _, name, manifest, index in found}


@functools.lru_cache(maxsize=256)
def _rows(path: Path, changed: int) -> tuple[dict[str, Any], dict[str, int]]:
    """A manifest, and the first row of each of its runs; read anew when the file has changed."""
    manifest = read_json(path)
    rows = manifest.get("rows") or []
    try:
        indices = {id: i for i, row in reversed([*enumerate(rows)]) for id in row["runs"].values()}
        _ = (
            [(row["label"], row["group"], row["changes"], row["experiment"]) for row in rows],
            manifest["tokens"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: is no manifest of a sweep ({error})") from error
    return manifest, indices


def difference(baseline: Mapping[str, Any], experiment: Mapping[str, Any]) -> list[str]:
    """What sets an experiment apart from the baseline: `model.norm: layernorm → rmsnorm`.

    Parameters that only one of two components has are left out, as its name says them.
    """
    before, now = (flatten({k: e.get(k) for k in SECTIONS[:3]}) for e in (baseline, experiment))
    return [
        f"{path.removesuffix('.name')}: {shown(before[path])} → {shown(value)}"
        for path, value in now.items()
        if path in before and before[path] != value
    ]


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def summary(run: Run) -> dict[str, Any]:
    """What stands in the summary of a run that has ended: its result, and each task's score.

    Raises:
        UserError: a record is damaged.
    """
    path = run / "result.json"
    if not path.exists():
        return {}
    result = read_json(path)
    skipped = ("schema", "id", "seed", "seal")  # a seal is of files that are not there
    return {k: v for k, v in result.items() if k not in skipped} | score_rows(run, result["step"])


def score_rows(run: Run, step: int) -> dict[str, Any]:
    """The `score_row` of each task that the run was scored on at a step, in one."""
    found = scores.of_step(run, step).items()
    return {key: value for item in found for key, value in score_row(*item).items()}


def score_row(name: str, record: Mapping[str, Any]) -> dict[str, Any]:
    """A task's primary metric, the standard error of its items, and what moves at chance too."""
    row: dict[str, Any] = {}
    metrics = record["metrics"]
    if primary := metrics.get(record["primary"] or ""):
        row = {f"score/{name}": primary["value"], f"score/{name}/stderr": primary["stderr"]}
    row |= {f"score/{name}/{key}": metrics[key]["value"] for key in scores.SMOOTH if key in metrics}
    return {key: value for key, value in row.items() if value is not None}
