"""Causal attention for a CPU: exact, in blocks of queries, each against the keys it can see.

torch's own CPU kernel is good in fp32 and slow in bf16. This one is made of batched products,
which bf16 instructions speed up, and of three passes over the scores, all in place:

    scores = q_block k[low:high]^T / sqrt(Dh),  + mask on the diagonal,  softmax,  times v

Keys after the block's last query, and before its window, are never touched: about half of the
work. The backward pass needs the probabilities; they are kept while they are small and computed
again where they are not. Query heads that share a key head are stacked as further rows of one
product: keys are not repeated, and the product itself sums their gradients.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = {torch.bfloat16: 128}
"""Queries per block (else 64): more waste work above the diagonal, fewer make slow products."""

CACHE = 2 << 20
"""Bytes of scores worked on at once, about: one block, of as many heads as stay in the cache."""

KEEP = 64 << 20
"""Bytes of probabilities that one call may keep for its backward pass."""

softmax_into = torch.ops.aten._softmax.out
softmax_backward_into = torch.ops.aten._softmax_backward_data.out


@dataclass(frozen=True)
class Block:
    """Queries `start:stop` and the keys `low:high` that they see."""

    start: int
    stop: int
    low: int
    high: int
    edge: int  # keys low:edge are seen by every query of the block
    mask: Tensor  # (stop - start, high - edge): 0 or -inf


@dataclass(frozen=True)
class Plan:
    """How q (B, H, T, Dh) and k (B, Hkv, S, Dh) are cut. The queries are the last T positions."""

    q: torch.Size
    k: torch.Size
    dtype: torch.dtype
    window: int | None

    @cached_property
    def blocks(self) -> list[Block]:
        length, past = self.q[2], self.k[2] - self.q[2]
        count = math.ceil(length / ROWS.get(self.dtype, 64))
        cuts = [length * i // count for i in range(count + 1)]
        return [self.block(a, b, past) for a, b in pairwise(cuts)]

    def block(self, start: int, stop: int, past: int) -> Block:
        high, window = past + stop, self.window or past + stop
        low = max(0, past + start - window + 1)
        edge = low if high - low > window else past + start
        query = torch.arange(past + start, high)[:, None]
        key = torch.arange(edge, high)
        hidden = (key > query) | (key <= query - window)
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, -torch.inf)
        return Block(start, stop, low, high, edge, mask)

    def shape(self, block: Block, groups: int) -> tuple[int, int, int]:
        """Of the block's scores: (groups, stacked rows, keys seen); a group is one key head."""
        rows = (block.stop - block.start) * self.q[1] // self.k[1]
        return groups, rows, block.high - block.low

    def size(self, groups: int) -> int:
        """The number of scores of the largest block."""
        return max(math.prod(self.shape(block, groups)) for block in self.blocks)

    @property
    def step(self) -> int:
        """Batch elements worked on at once."""
        one = self.size(self.k[1]) * self.dtype.itemsize
        return min(self.q[0], max(1, CACHE // one))

    def parts(self) -> Iterator[tuple[slice, slice]]:
        """Slices of the batch, and the same in groups."""
        for start in range(0, self.q[0], self.step):
            stop = min(start + self.step, self.q[0])
            yield slice(start, stop), slice(start * self.k[1], stop * self.k[1])

    def stack(self, x: Tensor) -> list[Tensor]:
        """x (B, H, T, Dh) as one (B Hkv, rows, Dh) per block, contiguous as products want it."""
        cut = (x[:, :, block.start : block.stop] for block in self.blocks)
        return [rows.reshape(self.q[0] * self.k[1], -1, self.q[3]).contiguous() for rows in cut]

    def unstack(self, stacks: list[Tensor]) -> Tensor:
        """The inverse of `stack`; laid out (B, T, H, Dh), which is what a projection takes."""
        batch, heads, length, width = self.q
        out = stacks[0].new_empty(batch, length, heads, width).transpose(1, 2)
        for block, rows in zip(self.blocks, stacks, strict=True):
            place = out[:, :, block.start : block.stop]
            place.copy_(rows.view(place.shape))
        return out


@lru_cache(maxsize=16)
def planned(q: torch.Size, k: torch.Size, dtype: torch.dtype, window: int | None) -> Plan:
    """The plan, the same for all layers of a model and all its steps."""
    return Plan(q, k, dtype, window)


class BlockedAttention(torch.autograd.Function):
    """`apply(q, k, v, bias, window, keep)`: bias (B, H, T, S) or None; keep: a backward follows.

    Autocast has no say inside, as every product writes into a given tensor (`out=`).
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int | None,
        keep: bool,
    ) -> Tensor:  # fmt: skip
        plan = planned(q.shape, k.shape, q.dtype, window)
        keys, values = (x.reshape(-1, *x.shape[2:]).contiguous() for x in (k, v))
        queries = plan.stack(q)
        outputs = [torch.empty_like(rows) for rows in queries]
        shapes = [plan.shape(block, keys.shape[0]) for block in plan.blocks]
        keep = keep and keeps(q, k)
        kept = [q.new_empty(shape) for shape in shapes] if keep else []
        most = plan.size(plan.step * k.shape[1])
        space, p_space = q.new_empty(most), q.new_empty(0 if keep else most)
        for part, groups in plan.parts():
            for i, block in enumerate(plan.blocks):
                rows = queries[i][groups]
                p = kept[i][groups] if keep else room(p_space, plan.shape(block, rows.shape[0]))
                added = None if bias is None else bias[part]
                probabilities(rows, keys[groups], block, added, p, space)
                torch.bmm(p, values[groups, block.low : block.high], out=outputs[i][groups])
        ctx.save_for_backward(keys, values, bias, *queries, *kept)
        ctx.plan = plan
        return plan.unstack(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, (keys, values, bias, *saved) = ctx.plan, ctx.saved_tensors
        count, scale = len(plan.blocks), plan.q[3] ** -0.5
        queries, kept, d_outputs = saved[:count], saved[count:], plan.stack(grad)
        d_queries = [torch.empty_like(rows) for rows in queries]
        d_keys, d_values = torch.empty_like(keys), torch.empty_like(values)
        most = plan.step * plan.k[1]
        space, p_space = (keys.new_empty(plan.size(most)) for _ in range(2))
        product = keys.new_empty(most * plan.k[2] * plan.k[3])
        # A key's gradient is a sum over blocks. Rounding a few times to bf16 does no harm (torch's
        # kernel is no better), many times would. The last block may see all keys, so it is first.
        exact = torch.promote_types(keys.dtype, torch.float32)
        few = count <= 4 or keys.dtype == exact
        sums = keys.new_empty(2, 0 if few else most, *keys.shape[1:], dtype=exact)
        for part, groups in plan.parts():
            size = groups.stop - groups.start
            total_k, total_v = (d_keys[groups], d_values[groups]) if few else sums[:, :size]
            fresh = few and plan.blocks[-1].low == 0
            if not fresh:
                total_k.zero_()
                total_v.zero_()
            for i, block in reversed(list(enumerate(plan.blocks))):
                rows, d_out = queries[i][groups], d_outputs[i][groups]
                shape = plan.shape(block, rows.shape[0])
                if kept:
                    p = kept[i][groups]
                else:
                    p = room(p_space, shape)
                    added = None if bias is None else bias[part]
                    probabilities(rows, keys[groups], block, added, p, space)
                seen = slice(block.low, block.high)
                accumulate(total_v, seen, p.mT, d_out, 1.0, product, fresh)
                ds = torch.bmm(d_out, values[groups, seen].mT, out=room(space, shape))
                softmax_backward_into(ds, p, -1, ds.dtype, grad_input=ds)
                accumulate(total_k, seen, ds.mT, rows, scale, product, fresh)
                scaled_bmm(ds, keys[groups, seen], scale, d_queries[i][groups])
                fresh = False
            if not few:
                d_keys[groups], d_values[groups] = total_k, total_v
        d_keys, d_values = d_keys.view(plan.k), d_values.view(plan.k)
        return plan.unstack(d_queries), d_keys, d_values, None, None, None


def keeps(q: Tensor, k: Tensor) -> bool:
    """Whether the probabilities of these queries and keys are small enough to keep."""
    past, length = k.shape[2] - q.shape[2], q.shape[2]
    return q.shape[0] * q.shape[1] * length * (past + length / 2) * q.element_size() <= KEEP


def probabilities(
    rows: Tensor, keys: Tensor, block: Block, bias: Tensor | None, out: Tensor, space: Tensor
) -> None:
    """softmax(rows keys^T / sqrt(Dh) + bias + mask) of one block; `space` is scratch.

    Scores rounded to bf16 would make sharp attention up to 1.8 times less exact than torch's
    kernel, which holds them in fp32. What the rounding lost, r = exact - rounded, is small and
    comes from a second product; the softmax's derivative adds it: p + p (r - sum p r).
    """
    seen, scale = keys[:, block.low : block.high].mT, rows.shape[2] ** -0.5
    scaled_bmm(rows, seen, scale, out)
    lost = None
    if out.dtype == torch.bfloat16:
        lost = torch.baddbmm(out, rows, seen, beta=-1, alpha=scale, out=room(space, out.shape))
    if bias is not None:
        added = bias[:, :, block.start : block.stop, block.low : block.high]
        out.view(added.shape).add_(added)
    by_head = out.view(-1, block.stop - block.start, out.shape[2])
    by_head[:, :, block.edge - block.low :].add_(block.mask)
    softmax_into(out, -1, False, out=out)
    if lost is not None:
        softmax_backward_into(lost, out, -1, out.dtype, grad_input=lost)
        out.add_(lost)


def scaled_bmm(a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """scale * a b, scaled before the product is rounded."""
    return torch.baddbmm(out, a, b, beta=0, alpha=scale, out=out)


def accumulate(
    total: Tensor, seen: slice, a: Tensor, b: Tensor, scale: float, space: Tensor, fresh: bool
) -> None:
    """Adds scale * a b to total[:, seen]; `fresh`: nothing is in total, and all of it is seen."""
    if fresh:
        scaled_bmm(a, b, scale, total)
    else:
        part = room(space, (a.shape[0], a.shape[1], b.shape[2]))
        total[:, seen].add_(scaled_bmm(a, b, scale, part))


def room(space: Tensor, shape: Sequence[int]) -> Tensor:
    """The front of a flat workspace, in a shape."""
    return space[: math.prod(shape)].view(shape)
