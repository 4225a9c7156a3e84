"""Whatever is wrong with an experiment file is told with its place, its key and its cure.

MESSAGES is the table to read: a change to a file that works, and the whole of what is said.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from components import registry
from experiments import loader
from experiments.yaml_text import ConfigError

GOOD = """\
model:
  d_model: 64
  n_layers: 2
  n_heads: 4
training:
  tokens: 1e6
  seq_len: 128
  global_batch_size: 8
  lr: 1e-3
"""
SECTIONS = "base, data, description, evaluation, execution, imports, model, tracking, training"
MODEL = (
    "block, d_model, dropout, ffn, head_dim, init, max_seq_len, mixer, n_heads, n_layers, norm, "
    "position, tie_embeddings"
)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    registry.load_builtin()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    return tmp_path


def write(**files: str) -> None:
    for name, text in files.items():
        Path(name.replace("_", ".")).write_text(text, encoding="utf-8")


def lines(*overrides: str, name: str = "x.yaml") -> list[str]:
    """What is said about a file and overrides."""
    with pytest.raises(ConfigError) as caught:
        loader.load(name, overrides)
    assert str(caught.value) == "\n".join(caught.value.lines)
    return list(caught.value.lines)


# what is appended to GOOD, and the one line that is said about it (GOOD ends at line 9)
MESSAGES = {
    "section": (
        "evalution: {tokens: 3}\n",
        "x.yaml:10:1: evalution: unknown key 'evalution' — did you mean 'evaluation'? "
        f"(known: {SECTIONS})",
    ),
    "key of a section": (
        "evaluation:\n  every_token: 3\n",
        "x.yaml:11:3: evaluation.every_token: unknown key 'every_token' — did you mean "
        "'every_tokens'? (known: add_bos_token, every, every_tokens, include_path, lengths, "
        "limit, max_length, num_fewshot, precision, tasks, tokens)",
    ),
    "component": (
        "data: {tokenizer: byte}\n",
        "x.yaml:10:8: data.tokenizer: unknown tokenizer 'byte' — did you mean 'bytes'? "
        "(known: bpe, bytes, characters, huggingface)",
    ),
    "component's parameter": (
        "data:\n  tokenizer: {name: bpe,\n    vocab: 512}\n",
        "x.yaml:12:5: data.tokenizer.vocab: unknown key 'vocab' — did you mean 'vocab_size'? "
        "(known: name, vocab_size, train_bytes)",
    ),
    "component in a list": (
        "data:\n  filters:\n    - dedup\n    - min_lenght\n",
        "x.yaml:13:7: data.filters.1: unknown filter 'min_lenght' — did you mean 'min_length'? "
        "(known: dedup, min_length)",
    ),
    "parameter in a list": (
        "data:\n  filters:\n    - {name: min_length, chars: 3}\n",
        "x.yaml:12:26: data.filters.0.chars: unknown key 'chars' — did you mean 'characters'? "
        "(known: name, characters)",
    ),
    "no name": (
        "data: {tokenizer: {vocab_size: 512}}\n",
        "x.yaml:10:8: data.tokenizer: needs the name of a component, or a mapping with 'name' "
        "(known: bpe, bytes, characters, huggingface)",
    ),
    "missing parameter": (
        "data: {corpus: text}\n",
        "x.yaml:10:8: data.corpus.files: is missing; give it a value",
    ),
    "too small": (
        "evaluation: {tokens: 0}\n",
        "x.yaml:10:14: evaluation.tokens: should be at least 1, got 0",
    ),
    "not in range": (
        "data: {validation_fraction: 1}\n",
        "x.yaml:10:8: data.validation_fraction: should be less than 1, got 1",
    ),
    "text for a number": (
        "evaluation: {tokens: many}\n",
        "x.yaml:10:14: evaluation.tokens: should be a whole number, got 'many'",
    ),
    "quoted number": (
        'evaluation: {tokens: "4"}\n',
        "x.yaml:10:14: evaluation.tokens: should be a whole number, got '4'",
    ),
    "bool for a number": (
        "evaluation: {tokens: true}\n",
        "x.yaml:10:14: evaluation.tokens: should be a whole number, got true",
    ),
    "yes": (
        "execution: {compile: yes}\n",
        "x.yaml:10:13: execution.compile: should be true or false, got 'yes'",
    ),
    "choice": (
        "execution: {device: gpu}\n",
        "x.yaml:10:13: execution.device: should be 'auto', 'cpu', 'cuda' or 'mps', got 'gpu'",
    ),
    "list": (
        "data: {filters: dedup}\n",
        "x.yaml:10:8: data.filters: should be a list, got 'dedup'",
    ),
    "mapping": ("data: 3\n", "x.yaml:10:1: data: should be a mapping, got 3"),
    "empty section": ("data:\n", "x.yaml:10:1: data: should be a mapping, got nothing"),
    "text": ("description: 3\n", "x.yaml:10:1: description: should be text, got 3"),
    "base": (
        "base: 3\n",
        "x.yaml:10:1: base: should be the path of a file or a preset's name",
    ),
    "key that is a number": (
        "3: 4\n",
        f"x.yaml:10:1: 3: unknown key '3' (known: {SECTIONS})",
    ),
    "cross-check": (
        "execution: {micro_batch_size: 3}\n",
        "x.yaml:10:13: execution.micro_batch_size: 3 does not divide global_batch_size 8",
    ),
    "no such class": (
        "data: {tokenizer: nowhere.module:Class}\n",
        "x.yaml:10:8: data.tokenizer: tokenizer 'nowhere.module:Class' can't be imported: "
        "No module named 'nowhere'",
    ),
    "no class": (
        "data: {tokenizer: os:getcwd}\n",
        "x.yaml:10:8: data.tokenizer: tokenizer 'os:getcwd' is not a class",
    ),
}

# overrides of GOOD, and the one line that is said about each
OVERRIDES = {
    "training.lr": "is no override; write it as a.b=c",
    "=3": "is no override; write it as a.b=c",
    "model..norm=3": "is no override; write it as a.b=c",
    "--model.norm=3": f"--model: unknown key '--model' — did you mean 'model'? (known: {SECTIONS})",
    "base=demo": "base: can only stand in a file",
    "training.lr=-1": "training.lr: should be greater than 0, got -1",
    "training.lr=.nan": "training.lr: should be a number, got nan",
    "training.lr=1e999": "training.lr: should be a number, got inf",
    "training.tokens=1.5": "training.tokens: should be a whole number, got 1.5",
    "training.lr.peak=1": "training.lr.peak: training.lr is 0.001, no mapping; set it whole",
    "model.nrom=rmsnorm": (
        f"model.nrom: unknown key 'nrom' — did you mean 'norm'? (known: {MODEL})"
    ),
    "model.norm=": (
        "model.norm: needs the name of a component, or a mapping with 'name' "
        "(known: dyt, layernorm, none, rmsnorm)"
    ),
    "model.norm.epsilon=1": (
        "model.norm.epsilon: unknown key 'epsilon' — did you mean 'eps'? (known: name, eps, bias)"
    ),
    "model.ffn.activation=relo": (
        "model.ffn.activation: unknown activation 'relo' — did you mean 'relu'? "
        "(known: gelu, identity, relu, relu2, sigmoid, silu)"
    ),
    "model.ffn.activation.approximat=none": (
        "model.ffn.activation.approximat: unknown key 'approximat' — did you mean 'approximate'? "
        "(known: name, approximate)"
    ),
    "training.optimizer.betas=[0.9, 0.99, 1]": (
        "training.optimizer.betas: should have at most 2 items, got [0.9, 0.99, 1]"
    ),
    "model.ffn={name: mlp": (
        "not YAML: while parsing a flow mapping, expected ',' or '}', but got '<stream end>'"
    ),
    "model.n_heads=3": "model.n_heads: n_heads 3 does not divide d_model 64",
    "data.corpus={name: copy, lengths: [5, 2]}": (
        "data.corpus.lengths: [5, 2]: the shortest goes first"
    ),
    "data.corpus={name: recall, pairs: 33}": (
        "data.corpus.pairs: 33 pairs need as many keys, and there are 32"
    ),
    "evaluation.tasks=[held_out, held_out_copy]": (
        "evaluation.tasks: held_out_copy asks what the corpus 'copy' teaches, and the "
        "experiment's is 'python_docs'; leave the task out"
    ),
    "evaluation.tasks=[held_out_recall]": (
        "evaluation.tasks: held_out_recall asks what the corpus 'recall' teaches, and the "
        "experiment's is 'python_docs'; leave the task out"
    ),
}


@pytest.mark.parametrize(("added", "message"), MESSAGES.values(), ids=MESSAGES)
def test_every_mistake_in_a_file_is_one_line_with_its_place(added: str, message: str) -> None:
    write(x_yaml=GOOD + added)
    assert lines() == [message]


@pytest.mark.parametrize(("word", "message"), OVERRIDES.items())
def test_every_mistake_on_the_command_line_names_the_word(word: str, message: str) -> None:
    write(x_yaml=GOOD)
    assert lines(word) == [f"command line: {word}: {message}"]


def test_all_errors_come_at_once_from_the_top_and_the_command_line_last() -> None:
    write(
        x_yaml="""\
