"""The composed presets are the published architectures: same weights, same logits, same gradients.

The references are transformers' GPT-2 and Llama and torch's encoder layer, built from a random
configuration; nothing is fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from components.decoder import Decoder
from components.dims import Dims
from components.position import T5Bias
from experiments.loader import load

transformers = pytest.importorskip("transformers", reason="needs the test extra")

VOCAB, CONTEXT = 97, 48


def decoder(preset: str, *overrides: str) -> Decoder:
    """A shipped preset, scaled down, with initial values that keep small effects visible."""
    experiment = load(preset, [*overrides, "training.seq_len=16"])
    m = experiment.model
    model = Decoder(experiment.dims(VOCAB), m.specs, m.tie_embeddings).initialise(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            start = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(start + 0.15 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@torch.no_grad()
def fill(reference: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights in by name; every parameter of the reference must be given."""
    parameters = dict(reference.named_parameters())
    assert parameters.keys() == weights.keys()
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], what: str) -> None:
    """Within 2e-5 of the largest number of each tensor."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        error = (ours[name] - expected).abs().max() / expected.abs().max()
        assert error < 2e-5, f"{what} {name}: relative difference {error:.1e}"


def gradients_of(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def loss_of(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def compare(model: Decoder, reference: Any, rename: Any) -> None:
    """Loads `rename(ours)` into the reference and compares logits, loss and all gradients."""
    fill(reference, rename(dict(model.named_parameters())))
    ids = torch.randint(VOCAB, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    ours, theirs = model.logits(model(ids)), reference.eval()(ids).logits
    assert ours.std() > 0.1
    assert_same({"logits": ours.detach()}, {"logits": theirs.detach()}, "all")
    found = rename(gradients_of(loss_of(ours, ids), model))
    assert_same(found, gradients_of(loss_of(theirs, ids), reference), "gradient of")


SMALL = ("model.d_model=48", "model.n_layers=3", f"model.max_seq_len={CONTEXT}")


def as_gpt2(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our names to theirs; their matrices are (in, out), with q, k and v in one."""
    named = {
        "transformer.wte.weight": ours["tok_emb.weight"],
        "transformer.wpe.weight": ours["position.table.weight"],
        "transformer.ln_f.weight": ours["final_norm.weight"],
        "transformer.ln_f.bias": ours["final_norm.bias"],
    }
    parts = {"mixer.w_o": "attn.c_proj", "ffn.w_up": "mlp.c_fc", "ffn.w_down": "mlp.c_proj"}
    norms = {"mixer_norm": "ln_1", "ffn_norm": "ln_2"}
    for layer in range(3):
        mine, theirs = f"blocks.{layer}.", f"transformer.h.{layer}."
        for end in ("weight", "bias"):
            joined = torch.cat([ours[f"{mine}mixer.{w}.{end}"] for w in ("w_q", "w_k", "w_v")])
            named[f"{theirs}attn.c_attn.{end}"] = joined.T if end == "weight" else joined
            for a, b in parts.items():
                value = ours[f"{mine}{a}.{end}"]
                named[f"{theirs}{b}.{end}"] = value.T if end == "weight" else value
            for a, b in norms.items():
                named[f"{theirs}{b}.{end}"] = ours[f"{mine}{a}.{end}"]
    return named


def test_the_gpt2_preset_is_gpt2() -> None:
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=CONTEXT, n_embd=48, n_layer=3, n_head=4,
        bos_token_id=0, eos_token_id=0, attn_implementation="eager",
    )  # fmt: skip
    model = decoder("gpt2", *SMALL, "model.n_heads=4")
    compare(model, transformers.GPT2LMHeadModel(config), as_gpt2)


def as_llama(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named = {
        "model.embed_tokens.weight": ours["tok_emb.weight"],
        "model.norm.weight": ours["final_norm.weight"],
        "lm_head.weight": ours["lm_head.weight"],
    }
    parts = {
        "mixer.w_q": "self_attn.q_proj",
        "mixer.w_k": "self_attn.k_proj",
        "mixer.w_v": "self_attn.v_proj",
        "mixer.w_o": "self_attn.o_proj",
        "ffn.w_gate": "mlp.gate_proj",
        "ffn.w_up": "mlp.up_proj",
        "ffn.w_down": "mlp.down_proj",
        "mixer_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    for layer in range(3):
        for a, b in parts.items():
            named[f"model.layers.{layer}.{b}.weight"] = ours[f"blocks.{layer}.{a}.weight"]
    return named


@pytest.mark.parametrize("theta", [10000.0, 500.0])
def test_the_llama_preset_is_llama(theta: float) -> None:
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=CONTEXT, hidden_size=48, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, intermediate_size=80, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=False, attn_implementation="eager",
    )  # fmt: skip
    model = decoder(
        "llama-160m", *SMALL, "model.n_heads=6", "model.mixer.n_kv_heads=2",
        "model.ffn.hidden=80", f"model.position.theta={theta}",
    )  # fmt: skip
    compare(model, transformers.LlamaForCausalLM(config), as_llama)


class Vaswani(nn.Module):
    """Section 3 of the paper with torch's own layers: √d embeddings, sines, Post-LN, ReLU."""

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.embedding = nn.Embedding(dims.vocab_size, dims.d_model)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dims.d_model, dims.n_heads, 64, dropout=0.0, activation="relu",
                layer_norm_eps=1e-6, batch_first=True, norm_first=False,
            )
            for _ in range(dims.n_layers)
        )  # fmt: skip

    def forward(self, ids: Tensor) -> Tensor:
        length, width = ids.shape[1], self.embedding.embedding_dim
        place, pair = torch.arange(length)[:, None], torch.arange(0, width, 2)
        angle = place / 10000 ** (pair / width)
        table = torch.zeros(length, width)
        table[:, 0::2], table[:, 1::2] = angle.sin(), angle.cos()
        x = self.embedding(ids) * width**0.5 + table
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        for layer in self.layers:
            x = layer(x, src_mask=hidden)
        return x @ self.embedding.weight.T


def test_the_original_transformer_preset_is_torchs_post_norm_layers() -> None:
    model = decoder(
        "original-transformer", *SMALL, "model.n_heads=4", "model.ffn.hidden=64",
        "model.mixer.bias=true",  # torch's layers have one
    )  # fmt: skip
    reference = Vaswani(model.dims).train()  # with dropout 0; its fast path needs evaluation

    def rename(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {"embedding.weight": ours["tok_emb.weight"]}
        parts = {
            "mixer.w_o": "self_attn.out_proj",
            "ffn.w_up": "linear1",
            "ffn.w_down": "linear2",
            "mixer_norm": "norm1",
            "ffn_norm": "norm2",
        }
        for layer in range(3):
            mine, theirs = f"blocks.{layer}.", f"layers.{layer}."
            for end in ("weight", "bias"):
                joined = torch.cat([ours[f"{mine}mixer.{w}.{end}"] for w in ("w_q", "w_k", "w_v")])
                named[f"{theirs}self_attn.in_proj_{end}"] = joined
                named |= {f"{theirs}{b}.{end}": ours[f"{mine}{a}.{end}"] for a, b in parts.items()}
        return named

    fill(reference, rename(dict(model.named_parameters())))
    ids = torch.randint(VOCAB, (2, CONTEXT), generator=torch.Generator().manual_seed(1))
    ours, theirs = model.logits(model(ids)), reference(ids)
    assert_same({"logits": ours.detach()}, {"logits": theirs.detach()}, "all")
    expected = gradients_of(loss_of(theirs, ids), reference)
    found = rename(gradients_of(loss_of(ours, ids), model))
    assert_same(found, expected, "gradient of")


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 5), (6, 20)])
def test_t5s_buckets_of_distances_are_t5s(buckets: int, max_distance: int) -> None:
    attention = transformers.models.t5.modeling_t5.T5Attention
    dims = Dims(d_model=32, n_layers=1, n_heads=4, head_dim=8, max_seq_len=16, vocab_size=VOCAB)
    ours = T5Bias(dims, buckets=buckets, max_distance=max_distance)
    distance = torch.arange(-5, 400)
    theirs = attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=buckets, max_distance=max_distance
    )
    assert torch.equal(ours.bucket(distance), theirs)
    assert set(theirs.tolist()) <= set(range(buckets))
    torch.nn.init.normal_(ours.table)
    bias = ours.bias(ours.tables(torch.tensor([5, 6]), torch.arange(7)))
    assert bias is not None
    assert bias.shape == (4, 2, 7)
    assert torch.equal(bias[:, 1, 2], ours.table[:, theirs[4 + 5]])
