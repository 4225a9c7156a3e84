"""The decoder: embedding, a stack of blocks, an output layer, composed through the registry.

    tokens (B, T) ─ embedding ─ position.embed ─ block 0 … L-1 ─ [final norm] ─ hidden (B, T, D)
    hidden (B, T, D) ─ output layer (the embedding's own matrix if tied) ─ logits (B, T, V)

The composition is thin: it builds modules and calls them in order, and each component owns its
fast path. What a model has and what a token costs is counted on the model itself, built on torch's
meta device, where tensors have shapes and no numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from components import faults
from components.block import Block, Parts
from components.dims import Dims, Embedding, Linear
from components.ffn import NoFFN
from components.init import initialise
from components.layout import Layout, Placed
from components.position import Position
from components.products import linear
from components.registry import Spec, UserError


class Decoder(nn.Module):
    """A causal language model.

    Args:
        dims: the dimensions that all parts share.
        specs: a Spec for each of norm, ffn, position, mixer, block, init.
        tie_embeddings: the output layer uses the embedding's matrix.
    """

    def __init__(self, dims: Dims, specs: Mapping[str, Spec], tie_embeddings: bool) -> None:
        super().__init__()
        self.dims, self.specs = dims, dict(specs)
        norm = specs["norm"].build

        def ffn(layer: int) -> nn.Module | None:
            built = specs["ffn"].build(dims, layer)
            return None if isinstance(built, NoFFN) else built

        self.tok_emb = Embedding(dims.vocab_size, dims.d_model)
        self.position: Position = specs["position"].build(dims)
        self.drop = nn.Dropout(dims.dropout)
        self.blocks: nn.ModuleList = nn.ModuleList()
        for layer in range(dims.n_layers):
            parts = Parts(
                dims,
                norm=norm,
                mixer=lambda layer=layer: specs["mixer"].build(dims, layer, norm),  # type: ignore[misc]
                ffn=lambda layer=layer: ffn(layer),  # type: ignore[misc]
            )
            self.blocks.append(specs["block"].build(parts))
        last: Block = self.blocks[-1]  # type: ignore[assignment]
        self.final_norm = norm(dims.d_model) if last.final_norm else None
        self.lm_head = None if tie_embeddings else Linear(dims.d_model, dims.vocab_size, bias=False)

    @property
    def output_weight(self) -> Tensor:
        """`(V, D)`: the output layer's matrix, the embedding's own if tied."""
        return self.tok_emb.weight if self.lm_head is None else self.lm_head.weight

    def initialise(self, seed: int) -> "Decoder":
        """Draws all initial values; see components/init.py. Returns the model itself."""
        initialise(self, self.specs["init"].build(), self.dims, seed)
        return self

    def fill_buffers(self) -> None:
        """Gives the buffers of a model from `skeleton` what their constructors put into them."""
        if next(self.buffers(), None) is None:
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # of a buffer that is drawn: the same in every run
            real = Decoder(self.dims, self.specs, self.lm_head is None)
        for name, buffer in real.named_buffers(remove_duplicate=False):
            owner, _, local = name.rpartition(".")
            self.get_submodule(owner)._buffers[local] = buffer

    @property
    def takes_layout(self) -> bool:
        """Whether position, blocks and mixers say so of themselves; see components/layout.py."""
        mixers = (getattr(block, "mixer", None) for block in self.blocks)
        parts = (self.position, *self.blocks, *mixers)
        return all(vars(type(part)).get("takes_layout") for part in parts)

    def forward(
        self, tokens: Tensor, caches: "Caches | None" = None, layout: Layout | None = None
    ) -> Tensor:
        """`(B, T)` token ids -> `(B, T, D)` final hidden states.

        With caches the tokens follow those already in them. A layout says for each token where it
        stands and what it sees; without, every row is one text, seen from its beginning.
        """
        start = caches.filled if caches is not None else 0
        length = tokens.shape[1]
        keys = torch.arange(start + length, device=tokens.device)
        positions = keys[start:]
        position = self.position if layout is None else Placed(self.position, layout)
        x = self.drop(position.embed(self.tok_emb(tokens), positions))
        tables = position.tables(positions, keys)
        for layer, block in enumerate(self.blocks):
            cache = caches.layers[layer] if caches is not None else None
            x = block(x, position, tables, cache)
        if caches is not None:
            caches.filled += length
        return x if self.final_norm is None else self.final_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """`(..., D)` -> `(..., V)`."""
        return linear(hidden, self.output_weight)

    def new_caches(self, batch: int, length: int) -> "Caches":
        """Empty caches for generating up to `length` tokens in `batch` sequences.

        Raises:
            UserError: an imported mixer has none, or a block no mixer.
        """
        caches = []
        for block in self.blocks:
            part = getattr(block, "mixer", None)
            make = getattr(part, "cache", None)
            if make is None:
                entry = faults.owner(block if part is None else part)
                where = f"{faults.title(entry)}: " if entry else ""
                raise UserError(
                    f"{where}{'mixer' if part is None else 'cache(batch, length)'} is missing, "
                    "which generation needs; see docs/add-a-component.md"
                )
            caches.append(make(batch, length))
        return Caches(caches)


@dataclass
class Caches:
    """One cache per block, each of its mixer's own kind, and how many tokens they hold."""

    layers: list[Any]
    filled: int = 0

    def select(self, rows: Tensor, length: int) -> "Caches":
        """New caches with room for `length` tokens, their rows those at the indexes `rows`."""
        return Caches([layer.select(rows, length) for layer in self.layers], self.filled)


