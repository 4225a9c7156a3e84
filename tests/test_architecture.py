"""Which room may import which, and that asking how things stand needs no torch."""

from __future__ import annotations

import ast
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT

ROOMS = ("components", "experiments", "sweeps", "analysis", "run", "tests", "benchmarks")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "components": (),
    "experiments": ("components",),
    "sweeps": ("components", "experiments"),
    "analysis": (
        *("experiments.record", "experiments.scores", "experiments.yaml_text"),
        *("experiments.tracking", "experiments.mirror", "experiments.wandb_client"),
        "components.registry",  # did_you_mean
    ),
}


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import, those within functions and for type checkers too."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: write the whole path of the module"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_those_behind_it(room: str) -> None:
    allowed = (room, *MAY_IMPORT[room])
    wrong = [
        f"{file.relative_to(ROOT)}:{line}: {module}"
        for file in sorted((ROOT / room).rglob("*.py"))
        for line, module in imports(file)
        if module.split(".")[0] in ROOMS
        and not any(f"{module}.".startswith(f"{name}.") for name in allowed)
    ]
    assert not wrong


def test_analysis_names_torch_nowhere() -> None:
    named = [
        file.name
        for file in (ROOT / "analysis").rglob("*.py")
        for _, module in imports(file)
        if module.split(".")[0] in ("torch", "accelerate")
    ]
    assert not named


QUICK = [
    ("--help",),
    ("train", "--help"),
    ("status",),
    ("status", "--json"),
    ("table", "small"),
    ("table", "small", "--format", "latex"),
    ("report", "small"),
    ("ledger",),
    ("reproduce",),
    ("power", "small", "--detect", "0.01"),
    ("retry", "small", "--dry-run"),
    ("cancel", "small"),
]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_what_only_reads_the_record_needs_no_torch(words: tuple[str, ...], tmp_path: Path) -> None:
    write_sweep(tmp_path)
    code = (
        "import sys, run\n"
        f"sys.argv = ['run.py', *{words!r}]\n"
        "try:\n    run.main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "assert 'components.registry' in sys.modules\n"
        "heavy = {'torch', 'accelerate', 'datasets'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    env = {**os.environ, "CETERIS_RUNS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_text_is_read_and_written_as_utf8() -> None:
    rooms = [ROOT / room for room in (*MAY_IMPORT, "benchmarks")]
    wrong = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in [ROOT / "run.py", *itertools.chain(*(room.rglob("*.py") for room in rooms))]
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call) and depends_on_the_locale(call)
    ]
    assert not wrong, f"no encoding is given at {wrong}"


def depends_on_the_locale(call: ast.Call) -> bool:
    """Whether a call opens text, or reads that of another program, without naming its encoding."""
    named = {word.arg: word.value for word in call.keywords}
    if "encoding" in named:
        return False
    if any(ast.unparse(named.get(key, call)) == "True" for key in ("text", "universal_newlines")):
        return True
    function = ast.unparse(call.func)
    words = [*call.args, *named.values()]
    constants = [word.value for word in words if isinstance(word, ast.Constant)]
    modes = [mode for mode in constants if isinstance(mode, str) and {*mode} <= {*"rwxab+t"}]
    match function.rpartition(".")[2]:
        case "read_text" | "write_text":
            return "utf-8" not in constants
        case "open" | "fdopen":
            return function not in ("os.open", "gzip.open") and not any("b" in m for m in modes)
        case "NamedTemporaryFile" | "TemporaryFile":  # of bytes, where no mode is given
            return bool(words)
    return False


def write_sweep(root: Path) -> None:
    """A recorded sweep of two rows at two seeds, finished."""
    rows = []
    for label, loss in (("base", 4.0), ("other", 3.9)):
        runs = {str(seed): f"{label}-s{seed}" for seed in (0, 1)}
        for seed, name in runs.items():
            (root / name).mkdir(parents=True)
            result = {
                "schema": 1, "id": name, "status": "done", "seed": int(seed), "step": 10,
                "tokens": 1000, "val/loss": loss + 0.01 * int(seed), "val/bpb": 1.7,
                "tokens_per_s": 1e4, "flops_per_token": 6e6,
            }  # fmt: skip
            (root / name / "result.json").write_text(json.dumps(result))
            (root / name / "experiment.yaml").write_text("model: {}\n")
            measured = {"step": 10, "tokens": 1000, "val/loss": result["val/loss"]}
            (root / name / "metrics.jsonl").write_text(json.dumps(measured) + "\n")
        row = {"label": label, "group": "rows", "changes": {}, "runs": runs, "experiment": {}}
        rows.append(row | {"parameters": 10**6, "flops_per_token": 6e6, "mismatch": 0.0})
    manifest = {
        "schema": 1, "name": "small", "file": "small.yaml", "baseline": "base", "match": "params",
        "seeds": [0, 1], "tokens": 1000, "rows": rows,
    }  # fmt: skip
    (root / "sweeps").mkdir()
    (root / "sweeps" / "small.json").write_text(json.dumps(manifest))
