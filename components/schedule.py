"""Learning-rate schedules: `factor(step, steps)` multiplies the experiment's `training.lr`.

All warm up linearly over `warmup_fraction` of the steps, then follow their own shape down to
`min_lr_ratio`. Fractions, not steps, so that a changed budget keeps the shape.
"""

import math
from typing import Annotated

from pydantic import Field

from components.registry import register

Fraction = Annotated[float, Field(ge=0, le=1)]


class Schedule:
    """Linear warm-up, then `shape(progress)` with progress in [0, 1] over the rest."""

    def __init__(self, *, warmup_fraction: Fraction = 0.05, min_lr_ratio: Fraction = 0.1) -> None:
        self.warmup_fraction, self.min_lr_ratio = warmup_fraction, min_lr_ratio

    def factor(self, step: int, steps: int) -> float:
        """The multiplier for step 0 … steps-1; the first step of a warm-up is not zero."""
        warmup = round(self.warmup_fraction * steps)
        if step < warmup:
            return (step + 1) / warmup
        return self.shape((step - warmup) / max(1, steps - 1 - warmup))

    def shape(self, progress: float) -> float:
        return 1.0

    def between(self, weight: float) -> float:
        """`min_lr_ratio` at weight 0, one at weight 1."""
        return self.min_lr_ratio + (1.0 - self.min_lr_ratio) * weight


@register("schedule", "cosine")
class Cosine(Schedule):
    """Half a cosine from lr to min_lr_ratio lr.

    Loshchilov & Hutter 2016, SGDR, arXiv 1608.03983, equation 5, one cycle.
    """

    def shape(self, progress: float) -> float:
        return self.between(0.5 * (1.0 + math.cos(math.pi * progress)))


@register("schedule", "linear")
class Linear(Schedule):
    """A straight line from lr to min_lr_ratio lr.

    Defazio et al. 2023, When, Why and How Much? Adaptive Learning Rate Scheduling by
    Refinement, arXiv 2310.07831.
    """

    def shape(self, progress: float) -> float:
        return self.between(1.0 - progress)


@register("schedule", "wsd")
class WarmupStableDecay(Schedule):
    """Constant, then straight down to min_lr_ratio lr over the last `decay_fraction`.

    Hu et al. 2024, MiniCPM, arXiv 2404.06395, equation 1 with linear decay.
    """

    def __init__(
        self,
        *,
        warmup_fraction: Fraction = 0.05,
        min_lr_ratio: Fraction = 0.1,
        decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2,
    ) -> None:
        super().__init__(warmup_fraction=warmup_fraction, min_lr_ratio=min_lr_ratio)
        self.decay_fraction = decay_fraction

    def shape(self, progress: float) -> float:
        return self.between(min(1.0, (1.0 - progress) / self.decay_fraction))


@register("schedule", "constant")
class Constant(Schedule):
    """lr throughout, after the warm-up."""

    def __init__(self, *, warmup_fraction: Fraction = 0.05) -> None:
        super().__init__(warmup_fraction=warmup_fraction, min_lr_ratio=1.0)
