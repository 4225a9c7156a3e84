"""The plan and the manifest: what would run, what is done, and what is stored of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.registry import UserError
from experiments import loader
from experiments.record import Run, write_json
from sweeps import design, manifest, plan

SWEEP = """\
base: base.yaml
baseline: {label: GPT-2}
seeds: [0, 1]
rows:
  - {label: RMSNorm, set: {model.norm: rmsnorm}}
  - {label: fast, set: {training.lr: 3e-3}}
ladder:
  - {label: +RoPE, set: {model.position: rotary}}
  - {label: +SwiGLU, set: {model.ffn: swiglu}}
leave_one_out: true
match: params
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where runs lie, beside a base experiment and a sweep."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(
        "model: {d_model: 64, n_layers: 1, n_heads: 4}\n"
        "training: {tokens: 20480, seq_len: 32, global_batch_size: 8, lr: 1e-3}\n"
    )
    Path("demo.yaml").write_text(SWEEP)
    return tmp_path / "runs"


def begin(root: Path, variant: design.Variant, seed: int) -> Run:
    run = Run(root, variant.run_id(seed))
    run.folder.mkdir(parents=True)
    (run / "experiment.yaml").write_text(loader.to_yaml(variant.experiment))
    return run


def finish(root: Path, variant: design.Variant, seed: int, **result: Any) -> None:
    run = begin(root, variant, seed)
    write_json(run / "result.json", {"schema": 1, "id": run.id, "status": "done", **result})


def test_plan_counts_each_run_once_and_knows_what_is_done(root: Path):
    sweep = design.load("demo.yaml")
    speed = {"flops_per_token": 1e6, "tokens_per_s": 1e3}
    finish(root, sweep.baseline, 0, **speed)
    finish(root, sweep.baseline, 1, flops_per_token=2e6, tokens_per_s=1e3)
    begin(root, sweep.variants[1], 0)
    write_json(begin(root, sweep.variants[1], 1) / "failure.json", {"schema": 1, "error": "x"})
    made = plan.plan(sweep, root)
    assert [row.label for row in made.rows] == [
        "GPT-2", "RMSNorm", "fast", "+RoPE", "+SwiGLU", "full − RoPE", "full − SwiGLU"
    ]  # fmt: skip
    assert made.rows[0].states == {0: "done", 1: "done"}
    assert made.rows[1].states == {0: "interrupted", 1: "failed"}
    assert made.rows[2].states == {0: "pending", 1: "pending"}
    assert (made.runs, made.missing) == (6 * 2, 5 * 2)  # full − SwiGLU is the ladder's +RoPE
    tokens = 20480
    costs = {row.label: row.flops_per_token * tokens for row in made.rows[:6]}
    assert made.flops == pytest.approx(2 * sum(costs.values()))
    assert made.missing_flops == pytest.approx(made.flops - 2 * costs["GPT-2"])
    assert made.seconds == pytest.approx(made.missing_flops / 1.5e9)


def test_time_is_unknown_until_a_run_has_finished(root: Path):
    made = plan.plan(design.load("demo.yaml"), root)
    assert made.seconds is None
    assert plan.totals(made).endswith("; time unknown until a run has finished")
    assert not root.exists()  # a plan writes nothing


def test_plan_shows_rows_as_differences_from_the_base(root: Path):
    Path("demo.yaml").write_text(
        "base: base.yaml\nset: {model.norm: {name: layernorm, eps: 1e-3}}\nrows:\n"
        "  - {label: A, set: {model.norm: {name: rmsnorm, eps: 1e-4}, training.tokens: 40960}}\n"
        "  - {label: B, set: {model.norm: {name: layernorm, eps: 1e-4}, model.max_seq_len: 64}}\n"
    )
    made = plan.plan(design.load("demo.yaml"), root)
    assert [row.differences for row in made.rows] == [
        (),
        ("model.norm: layernorm → rmsnorm(eps=0.0001)", "training.tokens: 20480 → 40960"),
        (
            "model.norm: layernorm(eps=0.001) → layernorm(eps=0.0001)",
            "model.max_seq_len: 64",
        ),
    ]


def test_rendered_plan_shows_every_row_and_json_is_plain(root: Path):
    made = plan.plan(design.load("demo.yaml"), root)
    out = io.StringIO()
    Console(file=out, width=120).print(plan.render(made))
    text = out.getvalue()
    for row in made.rows:
        assert row.label in text
    assert "learned → rotary" in text
    assert "2 pending" in text
    assert "12 runs (7 rows x 2 seeds), 12 to do" in text
    data = json.loads(json.dumps(made.as_json()))
    assert data["rows"][1]["states"] == {"0": "pending", "1": "pending"}
    assert data["rows"][1]["differences"] == [
        "model.norm: layernorm → rmsnorm",
        "model.norm.eps: 1e-05 → 1e-06 (by default)",  # both norms have one, with other defaults
    ]
    assert (data["runs"], data["seconds"]) == (12, None)


