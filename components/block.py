"""Blocks: how norm, mixer and feed-forward layer are wired, `(B, T, D) -> (B, T, D)`.

A block takes its parts from `Parts`, which builds them from the experiment's choices: a new wiring
is one class with a `forward`. Where the feed-forward layer is `none`, its branch and norm are left
out. `final_norm` says whether the stack ends with a norm before the output layer.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from components.dims import Dims
from components.position import Position
from components.registry import register


@dataclass(frozen=True)
class Parts:
    """Builders of one block's parts.

    Attributes:
        norm: width -> a norm.
        mixer, ffn: -> the layer; ffn gives None where the experiment has none.
    """

    dims: Dims
    norm: Callable[[int], nn.Module]
    mixer: Callable[[], nn.Module]
    ffn: Callable[[], nn.Module | None]


class Block(nn.Module):
    """The interface: parts by their names, residual dropout, and whether a final norm follows.

    A class that says `takes_layout` lets tokens see one another through its mixer alone; see
    components/layout.py.
    """

    final_norm = True
    takes_layout = False

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.mixer = parts.mixer()
        self.ffn = parts.ffn()
        self.drop = nn.Dropout(parts.dims.dropout)

    def forward(self, x: Tensor, position: Position, tables: Any, cache: Any = None) -> Tensor:
        raise TypeError(f"{type(self).__name__} has no forward")


class _TwoNorms(Block):
    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.mixer_norm = parts.norm(parts.dims.d_model)
        if self.ffn is not None:
            self.ffn_norm = parts.norm(parts.dims.d_model)


@register("block", "pre")
class PreLN(_TwoNorms):
    """x + mixer(norm(x)), then x + ffn(norm(x)); a norm after the last block.

        x ─┬─ norm ─ mixer ─ + ─┬─ norm ─ ffn ─ + ─
           └──────────────────┘ └─────────────┘

    Xiong et al. 2020, On Layer Normalization in the Transformer Architecture, arXiv 2002.04745.
    """

    takes_layout = True

    def forward(self, x: Tensor, position: Position, tables: Any, cache: Any = None) -> Tensor:
        x = x + self.drop(self.mixer(self.mixer_norm(x), position, tables, cache))
        if self.ffn is not None:
            x = x + self.drop(self.ffn(self.ffn_norm(x)))
        return x


@register("block", "post")
class PostLN(_TwoNorms):
    """norm(x + mixer(x)), then norm(x + ffn(x)); no norm after the last block.

        x ─┬─ mixer ─ + ─ norm ─┬─ ffn ─ + ─ norm ─
           └──────────┘         └────────┘

    Vaswani et al. 2017, Attention Is All You Need, arXiv 1706.03762, section 3.1.
    """

    final_norm = False
    takes_layout = True

    def forward(self, x: Tensor, position: Position, tables: Any, cache: Any = None) -> Tensor:
        x = self.mixer_norm(x + self.drop(self.mixer(x, position, tables, cache)))
        if self.ffn is not None:
            x = self.ffn_norm(x + self.drop(self.ffn(x)))
        return x


@register("block", "sandwich")
class Sandwich(_TwoNorms):
    """x + norm(mixer(norm(x))), then the same with ffn; a norm after the last block.

        x ─┬─ norm ─ mixer ─ norm ─ + ─┬─ norm ─ ffn ─ norm ─ + ─
           └────────────────────────┘  └─────────────────────┘

    Kim et al. 2025, Peri-LN, arXiv 2502.02732; Ding et al. 2021, CogView, arXiv 2105.13290.
    """

    takes_layout = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.mixer_out_norm = parts.norm(parts.dims.d_model)
        if self.ffn is not None:
            self.ffn_out_norm = parts.norm(parts.dims.d_model)

    def forward(self, x: Tensor, position: Position, tables: Any, cache: Any = None) -> Tensor:
        mixed = self.mixer(self.mixer_norm(x), position, tables, cache)
        x = x + self.drop(self.mixer_out_norm(mixed))
        if self.ffn is not None:
            x = x + self.drop(self.ffn_out_norm(self.ffn(self.ffn_norm(x))))
        return x


@register("block", "parallel")
class Parallel(Block):
    """x + mixer(norm(x)) + ffn(norm(x)), one norm for both; a norm after the last block.

        x ─┬─ norm ─┬─ mixer ─ + ─ + ─
           │        └─ ffn ────┘   │
           └───────────────────────┘

    Chowdhery et al. 2022, PaLM, arXiv 2204.02311, section 2.
    """

    takes_layout = True

    def __init__(self, parts: Parts) -> None:
        super().__init__(parts)
        self.norm = parts.norm(parts.dims.d_model)

    def forward(self, x: Tensor, position: Position, tables: Any, cache: Any = None) -> Tensor:
        normed = self.norm(x)
        out = self.mixer(normed, position, tables, cache)
        if self.ffn is not None:
            out = out + self.ffn(normed)
        return x + self.drop(out)


@register("block", "plain")
class Plain(Block):
    """ffn(mixer(x)): no residual path, no norm; the classic stack of recurrent layers.

        x ── mixer ── ffn ──

    Zaremba, Sutskever & Vinyals 2014, Recurrent Neural Network Regularization, arXiv 1409.2329.
    """

    final_norm = False
    takes_layout = True

    def forward(self, x: Tensor, position: Position, tables: Any, cache: Any = None) -> Tensor:
        x = self.drop(self.mixer(x, position, tables, cache))
        return x if self.ffn is None else self.drop(self.ffn(x))
