"""`match: time`: one width of each variant, solved so that a training step takes as long as the
baseline's.

Time is measured, on this machine: real steps (forward, backward, clipping, optimizer) on tokens
drawn at random, in short blocks that alternate between baseline and variant, so that whatever else
the machine does falls on both. The ratio is the median over pairs of blocks. On a CPU with as many
threads as `execution.threads` says, or one, which is what runs side by side have.

What is measured is kept in runs/probes/<baseline>-<machine>.json, and read instead of measured
again: a width is part of a run's identity, and must not follow the noise of a second measurement.

    {"schema": 1, "machine": {…}, "torch", "step_seconds": the baseline's, "rows": {a variant's key:
     {"label", "path", "width": null where its own stays, "ratio", "tried": [[parameters, ratio]]}}}
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.registry import UserError
from experiments import loader
from experiments.record import SCHEMA, read_json, write_json
from experiments.schema import Experiment
from sweeps import matching
from sweeps.design import Sweep, Variant
from sweeps.matching import TOLERANCE, Sized

if TYPE_CHECKING:
    import torch

BLOCK_SECONDS = 0.1  # of steps between two looks at the clock, at the least
PAIRS = 15  # of blocks; fewer where they would take more than MOST_SECONDS
FEWEST_PAIRS = 3
MOST_SECONDS = 20.0
MOST_WIDTHS = 5


@dataclass(frozen=True)
class Probes:
    """Where measurements are kept, and whether others may be made on this machine."""

    folder: Path
    measuring: bool = True


@dataclass
class _Kept:
    """One file of measurements: all variants against one baseline on one machine."""

    path: Path
    machine: dict[str, Any]
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    step_seconds: float | None = None

    @classmethod
    def read(cls, path: Path) -> _Kept:
        data = read_json(path)
        rows: Any = data.get("rows")
        machine: Any = data.get("machine")
        sound = isinstance(rows, dict) and all(map(_sound, rows.values()))
        if data.get("schema") != SCHEMA or not sound or "device" not in (machine or ()):
            raise UserError(f"{path}: holds no probes of this version; delete it to measure anew")
        return cls(path, machine, rows, data.get("step_seconds"))

    def write(self) -> None:
        import torch

        self.path.parent.mkdir(parents=True, exist_ok=True)
        known = {"machine": self.machine, "torch": torch.__version__}
        seconds = {"step_seconds": self.step_seconds}
        write_json(self.path, {"schema": SCHEMA, **known, **seconds, "rows": self.rows})


def _sound(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("ratio"), float)
        and isinstance(row.get("width"), int | None)
        and isinstance(row.get("path"), str | None)
    )


def timed(sweep: Sweep, cache: Path, probes: Probes) -> tuple[Sized, ...]:
    """Every variant counted, its width as the probes say; measures those that are not kept.

    Raises:
        UserError: none is kept where none may be measured; or what is kept is damaged.
    """
    vocabularies = {v.label: matching.vocabulary(v.experiment, cache) for v in sweep.variants}
    keys = {v.label: _key(v, vocabularies[v.label]) for v in sweep.variants}
    own = keys[sweep.baseline.label]
    others: dict[str, Variant] = {}
    for variant in sweep.variants:  # tries of `tune` are as large as what they are tries of
        if keys[variant.label] != own:
            others.setdefault(keys[variant.label], variant)
    kept = _find(sweep, probes, own, others)
    if missing := [key for key in others if key not in kept.rows]:
        print(
            f"match: time: measuring the training steps of {len(missing)} variants on "
            f"{kept.machine['device']}, once; kept in {kept.path}",
            file=sys.stderr,
        )
        _measure(sweep, {key: others[key] for key in missing}, kept, cache)
    rows = []
    for variant in sweep.variants:
        known = kept.rows.get(keys[variant.label], {"ratio": 1.0, "path": None, "width": None})
        solved = None
        if known["path"] is not None and known["width"] is not None:
            solved = (known["path"], known["width"])
            changed = matching.with_width(variant.experiment, *solved)
            variant = replace(variant, experiment=changed)
        counts = matching.measure(variant.experiment, cache)
        rows.append(Sized(variant, counts, known["ratio"] - 1, solved))
    return tuple(rows)


def _key(variant: Variant, vocabulary: int) -> str:
    """A hash of all that the time of a step depends on, and of which width is free."""
    e, t = variant.experiment, variant.experiment.training
    said = {
        "model": loader.resolved(e)["model"],
        "vocabulary": vocabulary,
        "batch": [t.global_batch_size, t.seq_len, t.precision, t.grad_clip is None],
        "optimizer": t.optimizer.dump(),
        "objective": t.objective.dump(),
        "execution": [e.execution.device, e.execution.micro_batch_size, e.execution.compile],
        "threads": e.execution.threads,
        "free": matching.free_width(variant),
    }
    text = json.dumps(said, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _find(sweep: Sweep, probes: Probes, own: str, others: Collection[str]) -> _Kept:
    """This machine's probes, perhaps none yet; where nothing may be measured, a whole set."""
    execution = sweep.baseline.experiment.execution
    machine = _machine(execution.device, execution.threads)
    text = json.dumps(machine, sort_keys=True)
    name = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    path = probes.folder / f"{own}-{name}.json"
    kept = _Kept.read(path) if path.exists() else _Kept(path, machine)
    if probes.measuring or all(key in kept.rows for key in others):
        return kept
    found = [_Kept.read(p) for p in sorted(probes.folder.glob(f"{own}-*.json"))]
    whole = [one for one in found if all(key in one.rows for key in others)]
    if len(whole) == 1:
        return whole[0]
    if whole:
        files = ", ".join(f"{one.path} ({one.machine['device']})" for one in whole)
        raise UserError(
            f"{sweep.name}: match: time: measured on several machines: {files}; "
            "delete those that the jobs will not run on"
        )
    raise UserError(
        f"{sweep.name}: match: time: the time of a step is not measured yet, and this machine is "
        f"not where the jobs run; run there once, with the same runs folder: "
        f"python run.py plan {sweep.file}"
    )


