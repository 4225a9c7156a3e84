"""What a result says beside the curve: held-out losses of all kinds, first steps, and the floor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from components.linear_cross_entropy import linear_cross_entropy, losses_by_target
from experiments import loader
from experiments.data import Dataset, prepare
from experiments.model import build, load_trained
from experiments.record import Run, UserError, read_json, seal
from experiments.trainer import train


def trained(yaml: Path, root: Path, *overrides: str) -> Run:
    experiment = loader.load(yaml, overrides)
    train(experiment, 0, root, progress="none")
    return Run(root, loader.run_id(experiment, 0))


def result_of(run: Run) -> dict[str, Any]:
    return read_json(run / "result.json")


def data_of(run: Run) -> Dataset:
    return prepare(loader.load(run / "experiment.yaml").data, run.root / "data", progress=False)


def nats(run: Run, windows: np.ndarray) -> torch.Tensor:
    """`(n, T+1)` -> `(n, T)`, by the definition and the run's last weights."""
    experiment = loader.load(run / "experiment.yaml")
    model = load_trained(run, experiment, data_of(run).vocab_size).model
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        logits = model.logits(model(ids[:, :-1])).double()
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:], reduction="none"
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Run:
    folder = tmp_path_factory.mktemp("measured")
    yaml = folder / "tiny.yaml"
    yaml.write_text(
        f"""\
model: {{d_model: 32, n_layers: 2, n_heads: 2, max_seq_len: 64, position: alibi, dropout: 0.1}}
data:
  corpus: {{name: text, files: "{text_file}", separator: "<|doc|>"}}
  validation_fraction: 0.2
training:
  tokens: 2560
  seq_len: 32
  global_batch_size: 8
  lr: 3e-3
  grad_clip: 0.01
  objective: {{name: cross_entropy, z_loss: 0.1}}
evaluation: {{tokens: 2000, lengths: [16, 32, 100]}}
execution: {{threads: 1, log_every: 3, micro_batch_size: 4}}
"""
    )
    return trained(yaml, folder / "runs")


