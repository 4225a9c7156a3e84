"""Tokens that do not simply follow one another: several texts that share a beginning in one row.

    row       the cat sat | slept | on a mat        positions 0 1 2 | 2 | 3 4 5 …
    seen by   each token: itself and what it continues, whichever row that stands in

A `Layout` says where each token of a batch stands and what it sees. The decoder then hands its
blocks a `Placed` position, which gives the real one these places and adds what is not seen to the
scores as -inf. Position, block and mixer take part once their own class says
`takes_layout = True`; it is not inherited, since a subclass may compute something else. Norms and
feed-forward layers look at one token at a time, wherever it stands.

    position   its hooks take positions of `(T,)` and of `(B, T)`
    block      lets tokens see one another through its mixer alone
    mixer      adds `position.scores(tables, window)` and sees through nothing else than attention;
               its caches have `select(rows, length)`
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from components.position import Position


@dataclass(frozen=True)
class Layout:
    """Where the tokens at hand stand, and what each of them sees.

    Attributes:
        positions: `(B, T)` int64, of the tokens at hand.
        keys: `(B, S)` int64, of all keys: those in the caches, then the tokens at hand.
        seen: `(B, T, S)` bool. A token sees at least itself, and no key that comes after it in S.
    """

    positions: Tensor
    keys: Tensor
    seen: Tensor


class Placed(Position):
    """Another position's hooks at a layout's places; `scores` adds the layout's mask."""

    def __init__(self, position: Position, layout: Layout) -> None:
        super().__init__(position.dims)
        self.real, self.layout = position, layout
        self.masks: dict[int | None, Tensor] = {}  # by window: layers mostly have the same

    def embed(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.real.embed(x, self.layout.positions)

    def tables(self, positions: Tensor, keys: Tensor) -> Any:
        return self.real.tables(self.layout.positions, self.layout.keys)

    def rotate(self, q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        return self.real.rotate(q, k, tables)

    def scores(self, tables: Any, window: int | None) -> tuple[Tensor, None]:
        if window not in self.masks:
            seen = self.layout.seen
            if window is not None:  # counted in positions: neighbours in a row may be far apart
                places = self.layout.positions[:, :, None]
                seen = seen & (places - self.layout.keys[:, None, :] < window)
            bias = self.real.bias(tables)
            free = torch.zeros((), device=seen.device) if bias is None else bias
            self.masks[window] = free.masked_fill(~seen[:, None], -torch.inf)  # (B, 1 or H, T, S)
        return self.masks[window], None