modle: {}
model:
  d_modle: 64
  n_layers: 2.5
  norm: rmsnrm
  ffn: {name: mlp, hiden: 3, activation: relo}
training:
  tokens: many
  lr: -1
  seq_len: 128
  global_batch_size: 0
"""
    )
    told = lines("training.lr=0", "execution.device=tpu")
    assert [line.rsplit(": ", maxsplit=1)[0].split(": ")[:2] for line in told] == [
        ["x.yaml:1:1", "modle"],
        ["x.yaml:2:1", "model.d_model"],
        ["x.yaml:3:3", "model.d_modle"],
        ["x.yaml:4:3", "model.n_layers"],
        ["x.yaml:5:3", "model.norm"],
        ["x.yaml:6:20", "model.ffn.hiden"],
        ["x.yaml:6:30", "model.ffn.activation"],
        ["x.yaml:8:3", "training.tokens"],
        ["x.yaml:11:3", "training.global_batch_size"],
        ["command line", "training.lr=0"],
        ["command line", "execution.device=tpu"],
    ]


def test_all_words_that_are_no_overrides_are_told_at_once() -> None:
    write(x_yaml=GOOD)
    assert len(lines("oops", "training.lr.x=1", "model.norm=[", "training.lr=2")) == 3


def test_a_long_word_or_value_is_cut_short_and_control_characters_are_shown() -> None:
    write(x_yaml=GOOD + 'data: {corpus: "a\\nb"}\n')
    told = lines("training.tokens=" + "9" * 5000, "training.lr=x\x1b[31m")
    assert len(told) == 1  # the escape character is no YAML
    assert told == [
        "command line: training.lr=x\\x1b[31m: not YAML: character U+001B is not allowed"
    ]
    told = lines("training.tokens=" + "9" * 5000)
    assert told[0].startswith("x.yaml:10:8: data.corpus: unknown corpus 'a\\nb' (known:")
    assert len(told[1]) < 250


# --- base ------------------------------------------------------------------------------------


def test_a_base_is_merged_deeply_but_lists_and_components_are_replaced_whole() -> None:
    Path("sub").mkdir()
    write(
        x_yaml="base: sub/y.yaml\nmodel: {n_layers: 3, norm: rmsnorm}\ndata: {filters: [dedup]}\n",
    )
    Path("sub/y.yaml").write_text("base: ../z.yaml\ntraining: {lr: 2e-3}\n")
    write(
        z_yaml=GOOD.replace(
            "  n_heads: 4\n", "  n_heads: 4\n  norm: {name: layernorm, eps: 1e-3}\n"
        )
        + "data: {filters: [{name: min_length, characters: 3}], split_seed: 5}\n"
    )
    e = loader.load("x.yaml")
    assert (e.model.n_layers, e.model.d_model, e.training.lr) == (3, 64, 2e-3)
    assert e.model.norm.dump() == {"name": "rmsnorm", "eps": 1e-6}
    assert [f.name for f in e.data.filters] == ["dedup"]
    assert e.data.split_seed == 5


def test_an_error_inherited_from_a_base_is_told_at_the_line_of_the_base() -> None:
    write(
        x_yaml="base: y.yaml\ntraining: {lr: -1}\n",
        y_yaml=GOOD + "data:\n  split_seed: x\nevaluation: {tokenz: 3}\n",
    )
    assert lines() == [
        "x.yaml:2:12: training.lr: should be greater than 0, got -1",
        "y.yaml:11:3: data.split_seed: should be a whole number, got 'x'",
        "y.yaml:12:14: evaluation.tokenz: unknown key 'tokenz' — did you mean 'tokens'? "
        "(known: add_bos_token, every, every_tokens, include_path, lengths, "
        "limit, max_length, num_fewshot, precision, tasks, tokens)",
    ]


def test_what_replaces_an_inherited_mistake_is_no_mistake() -> None:
    write(x_yaml="base: y.yaml\ndata: {split_seed: 1}\n", y_yaml=GOOD + "data: {split_seed: x}\n")
    assert loader.load("x.yaml").data.split_seed == 1


def test_a_base_that_includes_itself_shows_the_chain() -> None:
    write(x_yaml="base: y.yaml\n", y_yaml="a: 1\nbase: x.yaml\n", z_yaml="base: z.yaml\n")
    assert lines() == [
        "y.yaml:2:1: base: a file includes itself: x.yaml -> y.yaml -> x.yaml",
    ]
    assert lines(name="z.yaml") == ["z.yaml:1:1: base: a file includes itself: z.yaml -> z.yaml"]


def test_a_missing_file_preset_or_base_gets_a_suggestion() -> None:
    write(x_yaml="base: sub/bsae.yaml\n", y_yaml="base: dmo\n")
    Path("sub").mkdir()
    Path("sub/base.yaml").write_text(GOOD)
    assert lines() == [
        "x.yaml:1:1: base: no experiment 'sub/bsae.yaml': no such file or preset "
        "— did you mean 'sub/base.yaml'?"
    ]
    start = "no experiment 'dmo': no such file or preset — did you mean 'demo'? (known: "
    assert lines(name="y.yaml")[0].startswith(f"y.yaml:1:1: base: {start}")
    assert lines(name="dmo")[0].startswith(start)
    for odd in ("", ".", "a\0b", "x" * 5000, "sub", "x.yaml/y"):
        assert lines(name=odd)[0].startswith("no experiment '")


def test_a_base_is_looked_for_beside_the_file_and_not_where_the_program_runs() -> None:
    Path("sub").mkdir()
    Path("sub/x.yaml").write_text("base: y.yaml\n")
    write(y_yaml=GOOD)
    assert "no experiment 'y.yaml'" in lines(name="sub/x.yaml")[0]


# --- imports ---------------------------------------------------------------------------------

NORM = """\
from torch import nn
from components.registry import register

