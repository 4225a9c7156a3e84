"""A run's id is its science: all of it, nothing else, however it is written."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pydantic
import pytest

from components import registry
from components.registry import Closed, Slot, Spec
from experiments import loader
from experiments.schema import Experiment
from experiments.yaml_text import ConfigError, Located

GOOD = """\
model:
  d_model: 64
  n_layers: 2
  n_heads: 4
training:
  tokens: 1000000
  seq_len: 128
  global_batch_size: 8
  lr: 0.001
"""
GOLDEN = "64d849cd71-s0"  # changes only if every id that people have stored may change


def experiment(text: str = GOOD, *overrides: str, folder: Path | None = None) -> Experiment:
    located = loader.parse(text, "x.yaml")
    loader.apply_overrides(located, overrides)
    return loader.validate(located)


def run_id(text: str = GOOD, *overrides: str) -> str:
    return loader.run_id(experiment(text, *overrides), 0)


# --- every field counts -------------------------------------------------------------------------


def others(value: Any) -> list[Any]:
    """Values to try in place of `value`, of any type: the schema says which of them are good."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value * 2 + 1, value * 4, value / 2, 0.123, 0.25, value + 2]
    if isinstance(value, list):
        longer = [v + 1 for v in value if isinstance(v, int)]
        return [
            [v * 0.99 for v in value if isinstance(v, float)],
            ["dedup"],
            ["b.txt"],
            longer,
            [9],
        ]
    choices = ["cpu", "bf16", "tanh", "none", "relu", "rmsnorm", "offline"]
    if isinstance(value, str):
        return [f"{value}x", *choices]
    return [1, 512, 0.5, True, "other", "offline"]


def fields(model: type[Closed], path: str = "", science: bool = True) -> Iterator[tuple[str, bool]]:
    """Every leaf of the experiment's schema, and whether it is science; slots are leaves."""
    for name, info in model.model_fields.items():
        counts = science and not loader.is_execution(info)
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, Closed):
            yield from fields(inner, f"{path}{name}.", counts)
        else:
            yield f"{path}{name}", counts


FIELDS = dict(fields(Experiment))
assert FIELDS.pop("imports") is False  # files; what they register is in the id by its name
NEEDS = {"text": {"files": "a.txt"}, "huggingface": {"path": "a"}}  # parameters without default
PARAMETERS = [
    (entry.kind, entry.name, parameter)
    for entry in registry.entries()
    if ":" not in entry.name
    for parameter in entry.schema.model_fields
]


def variations(data: dict[str, Any], path: str, value: Any) -> Iterator[Experiment]:
    """Experiments like `data` but for another value at `path`."""
    for other in others(value):
        if other != value:
            with contextlib.suppress(ConfigError):
                yield loader.validate(changed(data, path, other))


def test_the_walk_finds_the_whole_schema() -> None:
    resolved = loader.resolved(experiment())
    for path in FIELDS:
        holder = resolved
        for key in path.split("."):
            holder = holder[key]
    sections = {path.split(".")[0] for path in FIELDS}
    assert sections == set(resolved) - {"imports"}
    assert len(FIELDS) > 30
    assert len(PARAMETERS) > 40


@pytest.mark.parametrize(("path", "science"), FIELDS.items(), ids=FIELDS)
def test_every_field_changes_the_id_or_is_declared_execution(path: str, science: bool) -> None:
    base = experiment()
    data = loader.resolved(base)
    value: Any = data
    for key in path.split("."):
        value = value[key]
    if isinstance(value, dict):  # a slot: any other component of its kind
        kind = path.rsplit(".", 1)[1]
        names = [n for n in registry.names(kind) if n != value["name"]]
        if not names:
            pytest.skip("the only one of its kind")
        found = []
        for name in names:
            with contextlib.suppress(ConfigError):  # an lstm has no heads
                found.append(
                    loader.validate(changed(data, path, {"name": name, **NEEDS.get(name, {})}))
                )
    else:
        found = list(variations(data, path, value))
    assert found, f"no other value of {path} was accepted; teach `others` one"
    for other in found:
        assert other != base
        assert (loader.run_id(other, 0) != loader.run_id(base, 0)) is science


def changed(data: dict[str, Any], path: str, value: Any) -> Located:
    located = Located(json.loads(json.dumps(data)))
    loader.set_path(located, path, value, loader.Mark("test"))
    return located