def test_the_first_figures_are_those_of_the_initial_weights_on_the_first_batch(run: Run) -> None:
    """The loss without dropout and z-loss."""
    experiment, data = loader.load(run / "experiment.yaml", ["model.dropout=0"]), data_of(run)
    model = build(experiment, data.vocab_size, 0)
    ids = torch.from_numpy(data.batch(0, seed=0, seq_len=32, global_batch_size=8))
    hidden = model(ids[:, :-1]).flatten(0, 1)
    loss = linear_cross_entropy(hidden, model.output_weight, None, ids[:, 1:].flatten()) / 256
    assert result_of(run)["init/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_first_gradient_is_taken_before_clipping(tiny_yaml: Path, tmp_path: Path) -> None:
    words = ["training.grad_clip=0.001", "execution.micro_batch_size=2", "training.tokens=512"]
    run = trained(tiny_yaml, tmp_path, *words)
    experiment, data = loader.load(run / "experiment.yaml"), data_of(run)
    model = build(experiment, data.vocab_size, 0)
    ids = torch.from_numpy(data.batch(0, seed=0, seq_len=32, global_batch_size=8))
    hidden = model(ids[:, :-1]).flatten(0, 1)
    loss = linear_cross_entropy(hidden, model.output_weight, None, ids[:, 1:].flatten()) / 256
    matrix = dict(model.named_parameters())["blocks.1.ffn.w_down.weight"]
    (gradient,) = torch.autograd.grad(loss, [matrix])
    assert result_of(run)["init/grad_norm_ffn"] == pytest.approx(float(gradient.norm()), rel=1e-4)


def test_a_block_without_a_feed_forward_layer_has_no_such_gradient(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    run = trained(tiny_yaml, tmp_path, "model.ffn=none", "training.tokens=256")
    assert result_of(run)["init/grad_norm_ffn"] is None
    assert result_of(run)["init/loss"] > 5


def test_settings_are_tuned_on_windows_that_are_not_reported(run: Run) -> None:
    data = data_of(run)
    reported, _ = data.validation(2000, 32)
    tuning = data.tuning(2000, 32)
    assert len(reported) == len(tuning) == 62
    stream = np.concatenate([*reported[:, 1:], *tuning[:, 1:]])
    assert np.array_equal(stream, data.val[1 : 124 * 32 + 1])
    expected = float(nats(run, tuning).mean())
    assert result_of(run)["tuning/loss"] == pytest.approx(expected, rel=1e-5)
    assert result_of(run)["tuning/loss"] != result_of(run)["val/loss"]


def test_tuning_takes_what_is_left_and_says_none_where_nothing_is(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    run = trained(tiny_yaml, tmp_path, "evaluation.tokens=1e9", "training.tokens=256")
    data = data_of(run)
    assert result_of(run)["tuning/loss"] is None
    whole = (len(data.val) - 1) // 32
    assert len(data.tuning((whole - 3) * 32, 32)) == 3
    assert data.tuning(10**9, 32).shape == (0, 33)


def test_losses_at_other_lengths_are_by_position_and_of_the_same_tokens(run: Run) -> None:
    found, result, data = read_json(run / "lengths.json"), result_of(run), data_of(run)
    assert list(found) == ["16", "32", "100"]
    for length in (16, 32, 100):
        windows, _ = data.validation(2000, length)
        expected = nats(run, windows).mean(0)
        measured = found[str(length)]
        assert measured["windows"] == 2000 // length
        assert measured["by_position"] == pytest.approx(expected.tolist(), rel=1e-4)
        assert measured["loss"] == result[f"val/loss@{length}"]
        assert measured["loss"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert result["val/loss@32"] == pytest.approx(result["val/loss"], rel=1e-6)


def test_positions_that_end_give_null_beyond_and_no_error(tiny_yaml: Path, tmp_path: Path) -> None:
    run = trained(tiny_yaml, tmp_path, "evaluation.lengths=[64, 65]", "training.tokens=256")
    found, result = read_json(run / "lengths.json"), result_of(run)
    assert found["65"] == {"loss": None, "windows": 2000 // 65, "by_position": None}
    assert result["val/loss@65"] is None
    assert len(found["64"]["by_position"]) == 64
    assert result["val/loss@64"] == found["64"]["loss"] > 0


def test_a_length_that_no_window_has_is_one_line_before_anything_is_written(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    for words, message in (
        (["evaluation.lengths=[16, 2001]"], "2001 does not fit in evaluation.tokens, 2000"),
        (["evaluation.lengths=[16, 16]"], "16 is written twice"),
        (["evaluation.lengths=[0]"], "at least 1"),
        (["evaluation.lengths=[900000]", "evaluation.tokens=1e6"], "no window of 900,000 tokens"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            trained(tiny_yaml, tmp_path / "runs", *words)
        assert "evaluation.lengths" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not list((tmp_path / "runs").glob("*-s0"))


def test_a_diverged_run_keeps_its_first_figures_and_has_no_held_out_ones(
    tiny_yaml: Path, tmp_path: Path
) -> None:
    words = ["training.lr=1e12", "training.optimizer=sgd", "training.grad_clip=null"]
    run = trained(tiny_yaml, tmp_path, *words, "evaluation.lengths=[16]")
    result = result_of(run)
    assert result["status"] == "diverged"
    assert result["tuning/loss"] is None
    assert "val/loss@16" not in result
    assert result["init/loss"] == pytest.approx(math.log(257), abs=1.5)
    assert result["init/grad_norm_ffn"] > 0
    assert seal(run.folder, result) == result["seal"]


def test_a_result_names_its_data_and_code_and_an_edit_breaks_the_seal(run: Run) -> None:
    result = result_of(run)
    assert result["data"] == data_of(run).fingerprint
    assert set(result["code"]) == {"commit", "dirty", "source", "imports"}
    assert len(result["code"]["source"]) == 16
    assert result["code"]["imports"] is None
    assert result["versions"] == {"torch": torch.__version__}
    assert seal(run.folder, result) == result["seal"]
    metrics = (run / "metrics.jsonl").read_text()
    try:
        (run / "metrics.jsonl").write_text(metrics.replace("1", "2", 1))
        assert seal(run.folder, result) != result["seal"]
    finally:
        (run / "metrics.jsonl").write_text(metrics)


def test_imported_components_are_code_too(tiny_yaml: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.py"
    digests = []
    for text in ("VALUE = 1\n", "VALUE = 2\n"):
        theirs.write_text(text)
        run = trained(tiny_yaml, tmp_path / text[8], f'imports=["{theirs}"]', "training.tokens=256")
        digests.append(result_of(run)["code"]["imports"])
    assert digests[0] != digests[1]


# --- the floor ------------------------------------------------------------------------------------

MADE = """\
model: {{d_model: 16, n_layers: 1, n_heads: 1}}
data: {{corpus: {corpus}, validation_fraction: 0.2}}
training: {{tokens: {tokens}, seq_len: {tokens}, global_batch_size: 1, lr: 1e-3}}
evaluation: {{tokens: 2000}}
execution: {{threads: 1}}
"""


def made(folder: Path, corpus: str, tokens: int, *overrides: str) -> Run:
    (folder / "made.yaml").write_text(MADE.format(corpus=corpus, tokens=tokens))
    return trained(folder / "made.yaml", folder / "runs", *overrides)


@pytest.mark.parametrize(
    ("corpus", "tokens"),
    [
        ("{name: copy, lengths: [1, 3], documents: 2000}", 8),
        ("{name: recall, pairs: 2, documents: 2000}", 9),
        ("{name: markov, documents: 100}", 50),
    ],
)
@pytest.mark.parametrize("tokenizer", ["bytes", "characters"])
def test_the_floor_is_the_makers_own_loss_on_the_validation_tokens(
    corpus: str, tokens: int, tokenizer: str, tmp_path: Path
) -> None:
    run = made(tmp_path, corpus, tokens, f"data.tokenizer={tokenizer}")
    data, maker = data_of(run), loader.load(run / "experiment.yaml").data.corpus.build()
    windows = 2000 // tokens
    text = "".join(
        chr(0) if i == data.tokenizer.end_of_text else data.tokenizer.decode([i])
        for i in data.val.tolist()
    )
    each = [maker.surprisal(document) for document in text.split("\0")[:-1]]
    targets = np.concatenate(each)[1 : windows * tokens + 1]
    assert result_of(run)["floor/loss"] == pytest.approx(targets.mean(), rel=1e-9)
    assert 0 < result_of(run)["floor/loss"] < result_of(run)["val/loss"]


def test_no_floor_is_claimed_where_it_is_not_known(run: Run, tmp_path: Path) -> None:
    assert result_of(run)["floor/loss"] is None  # a text that people wrote
    corpus = "{name: markov, documents: 100}"
    for words in (["data.tokenizer={name: bpe, vocab_size: 300}"], ["data.filters=[dedup]"]):
        assert result_of(made(tmp_path, corpus, 50, *words))["floor/loss"] is None


def test_windows_hold_whole_documents_of_a_made_corpus(tmp_path: Path) -> None:
    run = made(tmp_path, "{name: copy, lengths: [1, 3], documents: 300}", 8)
    data = data_of(run)
    assert data.meta["window"] == 8
    assert data.holds_documents(16)
    assert not data.holds_documents(12)
    for step in (0, 5, 40):  # the first epoch and a later one
        batch = data.batch(step, seed=3, seq_len=8, global_batch_size=4)
        assert (batch[:, 7] == 256).all()
        assert (batch[:, :7] != 256).all()
    cut = data.batch(0, seed=3, seq_len=12, global_batch_size=4)
    assert any((row[:8] == 256).argmax() != 7 for row in cut)
    with pytest.raises(
        UserError, match=r"training.seq_len: .*documents of 8 tokens; a window of 9"
    ):
        made(tmp_path, "{name: copy, lengths: [1, 3], documents: 300}", 9)


# --- one function ---------------------------------------------------------------------------------


def test_losses_by_target_sum_up_to_the_loss_whatever_the_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1000, 8), torch.randn(300, 8)
    targets = torch.randint(300, (1000,))
    whole = losses_by_target(hidden, weight, targets)
    assert whole.shape == (1000,)
    monkeypatch.setattr("components.linear_cross_entropy.CHUNK", {"cpu": 300 * 256})
    torch.testing.assert_close(losses_by_target(hidden, weight, targets), whole)
    total = linear_cross_entropy(hidden, weight, None, targets)
    torch.testing.assert_close(whole.sum(), total, rtol=1e-5, atol=0)
