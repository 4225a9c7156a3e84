"""`components.attention_cpu` inside torch.compile: two operators that the compiler does not open.

Traced, the blocks would become a graph of many small products, slow to compile and no faster. Each
operator states the shapes of what it returns; the forward one returns what the backward one needs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from components.attention_cpu import BlockedAttention, Plan, keeps, planned


class Saved:
    """Stands in for autograd's context where `BlockedAttention` is one step of a compiled graph."""

    def __init__(self, plan: Plan | None = None, tensors: Sequence[Tensor | None] = ()) -> None:
        self.plan, self.saved_tensors = plan, tuple(tensors)

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


@torch.library.custom_op("ceteris::blocked_attention", mutates_args=())
def compiled(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int | None, keep: bool
) -> list[Tensor]:
    """`BlockedAttention` as one operator: the output, then what the backward needs."""
    context: Any = Saved()
    out = BlockedAttention.forward(context, q, k, v, bias, window, keep)
    keys, values, _, *rest = context.saved_tensors
    if not keep:
        return [out]
    own = [a.clone() if a.data_ptr() == b.data_ptr() else a for a, b in ((keys, k), (values, v))]
    return [out, *own, *rest]


@compiled.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int | None, keep: bool
) -> list[Tensor]:
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3]).transpose(1, 2)
    if not keep:
        return [out]
    plan = Plan(q.shape, k.shape, q.dtype, window)
    scores = [plan.shape(block, k.shape[0] * k.shape[1]) for block in plan.blocks]
    flat = (k.shape[0] * k.shape[1], *k.shape[2:])
    rows = [q.new_empty(*shape[:2], q.shape[3]) for shape in scores]
    kept = [q.new_empty(shape) for shape in scores] if keeps(q, k) else []
    return [out, k.new_empty(flat), v.new_empty(flat), *rows, *kept]


@torch.library.custom_op("ceteris::blocked_attention_backward", mutates_args=())
def compiled_backward(
    grad: Tensor, saved: list[Tensor], bias: Tensor | None, heads: list[int], window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values, *rest = saved
    batch, length, width = grad.shape[0], keys.shape[1], keys.shape[2]
    k_shape = torch.Size((batch, heads[1], length, width))
    context: Any = Saved(
        planned(grad.shape, k_shape, keys.dtype, window), (keys, values, bias, *rest)
    )
    return BlockedAttention.backward(context, grad)[:3]  # type: ignore[return-value]


@compiled_backward.register_fake
def _(
    grad: Tensor, saved: list[Tensor], bias: Tensor | None, heads: list[int], window: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, length, width = grad.shape
    d_q = grad.new_empty(batch, length, heads[0], width).transpose(1, 2)
    d_k, d_v = (grad.new_empty(batch, heads[1], saved[0].shape[1], width) for _ in range(2))
    return d_q, d_k, d_v


def _remember(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    q, k, _, bias, window, _ = inputs
    ctx.save_for_backward(bias, *output[1:])
    ctx.heads, ctx.window = [q.shape[1], k.shape[1]], window


def _back(ctx: Any, grads: list[Tensor]) -> tuple[Tensor | None, ...]:
    bias, *saved = ctx.saved_tensors
    return *compiled_backward(grads[0], saved, bias, ctx.heads, ctx.window), None, None, None


compiled.register_autograd(_back, setup_context=_remember)
