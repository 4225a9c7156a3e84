"""Sweeps on disk in which everything that a report can show happens. No training."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.record import seal

STEPS, TOKENS = 20, 1_000_000
VALUES = (3e-4, 1e-3, 3e-3, 1e-2)
LENGTHS = (64, 128, 512)
ODD = "<b>LSTM</b> & 50% $x$ *wow*"  # a label with HTML, LaTeX and Markdown in it


@dataclass
class Variant:
    """A row to make up: how much lower or higher its loss is, and what goes wrong."""

    label: str
    effect: float = 0.0
    group: str = "rows"
    changes: Mapping[str, Any] = field(default_factory=dict)
    noise: float = 0.004  # of the paired difference
    cost: float = 1.0  # FLOPs per token over the baseline's
    speed: float = 1.0
    diverged: Sequence[int] = ()
    missing: Sequence[int] = ()
    levels: Mapping[str, str] | None = None
    tuned: Mapping[str, Any] | None = None
    slope: float | None = None  # loss per doubling of the length beyond training
    lr: float = 1e-3


def make(root: Path, name: str, variants: Sequence[Variant], seeds: int = 4, **more: Any) -> Path:
    """Writes a manifest and its runs below `root`; returns the manifest's path."""
    rows = []
    for i, variant in enumerate(variants):
        runs = {seed: f"{name[:4]}{i:06x}-s{seed}" for seed in range(seeds)}
        experiment = {
            "model": {"norm": {"name": "layernorm"}, "d_model": 128},
            "training": {"tokens": TOKENS, "seq_len": 64, "lr": variant.lr},
        }
        for seed, run in runs.items():
            if seed not in variant.missing:
                _run(root / run, variant, seed, experiment)
        rows.append(
            {
                "label": variant.label, "group": variant.group, "changes": dict(variant.changes),
                "differences": [f"{k}: → {json.dumps(v)}" for k, v in variant.changes.items()],
                "mismatch": 0.001 * i, "parameters": 558_000 + 90 * i, "solved": {},
                "flops_per_token": 3.8e6 * variant.cost, "levels": variant.levels,
                "tuned": variant.tuned, "experiment": experiment, "seeds": {},
                "runs": {str(seed): run for seed, run in runs.items()},
            }
        )  # fmt: skip
    manifest = {
        "schema": 1, "name": name, "file": f"{name}.yaml", "baseline": variants[0].label,
        "description": "", "match": "params", "seeds": list(range(seeds)), "tokens": TOKENS,
        "tune": None, "overrides": [], **more, "rows": rows,
    }  # fmt: skip
    path = root / "sweeps" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest))
    return path


def _run(folder: Path, variant: Variant, seed: int, experiment: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "experiment.yaml").write_text(json.dumps(experiment))
    common = random.Random(seed)
    own = random.Random(f"{variant.label}{seed}")
    luck = common.gauss(0, 0.015) + own.gauss(0, variant.noise)
    diverged = seed in variant.diverged
    rows, times = [], []
    steps = STEPS // 3 if diverged else STEPS
    for k in range(1, steps + 1):
        tokens = TOKENS * k // STEPS
        fall = 1.6 * math.exp(-5 * k / STEPS) + 0.25 * (1 - k / STEPS)
        loss = 3.2 + fall + (variant.effect + luck) * min(1.0, 2 * k / STEPS)
        if diverged:
            loss += 0.02 * 2.2**k
        rows.append({"step": 10 * k, "tokens": tokens, "val/loss": loss})
        speed = 24_000 * variant.speed * (1 + 0.02 * common.random())
        times.append({"step": 10 * k, "tokens": tokens, "seconds": tokens / speed})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    final = rows[-1]["val/loss"]
    result: dict[str, Any] = {
        "schema": 1, "id": folder.name, "status": "diverged" if diverged else "done", "seed": seed,
        "step": 10 * steps, "tokens": TOKENS * steps // STEPS,
        "val/loss": None if diverged else final, "val/bpb": None if diverged else final / 1.7,
        "tuning/loss": None if diverged else final + 0.01, "init/loss": 5.55, "floor/loss": None,
        "tokens_per_s": 24_000 * variant.speed * (1 + 0.01 * seed), "seconds": times[-1]["seconds"],
        "peak_memory_bytes": 3e8, "data": "f00d",
        "code": {"commit": "0123abc4567", "dirty": False, "source": "aa"},
        "versions": {"torch": "2.13.0"}, "parameters": 558_000,
        "flops_per_token": 3.8e6 * variant.cost,
        "diverged_step": 10 * steps if diverged else None,
        "reason": "non-finite loss" if diverged else None,
    }  # fmt: skip
    if variant.slope is not None and not diverged:
        _lengths(folder, variant, final, result)
    result["seal"] = seal(folder, result)
    (folder / "result.json").write_text(json.dumps(result))