def _machine(device: str, threads: int | None) -> dict[str, Any]:
    """What a step's time depends on besides the work."""
    import torch

    from experiments.provenance import cpu

    kind = _device(device).type
    if kind == "cuda":
        return {"device": torch.cuda.get_device_name()}
    return {"device": f"{cpu()} ({kind})" if kind != "cpu" else cpu(), "threads": threads or 1}


def _device(name: str) -> torch.device:
    import torch

    if name == "auto":
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        name = "cuda" if cuda else "mps" if mps else "cpu"
    return torch.device(name)


# --- measuring ------------------------------------------------------------------------------------


def _measure(sweep: Sweep, others: dict[str, Variant], kept: _Kept, cache: Path) -> None:
    """Measures these variants, each kept as soon as it is known."""
    baseline = sweep.baseline.experiment
    with _threads(baseline.execution.threads or 1):
        step = stepper(baseline, matching.vocabulary(baseline, cache))
        for key, variant in others.items():
            counts = matching.measure(baseline, cache)

            def ratio(experiment: Experiment) -> float:
                other = stepper(experiment, matching.vocabulary(experiment, cache))
                found, seconds = compare(step, other)
                kept.step_seconds = seconds
                return found

            kept.rows[key] = solve(variant, ratio, counts.flops_per_token, cache)
            kept.write()


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """As many threads as a run would have, while steps are timed."""
    import torch

    from components.memory_cpu import hold_freed_memory

    before = torch.get_num_threads()
    hold_freed_memory()  # as a run does
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def solve(
    variant: Variant, ratio: Callable[[Experiment], float], flops: float, cache: Path
) -> dict[str, Any]:
    """A row of what is kept: the width whose step takes nearest to the baseline's time.

    `ratio` measures an experiment's time over the baseline's; `flops` are the baseline's per token,
    from which the first guess is made: six operations for each parameter. Then a straight line
    through the nearest measurements, one on each side of the goal where there are.
    """
    experiment = variant.experiment
    path = matching.free_width(variant)

    def changed(width: int | None) -> Experiment:
        return experiment if width is None else matching.with_width(experiment, str(path), width)

    def parameters(width: int | None) -> float:
        return matching.measure(changed(width), cache, flops=False).parameters

    tried: dict[int | None, float] = {None: ratio(experiment)}

    def off(width: int | None) -> float:
        return abs(tried[width] - 1)

    while path is not None and min(map(off, tried)) > TOLERANCE and len(tried) < MOST_WIDTHS:
        nearest = min(tried, key=off)
        across = [w for w in tried if (tried[w] > 1) != (tried[nearest] > 1)]
        others = across or [w for w in tried if w != nearest]
        slope = guess = 6.0 / flops
        if others:
            other = min(others, key=off)
            apart = parameters(nearest) - parameters(other)
            slope = (tried[nearest] - tried[other]) / apart if apart else guess
            if not guess / 3 < slope < 3 * guess:  # of noise
                slope = guess
        wanted = parameters(nearest) + (1 - tried[nearest]) / slope
        spec = experiment.model.specs[path.split(".")[1]]
        multiple = spec.params.get("multiple_of", 1)
        width = matching.nearest_width(parameters, max(wanted, parameters(multiple) + 1), multiple)
        if width is None or width in tried:
            break
        tried[width] = ratio(changed(width))
    best = min(tried, key=off)
    return {
        "label": variant.label,
        "path": path,
        "width": best,
        "ratio": tried[best],
        "tried": [[parameters(width), found] for width, found in tried.items()],
    }


