"""Mixers: the layer that lets positions see earlier ones, `(B, T, D) -> (B, T, D)`.

A mixer makes and carries its own cache for generation: `cache(batch, length)` returns a fresh
one, `forward` reads it, and adds to it what the tokens at hand contribute.
"""

from collections.abc import Callable
from typing import Annotated, Any

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from components.dims import Dims, Linear, ResidualLinear, linear_columns
from components.functional import causal_attention
from components.position import Position
from components.registry import register

Norm = Callable[[int], nn.Module]


class KeyValueCache:
    """Keys and values of the tokens so far, in tensors allocated once.

    Shapes: `(B, n_kv_heads, length, head_dim)`, of which the first `filled` are valid. Fewer rows
    than B may come at first; those that come later hold zeros until then.
    """

    def __init__(self, batch: int, heads: int, length: int, width: int) -> None:
        self.shape = (batch, heads, length, width)
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.filled = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds the newest keys and values; returns all so far of their rows."""
        rows, end = k.shape[0], self.filled + k.shape[2]
        if self.keys is None or self.values is None:
            new = k.new_empty if rows == self.shape[0] else k.new_zeros
            self.keys, self.values = new(self.shape), new(self.shape)
        self.keys[:rows, :, self.filled : end] = k
        self.values[:rows, :, self.filled : end] = v
        self.filled = end
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def select(self, rows: Tensor, length: int) -> "KeyValueCache":
        """A new cache with room for `length` tokens, its rows those at the indexes `rows`."""
        new = KeyValueCache(len(rows), self.shape[1], length, self.shape[3])
        if self.keys is not None and self.values is not None:
            new.extend(*(x[rows, :, : self.filled] for x in (self.keys, self.values)))
        return new


@register("mixer", "attention")
class Attention(nn.Module):
    """softmax(q kᵀ / √head_dim + causal mask + position bias) v, in heads.

    Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762); with fewer key-value heads than
    query heads grouped-query (Ainslie et al. 2023, arXiv 2305.13245), with one multi-query
    (Shazeer 2019, arXiv 1911.02150). `qk_norm` puts the model's norm on each head's queries and
    keys before the rotation (Henry et al. 2020, arXiv 2010.04245, but with the scale 1/√head_dim,
    as in Dehghani et al. 2023, arXiv 2302.05442). `window`: each query sees that many newest
    keys, itself included (Beltagy et al. 2020, arXiv 2004.05150).
    """

    takes_layout = True

    def __init__(
        self,
        dims: Dims,
        layer: int,
        norm: Norm,
        *,
        n_kv_heads: Annotated[int, Field(ge=1)] | None = None,
        qk_norm: bool = False,
        window: Annotated[int, Field(ge=1)] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.dims, self.window = dims, window
        self.n_kv_heads = n_kv_heads or dims.n_heads
        inner, kv_inner = dims.n_heads * dims.head_dim, self.n_kv_heads * dims.head_dim
        self.w_q = Linear(dims.d_model, inner, bias)
        self.w_k = Linear(dims.d_model, kv_inner, bias)
        self.w_v = Linear(dims.d_model, kv_inner, bias)
        self.w_o = ResidualLinear(inner, dims.d_model, bias)
        self.q_norm = norm(dims.head_dim) if qk_norm else None
        self.k_norm = norm(dims.head_dim) if qk_norm else None

    @staticmethod
    def check(dims: Dims, params: dict[str, Any]) -> list[tuple[str, str]]:
        """n_kv_heads must divide n_heads."""
        n_kv_heads = params["n_kv_heads"] or dims.n_heads
        if dims.n_heads % n_kv_heads:
            return [
                ("n_kv_heads", f"n_kv_heads {n_kv_heads} does not divide n_heads {dims.n_heads}")
            ]
        return []

    def cache(self, batch: int, length: int) -> KeyValueCache:
        """An empty cache for `length` tokens."""
        return KeyValueCache(batch, self.n_kv_heads, length, self.dims.head_dim)

    def forward(
        self, x: Tensor, position: Position, tables: Any, cache: KeyValueCache | None = None
    ) -> Tensor:
        q, k, v = linear_columns(x, self.w_q, self.w_k, self.w_v)
        q, k, v = (rearrange(t, "b t (h d) -> b h t d", d=self.dims.head_dim) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = position.rotate(q, k, tables)
        if cache is not None:
            k, v = cache.extend(k, v)
        dropout = self.dims.dropout if self.training else 0.0
        bias, window = position.scores(tables, self.window)
        out = causal_attention(q, k, v, bias=bias, window=window, dropout=dropout)
        return self.w_o(rearrange(out, "b h t d -> b t (h d)"))


class StateCache:
    """The recurrent state after the tokens so far."""

    def __init__(self) -> None:
        self.state: tuple[Tensor, Tensor] | None = None

    def select(self, rows: Tensor, length: int) -> "StateCache":
        """The states of the rows at the indexes `rows`; `length` does not matter."""
        new = StateCache()
        if self.state is not None:
            hidden, cell = (x[:, rows] for x in self.state)
            new.state = hidden, cell
        return new


@register("mixer", "lstm")
class LSTM(nn.Module):
    """c_t = f * c_{t-1} + i * g, h_t = o * tanh(c_t); y = W_o h.

    Hochreiter & Schmidhuber 1997, Long Short-Term Memory, Neural Computation 9(8), with the
    forget gate of Gers et al. 2000, whose bias begins at 1 (Jozefowicz et al. 2015). `hidden` is
    the width of the state, d_model unless given; `project: false` leaves W_o out, as in the
    classic stack.
    """

    def __init__(
        self,
        dims: Dims,
        layer: int,
        norm: Norm,
        *,
        hidden: Annotated[int, Field(ge=1)] | None = None,
        project: bool = True,
    ) -> None:
        super().__init__()
        hidden = hidden or dims.d_model
        self.lstm = nn.LSTM(dims.d_model, hidden, batch_first=True)
        self.w_o = ResidualLinear(hidden, dims.d_model, bias=False) if project else None

    @staticmethod
    def check(dims: Dims, params: dict[str, Any]) -> list[tuple[str, str]]:
        """Without a projection the state is what the next layer reads."""
        if not params["project"] and params["hidden"] not in (None, dims.d_model):
            return [("hidden", f"without a projection hidden must be d_model, {dims.d_model}")]
        return []

    def cache(self, batch: int, length: int) -> StateCache:
        """An empty state; `length` does not matter to it."""
        return StateCache()

    def initialise(self, name: str, parameter: Tensor) -> bool:
        """Biases: zero, but one for the forget gate (the second quarter of bias_ih)."""
        if not name.startswith("lstm.bias"):
            return False
        quarter = parameter.shape[0] // 4
        parameter.zero_()
        if name.startswith("lstm.bias_ih"):
            parameter[quarter : 2 * quarter] = 1.0
        return True

    def forward(
        self, x: Tensor, position: Position, tables: Any, cache: StateCache | None = None
    ) -> Tensor:
        state = cache.state if cache is not None else None
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # torch's LSTM takes no part in autocast on a CPU: it runs in the weights' precision.
            with torch.autocast("cpu", enabled=False):
                out, state = self.lstm(x.float(), state)
        else:
            out, state = self.lstm(x, state)
        if cache is not None:
            cache.state = state
        return out if self.w_o is None else self.w_o(out)
