"""Initial values: the spread of each matrix by its role, constants, and what a component claims."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from components.decoder import Decoder
from components.dims import Dims
from components.init import FanIn, draw, initialise
from components.registry import UserError, spec

D, LAYERS, HIDDEN, VOCAB, CONTEXT = 96, 8, 160, 300, 80
DIMS = Dims(D, LAYERS, n_heads=4, head_dim=24, max_seq_len=CONTEXT, vocab_size=VOCAB)


def model(init: Any, **changes: Any) -> Decoder:
    parts = {
        "norm": "layernorm",
        "position": "learned",
        "mixer": {"name": "attention", "bias": True, "qk_norm": True},
        "ffn": {"name": "mlp", "hidden": HIDDEN, "bias": True},
        "block": "pre",
        "init": init,
        **changes,
    }
    specs = {kind: spec(kind, value) for kind, value in parts.items()}
    return Decoder(DIMS, specs, tie_embeddings=False).initialise(0)


XAVIER_SQUARE, XAVIER_FFN = (1 / D) ** 0.5, (2 / (D + HIDDEN)) ** 0.5
DEEP = (2 * LAYERS) ** -0.5


@pytest.mark.parametrize(
    ("init", "embedding", "w_q", "w_o", "w_up", "w_down", "lm_head"),
    [
        ("gpt2", 0.02, 0.02, 0.02 * DEEP, 0.02, 0.02 * DEEP, 0.02),
        ({"name": "gpt2", "std": 0.1, "scale_residual": False}, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1),
        (
            "fan_in", D**-0.5, D**-0.5, D**-0.5 * DEEP, D**-0.5, HIDDEN**-0.5 * DEEP, D**-0.5,
        ),
        (
            "xavier", D**-0.5, XAVIER_SQUARE, XAVIER_SQUARE, XAVIER_FFN, XAVIER_FFN,
            (2 / (D + VOCAB)) ** 0.5,
        ),
    ],
    ids=["gpt2", "gpt2-set", "fan_in", "xavier"],
)  # fmt: skip
def test_each_matrix_has_the_spread_of_its_role(
    init: Any, embedding: float, w_q: float, w_o: float, w_up: float, w_down: float, lm_head: float
) -> None:
    made = dict(model(init).named_parameters())
    for name, std in {
        "tok_emb.weight": embedding,
        "position.table.weight": embedding,
        "blocks.3.mixer.w_q.weight": w_q,
        "blocks.3.mixer.w_o.weight": w_o,
        "blocks.3.ffn.w_up.weight": w_up,
        "blocks.3.ffn.w_down.weight": w_down,
        "lm_head.weight": lm_head,
    }.items():
        assert made[name].std().item() == pytest.approx(std, rel=0.05), name
        assert abs(made[name].mean().item()) < 0.05 * std, name


def test_norm_weights_start_at_one_and_biases_at_zero() -> None:
    for name, value in model("gpt2").named_parameters():
        if "norm" in name and name.endswith("weight"):
            assert value.eq(1).all(), name
        elif name.endswith("bias"):
            assert value.eq(0).all(), name
        else:
            assert value.ndim == 2


def test_a_dynamic_tanh_starts_at_its_alpha() -> None:
    made = dict(model("fan_in", norm={"name": "dyt", "alpha": 0.8}).named_parameters())
    assert made["final_norm.alpha"].item() == pytest.approx(0.8)


def test_an_lstms_forget_gate_starts_open_and_its_other_biases_at_zero() -> None:
    made = dict(model("fan_in", mixer="lstm").named_parameters())
    bias = made["blocks.0.mixer.lstm.bias_ih_l0"]
    ingate, forget, cell, out = (bias + made["blocks.0.mixer.lstm.bias_hh_l0"]).chunk(4)
    assert forget.eq(1).all()
    assert not any(gate.any() for gate in (ingate, cell, out))
    assert made["blocks.0.mixer.lstm.weight_hh_l0"].std().item() == pytest.approx(D**-0.5, rel=0.05)


def test_what_is_drawn_depends_on_seed_name_and_shape_alone() -> None:
    shape = torch.Size([5, 4])
    first = draw(0, "a", shape, 1.0)
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(draw(0, "a", shape, 1.0), first)
    assert torch.equal(draw(0, "a", shape, 0.5), first / 2)
    assert not torch.equal(draw(1, "a", shape, 1.0), first)
    assert not torch.equal(draw(0, "b", shape, 1.0), first)


def test_initial_values_are_all_set_and_none_is_left_to_the_layer() -> None:
    """A value that torch's own layers drew would follow the global generator."""
    torch.manual_seed(0)
    first = model("fan_in", ffn="swiglu").state_dict()
    torch.manual_seed(1)
    again = model("fan_in", ffn="swiglu").state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


class Gain(nn.Module):
    """A parameter of one dimension that doesn't say how it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(3))


class SaidGain(Gain):
    constants: ClassVar = {"gain": 0.25}


class Outer(nn.Module):
    """Claims a parameter of a module inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Gain()

    def initialise(self, name: str, parameter: Tensor) -> bool:
        assert name == "inner.gain"
        parameter.fill_(7.0)
        return True


def test_a_vector_without_initial_value_is_an_error_that_says_what_to_write() -> None:
    with pytest.raises(UserError) as error:
        initialise(nn.Sequential(Gain()), FanIn(), DIMS, 0)
    assert "Gain: parameter 'gain' of 0.gain" in str(error.value)
    assert "constants = {'gain': value}" in str(error.value)


def test_constants_and_claims_say_how_a_vector_starts() -> None:
    parts = nn.Sequential(SaidGain(), Outer(), nn.RMSNorm(3))
    initialise(parts, FanIn(), DIMS, 0)
    starts = {name: p.unique().item() for name, p in parts.named_parameters()}
    assert starts == {"0.gain": 0.25, "1.inner.gain": 7.0, "2.weight": 1.0}