def stepper(experiment: Experiment, vocabulary: int) -> Callable[[int], float]:
    """A function that does some training steps, and returns the seconds that they took."""
    import torch

    from experiments.model import LanguageModel, build

    t, execution = experiment.training, experiment.execution
    device = _device(execution.device)
    decoder = build(experiment, vocabulary, 0).to(device)
    optimizer = t.optimizer.build().build(decoder, t.lr)
    language = LanguageModel(decoder, t.objective.build())
    if execution.compile:
        language.compile()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(t.precision)
    generator = torch.Generator().manual_seed(0)
    shape = (t.global_batch_size, t.seq_len + 1)
    tokens = torch.randint(vocabulary, shape, generator=generator).to(device)

    def one() -> None:
        for piece in tokens.split(execution.micro_batch_size or t.global_batch_size):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                loss = language(piece) / t.tokens_per_step
            loss.backward()
        limit = t.grad_clip or math.inf
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), limit)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def steps(count: int) -> float:
        began = _now(device)
        for _ in range(count):
            one()
        return _now(device) - began

    return steps


def _now(device: torch.device) -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def compare(baseline: Callable[[int], float], other: Callable[[int], float]) -> tuple[float, float]:
    """(time of a step of `other` over the baseline's, seconds of the baseline's), as medians."""
    counts = []
    for steps in (baseline, other):
        steps(2)  # caches are cold, kernels are chosen or compiled
        counts.append(max(1, math.ceil(BLOCK_SECONDS / max(steps(2) / 2, 1e-9))))
    ratios: list[float] = []
    seconds: list[float] = []
    began = time.monotonic()
    while len(ratios) < PAIRS:
        if len(ratios) >= FEWEST_PAIRS and time.monotonic() - began > MOST_SECONDS:
            break
        both = ((0, baseline), (1, other))
        spent = [0.0, 0.0]
        for side, steps in both if len(ratios) % 2 else reversed(both):
            spent[side] = steps(counts[side]) / counts[side]
        ratios.append(spent[1] / spent[0])
        seconds.append(spent[0])
    return statistics.median(ratios), statistics.median(seconds)
