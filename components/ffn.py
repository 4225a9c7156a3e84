"""Feed-forward layers: `(B, T, D) -> (B, T, D)`, each position by itself.

Hidden widths are multiples of `multiple_of`. Unless `hidden` is given, an ungated layer is 4 d
wide and a gated one 2/3 of that, so that both have the same parameters (Shazeer 2020, section 2).
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor, nn

from components.dims import Dims, Linear, ResidualLinear, linear_columns
from components.registry import Slot, Spec, build, register

Activation = Annotated[Spec, Slot("activation")]
Width = Annotated[int, Field(ge=1)]


def rounded(width: float, multiple: int) -> int:
    """The multiple nearest to `width`, at least one."""
    return max(multiple, round(width / multiple) * multiple)


@register("ffn", "mlp")
class MLP(nn.Module):
    """y = W_down act(W_up x).

    Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762, equation 2.
    """

    def __init__(
        self,
        dims: Dims,
        layer: int,
        *,
        hidden: Width | None = None,
        activation: Activation = "gelu",  # type: ignore[assignment]
        bias: bool = False,
        multiple_of: Width = 8,
    ) -> None:
        super().__init__()
        hidden = hidden or rounded(4 * dims.d_model, multiple_of)
        self.w_up = Linear(dims.d_model, hidden, bias)
        self.activation = build("activation", activation)
        self.w_down = ResidualLinear(hidden, dims.d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(self.activation(self.w_up(x)))


@register("ffn", "gated")
class Gated(nn.Module):
    """y = W_down (act(W_gate x) * W_up x), with any activation for the gate.

    Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202, equation 6.
    """

    def __init__(
        self,
        dims: Dims,
        layer: int,
        *,
        hidden: Width | None = None,
        activation: Activation = "silu",  # type: ignore[assignment]
        bias: bool = False,
        multiple_of: Width = 8,
    ) -> None:
        super().__init__()
        hidden = hidden or rounded(8 * dims.d_model / 3, multiple_of)
        self.w_gate = Linear(dims.d_model, hidden, bias)
        self.w_up = Linear(dims.d_model, hidden, bias)
        self.activation = build("activation", activation)
        self.w_down = ResidualLinear(hidden, dims.d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = linear_columns(x, self.w_gate, self.w_up)
        return self.w_down(self.activation(gate) * up)


class _Named(Gated):
    """A gated layer whose activation is part of its name."""

    gate = ""

    def __init__(
        self,
        dims: Dims,
        layer: int,
        *,
        hidden: Width | None = None,
        bias: bool = False,
        multiple_of: Width = 8,
    ) -> None:
        activation = build_spec(self.gate)
        super().__init__(
            dims, layer, hidden=hidden, activation=activation, bias=bias, multiple_of=multiple_of
        )


def build_spec(name: str) -> Spec:
    """The gate's activation as the Spec that `Gated` takes."""
    return Spec("activation", name, {"approximate": "none"} if name == "gelu" else {})


@register("ffn", "glu")
class GLU(_Named):
    """y = W_down (sigmoid(W_gate x) * W_up x).

    Dauphin et al. 2017, arXiv 1612.08083; as a feed-forward layer Shazeer 2020, GLU Variants
    Improve Transformer, arXiv 2002.05202.
    """

    gate = "sigmoid"


@register("ffn", "swiglu")
class SwiGLU(_Named):
    """y = W_down (silu(W_gate x) * W_up x).

    Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    gate = "silu"


@register("ffn", "geglu")
class GEGLU(_Named):
    """y = W_down (gelu(W_gate x) * W_up x).

    Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    gate = "gelu"


@register("ffn", "reglu")
class ReGLU(_Named):
    """y = W_down (relu(W_gate x) * W_up x).

    Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    gate = "relu"


@register("ffn", "bilinear")
class Bilinear(_Named):
    """y = W_down (W_gate x * W_up x): a gate without an activation.

    Shazeer 2020, GLU Variants Improve Transformer, arXiv 2002.05202.
    """

    gate = "identity"


@register("ffn", "none")
class NoFFN(nn.Module):
    """No feed-forward layer: the block leaves that branch out, its norm included."""

    def __init__(self, dims: Dims, layer: int) -> None:
        super().__init__()