@register("norm", "{name}")
class Mine(nn.Identity):
    def __init__(self, width: int, *, gain: float = 1.0) -> None:
        super().__init__()
"""


def test_imports_are_relative_to_their_file_and_accumulate_over_bases() -> None:
    Path("sub").mkdir()
    Path("sub/y.yaml").write_text(GOOD + "imports: [one.py]\n")
    Path("sub/one.py").write_text(NORM.format(name="test_one"))
    write(x_yaml="base: sub/y.yaml\nimports: [two.py]\nmodel: {norm: {name: test_two, gain: 2}}\n")
    Path("two.py").write_text(NORM.format(name="test_two"))
    e = loader.load("x.yaml")
    assert e.model.norm.params == {"gain": 2.0}
    assert e.imports == (str(Path("sub/one.py").resolve()), str(Path("two.py").resolve()))
    assert loader.load("x.yaml", ["model.norm=test_one"]).model.norm.name == "test_one"
    assert loader.load("x.yaml", ["model.norm.gain=3"]).model.norm.params == {"gain": 3.0}
    told = lines("model.norm.gian=1")
    assert told == [
        "command line: model.norm.gian=1: model.norm.gian: unknown key 'gian' — did you mean "
        "'gain'? (known: name, gain)"
    ]


def test_a_run_directory_can_load_what_the_command_line_imported(tmp_path: Path) -> None:
    write(x_yaml=GOOD)
    Path("three.py").write_text(NORM.format(name="test_three"))
    e = loader.load("x.yaml", ["imports=[three.py]", "model.norm=test_three"])
    assert e.imports == (str(tmp_path / "three.py"),)


def test_imports_that_fail_say_which_line_of_them_failed_all_at_once(tmp_path: Path) -> None:
    write(
        x_yaml="base: y.yaml\nimports:\n  - none.py\n  - raises.py\n",
        y_yaml=GOOD + "imports: [syntax.py, exits.py]\n",
        syntax_py="x = (\n",
        exits_py="\nraise SystemExit(3)\n",
        raises_py="def f():\n    raise ValueError('a\\nb')\n\n\nf()\n",
    )
    assert lines() == [
        f"y.yaml:10:11: imports: {tmp_path}/syntax.py:1: SyntaxError: '(' was never closed "
        "(syntax.py, line 1); mend the file",
        f"y.yaml:10:22: imports: {tmp_path}/exits.py:2: SystemExit: 3; mend the file",
        f"x.yaml:3:5: imports: no file {tmp_path}/none.py",
        f"x.yaml:4:5: imports: {tmp_path}/raises.py:2: ValueError: a\\nb; mend the file",
    ]


def test_imports_that_are_no_list_of_paths_are_told_even_over_a_base_that_has_some() -> None:
    write(x_yaml="base: y.yaml\nimports: mine.py\n", y_yaml=GOOD + "imports: []\n")
    assert lines() == ["x.yaml:2:1: imports: should be a list, got 'mine.py'"]
    assert lines("imports=[3]") == ["command line: imports=[3]: imports.0: should be text, got 3"]


def test_a_component_whose_signature_can_not_be_a_schema_is_told_at_its_own_line(
    tmp_path: Path,
) -> None:
    Path("odd.py").write_text(
        "from components.registry import register\n\n"
        '@register("norm", "test_bare")\nclass Bare:\n    def __init__(self, *, gain=1): ...\n\n'
        '@register("norm", "test_odd")\nclass Odd:\n'
        "    def __init__(self, *, gain: 'Nowhere' = 1): ...\n"
    )
    write(x_yaml=GOOD + "imports: [odd.py]\n")
    assert lines("model.norm=test_bare") == [
        "command line: model.norm=test_bare: model.norm: odd.py:3: norm 'test_bare': parameter "
        "'gain' needs a type annotation, which is what YAML values are checked against"
    ]
    assert lines("model.norm=test_odd") == [
        "command line: model.norm=test_odd: model.norm: odd.py:7: norm 'test_odd': its parameters "
        "make no schema: name 'Nowhere' is not defined"
    ]


# --- overrides -------------------------------------------------------------------------------

SET: list[tuple[str, str, Any]] = [
    ("training.lr=1e-4", "training.lr", 1e-4),
    ("training.tokens=10_000", "training.tokens", 10_000),
    ("training.tokens=0x10000", "training.tokens", 65536),
    ("description=012", "description", "012"),
    ("description=12:30", "description", "12:30"),
    ("description=2024-01-02", "description", "2024-01-02"),
    ("description=a=b", "description", "a=b"),
    ("description='1'", "description", "1"),
    ("model.head_dim=", "model.head_dim", None),
    ("model.norm=rmsnorm", "model.norm.name", "rmsnorm"),
    ("model.norm={name: rmsnorm, eps: 1e-3}", "model.norm.eps", 1e-3),
    ("model.norm.eps=1e-3", "model.norm.eps", 1e-3),  # the default component is opened
    ("model.ffn.activation=relu", "model.ffn.activation.name", "relu"),
    ("model.ffn.activation.approximate=none", "model.ffn.activation.approximate", "none"),
    ("training.optimizer.betas=[0.9, 0.99]", "training.optimizer.betas", [0.9, 0.99]),
    ("data.filters=[dedup]", "data.filters", [{"name": "dedup"}]),
    ("evaluation.tokens=7", "evaluation.tokens", 7),  # a section that the file leaves out
]


@pytest.mark.parametrize(("word", "path", "value"), SET, ids=[word for word, _, _ in SET])
def test_an_override_sets_one_value_by_the_rules_of_the_file(
    word: str, path: str, value: Any
) -> None:
    write(x_yaml=GOOD)
    flat = loader.flatten(loader.resolved(loader.load("x.yaml", [word])))
    assert flat[path] == value
    assert type(flat[path]) is type(value)


def test_overrides_apply_in_order_and_keep_a_components_other_parameters() -> None:
    write(x_yaml=GOOD.replace("model:\n", "model:\n  ffn: {name: gated, bias: true}\n"))
    e = loader.load("x.yaml", ["model.ffn.hidden=96", "training.lr=1", "training.lr=2"])
    assert (e.model.ffn.params["hidden"], e.model.ffn.params["bias"]) == (96, True)
    assert e.training.lr == 2.0
    assert loader.load("x.yaml", ["model.ffn=mlp"]).model.ffn.params["bias"] is False


# --- the resolved experiment ------------------------------------------------------------------

tricky = st.sampled_from(
    "yes no on null ~ true 1 1e5 1e-5 0x1f 012 1_0 .5 1. .inf 12:30 2024-01-02 << = : # - ? & "
    "* ! | > % @ ` ' \" , [ ] { } a:b a: #b".split(" ")
) | st.sampled_from(["", " ", " a", "a ", "a\n", "\na", "a\n\nb\n", "a\n  b", "a: b", "a #b", "\t",
                     "\x85", "\u2028", "\ufeff", "\0", "\x7f", "é", "日本", "🙂", "- a", "--- a",
                     "...", "x " * 80, "\\", "\r\n", "a'b\"c"])  # fmt: skip
text = tricky | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
fraction = st.floats(0, 1, exclude_min=True, exclude_max=True)
counts = st.integers(1, 2**53)


@st.composite
def experiments(draw: st.DrawFn) -> loader.Experiment:
    """Experiments with strings and numbers at their most awkward."""
    norm = draw(
        st.sampled_from(["none", "rmsnorm"])
        | st.builds(
            lambda e, b: {"name": "layernorm", "eps": e, "bias": b}, positive, st.booleans()
        )
    )
    ffn = {"name": "mlp", "hidden": draw(st.none() | counts), "activation": draw(
        st.sampled_from(["relu", {"name": "gelu", "approximate": "none"}]))}  # fmt: skip
    files = draw(text | st.lists(text, max_size=3))
    data = {
        "description": draw(text),
        "model": {"d_model": 12, "n_layers": draw(counts), "n_heads": 2, "norm": norm, "ffn": ffn,
                  "dropout": draw(st.floats(0, 1, exclude_max=True))},
        "data": {
            "corpus": {"name": "text", "files": files, "column": draw(text)},
            "filters": draw(st.lists(st.sampled_from(
                ["dedup", {"name": "min_length", "characters": 3}]), max_size=3)),
            "validation_fraction": draw(fraction),
        },
        "training": {"tokens": draw(st.integers(64, 2**53)), "seq_len": 8, "global_batch_size": 8,
                     "lr": draw(positive), "grad_clip": draw(st.none() | positive)},
    }  # fmt: skip
    return loader.validate(loader.Located(data))


@given(experiments(), st.integers(0, 9))
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_resolved_experiment_loads_back_equal_and_with_the_same_id(
    e: loader.Experiment, seed: int
) -> None:
    Path("resolved.yaml").write_text(loader.to_yaml(e), encoding="utf-8")
    back = loader.load("resolved.yaml")
    assert back == e
    assert loader.resolved(back) == loader.resolved(e)
    assert loader.run_id(back, seed) == loader.run_id(e, seed)
    assert not loader.changed_defaults(e, loader.read(Path("resolved.yaml")).data)


@given(experiments())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_other_yaml_readers_see_the_same_values_in_a_resolved_experiment(
    e: loader.Experiment,
) -> None:
    import yaml

    assert yaml.safe_load(loader.to_yaml(e)) == loader.resolved(e)


def test_a_resolved_experiment_reads_well() -> None:
    write(x_yaml=GOOD)
    words = ["training.optimizer.eps=1e-8", "description=yes", "data.filters=[dedup]"]
    shown = loader.to_yaml(loader.load("x.yaml", words))
    assert shown.startswith("description: 'yes'\nimports: []\nmodel:\n  d_model: 64\n")
    assert "    betas: [0.9, 0.95]\n    eps: 1.0e-08\n" in shown
    assert "  filters:\n  - name: dedup\n" in shown
    assert "head_dim: null" in shown


@pytest.mark.parametrize("path", sorted(loader.PRESETS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_loads_by_its_name_alone(path: Path) -> None:
    os.chdir("/")  # wherever the program runs; the fixture takes us back
    e = loader.load(path.stem)
    assert e == loader.load(path)
