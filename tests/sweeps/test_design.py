"""What a sweep file expands to, and what is said of a wrong one."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments import loader
from experiments.yaml_text import ConfigError
from sweeps import design

BASE = """\
model: {d_model: 64, n_layers: 2, n_heads: 4}
training: {tokens: 20480, seq_len: 64, global_batch_size: 8, lr: 1e-3}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base experiment, where paths in messages are relative to."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    return tmp_path


def load(text: str, *overrides: str) -> design.Sweep:
    Path("sweep.yaml").write_text("base: base.yaml\n" + text)
    return design.load("sweep.yaml", overrides)


def labels(sweep: design.Sweep, group: str | None = None) -> list[str]:
    return [v.label for v in sweep.variants if group in (None, v.group)]


def complaints(text: str, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return list(caught.value.lines)


# --- what it expands to ---------------------------------------------------------------------------


def test_rows_change_the_base_one_at_a_time_and_the_baseline_comes_first():
    sweep = load(
        "baseline: {label: GPT-2}\n"
        "rows:\n"
        "  - {label: RMSNorm, set: {model.norm: rmsnorm}}\n"
        "  - {label: SwiGLU, set: {model: {ffn: swiglu}}}\n"
    )
    assert labels(sweep) == ["GPT-2", "RMSNorm", "SwiGLU"]
    assert sweep.baseline.experiment == sweep.base
    assert [dict(v.changes) for v in sweep.variants] == [
        {},
        {"model.norm": "rmsnorm"},
        {"model.ffn": "swiglu"},  # nested sections and dotted paths say the same
    ]
    last = sweep.variants[2].experiment.model
    assert (last.norm.name, last.ffn.name, last.d_model) == ("layernorm", "swiglu", 64)


def test_ladder_keeps_the_steps_above_and_leave_one_out_goes_back_from_its_last():
    sweep = load(
        "ladder:\n"
        "  - {label: +RMSNorm, set: {model.norm: rmsnorm}}\n"
        "  - {label: +RoPE, set: {model.position: rotary}}\n"
        "  - {label: +SwiGLU, set: {model.ffn: swiglu}}\n"
        "leave_one_out: true\n"
    )
    assert [list(v.changes.values()) for v in sweep.variants if v.group == "ladder"] == [
        ["rmsnorm"],
        ["rmsnorm", "rotary"],
        ["rmsnorm", "rotary", "swiglu"],
    ]
    assert {v.label: list(v.changes.values()) for v in sweep.variants[4:]} == {
        "full − RMSNorm": ["rotary", "swiglu"],
        "full − RoPE": ["rmsnorm", "swiglu"],
        "full − SwiGLU": ["rmsnorm", "rotary"],
    }
    assert sweep.variants[6].run_id(0) == sweep.variants[2].run_id(0)  # one run, two rows


def test_leave_one_out_without_a_ladder_takes_all_rows_together():
    sweep = load(
        "rows:\n"
        "  - {label: RMSNorm, set: {model.norm: rmsnorm}}\n"
        "  - {label: RoPE, set: {model.position: rotary}}\n"
        "  - {label: SwiGLU, set: {model.ffn: swiglu}}\n"
        "leave_one_out: true\n"
    )
    assert labels(sweep, "leave_one_out") == [
        "full",
        "full − RMSNorm",
        "full − RoPE",
        "full − SwiGLU",
    ]
    assert len(sweep.variants[4].changes) == 3


def test_factorial_crosses_every_level_with_the_bases_own_and_the_baseline_is_one_cell():
    sweep = load("factorial: {model.norm: [rmsnorm, none], model.block: [pre, parallel]}\n")
    assert len(sweep.variants) == 3 * 2
    cells = [tuple((v.levels or {}).values()) for v in sweep.variants]
    assert sorted(cells) == sorted(
        itertools.product(["layernorm", "rmsnorm", "none"], ["pre", "parallel"])
    )
    assert cells[0] == ("layernorm", "pre")
    assert labels(sweep)[1] == "norm=layernorm, block=parallel"


def test_grid_is_a_product_zip_goes_side_by_side_and_exclude_drops():
    sweep = load(
        "grid: {training.lr: [1e-3, 3e-3], model.dropout: [0.0, 0.1, 0.2]}\n"
        "zip: {model.d_model: [32, 96], model.n_layers: [1, 3]}\n"
        "include: [{label: big, set: {model.d_model: 128}}]\n"
        "exclude: [{training.lr: 3e-3, model.dropout: 0.2}]\n"
    )
    assert labels(sweep, "grid") == [  # but for the baseline's own cell and the one excluded
        "lr=0.001, dropout=0.1",
        "lr=0.001, dropout=0.2",
        "lr=0.003, dropout=0.0",
        "lr=0.003, dropout=0.1",
    ]
    assert labels(sweep, "zip") == ["d_model=32, n_layers=1", "d_model=96, n_layers=3"]
    assert labels(sweep, "include") == ["big"]


def test_exclude_may_drop_a_combination_that_is_no_experiment_and_knows_defaults():
    sweep = load(
        "grid: {model.d_model: [64, 66], model.n_heads: [4, 2], model.norm: [rmsnorm]}\n"
        "exclude: [{model.d_model: 66, model.n_heads: 4}, {model.n_heads: 2, model.ffn: mlp}]\n"
    )
    assert labels(sweep, "grid") == ["d_model=64, n_heads=4, norm=rmsnorm"]


def test_tune_tries_each_row_at_each_value_and_counts_its_own_value_as_a_try():
    sweep = load(
        "rows:\n"
        "  - {label: A, set: {model.norm: rmsnorm}}\n"
        "  - {label: B, set: {training.lr: 5e-3}}\n"
        "tune: {over: training.lr, values: [1e-3, 3e-3]}\n"
    )
    assert labels(sweep, "tune") == ["baseline @ lr=0.003", "A @ lr=0.003"]
    assert sweep.variants[-1].tuned == {"of": "A", "path": "training.lr", "value": 0.003}
    assert sweep.variants[-1].experiment.training.lr == 0.003
    assert sweep.variants[-1].experiment.model.norm.name == "rmsnorm"


def test_a_row_may_stand_again_at_seeds_of_its_own_and_so_do_its_tries():
    sweep = load(
        "seeds: [0, 1]\n"
        "rows: [{label: again, seeds: [100, 101]}]\n"
        "include: [{label: RMSNorm, set: {model.norm: rmsnorm}, seeds: [7, 8]}]\n"
        "tune: {over: training.lr, values: [2e-3]}\n"
    )
    again, rmsnorm = sweep.variants[1:3]
    assert again.identity == sweep.baseline.identity
    assert sweep.runs(again) == {0: again.run_id(100), 1: again.run_id(101)}
    assert sweep.runs(rmsnorm) == {0: rmsnorm.run_id(7), 1: rmsnorm.run_id(8)}
    assert sweep.runs(sweep.baseline) == {s: sweep.baseline.run_id(s) for s in (0, 1)}
    assert {v.label: v.seeds for v in sweep.variants if v.tuned} == {
        "baseline @ lr=0.002": (),
        "again @ lr=0.002": (100, 101),
        "RMSNorm @ lr=0.002": (7, 8),
    }
    runs = [run for v in sweep.variants for run in sweep.runs(v).values()]
    assert len(set(runs)) == len(runs) == 6 * 2


def test_a_fraction_has_the_baselines_cell_and_a_balanced_half_of_the_others():
    sweep = load(
        "factorial: {model.norm: [rmsnorm], model.block: [pre, post], model.ffn: [swiglu]}\n"
        "fraction: 1/2\n"
    )
    cells = [tuple((v.levels or {}).values()) for v in sweep.variants]
    assert cells == [
        ("layernorm", "pre", "mlp"),
        ("layernorm", "post", "swiglu"),
        ("rmsnorm", "pre", "swiglu"),
        ("rmsnorm", "post", "mlp"),
    ]
    assert sweep.fraction is not None
    assert sweep.fraction.aliases[0] == ("norm", "block × ffn")


def test_a_component_is_replaced_whole_and_a_longer_path_changes_one_parameter():
    sweep = load(
        "set: {model.ffn: {name: mlp, hidden: 100, bias: true}}\n"
        "rows:\n"
        "  - {label: SwiGLU, set: {model.ffn: swiglu}}\n"
        "  - {label: no bias, set: {model.ffn.bias: false}}\n"
        "  - {label: both, set: {model.norm.eps: 1e-3, model.norm: rmsnorm}}\n"
    )
    assert [v.experiment.model.ffn.params["hidden"] for v in sweep.variants] == [
        100,
        None,
        100,
        100,
    ]
    assert [v.experiment.model.ffn.params["bias"] for v in sweep.variants] == [
        True,
        False,
        False,
        True,
    ]
    assert sweep.variants[3].experiment.model.norm.dump() == {"name": "rmsnorm", "eps": 1e-3}


def test_set_and_the_command_line_change_every_row_and_baseline_set_only_the_baseline():
    sweep = load(
        "set: {training.tokens: 10240}\n"
        "baseline: {label: post-LN, set: {model.block: post}}\n"
        "rows: [{label: the base}, {label: RMSNorm, set: {model.norm: rmsnorm}}]\n",
        "execution.threads=1",
        "training.lr=2e-3",
    )
    for variant in sweep.variants:
        training = variant.experiment.training
        assert (training.tokens, training.lr) == (10240, 0.002)
        assert variant.experiment.execution.threads == 1
    assert [v.experiment.model.block.name for v in sweep.variants] == ["post", "pre", "pre"]


def test_base_is_found_beside_the_sweep_file_and_its_imports_work(folder: Path):
    Path("parts.py").write_text(
        "from components.registry import register\n"
        "from components.norm import RMSNorm\n"
        '@register("norm", "sweep_test_norm")\n'
        "class Mine(RMSNorm):\n    '''Mine.'''\n"
    )
    Path("base.yaml").write_text("imports: [parts.py]\n" + BASE)
    sub = folder / "sub"
    sub.mkdir()
    (sub / "s.yaml").write_text(
        "base: ../base.yaml\nrows: [{label: mine, set: {model.norm: sweep_test_norm}}]\n"
    )
    sweep = design.load(sub / "s.yaml")
    assert sweep.variants[1].experiment.model.norm.name == "sweep_test_norm"
    assert sweep.name == "s"


AXES: dict[str, list[Any]] = {
    "model.norm": ["rmsnorm", "none", "dyt"],
    "model.dropout": [0.1, 0.2],
    "training.lr": [1e-4, 2e-4, 3e-4],
    "model.tie_embeddings": [False],
}


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4, unique=True),
    axes=st.lists(st.sampled_from(sorted(AXES)), min_size=1, max_size=3, unique=True),
    kind=st.sampled_from(["grid", "factorial"]),
)
def test_seeds_are_never_a_row_and_every_combination_is_one(
    seeds: list[int], axes: list[str], kind: str
):
    crossed = {path: AXES[path] for path in axes}
    sweep = load(f"seeds: {seeds}\n{kind}: {crossed}\nmax_runs: 2000\n".replace("'", '"').lower())
    expected = 1
    for values in crossed.values():
        expected *= len(values) + (kind == "factorial")
    assert len(sweep.variants) == expected + (kind == "grid")
    assert sweep.seeds == tuple(seeds)
    ids = Counter(v.run_id(seed) for v in sweep.variants for seed in seeds)
    assert len(ids) == len(sweep.variants) * len(seeds)
    assert len({v.label for v in sweep.variants}) == len(sweep.variants)


