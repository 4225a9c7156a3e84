"""Causal attention and the loss over the vocabulary, each by the fastest path that is exact.

`causal_attention` chooses between three paths, all tested against `plain`:

    plain    products and a softmax in fp32: the definition; also what counts FLOPs (meta device)
    sdpa     torch's fused kernels: GPUs, dropout, single queries against a cache
    blocked  `components.attention_cpu`: training and prefill on a CPU

`linear_cross_entropy` is re-exported from its own file.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from components.attention_compiled import compiled
from components.attention_cpu import BlockedAttention, keeps
from components.linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from components.products import by_fp32

Path = Literal["plain", "sdpa", "blocked"]


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
    path: Path | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(Dh) + bias) v, each query seeing its own position and those before it.

    q (B, H, T, Dh); k, v (B, Hkv, S, Dh), where Hkv divides H (grouped-query attention) and the
    queries are the last T of the S positions (a cache holds the others). `bias` is added to the
    scores and broadcasts to (B, H, T, S); `window` lets a query see that many keys, its own
    included. `dropout` applies as given: pass 0 in evaluation. Returns (B, H, T, Dh) in the
    dtype of the products. `path` overrides the choice of implementation. In bf16 on a CPU without
    instructions for it everything between the rounded inputs and the output is in fp32.
    """
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if path is None and by_fp32(q, q.dtype):
        with torch.autocast(device, enabled=False):
            wide = (q.float(), k.float(), v.float())
            out = causal_attention(*wide, bias=bias, window=window, dropout=dropout)
            return out.to(q.dtype)
    if window is not None and window >= k.shape[2]:
        window = None
    path = path or choose(q, k, bias, window, dropout)
    if path == "blocked":
        keep = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        if bias is not None:
            bias = bias.detach().expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if torch.compiler.is_compiling():
            return compiled(q, k, v, bias, window, keep)[0]
        return BlockedAttention.apply(q, k, v, bias, window, keep)
    return (plain if path == "plain" else sdpa)(q, k, v, bias, window, dropout)


def choose(q: Tensor, k: Tensor, bias: Tensor | None, window: int | None, dropout: float) -> Path:
    """The path for these tensors. The limits were measured, one thread, forward and backward.

    blocked against sdpa, times faster: bf16 1.9 (T 256), 2.6 (T 512), about 3 at T 16 to 128, 1.5
    (T 2048); fp32 1.3 (T 256), 1.7 (T 512), but 0.9 below T 96 and where the probabilities are
    too large to keep. With a window or a bias sdpa loses by more.
    """
    if q.device.type == "meta" or (bias is not None and bias.requires_grad):
        return "plain"
    if q.device.type != "cpu" or dropout > 0:
        return "sdpa"
    if q.dtype == torch.bfloat16 and q.shape[2] >= 16:
        return "blocked"
    masked = bias is not None or window is not None
    if q.dtype == torch.float32 and q.shape[2] >= 96 and (masked or keeps(q, k)):
        return "blocked"
    return "sdpa"


def visible(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """(T, S): True where query t, at position S - T + t, sees key s."""
    query = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    key = torch.arange(k.shape[2], device=q.device)
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def plain(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int | None, dropout: float
) -> Tensor:
    """The definition, in fp32 at least."""
    exact, repeats = torch.promote_types(q.dtype, torch.float32), q.shape[1] // k.shape[1]
    with torch.autocast(q.device.type if q.device.type != "meta" else "cpu", enabled=False):
        keys, values = (x.to(exact).repeat_interleave(repeats, dim=1) for x in (k, v))
        scores = (q.to(exact) * q.shape[3] ** -0.5) @ keys.mT
        if bias is not None:
            scores = scores + bias
        scores = scores.masked_fill(~visible(q, k, window), -torch.inf)
        weights = F.dropout(scores.softmax(-1), dropout)
        return (weights @ values).to(q.dtype)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, window: int | None, dropout: float
) -> Tensor:
    """torch's `scaled_dot_product_attention`, which picks a kernel by device and mask."""
    grouped = q.shape[1] != k.shape[1]
    if q.shape[2] == 1 and window is not None:
        k, v = k[:, :, -window:], v[:, :, -window:]
        bias = bias if bias is None or bias.shape[-1] == 1 else bias[..., -window:]
        window = None
    whole = bias is None and window is None
    causal = whole and q.shape[2] == k.shape[2]
    mask = None
    if not causal and not (whole and q.shape[2] == 1):
        mask = visible(q, k, window)
        if bias is not None:
            mask = bias.to(q.dtype).masked_fill(~mask, -torch.inf)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )
