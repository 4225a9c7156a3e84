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
from sweeps import design, logs, manifest, plan
from tests.command_line import ceteris

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
    whole = {"schema": 1, "id": run.id, "status": "done", "seed": seed, **result}
    write_json(run / "result.json", whole)


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


def test_the_manifest_says_differences_and_seeds_of_a_rows_own(root: Path):
    Path("demo.yaml").write_text(
        "base: base.yaml\nseeds: [0, 1]\nrows:\n"
        "  - {label: again, seeds: [100, 101]}\n"
        "  - {label: fast, set: {training.lr: 3e-3}}\n"
    )
    sweep = design.load("demo.yaml")
    made = plan.plan(sweep, root)
    manifest.write(root, made.manifest)
    data = manifest.load(root, "demo")
    base, again, fast = data["rows"]
    assert [row["differences"] for row in data["rows"]] == [
        [], ["seeds: 100, 101"], ["training.lr: 0.001 → 0.003"]
    ]  # fmt: skip
    assert (base["seeds"], again["seeds"], fast["seeds"]) == ({}, {"0": 100, "1": 101}, {})
    jobs = {job.id: job for job in manifest.jobs(data)}
    assert [jobs[again["runs"][s]].seed for s in ("0", "1")] == [100, 101]
    for job in jobs.values():
        assert loader.run_id(manifest.experiment(job), job.seed) == job.id
    finish(root, sweep.variants[1], 101)
    assert plan.plan(sweep, root).rows[1].states == {0: "pending", 1: "done"}
    assert logs.chosen(root, data, "again", 101).id == again["runs"]["1"]
    with pytest.raises(UserError, match=r"no seed 7 \(seeds: 0, 1, 100, 101\)"):
        logs.chosen(root, data, "again", 7)


def test_a_manifest_of_before_there_were_seeds_of_a_rows_own_is_read(root: Path):
    made = plan.plan(design.load("demo.yaml"), root)
    old = json.loads(json.dumps(made.manifest))
    del old["file_digest"]
    for row in old["rows"]:
        del row["seeds"], row["differences"]
    manifest.write(root, old)
    data = manifest.load(root, "demo")
    assert [job.seed for job in manifest.jobs(data)] == [0] * 6 + [1] * 6
    Path("demo.yaml").write_text("base: base.yaml\nseeds: [0, 1, 2]\n")
    assert manifest.changed_since(root, "demo") is None  # nothing to tell it by


def test_a_sweep_file_that_says_something_else_than_when_it_ran_is_told(root: Path):
    record = plan.plan(design.load("demo.yaml"), root).manifest
    manifest.write(root, record)
    assert manifest.changed_since(root, "demo") is None
    Path("demo.yaml").write_text("# a comment\n" + SWEEP)
    assert manifest.changed_since(root, "demo") is None
    line = (
        "demo.yaml (or its base) has changed since 'demo' was run; this is what was run then, and "
        "python run.py sweep demo.yaml runs what it says now"
    )
    Path("demo.yaml").write_text(SWEEP.replace("3e-3", "2e-3"))
    assert manifest.changed_since(root, record) == line
    Path("demo.yaml").write_text("rows: [")
    assert manifest.changed_since(root, "demo") == line
    Path("demo.yaml").write_text(SWEEP)
    base = Path("base.yaml").read_text()
    Path("base.yaml").write_text(base.replace("lr: 1e-3", "lr: 2e-3"))
    assert manifest.changed_since(root, "demo") == line
    Path("base.yaml").write_text("base: base.yaml\n" + base)
    assert manifest.changed_since(root, "demo") == line
    Path("demo.yaml").unlink()
    assert manifest.changed_since(root, "demo") is None


def rendered(made: plan.Plan) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(plan.render(made))
    return out.getvalue()