# --- what is said of a wrong one ------------------------------------------------------------------

TRAINING = (
    "(known: global_batch_size, grad_clip, lr, objective, optimizer, precision, schedule, "
    "seq_len, tokens)"
)
WRONG = {
    "typos in paths, values and components, each at its own line": (
        "rows:\n"
        "  - {label: A, set: {training.lrr: 1}}\n"
        "  - {label: B, set: {model.ffn.hiden: 3, model.tie_embeddings: 1}}\n"
        "  - {label: C, set: {model.position: rotery, training.lr: -1}}\n",
        [
            f"sweep.yaml:3:22: training.lrr: unknown key 'lrr' — did you mean 'lr'? {TRAINING}",
            "sweep.yaml:4:22: model.ffn.hiden: unknown key 'hiden' — did you mean 'hidden'? "
            "(known: name, hidden, activation, bias, multiple_of)",
            "sweep.yaml:4:42: model.tie_embeddings: should be true or false, got 1",
            "sweep.yaml:5:22: model.position: unknown position 'rotery' — did you mean 'rotary'? "
            "(known: alibi, learned, none, rotary, sinusoidal, t5)",
            "sweep.yaml:5:46: training.lr: should be greater than 0, got -1",
        ],
    ),
    "an unknown section": (
        "rows: [{label: A, set: {trainin.lr: 1}}]\n",
        [
            "sweep.yaml:2:25: trainin: unknown key 'trainin' — did you mean 'training'? (known: "
            "base, data, description, evaluation, execution, imports, model, tracking, training)"
        ],
    ),
    "a wrong axis is told once, not once per value": (
        "grid: {training.lrr: [1, 2, 3]}\n",
        [f"sweep.yaml:2:8: training.lrr: unknown key 'lrr' — did you mean 'lr'? {TRAINING}"],
    ),
    "what a row does to the base names the row": (
        "rows: [{label: wide, set: {model.d_model: 66}}]\n",
        [
            "sweep.yaml:2:9: 'wide': base.yaml:1:35: model.n_heads: n_heads 4 does not divide "
            "d_model 66"
        ],
    ),
    "a label used twice": (
        "rows:\n"
        "  - {label: A, set: {model.norm: rmsnorm}}\n"
        "  - {label: A, set: {model.norm: none}}\n"
        "  - {label: baseline, set: {model.block: post}}\n",
        [
            "sweep.yaml:4:6: the label 'A' is used twice (first: line 3); give one of them another",
            "sweep.yaml:5:6: the label 'baseline' is used twice (first: baseline); "
            "give one of them another",
        ],
    ),
    "the same experiment twice, or nothing changed": (
        "rows:\n"
        "  - {label: A, set: {model.norm: rmsnorm}}\n"
        "  - {label: B, set: {model.norm: {name: rmsnorm}}}\n"
        "  - {label: C, set: {execution.threads: 1}}\n"
        "  - {label: D, set: {model.norm: layernorm}}\n",
        [
            "sweep.yaml:4:6: 'B' is the same experiment as 'A' (line 3); remove one of them",
            "sweep.yaml:5:6: 'C' changes nothing: it is the same experiment as 'baseline' "
            "(execution settings do not count); set something else, or remove it",
            "sweep.yaml:6:6: 'D' changes nothing: it is the same experiment as 'baseline'; "
            "set something else, or remove it",
        ],
    ),
    "a ladder's step that changes nothing": (
        "ladder:\n"
        "  - {label: A, set: {model.norm: rmsnorm}}\n"
        "  - {label: B, set: {model.norm: rmsnorm}}\n",
        [
            "sweep.yaml:4:6: 'B' changes nothing: it is the same experiment as 'A'; "
            "set something else, or remove it"
        ],
    ),
    "steps that undo one another can't be left out": (
        "ladder:\n"
        "  - {label: A, set: {model.norm: rmsnorm}}\n"
        "  - {label: B, set: {model.norm: none}}\n"
        "leave_one_out: true\n",
        [
            "sweep.yaml:5:1: leave_one_out: 'full − A' is still 'B', since another step sets the "
            "same; give each step a path of its own"
        ],
    ),
    "lists, seeds and steps that do not fit": (
        "seeds: [0, 1, 1]\n"
        "leave_one_out: true\n"
        "zip: {training.lr: [1e-3], model.dropout: [0.1, 0.2]}\n",
        [
            "sweep.yaml:2:15: seeds: 1 is given twice",
            "sweep.yaml:4:1: zip: lists side by side need one length: training.lr has 1, "
            "model.dropout has 2",
            "sweep.yaml:3:1: leave_one_out: needs two or more steps in ladder (or rows) to leave "
            "one out of, got 0",
        ],
    ),
    "its own words, all at once": (
        "seeds: [-1]\n"
        "rows: [{lable: A, set: [1]}]\n"
        "grid: {training.lr: 3}\n"
        "match: param\n"
        "leave_one_out: maybe\n",
        [
            "sweep.yaml:2:9: seeds.0: should be at least 0, got -1",
            "sweep.yaml:3:8: rows.0.label: is missing; give it a value",
            "sweep.yaml:3:9: rows.0.lable: unknown key 'lable' — did you mean 'label'? "
            "(known: label, set, seeds)",
            "sweep.yaml:3:19: rows.0.set: should be a mapping, got [1]",
            "sweep.yaml:4:8: grid.training.lr: should be a list, got 3",
            "sweep.yaml:5:1: match: should be 'params', 'flops' or 'time', got 'param'",
            "sweep.yaml:6:1: leave_one_out: should be true or false, got 'maybe'",
        ],
    ),
    "nothing to compare": (
        "description: empty\n",
        [
            "sweep.yaml:1:1: nothing to compare: add rows, ladder, factorial, grid, zip or include "
            "(or seeds, two or more, to measure the noise of the baseline alone)"
        ],
    ),
    "seeds of a row that do not fit the sweep's": (
        "seeds: [0, 1]\n"
        "rows:\n"
        "  - {label: A, seeds: [1, 100]}\n"
        "  - {label: B, seeds: [100, 101, 101]}\n"
        "ladder: [{label: C, seeds: [100, 101]}]\n",
        [
            "sweep.yaml:6:21: ladder.0.seeds: unknown key 'seeds' (known: label, set)",
        ],
    ),
    "as many seeds, each once, none of the sweep's": (
        "seeds: [0, 1]\n"
        "rows:\n"
        "  - {label: A, seeds: [1, 100]}\n"
        "  - {label: B, seeds: [100, 101, 101]}\n",
        [
            "sweep.yaml:4:16: seeds: 1 is one of the sweep's, and 'A' would share batches with "
            "another row's run; take others, 100 and up",
            "sweep.yaml:5:34: seeds: 101 is given twice",
            "sweep.yaml:5:16: seeds: 'B' has 3 of its own, the sweep has 2; "
            "give it as many, each stands against one",
        ],
    ),
    "two rows of one experiment at the same seeds": (
        "seeds: [0, 1]\nrows: [{label: A, seeds: [7, 8]}, {label: B, seeds: [7, 8]}]\n",
        ["sweep.yaml:3:36: 'B' is the same experiment as 'A' (line 3); remove one of them"],
    ),
    "a row with seeds of its own is no step of a recipe": (
        "seeds: [0, 1]\n"
        "rows: [{label: A, seeds: [7, 8]}, {label: B, set: {model.norm: none}}]\n"
        "leave_one_out: true\n",
        [
            "sweep.yaml:4:1: leave_one_out: needs two or more steps in ladder (or rows) to leave "
            "one out of, got 1"
        ],
    ),
    "tries that are no numbers, or twice the same": (
        "tune: {over: model.norm, values: [rmsnorm, true, .nan]}\n",
        [
            f"sweep.yaml:2:{column}: tune.values.{i}: should be a number, got {value}; what is no "
            "number can be compared with grid or factorial"
            for i, (column, value) in enumerate([(35, "'rmsnorm'"), (44, "true"), (50, "nan")])
        ],
    ),
    "a try given twice": (
        "tune: {over: training.lr, values: [1e-3, 2e-3, 0.001]}\n",
        ["sweep.yaml:2:48: tune: 0.001 is given twice"],
    ),
    "a tune of what rows are judged by": (
        "tune: {over: evaluation.tokens, values: [1e3, 4e3]}\n",
        [
            "sweep.yaml:2:8: tune: evaluation.tokens is what all rows are given or judged by, not "
            "to be chosen for each; tune how the model is made or trained"
        ],
    ),
    "a tune of what rows are given": (
        "tune: {over: training.tokens, values: [1e6, 2e6]}\n",
        [
            "sweep.yaml:2:8: tune: training.tokens is what all rows are given or judged by, not "
            "to be chosen for each; tune how the model is made or trained"
        ],
    ),
    "a row that is only measured otherwise": (
        "rows: [{label: A, set: {model.norm: none}},\n"
        "       {label: B, set: {model.norm: none, evaluation.lengths: [16]}}]\n",
        [
            "sweep.yaml:3:9: 'B' trains the same model as 'A': they differ in evaluation alone; "
            "set it for all rows, under set"
        ],
    ),
    "a tune that tries nothing": (
        "seeds: [0, 1]\ntune: {over: execution.threads, values: [1, 2]}\n",
        [
            "sweep.yaml:3:1: tune: gives no row a try: each sets execution.threads itself, or its "
            "runs are the same at every value; remove it, or tune something else"
        ],
    ),
    "a fraction of nothing": (
        "seeds: [0, 1]\nfraction: 1/2\n",
        ["sweep.yaml:3:1: fraction: of what? there is no factorial beside it"],
    ),
    "a fraction of too few factors": (
        "factorial: {model.norm: [none], model.block: [post]}\nfraction: 1/4\n",
        ["sweep.yaml:3:1: fraction: 1/4 of 2 factors is no tabled design; it takes 5 to 8 factors"],
    ),
    "a fraction of factors of three levels": (
        "factorial: {model.norm: [none, rmsnorm], model.block: [post], model.ffn: [swiglu]}\n"
        "fraction: 1/2\n",
        [
            "sweep.yaml:2:13: fraction: needs two levels of each factor, model.norm has 3 (the "
            "base's own is one); take out fraction, or give each one other level"
        ],
    ),
    "a fraction with holes": (
        "factorial: {model.norm: [none], model.block: [post], model.ffn: [swiglu]}\n"
        "fraction: 1/2\n"
        "exclude: [{model.norm: none, model.block: post}]\n",
        [
            "sweep.yaml:4:11: exclude: drops cells of a fraction, and what is left would alias "
            "effects otherwise than the plan says; remove one of the two"
        ],
    ),
    "no seeds": ("seeds: []\n", ["sweep.yaml:2:1: seeds: should have at least 1 item, got []"]),
    "more runs than allowed": (
        "max_runs: 5\ngrid: {training.lr: [1e-4, 2e-4], model.norm: [rmsnorm, none]}\n",
        [
            "sweep.yaml:2:1: max_runs: 5 rows x 3 seeds = 15 runs, more than 5; "
            "set max_runs: 15 if you want them all"
        ],
    ),
    "a product too large to write out": (
        f"grid: {{training.lr: {list(range(1, 101))}, training.tokens: {list(range(1, 101))}}}\n",
        [
            "sweep.yaml:1:1: max_runs: 10000 rows x 3 seeds = 30000 runs, more than 200; "
            "set max_runs: 30000 if you want them all"
        ],
    ),
    "an exclude that drops nothing": (
        "grid: {training.lr: [1e-4, 2e-4]}\nexclude: [{training.lr: 5}]\n",
        [
            "sweep.yaml:3:11: exclude: matches no combination of factorial, grid, zip or tune, "
            "so it drops nothing; mend or remove it"
        ],
    ),
    "a name that leaves its folder": (
        "name: ../x\nseeds: [0, 1]\n",
        [
            "sweep.yaml:2:1: name: '../x' may have only letters, digits, '-', '_' and '.', and "
            "begins with a letter, a digit or '_'; set name to such a word"
        ],
    ),
    "settings that belong to the experiment file": (
        "set: {imports: [x.py]}\nseeds: [0, 1]\n",
        ["sweep.yaml:2:7: imports: is no setting; write it in the experiment"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_sweeps_are_told_line_by_line(case: str):
    text, lines = WRONG[case]
    assert complaints(text) == lines


def test_several_seeds_of_the_baseline_alone_measure_its_noise():
    assert labels(load("seeds: [0, 1]\n")) == ["baseline"]


def test_wrong_overrides_and_bases_are_told(folder: Path):
    assert complaints("seeds: [0, 1]\n", "training.lrr=1") == [
        f"command line: training.lrr=1: training.lrr: unknown key 'lrr' — did you mean 'lr'? "
        f"{TRAINING}"
    ]
    Path("s.yaml").write_text("base: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"^s\.yaml:1:1: base: no experiment 'nowhere\.yaml'"):
        design.load("s.yaml")
    Path("s.yaml").write_text("base: s.yaml\n")
    with pytest.raises(ConfigError, match=r"^s\.yaml:1:1: base: should be an experiment, not"):
        design.load("s.yaml")
    with pytest.raises(ConfigError, match=r"^base\.yaml:1:1: this is an experiment, not a sweep"):
        design.load("base.yaml")
    with pytest.raises(ConfigError, match=r"^no sweep 'nowhere'"):
        design.load("nowhere")


def test_row_ids_are_those_of_the_same_experiment_run_alone():
    sweep = load("rows: [{label: A, set: {model.norm: {name: rmsnorm, eps: 1e-3}}}]\n")
    alone = loader.load("base.yaml", ["model.norm=rmsnorm", "model.norm.eps=1e-3"])
    assert sweep.variants[1].run_id(7) == loader.run_id(alone, 7)
