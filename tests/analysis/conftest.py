"""A small sweep on disk with all that goes wrong: divergence, gaps, a mismatch, odd names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

Outcome = float | str | None  # the final loss; "diverged" or "failed"; None for a run never started
ROWS: list[tuple[str, str, float, list[Outcome]]] = [
    ("GPT-2", "rows", 0.0, [4.00, 4.02, 4.013]),
    (r"A&B_50% $x|<y>\^~{#}", "rows", 0.004, [3.95, 3.973, 3.962]),
    ("[SwiGLU] -- *gated*", "rows", 0.066, [4.002, 4.0, 4.03]),
    ("LSTM", "ladder", -0.002, [4.4, "diverged", 4.5]),
    ("NoPE", "ladder", 0.0, [4.1, None, "failed"]),
    ("QK-norm", "leave_one_out", -0.02, [None, None, None]),
]


def write_run(directory: Path, seed: int, outcome: Outcome) -> None:
    if outcome is None:
        return
    directory.mkdir(parents=True)
    if outcome == "failed":
        failure = {"schema": 1, "error": "disk\nfull \x1b[31m", "time": "2026-01-01T00:00:00"}
        (directory / "failure.json").write_text(json.dumps(failure))
        return
    diverged = outcome == "diverged"
    final = 4.5 if isinstance(outcome, str) else outcome
    with (directory / "metrics.jsonl").open("w") as file:
        for k in range(1, 4 if diverged else 11):
            row = {"step": 10 * k, "tokens": 1000 * k, "val/loss": final + 10 / k - 1}
            file.write(json.dumps({"step": 10 * k, "tokens": 1000 * k, "train/loss": 5.0}) + "\n")
            file.write(json.dumps(row) + "\n")
    result = {
        "schema": 1, "id": directory.name, "status": "diverged" if diverged else "done",
        "seed": seed, "tokens": 10000, "val/loss": None if diverged else final,
        "val/bpb": None if diverged else round(final * 0.44, 6),
        "tokens_per_s": 15000.0 + 100 * seed**2,
        "diverged_step": 37 if diverged else None,
        "reason": "non-finite loss" if diverged else None,
    }  # fmt: skip
    (directory / "result.json").write_text(json.dumps(result))


def write_sweep(root: Path, rows: list[tuple[str, str, float, list[Outcome]]] = ROWS) -> Path:
    """Fill `root` with runs and a manifest; returns the manifest's path."""
    planned: list[dict[str, Any]] = []
    for i, (label, group, mismatch, outcomes) in enumerate(rows):
        runs = {str(seed): f"{i:010x}-s{seed}" for seed in range(len(outcomes))}
        for seed, outcome in enumerate(outcomes):
            write_run(root / runs[str(seed)], seed, outcome)
        planned.append(
            {"label": label, "group": group, "changes": {}, "mismatch": mismatch, "runs": runs,
             "parameters": round(1_053_184 * (1 + mismatch)), "flops_per_token": 6.1e6}
        )  # fmt: skip
    manifest = {"schema": 1, "name": "odd_names", "file": "odd.yaml", "baseline": rows[0][0],
                "match": "params", "seeds": [0, 1, 2], "tokens": 10000,
                "rows": planned}  # fmt: skip
    path = root / "sweeps" / "odd_names.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(manifest))
    return path


@pytest.fixture
def manifest_path(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "runs")


@pytest.fixture
def make_sweep(tmp_path: Path) -> Any:
    """`make_sweep({label: outcomes})` -> (manifest, runs) of another sweep, fairly matched."""
    from analysis.results import read_manifest, read_runs

    def make(rows: dict[str, list[Outcome]]) -> Any:
        root = tmp_path / f"made-{len([*tmp_path.glob('made-*')])}"
        path = write_sweep(root, [(label, "rows", 0.0, seeds) for label, seeds in rows.items()])
        manifest = read_manifest(path)
        return manifest, read_runs(manifest, root)

    return make
