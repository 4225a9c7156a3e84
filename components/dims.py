"""The dimensions that the harness passes to every part of a model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from components.products import linear


@dataclass(frozen=True)
class Dims:
    """What a component may need to know of the whole.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads, head_dim: query heads and the width of one.
        max_seq_len: longest context in tokens (the size of a learned position table).
        vocab_size: tokens in the vocabulary.
        dropout: probability of zeroing an embedding, a residual branch or an attention weight.
    """

    d_model: int
    n_layers: int
    n_heads: int
    head_dim: int
    max_seq_len: int
    vocab_size: int
    dropout: float = 0.0


class Linear(nn.Linear):
    """torch's, but drawn once: `init` sets every number, so none is drawn on construction.

    In bf16 it is fast on any CPU; see components/products.py.
    """

    def reset_parameters(self) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class Embedding(nn.Embedding):
    """torch's, but drawn once, as `Linear`."""

    def reset_parameters(self) -> None:
        pass


class ResidualLinear(Linear):
    """A linear layer whose output is added to the residual stream.

    The type tells `init` rules which matrices to scale down with depth.
    """


def linear_columns(x: Tensor, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Several linear layers of one input as a single matrix product.

    Under autocast the input is then cast once, and one large product replaces small ones; the
    layers stay separate parameters, each with its own name and initial values.

    Shapes: `(..., D)` to one `(..., out)` per layer.
    """
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    bias = torch.cat([b for b in biases if b is not None]) if biases[0] is not None else None
    return linear(x, weight, bias).split([layer.out_features for layer in layers], dim=-1)
