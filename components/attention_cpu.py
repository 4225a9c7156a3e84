"""Causal attention for a CPU: exact, in blocks of queries, each against the keys it can see.

torch's own CPU kernel is good in fp32 and slow in bf16. This one is made of large batched matrix
products, which bf16 instructions speed up, and three passes over the scores, all in place:

    scores = q_block k[:end]^T / sqrt(Dh)  ->  + mask on the diagonal  ->  softmax  ->  times v

Keys behind the block's last query, and before its window, are never touched: about half of the
work. The backward pass needs the probabilities; they are kept while they are small and computed
again where they are not. Query heads that share a key head are stacked as further rows of one
product, so keys are not repeated and their gradients are summed by the product itself.

Forward plus backward, one thread, against torch's kernel (Zen 5, torch 2.13):
MEASURED
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ROWS = {torch.bfloat16: 128, torch.float32: 64}
"""Queries per block: larger wastes more above the diagonal, smaller makes worse products."""

SCORES = 1 << 20
"""Scores computed at once, about: one block of as many heads as keep them in the cache."""

KEEP = 64 << 20
"""Bytes of probabilities that one call may keep for its backward pass."""

softmax_ = torch.ops.aten._softmax.out
softmax_backward_ = torch.ops.aten._softmax_backward_data.out


@dataclass(frozen=True)
class Block:
    """Queries `start:stop` and the keys `low:high` that they see."""

    start: int
    stop: int
    low: int
    high: int
    mask: Tensor  # (stop - start, high - edge) of 0 and -inf, for the keys from `edge` on
    edge: int  # keys low:edge are seen by all queries of the block


def blocks(q: Tensor, length: int, window: int | None) -> list[Block]:
    """Cuts the T queries, which are the last of `length` positions, into blocks."""
    rows, past = ROWS.get(q.dtype, 64), length - q.shape[2]
    out = []
    for start in range(0, q.shape[2], rows):
        stop = min(start + rows, q.shape[2])
        low = 0 if window is None else max(0, past + start - window + 1)
        high = past + stop
        edge = past + start if low == 0 and (window is None or high <= window) else low
        query = torch.arange(past + start, high, device=q.device)[:, None]
        key = torch.arange(edge, high, device=q.device)
        hidden = key > query if window is None else (key > query) | (key <= query - window)
        mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
        out.append(Block(start, stop, low, high, mask.masked_fill_(hidden, -torch.inf), edge))
    return out


class BlockedAttention(torch.autograd.Function):
    """`apply(q, k, v, bias, window, keep)`; see `components.functional.causal_attention`.

    Autocast has no say inside: every product writes into a given tensor (`out=`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        window: int | None,
        keep: bool,
    ) -> Tensor:
        plan, groups = blocks(q, k.shape[2], window), k.shape[1]
        keys, values = flat(k), flat(v)
        queries = [stacked(q, groups, block) for block in plan]
        outputs = [torch.empty_like(rows) for rows in queries]
        kept, space = store(queries, plan, keep)
        for part, heads in parts(plan, queries[0], groups):
            for i, block in enumerate(plan):
                p = kept[i][heads] if kept else shaped(space, queries[i][heads], block)
                probabilities(queries[i][heads], keys[heads], block, bias, part, out=p)
                torch.bmm(p, values[heads, block.low : block.high], out=outputs[i][heads])
        ctx.save_for_backward(keys, values, bias, *queries, *kept)
        ctx.plan, ctx.shapes = plan, (q.shape, k.shape)
        return gathered(outputs, plan, q.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, (q_shape, k_shape) = ctx.plan, ctx.shapes
        keys, values, bias, *saved = ctx.saved_tensors
        queries, kept = saved[: len(plan)], saved[len(plan) :]
        groups, scale = k_shape[1], k_shape[3] ** -0.5
        d_outputs = [stacked(grads[0], groups, block) for block in plan]
        d_queries = [torch.empty_like(rows) for rows in queries]
        d_keys, d_values = (by_position(k_shape, keys) for _ in range(2))
        again, space = store(queries, plan, False), store(queries, plan, False)[1]
        room, sums = None, None
        for part, heads in parts(plan, queries[0], groups):
            if sums is None:
                # A key's gradient is a sum over blocks, which in bf16 would round at each.
                precise = torch.promote_types(keys.dtype, torch.float32)
                sums = torch.empty(2, *keys[heads].shape, dtype=precise)
                room = torch.empty_like(keys[heads])
            n = keys[heads].shape[0]
            sum_k, sum_v = sums[:, :n].zero_()
            for i, block in enumerate(plan):
                rows, d_out, seen = (
                    queries[i][heads],
                    d_outputs[i][heads],
                    slice(block.low, block.high),
                )
                if kept:
                    p = kept[i][heads]
                else:
                    p = shaped(again[1], rows, block)
                    probabilities(rows, keys[heads], block, bias, part, out=p)
                ds = shaped(space, rows, block)
                product = room.view(-1)[: n * ds.shape[2] * rows.shape[2]].view(n, ds.shape[2], -1)
                sum_v[:, seen].add_(torch.bmm(p.mT, d_out, out=product))
                torch.bmm(d_out, values[heads, seen].mT, out=ds)
                softmax_backward_(ds, p, -1, ds.dtype, grad_input=ds)
                sum_k[:, seen].add_(scaled_bmm(ds.mT, rows, scale, out=product))
                scaled_bmm(ds, keys[heads, seen], scale, out=d_queries[i][heads])
            d_keys[part].copy_(sum_k.view(d_keys[part].shape))
            d_values[part].copy_(sum_v.view(d_values[part].shape))
        return gathered(d_queries, plan, q_shape), d_keys, d_values, None, None, None


def scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """scale * a b, the scale applied before the product is rounded."""
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def probabilities(
    rows: Tensor, keys: Tensor, block: Block, bias: Tensor | None, part: slice, out: Tensor
) -> None:
    """softmax(rows keys^T / sqrt(Dh) + bias + mask) of one block: (heads, rows, seen keys)."""
    scaled_bmm(rows, keys[:, block.low : block.high].mT, rows.shape[2] ** -0.5, out=out)
    if bias is not None:
        seen = bias[part, :, block.start : block.stop, block.low : block.high]
        out.view(seen.shape).add_(seen)
    by_head = out.view(-1, block.stop - block.start, out.shape[2])
    by_head[..., block.edge - block.low :].add_(block.mask)
    softmax_(out, -1, False, out=out)


def parts(plan: list[Block], rows: Tensor, groups: int) -> Iterator[tuple[slice, slice]]:
    """Slices of the batch, and of the batch's heads, whose scores of one block fit the cache."""
    widest = max(block.high - block.low for block in plan)
    step = max(1, SCORES // (groups * rows.shape[1] * widest))
    for start in range(0, rows.shape[0] // groups, step):
        yield slice(start, start + step), slice(start * groups, (start + step) * groups)


def store(queries: list[Tensor], plan: list[Block], keep: bool) -> tuple[list[Tensor], Tensor]:
    """Room for the probabilities of every block if they are to be kept, else of one part."""
    shapes = [(*rows.shape[:2], block.high - block.low) for rows, block in zip(queries, plan)]
    total = sum(math.prod(shape) for shape in shapes)
    if keep and total * queries[0].element_size() <= KEEP:
        space = queries[0].new_empty(total)
        return [
            x.view(s) for x, s in zip(space.split([math.prod(s) for s in shapes]), shapes)
        ], space
    big = max(math.prod(shape) for shape in shapes)
    return [], queries[0].new_empty(big)


def shaped(space: Tensor, rows: Tensor, block: Block) -> Tensor:
    shape = (*rows.shape[:2], block.high - block.low)
    return space[: math.prod(shape)].view(shape)


def by_position(shape: torch.Size, like: Tensor) -> Tensor:
    """An empty (B, H, T, Dh), laid out (B, T, H, Dh): what a projection takes."""
    return like.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)


def flat(x: Tensor) -> Tensor:
    """(B, H, S, Dh) -> (B H, S, Dh), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def stacked(x: Tensor, groups: int, block: Block) -> Tensor:
    """The block's rows of x (B, H, T, Dh), per key head: (B Hkv, H/Hkv rows, Dh), contiguous."""
    return (
        x[:, :, block.start : block.stop].reshape(x.shape[0] * groups, -1, x.shape[3]).contiguous()
    )


def gathered(rows: list[Tensor], plan: list[Block], shape: torch.Size) -> Tensor:
    """The inverse of `stacked` for all blocks: (B, H, T, Dh)."""
    out = by_position(shape, rows[0])
    for block, x in zip(plan, rows, strict=True):
        place = out[:, :, block.start : block.stop]
        place.copy_(x.view(place.shape))
    return out
