"""Optimizers: parameters and a learning rate in, a `torch.optim.Optimizer` out."""

from collections.abc import Iterable
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from components.registry import register

Beta = Annotated[float, Field(ge=0, lt=1)]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices (embeddings too) with weight decay; biases and norm weights without."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _fused(parameters: Iterable[torch.Tensor]) -> bool:
    return all(p.device.type in ("cpu", "cuda") for p in parameters)


@register("optimizer", "adamw")
class AdamW:
    """Adam with decay decoupled from the gradient: w -= lr (m̂ / (√v̂ + eps) + weight_decay w).

    Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization, arXiv 1711.05101. torch's
    fused kernel where it has one; decay on matrices only.
    """

    def __init__(
        self,
        *,
        betas: tuple[Beta, Beta] = (0.9, 0.95),
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        weight_decay: Annotated[float, Field(ge=0)] = 0.1,
    ) -> None:
        self.betas, self.eps, self.weight_decay = (betas[0], betas[1]), eps, weight_decay

    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters of `model`."""
        groups = [g for g in decay_groups(model, self.weight_decay) if g["params"]]
        fused = _fused(p for g in groups for p in g["params"])
        return torch.optim.AdamW(groups, lr=lr, betas=self.betas, eps=self.eps, fused=fused)


@register("optimizer", "sgd")
class SGD:
    """w -= lr v, v = momentum v + g; decay on matrices only.

    Robbins & Monro 1951; momentum after Polyak 1964. The classic for recurrent stacks.
    """

    def __init__(self, *, momentum: Beta = 0.9, weight_decay: Annotated[float, Field(ge=0)] = 0.0):
        self.momentum, self.weight_decay = momentum, weight_decay

    def build(self, model: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimizer over all trainable parameters of `model`."""
        groups = [g for g in decay_groups(model, self.weight_decay) if g["params"]]
        fused = _fused(p for g in groups for p in g["params"])
        return torch.optim.SGD(groups, lr=lr, momentum=self.momentum, fused=fused)