def test_tries_are_folded_into_their_rows_and_all_of_them_counted(root: Path):
    Path("demo.yaml").write_text(
        "base: base.yaml\nseeds: [0, 1]\n"
        "rows:\n  - {label: A, set: {model.norm: rmsnorm}}\n"
        "  - {label: fixed, set: {training.lr: 7e-4}}\n"
        "tune: {over: training.lr, values: [3e-3, 3e-4, 1e-3]}\n"
    )
    made = plan.plan(design.load("demo.yaml"), root)
    assert [(row.try_of, row.tries) for row in made.rows[:3]] == [
        (None, (0.0003, 0.001, 0.003)),
        (None, (0.0003, 0.001, 0.003)),
        (None, ()),
    ]
    assert [row.try_of for row in made.rows[3:]] == ["baseline"] * 2 + ["A"] * 2
    text = rendered(made)
    assert text.count("3 tries of training.lr: 0.0003, 0.001, 0.003") == 2
    assert " @ " not in text
    assert text.count("6 pending") == 2
    assert text.count("2 pending") == 1
    assert "14 runs (3 rows and 4 more tries, x 2 seeds), 14 to do" in text


def test_a_fraction_states_cells_saved_resolution_and_aliases(root: Path):
    Path("demo.yaml").write_text(
        "base: base.yaml\nseeds: [0, 1]\nfraction: 1/2\n"
        "factorial: {model.norm: [rmsnorm], model.block: [post], model.ffn: [swiglu]}\n"
        "tune: {over: training.lr, values: [2e-3]}\n"
    )
    made = plan.plan(design.load("demo.yaml"), root)
    assert made.runs == 4 * 2 * 2
    assert made.notes[0].endswith("main effects are aliased with pairs; 16 runs saved")
    assert made.notes[1] == "  aliased: norm = block × ffn"
    assert made.notes[0] in rendered(made)


def test_a_best_try_at_the_edge_of_its_grid_comes_with_the_next_value():
    grid = (3e-4, 1e-3, 3e-3)
    assert plan.at_edges(
        [
            ("A", "training.lr", grid, "high"),
            ("B", "training.lr", grid, None),
            ("C", "training.lr", grid, "high"),
            ("D", "training.lr", grid, "low"),
            ("E", "model.dropout", (0.0, 0.1), "low"),
            ("F", "training.lr", (1e-3,), "low"),
        ]
    ) == [
        "best at the highest training.lr tried, 0.003: A, C; to look beyond it, add 0.009 to "
        "tune.values",
        "best at the lowest training.lr tried, 0.0003: D; to look beyond it, add 9e-05 to "
        "tune.values",
    ]  # below a dropout of 0 there is nothing


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


def test_plan_warns_of_a_design_that_can_find_nothing(root: Path):
    rows = "".join(f"  - {{label: r{i}, set: {{training.lr: {i + 2}e-3}}}}\n" for i in range(10))
    Path("demo.yaml").write_text(f"base: base.yaml\nseeds: [0, 1, 2]\nrows:\n{rows}")
    done = ceteris("plan", "demo.yaml", "--runs", root)
    assert done.code == 0
    assert "with 3 seeds and 10 comparisons nothing under " in done.err
    (warning,) = ceteris("plan", "demo.yaml", "--runs", root, "--json").json["warnings"]
    assert warning in done.err
    Path("demo.yaml").write_text(
        f"base: base.yaml\nseeds: {list(range(12))}\n"
        "rows: [{label: A, set: {training.lr: 1}}]\n"
    )
    assert ceteris("plan", "demo.yaml", "--runs", root, "--json").json["warnings"] == []


def test_plan_offers_to_look_beyond_a_grid_whose_best_is_at_its_edge(root: Path):
    Path("demo.yaml").write_text(
        f"base: base.yaml\nseeds: {list(range(10))}\n"
        "rows:\n  - {label: A, set: {model.norm: rmsnorm}}\n"
        "tune: {over: training.lr, values: [3e-3, 3e-4]}\n"
    )
    sweep = design.load("demo.yaml")
    warned = ceteris("plan", "demo.yaml", "--runs", root, "--json").json["warnings"]
    assert warned == []
    manifest.write(root, plan.plan(sweep, root).manifest)
    best = {"baseline": 1e-3, "A": 3e-3}
    for variant in sweep.variants:
        of = variant.tuned["of"] if variant.tuned else variant.label
        loss = 2 + abs(variant.experiment.training.lr - best[of])
        for seed in sweep.seeds:
            known = {"step": 1, "tokens": 20480, "val/loss": loss, "val/bpb": 1.0}
            finish(root, variant, seed, **known, **{"tuning/loss": loss})
    assert ceteris("plan", "demo.yaml", "--runs", root, "--json").json["warnings"] == [
        "best at the highest training.lr tried, 0.003: A; to look beyond it, add 0.009 to "
        "tune.values"
    ]