def test_a_default_changed_under_a_stored_run_is_an_error_with_both_values(root: Path):
    sweep = design.load("demo.yaml")
    run = begin(root, sweep.variants[1], 1)
    path = run / "experiment.yaml"
    path.write_text(path.read_text().replace("grad_clip: 1.0", "grad_clip: 0.5"))
    with pytest.raises(UserError) as caught:
        plan.plan(sweep, root)
    assert str(caught.value) == (
        f"runs/{run.id}/experiment.yaml: 'RMSNorm' has this run's id, but a default has changed "
        "since: training.grad_clip: stored 0.5, now 1.0; write the stored value into the "
        "experiment, or delete the run"
    )


def test_the_manifest_is_enough_to_run_a_sweep_whose_files_are_gone(root: Path):
    sweep = design.load("demo.yaml", ["execution.threads=1"])
    made = plan.plan(sweep, root)
    path = manifest.write(root, made.manifest)
    assert path == root / "sweeps" / "demo.json"
    for file in ("demo.yaml", "base.yaml"):
        Path(file).unlink()
    data = manifest.load(root, "demo")
    assert data == made.manifest == manifest.load(root, "some/demo.yaml")
    assert data["baseline"] == data["rows"][0]["label"] == "GPT-2"
    jobs = list(manifest.jobs(data))
    assert [job.seed for job in jobs] == [0] * 6 + [1] * 6  # whole tables first, each run once
    for job in jobs:
        experiment = manifest.experiment(job)
        assert loader.run_id(experiment, job.seed) == job.id
        assert experiment.execution.threads == 1


def test_the_manifest_holds_solved_widths_levels_and_tries(root: Path):
    Path("demo.yaml").write_text(
        "base: base.yaml\nmatch: params\nfactorial: {model.mixer: [lstm]}\n"
        "tune: {over: training.lr, values: [1e-3, 2e-3]}\n"
    )
    rows = plan.plan(design.load("demo.yaml"), root).manifest["rows"]
    assert [row["levels"] for row in rows[:2]] == [
        {"model.mixer": "attention"},
        {"model.mixer": "lstm"},
    ]
    assert set(rows[1]["solved"]) == {"model.ffn.hidden"}
    assert rows[3]["tuned"] == {"of": "mixer=lstm", "path": "training.lr", "value": 0.002}
    assert rows[3]["solved"] == rows[1]["solved"]


def test_two_sweep_files_of_one_name_do_not_overwrite_each_other(root: Path):
    manifest.write(root, plan.plan(design.load("demo.yaml"), root).manifest)
    Path("other").mkdir()
    Path("other/demo.yaml").write_text("base: ../base.yaml\nseeds: [0, 1]\n")
    other = plan.plan(design.load("other/demo.yaml"), root).manifest
    with pytest.raises(UserError, match=r"the sweep 'demo' is demo\.yaml, not other/demo\.yaml"):
        manifest.write(root, other)
    Path("demo.yaml").unlink()  # moved away: the name is free
    manifest.write(root, other)
    assert manifest.load(root, "demo")["file"] == "other/demo.yaml"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"demo\.json: can't be read"),
        ("[]", r"demo\.json: holds list"),
        ("{}", r"demo\.json: schema is None, this version reads 1; write it anew with"),
        ('{"schema": 1}', r"demo\.json: name is missing; write it anew with"),
        ('{"schema": 1, "rows": []}', r"demo\.json: has no rows"),
        ('{"schema": 1, "rows": [3]}', r"demo\.json: row 1: is int, not a mapping"),
        ('{"schema": 1, "rows": [{"label": "A"}]}', r"demo\.json: row 1: group is missing"),
        (
            '{"schema": 1, "rows": [{"label": "A", "group": "rows", "changes": {}, '
            '"experiment": {}, "runs": {"0": "../x"}}]}',
            r"row 1: runs: '0': '\.\./x' is not a seed and a run's id",
        ),
    ],
)
def test_damaged_and_foreign_manifests_are_named(root: Path, text: str, message: str):
    path = root / "sweeps" / "demo.json"
    path.parent.mkdir(parents=True)
    if "rows" in text:
        whole = {"name": "demo", "file": "f", "baseline": "A", "seeds": [0], "tokens": 1}
        text = json.dumps({**whole, **json.loads(text)})
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        manifest.load(root, "demo")


def test_a_missing_manifest_suggests_a_near_name(root: Path):
    manifest.write(root, plan.plan(design.load("demo.yaml"), root).manifest)
    with pytest.raises(UserError, match=r"no sweep 'dmo' in .* — did you mean 'demo'\?"):
        manifest.load(root, "dmo")


def test_reading_a_manifest_needs_no_torch(root: Path):
    manifest.write(root, plan.plan(design.load("demo.yaml"), root).manifest)
    code = (
        "import sys; from pathlib import Path; from sweeps import manifest\n"
        f"data = manifest.load(Path({str(root)!r}), 'demo')\n"
        "print(len(list(manifest.jobs(data))), 'torch' in sys.modules)"
    )
    repository = Path(manifest.__file__).parents[1]
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True
    )
    assert out.stdout.split() == ["12", "False"]
