"""Scoring a run with lm-eval, in process: what is missing, task by task, each kept when it is done.

    names ─ tasks.resolve ─ leaves not yet scored ─ lm-eval's evaluate(CeterisLM) ─ scores/step-…/

A task that fails stops no other. What was scored before a crash is not scored again; a task whose
YAML or data has changed since is. Training's random numbers, its weights and its metrics.jsonl are
left as they are.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic

from components.registry import UserError
from experiments import held_out, scores, tasks
from experiments.record import Interrupted, Run, disk_error, write_json
from experiments.schema import Evaluation
from experiments.scored_items import answer_metric, has_chance, items_of
from experiments.scores import ScoringFailed, Settings

if TYPE_CHECKING:
    from components.decoder import Decoder
    from experiments.data import Dataset
    from experiments.lm import CeterisLM

LEADING = ("acc", "exact_match", "bits_per_byte")  # a task's first number, where it has one of them
BOOTSTRAP = 1000  # draws; a closed formula serves all means
ANSWER = scores.SMOOTH


@dataclass(frozen=True)
class Wanted:
    """The tasks of an evaluation: all leaves, and what each name stands for."""

    leaves: Mapping[str, tasks.Leaf]
    names: Mapping[str, tasks.Resolved]


def wanted(evaluation: Evaluation, data: Dataset | None = None) -> Wanted:
    """What `evaluation.tasks` means; items of shipped tasks are built from `data`.

    Raises:
        UserError: an unknown or broken task; names it.
    """
    include = included(evaluation)
    known = tasks.resolve(evaluation.tasks, include)  # all that is wrong, at once
    folder = None
    shipped = [n for n, leaf in known.leaves.items() if leaf.path.parent == tasks.SHIPPED]
    if data is not None and shipped:
        folder = held_out.build(data, shipped)
    names = {name: tasks.resolve([name], include, folder) for name in evaluation.tasks}
    leaves = {key: leaf for some in names.values() for key, leaf in some.leaves.items()}
    return Wanted(leaves, names)


def included(evaluation: Evaluation) -> Path | None:
    """The folder of the user's own tasks.

    Raises:
        UserError: it is not there.
    """
    include = Path(evaluation.include_path) if evaluation.include_path else None
    if include is not None and not include.exists():
        raise UserError(f"evaluation.include_path: {include}: no such folder")
    return include


def check(evaluation: Evaluation, *, fetch: bool = False) -> None:
    """Every task is known and its data is there, before any training relies on it.

    Args:
        fetch: get what is missing from the hub now, while there is a network.

    Raises:
        UserError: one line for the first that is not.
    """
    if evaluation.tasks:
        resolved = tasks.resolve(evaluation.tasks, included(evaluation))
        with tasks.quiet(), hushed():
            (tasks.fetch if fetch else tasks.check)(resolved)


@dataclass
class Subject:
    """A model to be scored, and how far it was trained.

    Attributes:
        main: whether this process, of several that hold the model, keeps the records.
        stop: numbers of the signals caught so far.
    """

    run: Run
    model: Decoder
    data: Dataset
    step: int
    tokens: int
    main: bool = True
    stop: list[int] = field(default_factory=list)
    say: Callable[[str], None] = lambda text: None
    pulse: Callable[[], None] = lambda: None

    def look(self) -> None:
        """Between batches: a heartbeat, and whether somebody asked to stop.

        Raises:
            Interrupted: so it is.
        """
        self.pulse()
        if self.stop:
            raise Interrupted(self.stop[0])


def score(subject: Subject, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """Scores what is missing at the subject's step; returns the records of `evaluation.tasks`.

    Raises:
        ScoringFailed: some tasks could not be; says why, also in scores/failure.json.
        Interrupted: a signal came; whole tasks are kept.
    """
    if not evaluation.tasks:
        return {}
    with contextlib.ExitStack() as stack:
        if subject.main:
            stack.enter_context(scores.lock(subject.run, subject.look))
        failures: dict[str, str] = {}
        tracebacks: dict[str, str] = {}
        records: dict[str, dict[str, Any]] = {}
        try:
            asked = wanted(evaluation, subject.data)
            _leaves(subject, evaluation, asked, failures, tracebacks)
            records = _names(subject, evaluation, asked, failures)
        except Interrupted:
            raise
        except UserError as error:
            failures[""] = str(error)
        except Exception as error:  # the run stays what it is, whatever befalls its scores
            failures[""] = unexpected(error)
            tracebacks[""] = "".join(traceback.format_exception(error))
        path = subject.run / "scores" / "failure.json"
        if failures:
            parts = [f"{name}: {why}" if name not in why else why for name, why in failures.items()]
            line = "; ".join(parts[:3]) + (f"; and {len(parts) - 3} more" * (len(parts) > 3))
            if subject.main:
                whole = {"error": line, "tasks": failures, "tracebacks": tracebacks}
                write_json(path, {"schema": scores.SCHEMA, **whole})
            raise ScoringFailed(line, records)
        if subject.main:
            path.unlink(missing_ok=True)
        return records


def score_run(
    run: Run,
    change: Mapping[str, Any],
    *,
    checkpoint: int | None = None,
    kept: bool = True,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Scores a finished or running run's checkpoint; returns the record of each task named.

    Args:
        change: of the run's own `evaluation`: `{"tasks": [...], "limit": 100}`.
        checkpoint: its step; the newest by default.
        kept: whether the records stay in the run's directory.

    Raises:
        UserError: no checkpoint, or no tasks are named.
        ScoringFailed, Interrupted: as `score`.
    """
    from experiments.model import open_run
    from experiments.start import accelerate_on, stop_signals

    trained, data = open_run(run, checkpoint)
    evaluation = changed(trained.experiment.evaluation.model_dump(), change)
    if not evaluation.tasks:
        raise UserError(f"{run.folder}: no tasks to score; name some: --tasks hellaswag,my_task")
    check(evaluation, fetch=True)
    with stop_signals() as stop, contextlib.ExitStack() as stack:
        accelerator = accelerate_on(trained.experiment)
        if not kept:
            place = stack.enter_context(tempfile.TemporaryDirectory())
            run = Run(Path(place), run.id)
        tokens = trained.step * trained.experiment.training.tokens_per_step
        model, main = trained.model.to(accelerator.device), accelerator.is_main_process
        tell = say if main else (lambda text: None)
        subject = Subject(run, model, data, trained.step, tokens, main, stop, tell)
        return score(subject, evaluation)


