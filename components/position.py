"""Where a token stands: three hooks, each doing nothing unless a variant overrides it.

`embed` adds to the embedding, `rotate` turns queries and keys, `bias` adds to attention scores.
`tables` computes once per forward what the hooks of all layers share.
"""

import math
from typing import Annotated, Any

import torch
from einops import rearrange
from pydantic import Field
from torch import Tensor, nn

from components.dims import Dims, Embedding
from components.pointwise_cpu import rotary
from components.registry import register


class Position(nn.Module):
    """The interface, with identity defaults.

    `positions` is `(T,)` int64: absolute indexes of the tokens at hand; in cached generation they
    begin behind what the cache holds. A class that says `takes_layout` also takes `(B, T)`, where
    each row has its own; see components/layout.py.
    """

    limited = False  # True where positions from max_seq_len on have no meaning
    takes_layout = False

    def __init__(self, dims: Dims) -> None:
        super().__init__()
        self.dims = dims

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        """`(B, T, D) -> (B, T, D)`: on the token embeddings."""
        return x

    def tables(self, positions: Tensor, keys: Tensor) -> Any:
        """What `rotate` and `bias` need; shared by all layers. `keys` `(S,)` are the positions of
        all visible tokens, those in the cache and those at hand."""
        return None

    def rotate(self, q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """`(B, H, T, head_dim)` queries and keys of the tokens at hand."""
        return q, k

    def bias(self, tables: Any) -> Tensor | None:
        """`(H, T, S)` added to the scores, S keys from position 0 up to the last query."""
        return None

    def scores(self, tables: Any, window: int | None) -> tuple[Tensor | None, int | None]:
        """What a mixer gives `causal_attention`: the bias, and the window that is left to mask."""
        return self.bias(tables), window


@register("position", "none")
class NoPosition(Position):
    """No position at all: causality alone tells order.

    Haviv et al. 2022, Transformer Language Models without Positional Encodings Still Learn
    Positional Information, arXiv 2203.16634.
    """

    takes_layout = True


@register("position", "learned")
class Learned(Position):
    """x_t + P_t, with P a trained table of max_seq_len rows.

    Gehring et al. 2017, Convolutional Sequence to Sequence Learning, arXiv 1705.03122; GPT-2's.
    """

    limited = True
    takes_layout = True

    def __init__(self, dims: Dims) -> None:
        super().__init__(dims)
        self.table = Embedding(dims.max_seq_len, dims.d_model)

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return x + self.table(positions)


@register("position", "sinusoidal")
class Sinusoidal(Position):
    """√d x_t + P_t, P(t, 2i) = sin(t / 10000^(2i/d)), P(t, 2i+1) = cos of the same.

    Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762, section 3.5; the embedding
    is multiplied by √d as in section 3.4, which with embeddings of standard deviation 1/√d makes
    both terms alike in size; `scale_embedding: false` leaves it as it is.
    """

    takes_layout = True

    def __init__(self, dims: Dims, *, scale_embedding: bool = True) -> None:
        super().__init__(dims)
        self.scale = math.sqrt(dims.d_model) if scale_embedding else 1.0

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        width = self.dims.d_model
        pair = torch.arange(0, width, 2, device=x.device, dtype=torch.float32)
        angle = positions[..., None].float() * torch.exp(pair * (-math.log(10000.0) / width))
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)  # (T, D or D+1)
        return self.scale * x + table[..., :width].to(x.dtype)


