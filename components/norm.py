"""Normalisation layers: `(..., width) -> (..., width)`.

`constants` gives the initial value of parameters that start at a constant; every component that
has one-dimensional parameters names theirs this way.
"""

from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from components.pointwise_cpu import rms_norm
from components.registry import register

Epsilon = Annotated[float, Field(gt=0)]


@register("norm", "layernorm")
class LayerNorm(nn.Module):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    Ba, Kiros & Hinton 2016, Layer Normalization, arXiv 1607.06450.
    """

    constants: ClassVar = {"weight": 1.0, "bias": 0.0}

    def __init__(self, width: int, *, eps: Epsilon = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


@register("norm", "rmsnorm")
class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) * weight: no mean is taken off, no bias.

    Zhang & Sennrich 2019, Root Mean Square Layer Normalization, arXiv 1910.07467.
    """

    constants: ClassVar = {"weight": 1.0}

    def __init__(self, width: int, *, eps: Epsilon = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast queries come as bf16 and the weight does not, which no fused kernel takes.
        return rms_norm(x.to(self.weight.dtype), self.weight, self.eps)


@register("norm", "dyt")
class DynamicTanh(nn.Module):
    """y = weight * tanh(alpha * x) + bias: no statistics at all.

    Zhu et al. 2025, Transformers without Normalization, arXiv 2503.10622, equation 1.
    """

    def __init__(self, width: int, *, alpha: Annotated[float, Field(gt=0)] = 0.5) -> None:
        super().__init__()
        self.constants = {"alpha": alpha, "weight": 1.0, "bias": 0.0}
        self.alpha = nn.Parameter(torch.empty(1))
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, torch.tanh(self.alpha * x), self.weight)


@register("norm", "none")
class NoNorm(nn.Identity):
    """y = x: what a norm is worth."""

    def __init__(self, width: int) -> None:
        super().__init__()