def _lengths(folder: Path, variant: Variant, final: float, result: dict[str, Any]) -> None:
    record: dict[str, Any] = {}
    for length in LENGTHS:
        if math.isnan(variant.slope or 0.0) and length > LENGTHS[0]:  # has no such positions
            record[str(length)] = {"loss": None, "windows": 8, "by_position": None}
            continue
        slope = 0.0 if math.isnan(variant.slope or 0.0) else variant.slope
        by_position = [
            final
            + 0.8 / math.sqrt(i + 1)
            + (slope or 0.0) * max(0.0, math.log2((i + 1) / 64))
            - 0.2
            for i in range(length)
        ]
        loss = sum(by_position) / length
        record[str(length)] = {"loss": loss, "windows": 8, "by_position": by_position}
        result[f"val/loss@{length}"] = loss
    (folder / "lengths.json").write_text(json.dumps(record))


def rows_sweep(root: Path) -> Path:
    """Better, worse, no difference, slower, a divergence, one that never ran, one missing seed."""
    nan = math.nan
    return make(root, "recipe", [
        Variant("GPT-2", slope=nan),
        Variant("RMSNorm", 0.0005, changes={"model.norm": "rmsnorm"}, speed=1.04, slope=nan),
        Variant("SwiGLU", -0.041, changes={"model.ffn": {"name": "swiglu", "bias": True}},
                speed=0.93, cost=1.01, slope=nan),
        Variant("Rotary", -0.128, changes={"model.position": "rotary"}, cost=1.02, speed=0.9,
                noise=0.008, slope=0.3),
        Variant("ALiBi", -0.094, changes={"model.position": "alibi"}, speed=0.82, slope=-0.03),
        Variant("Post-LN", 0.06, changes={"model.block": "post"}, noise=0.05, missing=[2]),
        Variant(ODD, 0.3, changes={"model.mixer": "lstm"}, cost=1.4,
                speed=0.4, diverged=[1]),
        Variant("NoPE", 0.2, changes={"model.position": "none"}, missing=range(4)),
    ], overrides=["training.tokens=1e6"], description="Five changes to a small GPT-2")  # fmt: skip


def ladder_sweep(root: Path) -> Path:
    """A ladder and the full recipe back."""
    effects = {"+rotary": -0.125, "+RMSNorm": 0.001, "+SwiGLU": -0.042, "+no bias": 0.004}
    total, rungs = 0.0, []
    for label, effect in effects.items():
        total += effect
        rungs.append(Variant(label, total, "ladder", {"model.x": label}))
    out = [
        Variant(f"without {label[1:]}", total - effect, "leave_one_out", {"model.x": label})
        for label, effect in effects.items()
    ]
    return make(root, "gpt2_to_llama", [Variant("GPT-2"), *rungs, *out], seeds=5)


def tuned_sweep(root: Path) -> Path:
    """Two rows at four learning rates each; one is usable over a wider range."""
    rows, tries = [], []
    for label, best, width in (("pre-LN", 1e-3, 0.10), ("pre-LN + QK-norm", 3e-3, 0.03)):
        for lr in VALUES:
            off = width * math.log(lr / best) ** 2 - 0.02 * (width < 0.05)
            diverged = [0, 1] if width > 0.05 and lr == VALUES[-1] else []
            if lr == 1e-3:
                rows.append(Variant(label, off, changes={"model.mixer.qk_norm": True}, lr=lr))
            else:
                tuned = {"of": label, "path": "training.lr", "value": lr}
                tries.append(Variant(f"{label}, lr {lr:g}", off, "tune", tuned=tuned, lr=lr,
                                     diverged=diverged))  # fmt: skip
    return make(root, "lr_range", [*rows, *tries],
                tune={"over": "training.lr", "values": list(VALUES)})  # fmt: skip


def factorial_sweep(root: Path) -> Path:
    """Two factors of two levels, which interact."""
    cells = []
    for norm in ("layernorm", "none"):
        for block in ("pre", "post"):
            effect = 0.05 * (norm == "none") + 0.03 * (block == "post")
            effect += 0.06 * (norm == "none" and block == "post")
            levels = {"model.norm": norm, "model.block": block}
            changes = {k: v for k, v in levels.items() if v not in ("layernorm", "pre")}
            cells.append(Variant(f"{norm}, {block}", effect, "factorial", changes, levels=levels))
    return make(root, "norm_by_block", cells)
