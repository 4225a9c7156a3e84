"""The loss over the vocabulary without the logits: linear layer and cross-entropy in one.

Logits of N tokens over V words are the largest tensor of a small model's step, and the plain way
holds them about five times over. Here rows go through in chunks, and each chunk's gradients are
taken while its logits exist: three products per chunk, and the rest happens in the cache. The
forward pass therefore does the backward's work, and the backward only multiplies by a scalar.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from components.products import linear, product

IGNORE = -100
"""The target of a position that has none."""

CHUNK = {"cpu": 1 << 24, "cuda": 1 << 27}
"""Logits that exist at once: enough rows for the products to run at full speed."""

CHUNKED_FROM = 256
"""Words in the vocabulary from which chunks are faster than `plain` on a CPU."""

CACHE = {"cpu": 1 << 18}
"""Logits that the softmax works on at once (elsewhere, the whole chunk)."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    z_loss: float = 0.0,
    chunk: int | None = None,
) -> Tensor:
    """The summed negative log-likelihood (nats) of `targets` under softmax(hidden weight^T + bias).

    hidden (N, D), weight (V, D), bias (V) or None, targets (N) int64, where -100 marks a position
    that counts for nothing. Adds `z_loss` times the sum of squared log-normalisers (PaLM,
    arXiv:2204.02311). Returns a scalar, in fp32 at least. `chunk` is the number of rows whose
    logits exist at once; by default as many as run at full speed. Products follow autocast; the
    softmax is in fp32. Differentiable once.
    """
    device = hidden.device.type
    vocabulary = weight.shape[0]
    if device == "meta" or (chunk is None and vocabulary < CHUNKED_FROM):
        return plain(hidden, weight, bias, targets, z_loss)
    dtype = hidden.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    rows = chunk or max(256, CHUNK.get(device, 1 << 24) // vocabulary)
    train = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (hidden, weight, bias)
    )
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, z_loss, rows, dtype, train)


def plain(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, z_loss: float = 0.0
) -> Tensor:
    """The definition, with whole logits; what the FLOP counter sees."""
    logits = linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORE)
    if z_loss:
        loss = loss + z_loss * (logits.logsumexp(-1).square() * (targets != IGNORE)).sum()
    return loss


@torch.no_grad()
def losses_by_target(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """`(N, D)`, `(V, D)`, `(N,)` -> `(N,)` in fp32: each target's negative log-likelihood (nats).

    As `linear_cross_entropy` it holds the logits of a chunk of the rows at once.
    """
    rows = max(256, CHUNK.get(hidden.device.type, 1 << 24) // weight.shape[0])
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat(
        [F.cross_entropy(linear(h, weight).float(), t, reduction="none") for h, t in parts]
    )


class LinearCrossEntropy(torch.autograd.Function):
    """`apply(hidden, weight, bias, targets, z_loss, rows, dtype of the products, train)`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        z_loss: float, rows: int, dtype: torch.dtype, train: bool,
    ) -> Tensor:  # fmt: skip
        exact = torch.promote_types(dtype, torch.float32)
        count = max(1, math.ceil(hidden.shape[0] / rows))
        rows = math.ceil(hidden.shape[0] / count)  # no small chunk at the end
        loss = hidden.new_zeros((), dtype=exact)
        d_hidden = torch.empty_like(hidden) if train and ctx.needs_input_grad[0] else None
        d_weight: Tensor | None = None
        d_bias = None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)
            b = None if bias is None else bias.to(dtype)
            for start in range(0, hidden.shape[0], max(1, rows)):
                part = slice(start, start + rows)
                h = hidden[part].to(dtype)
                logits = linear(h, w, b)
                loss += losses(logits, targets[part], z_loss, exact, train)
                if d_hidden is not None:
                    d_hidden[part] = product(logits, w)
                if train and ctx.needs_input_grad[1]:
                    added = product(logits.T, h).to(exact)
                    d_weight = added if d_weight is None else d_weight.add_(added)
                if train and ctx.needs_input_grad[2]:
                    total = logits.sum(0, dtype=exact)
                    d_bias = total if d_bias is None else d_bias.add_(total)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (
            None if d is None else (d * grad).to(dtype)
            for d, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *scaled, None, None, None, None, None


def losses(
    logits: Tensor, targets: Tensor, z_loss: float, exact: torch.dtype, train: bool
) -> Tensor:
    """The chunk's summed loss; in training, `logits` (rows, V) become their own gradient."""
    rows, total = logits.shape[0], logits.new_zeros((), dtype=exact)
    step = max(1, CACHE.get(logits.device.type, logits.numel()) // logits.shape[1])
    step = rows if torch.compiler.is_compiling() else step  # the compiler fuses by itself
    counted = (targets != IGNORE).to(exact)[:, None]
    targets = targets.clamp_min(0)[:, None]
    for start in range(0, rows, step):
        part = slice(start, start + step)
        # The largest probability is the largest logit's: log-normaliser = max logit - log max p.
        largest, chosen = logits[part].amax(-1, True), logits[part].gather(1, targets[part])
        p = torch.softmax(logits[part], -1, dtype=exact)
        normaliser = largest.to(exact) - p.amax(-1, True).log_()
        loss = normaliser - chosen.to(exact)
        if z_loss:
            loss += z_loss * normaliser.square()
        total += (loss * counted[part]).sum()
        if train:
            p *= counted[part] * (1 + 2 * z_loss * normaliser)
            p.scatter_add_(1, targets[part], -counted[part])
            logits[part] = p
    return total
