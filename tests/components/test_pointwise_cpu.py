"""The hand-written gradients are the right ones, and the fast forms are torch's functions."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from components.pointwise_cpu import GELUTanhFunction, gelu_tanh, rms_norm, rotary


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def angles(length: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    pair = torch.arange(width // 2, dtype=torch.float64).repeat(2)
    angle = torch.arange(length)[:, None] * 100 ** (-pair / width)
    return angle.cos(), angle.sin()


def test_gradients_match_finite_differences():
    x, weight = double(2, 3, 8), double(8)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, 1e-2), (x,))
    assert torch.autograd.gradcheck(gelu_tanh, (x,))
    assert torch.autograd.gradcheck(lambda x: rotary(x, *angles(3, 8)), (double(2, 2, 3, 8),))


def test_rms_norm_is_torchs():
    x, weight = torch.randn(5, 7, 32), torch.randn(32)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), F.rms_norm(x, (32,), weight, 1e-5))
    half = x.bfloat16()
    assert torch.equal(rms_norm(half, None, 1e-5), F.rms_norm(half, (32,), None, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_is_torchs_at_every_size(dtype, monkeypatch):
    monkeypatch.setattr(GELUTanhFunction, "CHUNK", 100)
    x = torch.linspace(-12, 12, 1234).to(dtype).requires_grad_()
    torch.testing.assert_close(gelu_tanh(x), F.gelu(x, approximate="tanh"))
    found = torch.autograd.grad(gelu_tanh(x).sum(), x)
    torch.testing.assert_close(found, torch.autograd.grad(F.gelu(x, approximate="tanh").sum(), x))


def test_rotary_keeps_lengths_and_makes_scores_depend_on_distance_only():
    cos, sin = angles(20, 8)
    q, k = (torch.randn(8, dtype=torch.float64).expand(1, 1, 20, 8) for _ in range(2))
    q, k = rotary(q, cos, sin), rotary(k, cos, sin)
    torch.testing.assert_close(q.norm(dim=-1), q[:, :, :1].norm(dim=-1).expand(1, 1, 20))
    scores = (q @ k.mT)[0, 0]
    for distance in range(20):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.isclose(scores[0, 0], scores[0, 5])


def test_rotary_in_bf16_is_the_exact_rotation_rounded():
    cos, sin = angles(20, 8)
    x = torch.randn(2, 3, 20, 8, dtype=torch.float64)
    found = rotary(x.bfloat16(), cos, sin)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), rotary(x, cos, sin), atol=0.03, rtol=0.02)


def test_freed_memory_is_held_where_the_allocator_can():
    script = (
        "import resource, torch; from components.memory_cpu import hold_freed_memory\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): torch.zeros(1 << 22).fill_(1)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "first = faults()\n"
        "print(hold_freed_memory(), first, min(faults(), faults()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    held, before, after = done.stdout.split()
    assert held == "False" or int(after) < int(before) / 2