def changed(evaluation: Mapping[str, Any], change: Mapping[str, Any]) -> Evaluation:
    """An evaluation, given as plain data, with some of its fields replaced.

    Raises:
        UserError: a value is not allowed.
    """
    try:
        text = json.dumps({**evaluation, **change})
        made = Evaluation.model_validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"evaluation.{where}: {first['msg']}, got {first['input']!r}") from None
    for path, message in made.problems():
        raise UserError(f"{path}: {message}")
    return made


def _leaves(
    subject: Subject,
    evaluation: Evaluation,
    asked: Wanted,
    failures: dict[str, str],
    tracebacks: dict[str, str],
) -> None:
    settings = Settings.of(evaluation.model_dump())
    missing = []
    for name, leaf in asked.leaves.items():
        try:
            known = scores.read(scores.path_of(subject.run, subject.step, name, settings))
            current = known is not None and known.get("schema") == scores.SCHEMA
            if known is None or not current or known.get("fingerprint") != leaf.fingerprint:
                missing.append(name)
        except UserError as error:
            failures[name] = str(error)
    missing = _agreed(missing)
    if not missing:
        return
    from experiments.lm import CeterisLM

    try:
        lm = CeterisLM(
            subject.model,
            subject.data.tokenizer,
            max_length=evaluation.max_length,
            add_bos_token=evaluation.add_bos_token,
            precision=evaluation.precision,
            pulse=subject.look,
        )
    except UserError as error:
        failures[""] = str(error)
        return
    for number, name in enumerate(missing, 1):
        subject.say(f"scoring {name} ({number} of {len(missing)})")
        try:
            whole = next(r for r in asked.names.values() if name in r.leaves)
            record, items = _score_leaf(lm, whole, name, evaluation)
            record |= {"step": subject.step, "tokens": subject.tokens}
            record["settings"] = settings.as_json()
            record["fingerprint"] = asked.leaves[name].fingerprint
            if subject.main:
                scores.forget_groups(subject.run, subject.step, name, settings)
                keep(scores.path_of(subject.run, subject.step, name, settings), record, items)
        except (Interrupted, MemoryError):
            raise
        except UserError as error:
            failures[name] = str(error)
        except Exception as error:  # of a task's own code, or lm-eval's
            failures[name] = unexpected(error)
            tracebacks[name] = "".join(traceback.format_exception(error))