def skeleton(dims: Dims, specs: Mapping[str, Spec], tie_embeddings: bool) -> Decoder:
    """A decoder on torch's meta device: shapes, and no numbers.

    Raises:
        UserError: an imported component can't be built, or holds one parameter under two names.
    """
    with faults.blamed("while the model is built", specs.values()), torch.device("meta"):
        model = Decoder(dims, specs, tie_embeddings)
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(parameter), name)
        if first != name:  # materialising the model would give each name numbers of its own
            parts = faults.imported_in(specs.values())
            where = f"{faults.title(parts[0])}: " if len(parts) == 1 else ""
            raise UserError(
                f"{where}one parameter is registered twice, as {first} and {name}; "
                "keep one name, and use it from there"
            )
    return model


@dataclass(frozen=True)
class Counts:
    """What a model has and what a token costs, counted, not computed from a formula.

    Attributes:
        parameters: trained numbers; a tied matrix once.
        non_embedding: without token embedding, position table and output layer.
        flops_per_token: floating-point operations of a training step, forward and backward,
            per token at the given length, by torch's counter on the meta device: matrix
            products and attention over all T x T scores; elementwise work is not in it.
        by_name: parameters by name.
    """

    parameters: int
    non_embedding: int
    flops_per_token: float
    by_name: dict[str, int] = field(repr=False)


def count(
    dims: Dims, specs: Mapping[str, Spec], tie_embeddings: bool, seq_len: int, flops: bool = True
) -> Counts:
    """Counts a model of these parts without holding a single number of it.

    Raises:
        UserError: an imported component can't be built, or fails in forward or backward.
    """
    model = skeleton(dims, specs, tie_embeddings)
    with torch.device("meta"):
        by_name = {name: p.numel() for name, p in model.named_parameters()}
        embeddings = sum(
            n for name, n in by_name.items() if name.startswith(("tok_emb", "position", "lm_head"))
        )
    total = sum(by_name.values())
    spent = 0.0
    if flops:
        with faults.watched(model, faults.META, specs.values()):
            spent = training_flops(model, seq_len) / seq_len
    return Counts(total, total - embeddings, spent, by_name)


def training_flops(model: Decoder, seq_len: int) -> int:
    """Operations of forward and backward over one sequence, by a model on the meta device.

    torch counts a recurrent layer step by step, minutes at real lengths. There the first step
    costs less (no state before it), every other the same, and attention the square of the length:
    a parabola, which three short lengths give exactly.
    """
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if not recurrent or seq_len <= 4:
        return _counted_flops(model, seq_len)
    two, three, four = (_counted_flops(model, length) for length in (2, 3, 4))
    steps = seq_len - 2
    return two + steps * (three - two) + steps * (steps - 1) // 2 * (four - 2 * three + two)


def _counted_flops(model: Decoder, length: int) -> int:
    tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model.logits(model(tokens)).float().sum().backward()
    return int(counter.get_total_flops())
