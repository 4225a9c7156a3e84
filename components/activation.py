"""Activations: elementwise, `(...) -> (...)`, no parameters."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from components.pointwise_cpu import gelu_tanh
from components.registry import register


@register("activation", "gelu")
class GELU(nn.Module):
    """y = x Φ(x), Φ the normal distribution function; GPT-2 uses the tanh approximation.

    Hendrycks & Gimpel 2016, Gaussian Error Linear Units, arXiv 1606.08415.
    """

    def __init__(self, *, approximate: Literal["tanh", "none"] = "tanh") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return gelu_tanh(x) if self.approximate == "tanh" else F.gelu(x)


@register("activation", "relu")
class ReLU(nn.Module):
    """y = max(x, 0).

    Nair & Hinton 2010, Rectified Linear Units Improve Restricted Boltzmann Machines, ICML.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


@register("activation", "relu2")
class SquaredReLU(nn.Module):
    """y = max(x, 0)².

    So et al. 2021, Primer: Searching for Efficient Transformers, arXiv 2109.08668.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


@register("activation", "silu")
class SiLU(nn.Module):
    """y = x sigmoid(x), also called swish.

    Elfwing, Uchibe & Doya 2017, Sigmoid-Weighted Linear Units, arXiv 1702.03118.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


@register("activation", "sigmoid")
class Sigmoid(nn.Module):
    """y = 1 / (1 + exp(-x)).

    The gate of Dauphin et al. 2017, Language Modeling with Gated Convolutional Networks,
    arXiv 1612.08083.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid()


@register("activation", "identity")
class Identity(nn.Identity):
    """y = x: what a bilinear gate uses."""

    def __init__(self) -> None:
        super().__init__()