def unexpected(error: Exception) -> str:
    """One line for what lm-eval or a task's own code raised, with the place in the code."""
    if "Sample larger than population" in str(error):
        return "num_fewshot is more than the examples that the task has"
    frames = traceback.extract_tb(error.__traceback__)
    at = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}{at}"


def _agreed(missing: list[str]) -> list[str]:
    """What the first process found: the records of others may lag behind on a shared disk."""
    if "torch" in sys.modules:
        import torch.distributed as dist

        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            told = [missing]
            dist.broadcast_object_list(told, src=0)
            return told[0]
    return missing


def keep(path: Path, record: Mapping[str, Any], items: Mapping[str, list[Any]]) -> None:
    """Writes a task's items and then, as the sign that they are whole, its record."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.stem}.parquet.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(dict(items)), temporary, compression="zstd")
        temporary.replace(path.with_suffix(".parquet"))
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise disk_error(error, path.with_suffix(".parquet")) from error
    write_json(path, dict(record))


# --- one task ------------------------------------------------------------------------------------


def _score_leaf(
    lm: CeterisLM, resolved: tasks.Resolved, name: str, evaluation: Evaluation
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """(record, columns of its items) of one task."""
    from lm_eval.evaluator import evaluate

    began = time.monotonic()
    lm.cut.clear()
    lm.strange.clear()
    # Or lm-eval forks a pool for its bootstrap, from a process with threads and maybe a GPU.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    with tasks.quiet(), tasks.fast_templates(), hushed():
        loaded = tasks.load(resolved, [name], evaluation.num_fewshot)
        task = loaded["tasks"][name]
        with tasks.explained(resolved.leaves[name], task):
            result = evaluate(
                lm,
                {"tasks": {name: task}, "groups": {}},
                limit=evaluation.limit,
                bootstrap_iters=BOOTSTRAP,
                log_samples=True,
            )
    samples = sorted(result["samples"][name], key=lambda s: (s["filter"], s["doc_id"]))
    items = items_of(task, samples)
    metrics = _metrics(result["results"][name], result["higher_is_better"][name])
    if not metrics:
        asked = ", ".join(result["higher_is_better"][name])
        raise UserError(f"no metric that it asks for ({asked}) fits output_type {task.OUTPUT_TYPE}")
    for key in (key for key in metrics if has_chance(task, key)):
        metrics[key] |= items.guessing()
    columns = items.columns
    metrics |= {key: answer_metric(columns, key) for key in ANSWER if key in columns}
    count = result["n-samples"][name]
    return {
        "schema": scores.SCHEMA,
        "task": name,
        "kind": "task",
        "children": [],
        "version": None if result["versions"][name] == "Yaml" else result["versions"][name],
        "lm_eval": importlib.metadata.version("lm_eval"),
        "shots": result["n-shot"][name],
        "items": count["effective"],
        "of": count["original"],
        "metrics": metrics,
        "primary": leading(metrics),
        "truncated": len(lm.cut),
        "unknown": len(lm.strange),
        "seconds": time.monotonic() - began,
    }, columns


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Inside, what lm-eval or a task's own code prints is held back.

    Raises:
        UserError: that code ends the program.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield
    except SystemExit as error:
        raise UserError("the task's own code ended the program (sys.exit)") from error


def _metrics(
    result: Mapping[str, Any], higher_is_better: Mapping[str, bool]
) -> dict[str, dict[str, Any]]:
    """`{"acc": {"value", ...}}` from lm-eval's `{"acc,none": ..., "acc_stderr,none": ...}`."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in result.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = result.get(f"{metric}_stderr,{how}")
        found[metric if how == "none" else key] = {
            "value": finite(value),
            "stderr": finite(stderr),
            "higher_is_better": higher_is_better.get(metric),
            "chance": None,
            "chance_stderr": None,
        }
    return found


