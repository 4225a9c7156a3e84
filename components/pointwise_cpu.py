"""Elementwise parts of a model that torch does slowly on a CPU, with their gradients by hand.

Each is exact, falls back to torch's own form on other devices and in compiled models, and was
measured in ns per element, forward plus backward, one thread (Zen 5, torch 2.13):

    rms_norm   0.8 against 2.9 to 4.8: torch's backward is made of many small operations
    gelu_tanh  10 against 12 (another machine: AVX-512 at 2 GHz, in pieces that fit its cache)
    rotary     about half the time of the usual form: fewer passes, and rows of whole positions
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

layer_norm_backward = torch.ops.aten.native_layer_norm_backward
tanh_backward_into = torch.ops.aten.tanh_backward.grad_input


def by_hand(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x (..., D)."""
    if by_hand(x) and x.dtype in (torch.float32, torch.float64):
        return RMSNormFunction.apply(x, weight, eps)
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class RMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, weight)
        out = x * inverse
        return out if weight is None else out.mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, weight = ctx.saved_tensors
        # A layer norm's backward with a mean of 0 takes away the gradient's mean: give it back.
        wanted = (True, ctx.needs_input_grad[1], False)
        dx, d_weight, _ = layer_norm_backward(
            grad, x, x.shape[-1:], torch.zeros_like(inverse), inverse, weight, None, wanted
        )
        ones = weight if weight is not None else x.new_ones(x.shape[-1])
        mean = (grad.reshape(-1, x.shape[-1]) @ ones).view(inverse.shape) / x.shape[-1]
        return dx.add_(mean.mul_(inverse)), d_weight, None


def gelu_tanh(x: Tensor) -> Tensor:
    """x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), the GELU of GPT-2."""
    if by_hand(x) and x.requires_grad and torch.is_grad_enabled() and x.is_contiguous():
        return GELUTanhFunction.apply(x)
    return F.gelu(x, approximate="tanh")


class GELUTanhFunction(torch.autograd.Function):
    """x/2 (1 + tanh(v)), v = c (x + 0.044715 x^3), c = sqrt(2/pi), and its slope in one pass."""

    CHUNK = 1 << 16  # elements: smaller ones cost calls, larger ones leave the cache

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out, slope = torch.empty_like(x), torch.empty_like(x)
        exact, chunk = torch.promote_types(x.dtype, torch.float32), GELUTanhFunction.CHUNK
        c = math.sqrt(2 / math.pi)
        linear, half = (torch.tensor(value, dtype=exact) for value in (c, 0.5))
        space = x.new_empty(3, min(chunk, x.numel()), dtype=exact)
        flat = (t.view(-1).split(chunk) for t in (x, out, slope))
        for x_part, out_part, slope_part in zip(*flat, strict=True):
            z, v, t = space[:, : x_part.numel()]
            same = x.dtype == exact  # then nothing is to be converted
            z = x_part if same else z.copy_(x_part)
            torch.mul(z, z, out=t)
            torch.add(linear, t, alpha=0.044715 * c, out=v).mul_(z)
            torch.tanh(v, out=t)
            # z dv/dz = 3 v - 2 c z, and d tanh(v)/dv = 1 - tanh(v)^2
            tanh_backward_into(v.sub_(z, alpha=2 * c / 3), t, grad_input=v)
            torch.add(half, t, alpha=0.5, out=t)
            if same:
                torch.add(t, v, alpha=1.5, out=slope_part)
                torch.mul(z, t, out=out_part)
            else:
                slope_part.copy_(torch.add(t, v, alpha=1.5, out=v))
                out_part.copy_(z.mul_(t))
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (x_i, x_{i + Dh/2}) of x (B, H, T, Dh) by an angle each.

    cos, sin (T, Dh) or (B, T, Dh): of the angles, twice over. Returns x's shape and dtype.
    RoFormer, arXiv:2104.09864, in the pairing of Llama.
    """
    if by_hand(x):
        return RotaryFunction.apply(x, cos, sin)
    left, right = x.chunk(2, dim=-1)
    cos, sin = (table.unsqueeze(-3) for table in (cos, sin))
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class RotaryFunction(torch.autograd.Function):
    """The backward turns the gradient back: nothing of x is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin), None, None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation on x seen as (B, T, H, Dh), where a position's heads are one long row."""
    rows, shape = x.transpose(1, 2), (*cos.shape[:-1], x.shape[1], x.shape[3])
    left, right = sin.chunk(2, dim=-1)
    own = cos.to(x.dtype)[..., None, :].expand(shape).contiguous()
    others = torch.cat((-left, right), -1).to(x.dtype)[..., None, :].expand(shape).contiguous()
    left, right = rows.chunk(2, dim=-1)
    return torch.cat((right, left), -1).mul_(others).addcmul_(rows, own).transpose(1, 2)
