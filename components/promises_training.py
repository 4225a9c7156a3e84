"""What optimizers, schedules and objectives owe, as checks of live objects; see promises.py."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from components import faults
from components.faults import Broken
from components.promises import ROUNDING

RATE = 0.01  # the learning rate at which optimizers are looked at, whatever an experiment's is

# --- optimizers ----------------------------------------------------------------------------------


def keeps_its_state(
    build: Callable[[nn.Module, float], Any], make: Callable[[], nn.Module]
) -> None:
    """The schedule still acts after `load_state_dict(state_dict())`, and resuming is going on.

    Accelerate makes that round trip once before the first step; a checkpoint makes it when a run
    goes on. A wrapper around other optimizers is easily left with copies of its groups.

    Args:
        build: the optimizer component's own.
        make: the same small model each time.

    Raises:
        Broken: a rate of 0 moves a parameter, a rate above 0 moves none, the state does not go
            through a checkpoint, or a resumed step differs.
    """
    model = make()
    optimizer = _prepared(build, model)
    _set_rate(optimizer, 0.0)
    _step(model, optimizer, 0)  # one that projects its weights does so at any rate, once
    before = _copies(model)
    _step(model, optimizer, 1)
    if moved := _apart(before, _copies(model), ROUNDING):
        raise Broken(
            f"at a learning rate of 0 a step changes {moved}: after load_state_dict(state_dict()), "
            "which Accelerate calls before training, steps no longer read param_groups[i]['lr'], "
            "and the schedule has no effect (a wrapper should collect the inner optimizers' "
            "groups again at the end of its load_state_dict)"
        )
    _set_rate(optimizer, 1.0)
    for number in (2, 3):
        _step(model, optimizer, number)
    if not _apart(before, _copies(model)):
        raise Broken("steps at the full learning rate change no parameter")
    saved = through_a_file(optimizer.state_dict())
    weights = _copies(model)
    _step(model, optimizer, 4)

    resumed = make()
    with torch.no_grad():
        for name, parameter in resumed.named_parameters():
            parameter.copy_(weights[name])
    second = _prepared(build, resumed)
    second.load_state_dict({key: saved[key] for key in ("state", "param_groups")})
    _set_rate(second, 1.0)
    _step(resumed, second, 4)
    if moved := _apart(_copies(model), _copies(resumed)):
        extra = ", ".join(repr(key) for key in saved if key not in ("state", "param_groups"))
        lost = f" (a checkpoint gives back 'state' and 'param_groups' alone, not {extra})"
        raise Broken(
            f"resuming is not going on: after load_state_dict into a new optimizer the next step "
            f"gives another {moved}; state_dict leaves out something that steps depend on"
            + (lost if extra else "")
        )


def _prepared(build: Callable[[nn.Module, float], Any], model: nn.Module) -> Any:
    """The optimizer as the trainer and Accelerate leave it before the first step."""
    optimizer = build(model, RATE)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise Broken(
            f"build should return a torch.optim.Optimizer, not {faults.described(optimizer)}; "
            "derive a wrapper from torch.optim.Optimizer"
        )
    grouped = [p for group in optimizer.param_groups for p in group["params"]]
    if len({id(p) for p in grouped}) < len(grouped):
        raise Broken("a parameter is in two groups, and would be stepped twice")
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    through_a_file(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def through_a_file(state: Any) -> dict[str, Any]:
    """A state_dict as a checkpoint gives it back.

    Raises:
        Broken: it is not of torch's form, or holds more than tensors and plain data.
    """
    form = "{'state': {number of a parameter: {...}}, 'param_groups': [{'params': [numbers], ...}]}"
    if not isinstance(state, dict) or not {"state", "param_groups"} <= state.keys():
        has = f"the keys {', '.join(map(repr, state))}" if isinstance(state, dict) else "no mapping"
        raise Broken(f"state_dict has {has}; a checkpoint needs torch's own form, {form}")
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    try:
        found: dict[str, Any] = torch.load(buffer, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds
        raise Broken(
            "a checkpoint can't give its state_dict back: only tensors and plain data are let in "
            f"({faults.message(error)})"
        ) from error
    numbers = [n for group in found["param_groups"] for n in group["params"]]
    if not all(n in numbers for n in found["state"]) or len(set(numbers)) < len(numbers):
        raise Broken(
            f"state_dict numbers its parameters otherwise than its param_groups; its form is {form}"
        )
    return found


def _set_rate(optimizer: Any, factor: float) -> None:
    for group in optimizer.param_groups:
        if "peak_lr" not in group:
            raise Broken(
                "load_state_dict(state_dict()) drops keys from its groups (the trainer keeps each "
                "group's full rate there); keep every key"
            )
        group["lr"] = group["peak_lr"] * factor


def _step(model: nn.Module, optimizer: Any, number: int) -> None:
    """A step on gradients that depend on its number alone."""
    generator = torch.Generator().manual_seed(number)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator) / 10
    torch.manual_seed(number)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def _apart(one: dict[str, Tensor], other: dict[str, Tensor], most: float = 0.0) -> str | None:
    """The first parameter in which two models differ by more than `most` of its largest number."""
    for name, value in one.items():
        apart = float((value - other[name]).abs().max())
        if not apart <= most * float(value.abs().max()):
            return name
    return None


# --- schedules and objectives --------------------------------------------------------------------


def factors_are_rates(schedule: Any, steps: int, most: int = 1000) -> None:
    """Every factor is a finite number that is not negative, and some are above zero.

    Args:
        most: of the steps that are looked at, spread evenly.

    Raises:
        Broken: one is not.
    """
    looked = sorted({*range(0, steps, max(1, steps // most)), steps - 1})
    factors = [factor_is_a_rate(schedule, step, steps) for step in looked]
    if not any(factors):
        raise Broken(f"its factor is 0 at each of {steps} steps: nothing would be trained")


def factor_is_a_rate(schedule: Any, step: int, steps: int) -> float:
    """The factor of one step, a finite number of 0 or more.

    Raises:
        Broken: it is something else.
    """
    factor = schedule.factor(step, steps)
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise Broken(f"factor({step}, {steps}) is {faults.described(factor)}, not a number")
    if not math.isfinite(factor) or factor < 0:
        raise Broken(
            f"factor({step}, {steps}) is {factor:g}; it multiplies the learning rate, and "
            "should be a number of 0 or more"
        )
    return factor


def loss_is_a_sum(objective: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """The objective is a finite scalar with a gradient, the sum of those of two halves.

    Args:
        hidden, weight, targets: `(N, D)`, `(V, D)`, `(N,)`, N > 1.

    Raises:
        Broken: it is not.
    """
    hidden = hidden.detach().requires_grad_()
    whole = loss(objective, hidden, weight, targets)
    (gradient,) = torch.autograd.grad(whole, hidden, allow_unused=True)
    if gradient is None or not gradient.isfinite().all():
        raise Broken("its gradient at the hidden states is missing, or not finite")
    half = len(targets) // 2
    halves = [(hidden[:half], targets[:half]), (hidden[half:], targets[half:])]
    parts = sum(float(loss(objective, h, weight, t).detach()) for h, t in halves)
    total = float(whole.detach())
    if abs(parts - total) > 1e-3 * max(abs(total), abs(parts)):
        raise Broken(
            f"it should be a sum over targets: of {len(targets)} it is "
            f"{total:.4g}, and of their two halves together {parts:.4g} (a mean over the batch "
            "would depend on micro_batch_size)"
        )


def loss(objective: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """What an objective gives.

    Raises:
        Broken: no finite scalar with a gradient.
    """
    value = objective(hidden, weight, targets)
    if not isinstance(value, Tensor) or value.ndim:
        raise Broken(
            f"should return a scalar tensor, the sum over targets, not {faults.described(value)}"
        )
    if not value.requires_grad or not value.dtype.is_floating_point:
        raise Broken("its loss has no gradient: it is cut from the hidden states and weights")
    if not bool(value.isfinite()):
        raise Broken(f"its loss is {float(value.detach()):g} on the first batch")
    return value