def finite(value: Any) -> float | None:
    """A number that JSON can hold."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def leading(metrics: Mapping[str, Any]) -> str | None:
    """The metric that stands for a task where there is room for one."""
    plain = [key for key in metrics if key not in ANSWER]
    return next((key for key in LEADING if key in plain), plain[0] if plain else None)


# --- groups --------------------------------------------------------------------------------------


def _names(
    subject: Subject, evaluation: Evaluation, asked: Wanted, failures: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The record of each name asked for; a group's or tag's is written from its tasks'.

    One that has no score of its own is returned as its tasks.
    """
    settings = Settings.of(evaluation.model_dump())
    shown: dict[str, dict[str, Any]] = {}
    for name, resolved in asked.names.items():
        if not subject.main or "" in failures or failures.keys() & resolved.leaves.keys():
            continue
        leaves = {
            leaf: scores.read(scores.path_of(subject.run, subject.step, leaf, settings)) or {}
            for leaf in resolved.leaves
        }
        if name in leaves:
            shown[name] = leaves[name]
            continue
        groups = {group: _together(group, resolved, leaves) for group in [*resolved.groups, name]}
        for group, record in groups.items():
            path = scores.path_of(subject.run, subject.step, group, settings)
            if scores.read(path) != record:
                write_json(path, record)
        shown |= leaves if groups[name]["primary"] is None else {name: groups[name]}
    return shown


def _together(
    name: str, resolved: tasks.Resolved, leaves: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """A group's record: means over its tasks as lm-eval takes them, weighted by items or not."""
    below = list(_below(name, resolved)) if name in resolved.groups else list(leaves)
    some = [leaves[leaf] for leaf in below]
    metrics = {}
    for rule in resolved.aggregates.get(name, []):
        weighted, filters = rule.get("weight_by_size", True), rule.get("filter_list")
        for key in dict.fromkeys(key for record in some for key in record["metrics"]):
            metric, _, how = key.partition(",")
            if metric == rule["metric"] and (not filters or (how or "none") in filters):
                members = [record for record in some if key in record["metrics"]]
                metrics[key] = _average(members, key, weighted)
    for key in ANSWER:
        if metrics and all(key in record["metrics"] for record in some):
            metrics[key] = _average(some, key, True)
    first = some[0]
    shared = ("schema", "lm_eval", "step", "tokens", "settings")
    return {
        **{key: first[key] for key in shared},
        "task": name,
        "kind": "group" if name in resolved.groups else "tag",
        "children": resolved.groups.get(name, below),
        "version": None,
        "items": sum(record["items"] for record in some),
        "of": sum(record["of"] for record in some),
        "metrics": metrics,
        "primary": leading(metrics),
        "truncated": sum(record["truncated"] for record in some),
        "unknown": sum(record["unknown"] for record in some),
        "seconds": sum(record["seconds"] for record in some),
    }


def _below(name: str, resolved: tasks.Resolved) -> Iterable[str]:
    for child in resolved.groups[name]:
        yield from _below(child, resolved) if child in resolved.groups else [child]


def _average(records: list[Mapping[str, Any]], key: str, weighted: bool) -> dict[str, Any]:
    """The mean over tasks and its standard error, by lm-eval's own formulas."""
    from lm_eval.api.metrics import (
        aggregate_subtask_metrics,
        pooled_sample_stderr,
        unweighted_mean_stderr,
    )

    metrics = [record["metrics"][key] for record in records]
    sizes = [record["items"] for record in records]
    columns = {name: [metric[name] for metric in metrics] for name in metrics[0]}

    def mean(name: str) -> float | None:
        whole = None not in columns[name]
        return float(aggregate_subtask_metrics(columns[name], sizes, weighted)) if whole else None

    stderr = None
    if None not in columns["stderr"]:
        errors = columns["stderr"]
        pooled = pooled_sample_stderr(errors, sizes) if weighted else unweighted_mean_stderr(errors)
        stderr = float(pooled)
    guessing = None
    if None not in columns["chance_stderr"]:  # of a sum of independent guesses
        weights = [size if weighted else 1 for size in sizes]
        parts = (w * e for w, e in zip(weights, columns["chance_stderr"], strict=True))
        guessing = math.hypot(*parts) / sum(weights)
    return {
        "value": mean("value"),
        "stderr": stderr,
        "higher_is_better": metrics[0]["higher_is_better"],
        "chance": mean("chance"),
        "chance_stderr": guessing,
    }