def place(kind: str, name: str, params: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """An experiment that uses the component, and the path where it stands."""
    data = loader.resolved(experiment())
    path = {"filter": "data.filters", "activation": "model.ffn.activation"}.get(kind)
    if path is None:
        path = next(f for f in FIELDS if f.rsplit(".", 1)[-1] == kind)
    spec = {"name": name, **params}
    if kind == "corpus":  # whose documents then fit in windows of any length
        data = changed(data, "data.tokenizer", "bpe").data
    return changed(data, path, [spec] if kind == "filter" else spec).data, path


@pytest.mark.parametrize(("kind", "name", "parameter"), PARAMETERS)
def test_every_parameter_of_every_component_changes_the_id(
    kind: str, name: str, parameter: str
) -> None:
    data, path = place(kind, name, NEEDS.get(name, {}) if kind in ("corpus", "tokenizer") else {})
    base = loader.validate(Located(data))
    info = registry.get(kind, name).schema.model_fields[parameter]
    default = registry.plain_value(info.default) if not info.is_required() else "a.txt"
    item = f"{path}.{parameter}"
    if kind == "filter":
        found = [
            loader.validate(changed(data, path, [{"name": name, parameter: other}]))
            for other in others(default)[:1]
        ]
    else:
        found = list(variations(data, item, default))
    assert found, f"no other value of {kind} {name}.{parameter} was accepted"
    for other in found:
        same = loader.run_id(other, 0) == loader.run_id(base, 0)
        assert same is registry.is_place(info)  # where text lies decides nothing


# --- the same science is the same id ------------------------------------------------------------

SAME = {
    "flow style and another order": "training: {lr: 1e-3, global_batch_size: 8, seq_len: 128, "
    "tokens: 1e6}\nmodel: {n_heads: 4, n_layers: 2, d_model: 64}\n",
    "floats for counts": GOOD.replace("1000000", "1e6").replace("64", "64.0"),
    "other digits": GOOD.replace("1000000", "1_000_000").replace("0.001", "1.0e-3"),
    "comments and quotes": "# mine\n" + GOOD.replace("training:", '"training": # how'),
    "anchors": GOOD.replace("n_layers: 2", "n_layers: &two 2") + "data: {split_seed: 0}\n",
    "a default": GOOD + "data: {corpus: python_docs, validation_fraction: 0.05}\n",
    "a default of a default component": GOOD.replace(
        "model:\n", "model:\n  norm: {name: layernorm, eps: 1.0e-5}\n"
    ),
    "a component as a mapping": GOOD.replace("model:\n", "model:\n  norm: {name: layernorm}\n"),
    "a nested component as a mapping": GOOD.replace(
        "model:\n", "model:\n  ffn: {name: mlp, activation: {name: gelu, approximate: tanh}}\n"
    ),
    "an empty section": GOOD + "evaluation: {}\n",
    "execution and words": GOOD + "execution: {compile: true, device: cpu}\ndescription: mine\n",
}


@pytest.mark.parametrize("text", SAME.values(), ids=SAME)
def test_another_spelling_is_the_same_run(text: str) -> None:
    assert run_id(text) == GOLDEN


def test_another_file_base_chain_or_command_line_is_the_same_run(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD.replace("64", "32").replace("0.001", "5"))
    (tmp_path / "b.yaml").write_text("base: a.yaml\nmodel: {d_model: 64, norm: rmsnorm}\n")
    (tmp_path / "c.yaml").write_text("base: b.yaml\nmodel: {norm: layernorm}\n")
    e = loader.load(tmp_path / "c.yaml", ["training.lr=1e-3"])
    assert loader.run_id(e, 0) == GOLDEN


def test_the_seed_is_the_ids_ending_and_nothing_else_of_it() -> None:
    assert loader.run_id(experiment(), 17) == GOLDEN.removesuffix("0") + "17"


def test_the_id_is_the_same_in_every_process_and_the_golden_one() -> None:
    code = (
        "import sys; from experiments import loader;"
        "e = loader.validate(loader.parse(sys.stdin.read(), 'x'));"
        "print(loader.run_id(e, 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=GOOD, capture_output=True, text=True, check=True,
        cwd=Path(loader.__file__).parent.parent,
        env={**os.environ, "PYTHONHASHSEED": "12345"},
    )  # fmt: skip
    assert done.stdout.strip() == run_id() == GOLDEN


# --- schemas that grow ----------------------------------------------------------------------------


def grow(monkeypatch: pytest.MonkeyPatch, kind: str, name: str, **new: Any) -> None:
    """Gives a registered component further parameters, or others of their defaults."""
    entry = registry.get(kind, name)
    schema: type[Closed] = pydantic.create_model("Grown", __base__=entry.schema, **new)
    monkeypatch.setitem(entry.__dict__, "schema", schema)


def test_a_new_parameter_with_a_default_leaves_every_id_as_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = run_id(GOOD, "model.norm.eps=1e-3")
    stored = loader.resolved(experiment(GOOD, "model.norm.eps=1e-3"))
    grow(monkeypatch, "norm", "layernorm", gain=(float, 1.0))
    gate = (Annotated[Spec, Slot("activation")], pydantic.Field("relu", validate_default=True))
    grow(monkeypatch, "ffn", "mlp", gate=gate)
    now = experiment(GOOD, "model.norm.eps=1e-3")
    assert now.model.norm.params["gain"] == 1.0
    assert loader.run_id(now, 0) == before
    assert loader.changed_defaults(now, stored) == []
    assert run_id(GOOD, "model.norm.eps=1e-3", "model.norm.gain=2") != before


def test_a_changed_default_is_told_with_both_values(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = loader.resolved(experiment())
    assert loader.changed_defaults(experiment(), stored) == []
    grow(monkeypatch, "norm", "layernorm", eps=(float, 1e-6))
    now = experiment()
    assert loader.run_id(now, 0) == GOLDEN
    assert loader.changed_defaults(now, stored) == ["model.norm.eps: stored 1e-05, now 1e-06"]


def test_a_change_of_execution_alone_is_no_changed_default() -> None:
    stored = loader.resolved(experiment(GOOD, "execution.device=cpu", "description=old"))
    assert loader.changed_defaults(experiment(GOOD, "execution.threads=1"), stored) == []
