"""Matched variants have the baseline's size or cost, as nearly as widths allow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from components import decoder
from experiments import loader
from sweeps import design, matching, probe

BASE = """\
model: {d_model: 128, n_layers: 2, n_heads: 4}
training: {tokens: 20480, seq_len: 64, global_batch_size: 8, lr: 1e-3}
"""
ROWS = """\
rows:
  - {label: RMSNorm, set: {model.norm: rmsnorm}}
  - {label: RoPE, set: {model.position: rotary}}
  - {label: LSTM, set: {model.mixer: lstm}}
  - {label: MQA, set: {model.mixer.n_kv_heads: 1}}
  - {label: SwiGLU with biases, set: {model.ffn: {name: swiglu, bias: true}}}
  - {label: shallow, set: {model.n_layers: 1}}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def rows(text: str) -> dict[str, matching.Sized]:
    Path("s.yaml").write_text("base: base.yaml\n" + text)
    return {
        row.variant.label: row
        for row in matching.sized(
            design.load("s.yaml"), Path("cache"), probe.Probes(Path("probes"))
        )
    }


@pytest.mark.parametrize("match", ["params", "flops"])
def test_every_variant_is_within_one_percent_and_says_what_is_left(match: str):
    sized = rows(f"match: {match}\n{ROWS}")

    def quantity(row: matching.Sized) -> float:
        return row.counts.parameters if match == "params" else row.counts.flops_per_token

    goal = quantity(sized["baseline"])
    for label, row in sized.items():
        assert row.mismatch == pytest.approx(quantity(row) / goal - 1, abs=1e-12), label
        assert row.mismatch is not None
        assert abs(row.mismatch) < 0.01, label
    assert sized["baseline"].solved is None
    assert sized["shallow"].solved is not None
    path, width = sized["shallow"].solved
    assert path == "model.ffn.hidden"
    assert sized["shallow"].variant.experiment.model.ffn.params["hidden"] == width


def test_no_other_multiple_comes_nearer():
    row = rows(f"match: params\n{ROWS}")["LSTM"]
    assert row.solved is not None
    assert row.mismatch is not None
    path, width = row.solved
    assert width % 8 == 0
    for other in (width - 8, width + 8):
        changed = matching.with_width(row.variant.experiment, path, other)
        found = matching.measure(changed, Path("cache")).parameters
        goal = row.counts.parameters / (1 + row.mismatch)
        assert abs(found / goal - 1) >= abs(row.mismatch)


def test_a_variant_that_no_width_brings_nearer_keeps_its_run_id():
    text = "rows: [{label: RMSNorm, set: {model.norm: rmsnorm}}]\n"
    free, matched = rows(text)["RMSNorm"], rows("match: params\n" + text)["RMSNorm"]
    assert matched.solved is None
    assert matched.variant.run_id(0) == free.variant.run_id(0)
    assert free.mismatch is None
    assert matched.mismatch == pytest.approx(-5 * 128 / matched.counts.parameters, rel=0.01)


def test_what_a_variant_sets_itself_is_not_solved_but_the_mixers_width_may_be():
    sized = rows(
        "match: params\n"
        "rows:\n"
        "  - {label: narrow, set: {model.ffn.hidden: 64}}\n"
        "  - {label: narrow whole, set: {model.ffn: {name: mlp, hidden: 72}}}\n"
        "  - {label: no ffn, set: {model.ffn: none}}\n"
        "  - {label: LSTM, set: {model.mixer: lstm, model.ffn: none}}\n"
        "  - {label: classic, set: {model.mixer: {name: lstm, project: false}, model.ffn: none}}\n"
    )
    solved = {label: row.solved for label, row in sized.items()}
    assert solved["narrow"] is solved["narrow whole"] is solved["no ffn"] is None
    assert solved["classic"] is None  # without a projection its width is d_model
    assert solved["LSTM"] is not None
    assert solved["LSTM"][0] == "model.mixer.hidden"
    assert sized["narrow"].mismatch is not None
    assert sized["narrow"].mismatch < -0.1  # left unmatched, and told
    assert abs(sized["LSTM"].mismatch or 1) < 0.01


def test_a_variant_too_large_at_any_width_stays_as_it_is_written():
    row = rows("match: params\nrows: [{label: wide, set: {model.d_model: 512}}]\n")["wide"]
    assert row.solved is None
    assert row.mismatch is not None
    assert row.mismatch > 1


def test_coarse_multiples_give_way_to_whole_numbers_where_they_miss_by_more_than_a_percent():
    row = rows(
        "match: params\n"
        "rows: [{label: A, set: {model.position: rotary, model.ffn.multiple_of: 512,"
        " model.norm: none}}]\n"
    )["A"]
    assert row.solved is not None
    assert row.solved[1] % 512
    assert abs(row.mismatch or 1) < 0.01


def test_flops_of_recurrent_mixers_are_those_that_torch_counts():
    experiment = loader.load(
        "base.yaml", ["model.mixer=lstm", "model.n_layers=1", "training.seq_len=24"]
    )
    dims = experiment.dims(matching.vocabulary(experiment, Path("cache")))
    with torch.device("meta"):
        full = decoder.Decoder(dims, experiment.model.specs, True)
    stepwise = decoder._counted_flops(full, 24)
    found = matching.measure(experiment, Path("cache"))
    assert found.flops_per_token == pytest.approx(stepwise / 24, rel=1e-12)
