"""Rows that do nothing are told before anything runs, and rows that do something never are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from components.registry import UserError
from experiments import loader, precheck
from experiments.data import prepare
from experiments.record import Run, write_json
from sweeps import design, guard, plan
from tests.command_line import ceteris

BASE = """\
model: {d_model: 32, n_layers: 2, n_heads: 2}
data: {corpus: {name: text, files: [text.txt], document_bytes: 100}, validation_fraction: 0.3}
training: {tokens: 2048, seq_len: 16, global_batch_size: 4, lr: 1e-3}
evaluation: {tokens: 128}
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    words = " ".join(str(number * number) for number in range(3000))
    Path("text.txt").write_text(words)
    return tmp_path / "runs"


def checked(rows: str, root: Path) -> list[str]:
    """What is said of a sweep of these rows; an error's lines come up."""
    Path("s.yaml").write_text("base: base.yaml\nseeds: [0, 1]\n" + rows)
    sweep, said = design.load("s.yaml"), list[str]()
    guard.check(sweep, plan.plan(sweep, root).manifest, root, said.append)
    return said


def refused(rows: str, root: Path) -> list[str]:
    with pytest.raises(UserError) as caught:
        checked(rows, root)
    return str(caught.value).splitlines()


ALIKE = "(same parameters, same first-batch logits, same first-step gradients)"
REMEDY = "remove the row, or mend the component"


def test_a_setting_that_changes_nothing_at_these_sizes_is_an_error_naming_both_rows(root: Path):
    lines = refused(
        "rows:\n"
        "  - {label: narrow, set: {model.mixer.window: 4}}\n"
        "  - {label: wide, set: {model.mixer.window: 16}}\n"
        "  - {label: a, set: {model.position: rotary}}\n"
        "  - {label: b, set: {model.position: rotary, model.max_seq_len: 64}}\n",
        root,
    )
    assert lines == [
        f"s.yaml:5:6: 'wide' does nothing: model.mixer.window: null → 16 changes nothing against "
        f"'baseline' {ALIKE}; {REMEDY}",
        f"s.yaml:7:6: 'b' does nothing: model.max_seq_len: null → 64 changes nothing against 'a' "
        f"{ALIKE}; {REMEDY}",
    ]


def test_an_option_that_a_component_never_reads_stops_a_sweep_before_its_first_run(root: Path):
    Path("parts.py").write_text(
        "from components.norm import RMSNorm\n"
        "from components.registry import register\n"
        '@register("norm", "guard_test_norm")\n'
        "class Mine(RMSNorm):\n"
        "    '''Mine.'''\n"
        "    def __init__(self, dim: int, *, eps: float = 1e-6, centred: bool = False) -> None:\n"
        "        super().__init__(dim, eps=eps)\n"
    )
    Path("base.yaml").write_text("imports: [parts.py]\n" + BASE)
    Path("s.yaml").write_text(
        "base: base.yaml\nset: {model.norm: guard_test_norm}\n"
        "rows: [{label: centred, set: {model.norm.centred: true}}]\n"
    )
    done = ceteris("sweep", "s.yaml", "--runs", root)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        "error: s.yaml:3:9: 'centred' does nothing: model.norm.centred: false → true changes "
        f"nothing against 'baseline' {ALIKE}; {REMEDY}\n"
    )
    assert not list(root.glob("*-s0"))


def test_rows_that_do_something_pass_without_a_word(root: Path):
    rows = (
        "rows:\n"
        "  - {label: again, seeds: [100, 101]}\n"
        "  - {label: RMSNorm, set: {model.norm: rmsnorm}}\n"
        "  - {label: eps, set: {model.norm.eps: 1e-6}}\n"
        "  - {label: window, set: {model.mixer.window: 8}}\n"
        "  - {label: post, set: {model.block: post}}\n"
        "  - {label: dropout, set: {model.dropout: 0.1}}\n"
        "  - {label: z-loss, set: {training.objective: {name: cross_entropy, z_loss: 1e-4}}}\n"
        "  - {label: init, set: {model.init: gpt2}}\n"
        "  - {label: lr, set: {training.lr: 2e-3}}\n"
        "tune: {over: training.lr, values: [5e-3]}\n"
    )
    assert checked(rows, root) == []  # the text is not prepared: on drawn tokens
    prepare(design.load("s.yaml").base.data, root / "data", progress=False)
    assert checked(rows, root) == []  # on the first batch


