"""The command that makes a run of a row again, from the sweep's manifest.

    python run.py train gpt2-tiny training.tokens=1e6 model.ffn=swiglu --seed 0

As long as the sweep file says what it said when the sweep ran: the base, the file's `set:`, the
command line's overrides, what the row sets, and the width that was solved for it, in this order.
Without the file, the run's own resolved experiment is the base, and there is nothing to set.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.record import UserError
from experiments.yaml_text import read, scalar

PLAIN = re.compile(r"[A-Za-z_][\w./-]*")  # a word that needs no quotes wherever it stands


def train(
    record: Mapping[str, Any], row: Mapping[str, Any], root: Path, *, changed: bool = False
) -> str:
    """The command for the row's first seed.

    Args:
        record, row: the manifest and one of its rows, as written.
        root: where the sweep's runs lie.
        changed: the sweep file says something else by now.
    """
    seed, run = next(iter(row["runs"].items()), ("0", ""))
    own = (row.get("seeds") or {}).get(seed, seed)
    words = None if changed else _composed(record, row)
    if words is None:
        words = [str(root / run / "experiment.yaml")]
    return shlex.join(["python", "run.py", "train", *words, "--seed", str(own)])


def again(record: Mapping[str, Any]) -> str:
    """The command that runs the whole sweep again, or what it lacks."""
    return shlex.join(["python", "run.py", "sweep", str(record["file"]),
                       *map(str, record.get("overrides") or ())])  # fmt: skip


def _composed(record: Mapping[str, Any], row: Mapping[str, Any]) -> Sequence[str] | None:
    """The base and its overrides; None where the sweep file can't be read."""
    file = Path(str(record.get("file")))
    try:
        said = read(file).data
    except UserError:
        return None
    base = said.get("base")
    if not isinstance(base, str):
        return None
    beside = file.parent / base
    overrides = [f"{path}={flow(value)}" for path, value in _leaves(said.get("set") or {})]
    overrides += map(str, record.get("overrides") or ())
    changes = {**row["changes"], **(row.get("solved") or {})}
    overrides += [f"{path}={flow(value)}" for path, value in changes.items()]
    return [str(beside) if beside.is_file() else base, *overrides]


def _leaves(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """`set:` as dotted paths, the shorter first; its sections may be nested: training: {lr: …}."""
    found = []
    for key, value in settings.items():
        if isinstance(value, Mapping) and "." not in key:
            found += [(f"{key}.{inner}", each) for inner, each in value.items()]
        else:
            found.append((key, value))
    return sorted(found, key=lambda pair: pair[0].count("."))


def flow(value: Any) -> str:
    """A value as it stands after the `=`: `swiglu`, `{name: swiglu, bias: true}`, `0.001`."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{flow(key)}: {flow(each)}' for key, each in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(flow, value))}]"
    if isinstance(value, str) and PLAIN.fullmatch(value) and scalar(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)  # which YAML reads too