@register("position", "rotary")
class Rotary(Position):
    """q_t, k_t turned by angles t θ^(-2i/d) in pairs (i, i + d/2): scores see only distances.

    Su et al. 2021, RoFormer, arXiv 2104.09864, equation 34; pairs are halves apart, as Llama's.
    """

    takes_layout = True

    def __init__(self, dims: Dims, *, theta: Annotated[float, Field(gt=1)] = 10000.0) -> None:
        super().__init__(dims)
        self.theta = theta

    @staticmethod
    def check(dims: Dims, params: dict[str, Any]) -> list[tuple[str, str]]:
        """Head sizes must be even, since dimensions turn in pairs."""
        if dims.head_dim % 2:
            return [("", f"rotary needs an even head size, got head_dim {dims.head_dim}")]
        return []

    def tables(self, positions: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        half = torch.arange(0, self.dims.head_dim, 2, device=positions.device).float()
        angle = positions[..., None].float() * self.theta ** (-half / self.dims.head_dim)
        angle = torch.cat([angle, angle], dim=-1)  # (T, head_dim)
        return angle.cos(), angle.sin()

    def rotate(self, q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        cos, sin = (table.to(q.dtype) for table in tables)
        return rotary(q, cos, sin), rotary(k, cos, sin)


@register("position", "alibi")
class ALiBi(Position):
    """score(q_t, k_s) - m_h (t - s), slopes m_h a geometric series over heads; extrapolates.

    Press, Smith & Lewis 2021, Train Short, Test Long, arXiv 2108.12409, section 3.
    """

    takes_layout = True

    def slopes(self, device: torch.device) -> Tensor:
        """`(H,)`: 2^(-8/H), 2^(-16/H), …; between powers of two, every other of the next one's."""
        heads = self.dims.n_heads
        power = 2 ** math.floor(math.log2(heads))
        values = [2 ** (-8 * (i + 1) / power) for i in range(power)]
        values += [2 ** (-4 * (2 * i + 1) / power) for i in range(heads - power)]
        return torch.tensor(values, device=device)

    def tables(self, positions: Tensor, keys: Tensor) -> Tensor:
        distance = keys[..., None, None, :] - positions[..., None, :, None]  # (1, T, S)
        slopes = rearrange(self.slopes(positions.device), "h -> h 1 1")
        return slopes * distance.float()  # not positive where causal

    def bias(self, tables: Any) -> Tensor | None:
        return tables


@register("position", "t5")
class T5Bias(Position):
    """score(q_t, k_s) + b_h(t - s), a trained number for each head and bucket of distances.

    Half of the `buckets` hold one distance each, the others grow evenly in the logarithm up to
    `max_distance`, and the last holds all beyond. All layers share them. Raffel et al. 2020,
    Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer,
    arXiv 1910.10683, section 2.1; scores here are over √head_dim, as with every position.
    """

    takes_layout = True

    def __init__(
        self,
        dims: Dims,
        *,
        buckets: Annotated[int, Field(ge=4, multiple_of=2)] = 32,
        max_distance: Annotated[int, Field(ge=3)] = 128,
    ) -> None:
        super().__init__(dims)
        self.buckets, self.max_distance = buckets, max_distance
        self.table = nn.Parameter(torch.empty(dims.n_heads, buckets))

    @staticmethod
    def check(dims: Dims, params: dict[str, Any]) -> list[tuple[str, str]]:
        """The distances of the second half must lie behind those of the first."""
        half = params["buckets"] // 2
        if params["max_distance"] <= half:
            return [("max_distance", f"{params['max_distance']} is not above buckets / 2, {half}")]
        return []

    def bucket(self, distance: Tensor) -> Tensor:
        """Of each distance t - s, the column of the table; negative ones count as none."""
        distance, half = distance.clamp_min(0), self.buckets // 2
        share = (distance.clamp_min(1) / half).log() / math.log(self.max_distance / half)
        far = half + (share * half).long()
        return torch.where(distance < half, distance, far.clamp_max(self.buckets - 1))

    def tables(self, positions: Tensor, keys: Tensor) -> Tensor:
        distance = positions[..., :, None] - keys[..., None, :]  # (T, S)
        return rearrange(self.table.T[self.bucket(distance)], "... t s h -> ... h t s")

    def bias(self, tables: Any) -> Tensor | None:
        return tables
