"""Scoring the finished runs of a sweep on tasks named afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.registry import UserError
from experiments.record import Run
from sweeps import manifest


def with_tasks(record: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest whose runs are also wanted on these tasks: `{"tasks": [...], "limit": 100}`.

    Raises:
        UserError: no tasks are named; or one is unknown, or its data is not there.
    """
    from experiments import evaluate

    changed = copy.deepcopy(dict(record))
    seen = []
    for row in changed["rows"]:
        evaluation = evaluate.changed(row["experiment"].get("evaluation", {}), change)
        row["experiment"]["evaluation"] = evaluation.model_dump(mode="json")
        if not evaluation.tasks:
            raise UserError(
                f"{record['name']}: no tasks to score; name some: --tasks hellaswag,my_task"
            )
        if evaluation not in seen:
            evaluate.check(evaluation, fetch=True)
            seen.append(evaluation)
    return changed


def trained(root: Path, record: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Ids of the runs that are trained, and of those that are not."""
    done: list[str] = []
    others: list[str] = []
    for job in manifest.jobs(record):
        (done if Run(root, job.id).state == "done" else others).append(job.id)
    return done, others
