"""Losses of a model in training, over windows of held-out or training text, in nats.

Every process takes its share of the windows; what is returned is over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from experiments.data import Dataset
from experiments.model import LanguageModel
from experiments.schema import Experiment


class Measure:
    """Sums cross-entropies with a model as it stands at that moment, without dropout.

    Args:
        at_once: tokens that go through the model at once on one device.
        pulse: called after each piece, as a sign of life.
    """

    def __init__(
        self,
        language: LanguageModel,
        accelerator: Accelerator,
        at_once: int,
        pulse: Callable[[], object],
    ) -> None:
        self.language, self.accelerator = language, accelerator
        self.at_once, self.pulse = at_once, pulse
        device = accelerator.device
        # float64 adds up millions of losses without loss; mps has none
        self.device = torch.device("cpu") if device.type == "mps" else device

    def total(self, windows: np.ndarray) -> float:
        """`(n, T+1)` tokens -> the summed loss of their n x T targets."""
        return float(self._summed(windows, self.language.nats, ()))

    def mean(self, windows: np.ndarray) -> float | None:
        """The mean loss of a target; None of no windows, or where it is not finite."""
        targets = windows.shape[0] * (windows.shape[1] - 1)
        return finite(self.total(windows) / targets) if targets else None

    def by_position(self, windows: np.ndarray) -> list[float]:
        """`(n, T+1)` tokens, n > 0 -> the mean loss of each of the T positions."""
        shape = (windows.shape[1] - 1,)
        return (self._summed(windows, self._per_position, shape) / len(windows)).tolist()

    def _per_position(self, windows: Tensor) -> Tensor:
        return self.language.nats_by_target(windows).sum(0, dtype=torch.float32)

    @torch.no_grad()
    def _summed(
        self, windows: np.ndarray, measure: Callable[[Tensor], Tensor], shape: tuple[int, ...]
    ) -> Tensor:
        accelerator, decoder = self.accelerator, self.language.decoder
        processes, mine = int(accelerator.num_processes), accelerator.process_index
        rows = max(1, self.at_once // (windows.shape[1] - 1))
        share = torch.from_numpy(windows[mine::processes])
        pieces = share.split(rows) if len(share) else ()
        passes = len(pieces)
        if accelerator.is_fsdp2:  # others may have one more, and gather parameters for it
            passes = math.ceil(len(windows[::processes]) / rows)
        sums = torch.zeros(shape, dtype=torch.float64, device=self.device)
        decoder.eval()
        for index in range(passes):
            surplus = index >= len(pieces)
            piece = torch.from_numpy(windows[:rows]) if surplus else pieces[index]
            with accelerator.autocast():
                nats = measure(piece.to(accelerator.device))
            sums += 0.0 if surplus else nats.to(sums)
            self.pulse()
        decoder.train()
        return accelerator.reduce(sums, "sum") if processes > 1 else sums


def at_lengths(
    experiment: Experiment, data: Dataset, measure: Measure
) -> dict[str, dict[str, Any]]:
    """What lengths.json holds: by length in tokens, the loss in windows of it, and by position.

    The windows tile as many validation tokens as those of `val/loss`, from the same place. A
    position that has no meaning there (a learned table that is too short) gives null.
    """
    found: dict[str, dict[str, Any]] = {}
    limited = measure.language.decoder.position.limited
    for length in experiment.evaluation.lengths:
        windows, _ = data.validation(experiment.evaluation.tokens, length)
        losses: list[float | None] | None = None
        if not (limited and length > experiment.max_seq_len):
            losses = [finite(loss) for loss in measure.by_position(windows)]
        known = [loss for loss in losses or () if loss is not None]
        loss = sum(known) / length if len(known) == length else None
        found[str(length)] = {"loss": loss, "windows": len(windows), "by_position": losses}
    return found


def floor(experiment: Experiment, data: Dataset, windows: int) -> float | None:
    """The loss on the first `windows` validation windows of the one who made the text: nats per
    token that no model can expect to go below. None where it is not known: the corpus does not
    know it, filters have changed it, or a token is not one of its characters.
    """
    predicted = windows * experiment.training.seq_len
    ids = np.asarray(data.val[: predicted + 1])
    held = ids != data.tokenizer.end_of_text
    if experiment.data.filters or np.any(data.val_bytes[: predicted + 1] != held):
        return None
    surprisal = getattr(experiment.data.corpus.build(), "surprisal", None)
    if surprisal is None:
        return None
    nats: list[float] = []
    for part in np.split(ids, np.flatnonzero(~held) + 1):  # the last one may be cut off
        known = surprisal(data.tokenizer.decode(part.tolist()))
        if known is None:
            return None
        nats += known[: len(part)]
    return math.fsum(nats[1:]) / predicted


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
