"""What every component owes, as checks of live objects that say in words what is broken.

The contract (components/contract.py) puts each component through them in a small model; the guard
before a sweep (experiments/precheck.py) puts each experiment's own model through those that would
spoil its numbers. A check either returns, or raises `Broken`.

What trains a model is in promises_training.py.

Models are compared in evaluation mode, in full precision, at equal shapes, where kernels of torch
give equal bits. ROUNDING is allowed nevertheless: a component that gathers tokens by their values
(a sparse mixture of experts) multiplies matrices of other sizes when one token changes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from components import faults
from components.decoder import Decoder
from components.faults import Broken
from components.registry import Entry

ROUNDING = 1e-5  # of the largest output: some hundred roundings of fp32 in a row
CACHE_ERROR = 1e-3  # relative, between steps and the complete pass, whose sums run in other orders
STIR = 0.1  # standard deviation of what is added to constant parameters


# --- models --------------------------------------------------------------------------------------


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Adds noise to parameters that begin constant: behind a gate of zero nothing would be seen."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((STIR * noise).to(parameter))


def changed(ids: Tensor, vocabulary: int) -> tuple[Tensor, list[int]]:
    """`(3, T)` tokens with one changed in row 0 (the last) and one in row 1 (an early odd place).

    Odd places and the last one are not the first of a chunk of tokens, whatever its size: a
    component that looks ahead within a chunk shows it. Row 2 stays as it is.
    """
    length = ids.shape[1]
    places = [length - 1, (length // 3) | 1 if length > 2 else length - 1]
    other = ids.clone()
    for row, place in enumerate(places):
        other[row, place] = (other[row, place] + 1 + vocabulary // 3) % vocabulary
    return other, places


@dataclass(frozen=True)
class Leak:
    """An output that changes where it may not: with a later token, or with another sequence."""

    row: int  # of `changed`
    place: int  # the last token before the changed one at which the output changes


NOWHERE = [0, 0]  # places where rows 0 and 1 are changed from their first token on


def leaks(before: Tensor, after: Tensor, places: list[int]) -> Leak | None:
    """Where `(3, T, ...)` of the tokens of `changed` differs and should not; None: nowhere."""
    apart = (after - before).abs().flatten(2).amax(-1) > ROUNDING * before.abs().max()  # (3, T)
    for row, place in enumerate([*places, apart.shape[1]]):  # in row 2 nothing was changed
        seen = apart[row, :place].nonzero()
        if len(seen):
            return Leak(row, int(seen[-1]))
    return None


@torch.no_grad()
def keeps_sequences_apart(model: Decoder, ids: Tensor) -> None:
    """No output depends on a later token, on another sequence of the batch, or on earlier batches.

    Args:
        model: in evaluation mode.
        ids: `(3, T)`, T > 1.

    Raises:
        Broken: one does; `at` is the first part whose inputs agree where its outputs do not.
    """
    other, places = changed(ids, model.dims.vocab_size)
    (before, first), (after, second), (again, third) = (_run(model, i) for i in (ids, other, ids))
    beside, fourth = _run(model, torch.cat([ids[:2].flip(1), ids[2:]]))
    if not before.isfinite().all():
        raise Broken("outputs are not finite (nan or infinite) at the initial values")
    if not torch.equal(before, again):
        at = _culprit(first, third, lambda a, b: None if torch.equal(a, b) else True)
        raise Broken(
            "the same tokens give other outputs the second time, in evaluation mode: it draws "
            "random numbers there, or keeps something from one batch to the next",
            at,
        )
    if leaks(before, beside, NOWHERE) is not None:
        raise Broken(
            "a sequence's output changes with the other sequences of its batch: its loss would "
            "depend on its neighbours",
            _culprit(first, fourth, lambda a, b: leaks(a, b, NOWHERE)),
        )
    leak = leaks(before, after, places)
    if leak is None:
        return
    at = _culprit(first, second, lambda a, b: leaks(a, b, places))
    raise Broken(
        f"it sees the future: the output at token {leak.place} changes with token "
        f"{places[leak.row]}, which comes after it (a mask or a shift is missing)",
        at,
    )


def _run(model: Decoder, ids: Tensor) -> tuple[Tensor, Records]:
    with _recorded(model) as found:
        return model(ids), found


Records = list[tuple[Entry, Tensor, Tensor]]


@contextlib.contextmanager
def _recorded(model: nn.Module) -> Iterator[Records]:
    """Input and output of each imported part in the order in which they return."""
    found: Records = []
    handles = []
    for module in model.modules():
        entry = faults.owner(module)
        if entry is None or entry.kind not in faults.SAME_SHAPE:
            continue

        def note(_: nn.Module, args: tuple[Any, ...], out: Any, entry: Entry = entry) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor):
                found.append((entry, args[0].clone(), out.clone()))

        handles.append(module.register_forward_hook(note))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _culprit(one: Records, other: Records, leak: Callable[[Tensor, Tensor], Any]) -> Entry | None:
    for (entry, x, y), (_, u, v) in zip(one, other, strict=False):
        fits = x.ndim > 2 and x.shape == u.shape and y.ndim > 2 and y.shape == v.shape
        if fits and leak(x, u) is None and leak(y, v) is not None:
            return entry
    return None


@torch.no_grad()
def caches_keep_what_they_are_given(
    model: Decoder, ids: Tensor, lengths: list[int] | None = None, most: float = CACHE_ERROR
) -> None:
    """Tokens in pieces behind a cache give the outputs of one complete pass.

    Args:
        model: in evaluation mode.
        ids: `(B, T)`, T > 1.
        lengths: of the pieces; some long, some of one token by default.

    Raises:
        Broken: they differ by more than `most`, relative to the norm of a token's output.
        UserError: a mixer has no cache.
    """
    length = ids.shape[1]
    if lengths is None:
        lengths = [length - 1, 1] if length < 6 else [length - 5, 1, 3, 1]
    whole, caches = model(ids), model.new_caches(ids.shape[0], length)
    if not whole.isfinite().all():
        raise Broken("outputs are not finite (nan or infinite) at the initial values")
    pieces = [model(piece, caches) for piece in ids.split(lengths, dim=1)]
    error = (torch.cat(pieces, dim=1) - whole).norm(dim=-1) / whole.norm(dim=-1).clamp_min(1e-12)
    worst, place = error.amax(0).max(0)
    if not float(worst) <= most:
        raise Broken(
            f"with a cache, the output at token {int(place)} is {float(worst):.1%} off that of one "
            "complete pass: generated text would come from another model (forward should add what "
            "it is given to the cache, in place, and use what is in it)"
        )


def keeps_values_of_constructors(
    construct: Callable[[], nn.Module], initialised: Callable[[], nn.Module]
) -> None:
    """Where an imported part's constructor sets a matrix to given numbers, it begins with them.

    Initial values are drawn by `init` after construction, over whatever stands there. Memory that
    was not set is nan here; numbers drawn by the constructor (torch's own layers) are no matter.

    Raises:
        Broken: a parameter begins otherwise.
    """
    before = torch.are_deterministic_algorithms_enabled()
    try:
        torch.use_deterministic_algorithms(True)  # which fills new memory with nan
        made = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            made.append(construct())
    finally:
        torch.use_deterministic_algorithms(before)
    other, start = (dict(m.named_parameters()) for m in (made[1], initialised()))
    for prefix, module in made[0].named_modules():
        if faults.owner(module) is None:
            continue
        for local, value in module.named_parameters():
            name = f"{prefix}.{local}" if prefix else local
            if torch.equal(value, other[name]) and not torch.equal(value, start[name]):
                raise Broken(
                    f"its constructor sets {local} to given numbers, and `init` draws others over "
                    f"them; keep them with constants = {{'{local.rpartition('.')[2]}': number}}, "
                    "or with initialise(name, parameter) that sets it and returns True",
                    faults.owner(module),
                )


def same_initial_values(make: Callable[[], nn.Module]) -> None:
    """Two builds at one seed are equal, whatever the state of torch's own generator.

    Raises:
        Broken: a parameter or a buffer differs.
    """
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(make())
    other = dict(_values(models[1]))
    for name, value in _values(models[0]):
        if not torch.equal(value, other[name]):
            raise Broken(
                f"two builds at the same seed differ in {name}: it is drawn from torch's global "
                "generator; leave the drawing to `init`, or use a torch.Generator with a fixed seed"
            )


def _values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        yield name, value.detach().nan_to_num()
