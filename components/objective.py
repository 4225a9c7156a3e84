"""Objectives: final hidden states and targets to the sum of losses that training minimises."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from components.functional import linear_cross_entropy
from components.registry import register


@register("objective", "cross_entropy")
class CrossEntropy:
    """Σ -log softmax(W h)[target] + z_loss Σ (log Σ exp(W h))², in nats.

    The second term keeps the logits' normaliser near one (Chowdhery et al. 2022, PaLM,
    arXiv 2204.02311, section 5). Logits are never held for the whole batch where that costs
    memory: see `components.functional.linear_cross_entropy`.
    """

    def __init__(self, *, z_loss: Annotated[float, Field(ge=0)] = 0.0) -> None:
        self.z_loss = z_loss

    def __call__(self, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """`(N, D)`, `(V, D)`, `(N,)` -> a scalar, summed over the N targets (not -100)."""
        return linear_cross_entropy(hidden, weight, None, targets, z_loss=self.z_loss)