def test_what_shows_only_beyond_the_training_length_is_no_idle_row(root: Path):
    row = "rows: [{label: window, set: {model.mixer.window: 16}}]\n"
    base = "set: {model.position: alibi, evaluation.lengths: [64]}\n"
    assert checked(base + row, root) == []
    assert len(refused("set: {model.position: alibi}\n" + row, root)) == 1


def test_the_first_batch_is_that_of_the_run_where_the_text_is_prepared(root: Path):
    experiment = loader.load("base.yaml")
    data = prepare(experiment.data, root / "data", progress=False)
    found = guard.first_tokens(experiment, 3, data.vocab_size, root / "data")
    batch = data.batch(0, seed=3, seq_len=16, global_batch_size=4)
    assert torch.equal(found, torch.from_numpy(batch))
    drawn = guard.first_tokens(experiment, 3, data.vocab_size, root / "elsewhere")
    assert drawn.shape == found.shape
    assert int(drawn.max()) == data.vocab_size - 1  # an end of text among them


def test_rows_whose_runs_are_all_done_are_not_computed(root: Path, monkeypatch: pytest.MonkeyPatch):
    rows = "rows: [{label: wide, set: {model.mixer.window: 16}}]\n"
    assert len(refused(rows, root)) == 1
    for variant in design.load("s.yaml").variants:
        for seed in (0, 1):
            run = Run(root, variant.run_id(seed))
            run.folder.mkdir(parents=True)
            write_json(run / "result.json", {"schema": 1, "id": run.id, "status": "done"})
    monkeypatch.setattr(guard, "build", lambda *_: pytest.fail("built a model"))
    assert checked(rows, root) == []


def test_in_a_copy_of_two_layers_what_coincides_is_said_not_refused(
    root: Path, monkeypatch: pytest.MonkeyPatch
):
    rows = (
        "set: {model.n_layers: 3}\n"
        "rows: [{label: wide, set: {model.mixer.window: 16}}, "
        "{label: narrow, set: {model.mixer.window: 4}}]\n"
    )
    monkeypatch.setattr(precheck, "LARGEST", 1000)
    assert checked(rows, root) == [
        "'wide' may do nothing: model.mixer.window: null → 16 changes nothing against 'baseline' "
        f"in a copy of 2 layers {ALIKE}"
    ]
    monkeypatch.setattr(precheck, "LARGEST_COPY", 1000)
    assert checked(rows, root) == [
        f"not checked whether '{label}' does anything: its model is too large for it"
        for label in ("baseline", "wide", "narrow")
    ]


def test_a_model_that_does_not_run_is_left_to_its_runs(root: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(guard, "build", broken)
    rows = "rows: [{label: wide, set: {model.mixer.window: 16}}]\n"
    assert checked(rows, root) == [
        f"not checked whether '{label}' does anything: RuntimeError: no such kernel"
        for label in ("baseline", "wide")
    ]


def test_looking_leaves_the_callers_random_numbers_alone(root: Path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    checked("rows: [{label: narrow, set: {model.mixer.window: 4}}]\n", root)
    assert torch.equal(torch.rand(3), expected)


def test_an_optimizer_that_treats_equal_gradients_otherwise_tells_rows_apart(root: Path):
    """Weights after a step count too: a component may ask the optimizer for another one."""
    experiment = loader.load("base.yaml")
    tokens = guard.first_tokens(experiment, 0, 257, root / "data")
    slow = loader.load("base.yaml", ["training.lr=2e-3"])
    assert guard.fingerprint(experiment, 0, 257, tokens) == guard.fingerprint(
        experiment, 0, 257, tokens
    )
    assert guard.fingerprint(experiment, 0, 257, tokens) != guard.fingerprint(slow, 0, 257, tokens)
