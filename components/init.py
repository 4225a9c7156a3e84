"""Initial values: the standard deviation of every matrix, by its role.

| parameter                                         | initial value                            |
|---------------------------------------------------|------------------------------------------|
| embeddings, matrices, matrices into the residual  | normal, mean 0, `std` of the init's rule |
| named in its component's `constants`              | that constant (norm weights 1)           |
| biases                                            | 0                                        |
| claimed by its component's `initialise`           | as it says (an LSTM's forget gate)       |

Each tensor is drawn on the CPU from a generator of its own, keyed by (seed, name). A tensor that
two variants share by name and shape therefore starts equal in both, whatever else differs, and on
every device: differences between variants can be taken in pairs.
"""

import hashlib
import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from components.dims import Dims, ResidualLinear
from components.registry import UserError, register

Role = Literal["embedding", "linear", "residual"]
Positive = Annotated[float, Field(gt=0)]


@register("init", "gpt2")
class GPT2Init:
    """σ = std; matrices into the residual stream σ / √(2 n_layers); positions' table too.

    Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 2.3. At
    widths far below 512 this makes pre-activations so small that activations are nearly linear:
    `fan_in` is the fairer ground for small models.
    """

    def __init__(self, *, std: Positive = 0.02, scale_residual: bool = True) -> None:
        self.base, self.scale_residual = std, scale_residual

    def std(self, role: Role, shape: torch.Size, dims: Dims) -> float:
        """The standard deviation of one matrix of `shape` (out, in)."""
        return self.base * _residual(role, dims, self.scale_residual)


@register("init", "fan_in")
class FanIn:
    """σ = 1 / √fan_in; embeddings 1 / √d_model; into the residual stream over √(2 n_layers) more.

    LeCun et al. 1998, Efficient BackProp, section 4.6: a unit's input has variance one.
    """

    def __init__(self, *, scale_residual: bool = True) -> None:
        self.scale_residual = scale_residual

    def std(self, role: Role, shape: torch.Size, dims: Dims) -> float:
        """The standard deviation of one matrix of `shape` (out, in)."""
        return shape[-1] ** -0.5 * _residual(role, dims, self.scale_residual)


@register("init", "xavier")
class Xavier:
    """σ = √(2 / (fan_in + fan_out)); embeddings 1 / √d_model.

    Glorot & Bengio 2010, Understanding the Difficulty of Training Deep Feedforward Neural
    Networks, equation 16 (normal in place of uniform); the original transformer's.
    """

    def __init__(self, *, scale_residual: bool = False) -> None:
        self.scale_residual = scale_residual

    def std(self, role: Role, shape: torch.Size, dims: Dims) -> float:
        """The standard deviation of one matrix of `shape` (out, in)."""
        if role == "embedding":
            return shape[-1] ** -0.5
        fans = shape[0] + math.prod(shape[1:])
        return math.sqrt(2.0 / fans) * _residual(role, dims, self.scale_residual)


def _residual(role: Role, dims: Dims, scaled: bool) -> float:
    return (2 * dims.n_layers) ** -0.5 if scaled and role == "residual" else 1.0


def draw(seed: int, name: str, shape: torch.Size, std: float) -> torch.Tensor:
    """Normal numbers that depend on (seed, name, shape) alone, fp32 on the CPU."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
    return torch.empty(shape).normal_(0.0, std, generator=generator)


@torch.no_grad()
def initialise(model: nn.Module, rule: GPT2Init | FanIn | Xavier, dims: Dims, seed: int) -> None:
    """Sets every parameter of `model`, as the table at the top says.

    Raises:
        UserError: a component has a parameter of one dimension and does not say how it starts.
    """
    for prefix, module in model.named_modules():
        constants = getattr(module, "constants", {})
        for local, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{local}" if prefix else local
            if local in constants:
                parameter.fill_(constants[local])
            elif _claimed(model, name, parameter):
                continue
            elif parameter.ndim >= 2:
                std = rule.std(_role(module), parameter.shape, dims)
                parameter.copy_(draw(seed, name, parameter.shape, std))
            elif local.startswith("bias"):
                parameter.zero_()
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
                parameter.fill_(1.0)
            else:
                raise UserError(
                    f"{type(module).__name__}: parameter '{local}' of {name} has one dimension and "
                    f"no initial value; give the class constants = {{'{local}': value}}"
                )


def _role(module: nn.Module) -> Role:
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "residual" if isinstance(module, ResidualLinear) else "linear"


def _claimed(model: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Asks each module above the parameter, from the inside, whether it sets this one itself."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        owner = model.get_submodule(".".join(parts[:depth]))
        claim = getattr(owner, "initialise", None)
        if claim is not None and claim(".".join(parts[depth:]), parameter):
            return True
    return False
