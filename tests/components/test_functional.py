"""Every fast path equals the plain one, in values and in gradients."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from components import attention_cpu, products
from components.attention_compiled import compiled
from components.functional import causal_attention, choose, linear_cross_entropy
from components.linear_cross_entropy import plain as plain_loss

LENGTHS = [(1, 1), (7, 7), (129, 129), (300, 300), (1, 40), (7, 40), (130, 300)]  # (T, S)
PATHS = ["sdpa", "blocked"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def inputs(
    length: int, keys: int, n_kv_heads: int, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> list[Tensor]:
    """q, k, v, as a projection lays them out: (B, T, H, Dh), seen as (B, H, T, Dh)."""
    shapes = [(2, length, 4, 16), (2, keys, n_kv_heads, 16), (2, keys, n_kv_heads, 16)]
    return [
        (scale * torch.randn(shape)).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes
    ]


def alibi(length: int, keys: int) -> Tensor:
    distance = torch.arange(keys) - torch.arange(keys - length, keys)[:, None]
    return torch.tensor([0.5, 0.25, 0.1, 0.01])[:, None, None] * distance


def results(path, tensors, grad, **options):
    """The output and the gradients of q, k and v."""
    out = causal_attention(*tensors, path=path, **options)
    return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]


def error(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative errors, one per tensor."""
    pairs = zip(found, exact, strict=True)
    return [((a.float() - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in pairs]


GRID = list(itertools.product(LENGTHS, [4, 2, 1], [None, 5, 140], [False, True]))


@pytest.mark.parametrize("path", PATHS)
def test_fp32_paths_equal_the_plain_one_in_values_and_gradients(path):
    for (length, keys), n_kv_heads, window, biased in GRID:
        tensors, grad = inputs(length, keys, n_kv_heads), torch.randn(2, 4, length, 16)
        options = {"window": window, "bias": alibi(length, keys) if biased else None}
        exact = results("plain", tensors, grad, **options)
        for found, right in zip(results(path, tensors, grad, **options), exact, strict=True):
            torch.testing.assert_close(found, right, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_bf16_blocks_are_as_exact_as_torchs_kernel(scale):
    for (length, keys), n_kv_heads, window, biased in GRID[::5]:
        tensors = inputs(length, keys, n_kv_heads, scale=scale)
        grad = torch.randn(2, 4, length, 16)
        options = {"window": window, "bias": alibi(length, keys) if biased else None}
        exact = results("plain", tensors, grad, **options)
        with torch.autocast("cpu", torch.bfloat16):
            ours = results("blocked", tensors, grad, **options)
            torchs = results("sdpa", tensors, grad, **options)
        assert ours[0].dtype == torchs[0].dtype == torch.bfloat16
        for a, b in zip(error(ours, exact), error(torchs, exact), strict=True):
            assert a <= 1.5 * b + 1e-3, (length, keys, n_kv_heads, options, a, b)


def test_bf16_tensors_without_autocast_give_what_autocast_gives():
    tensors, grad = inputs(130, 130, 2), torch.randn(2, 4, 130, 16)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = results("blocked", tensors, grad)
    rounded = [x.detach().bfloat16().requires_grad_() for x in tensors]
    found = results("blocked", rounded, grad)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(found, wanted, strict=True))


def test_probabilities_computed_again_give_the_gradients_of_kept_ones(monkeypatch):
    tensors, grad = inputs(300, 300, 2), torch.randn(2, 4, 300, 16)
    kept = results("blocked", tensors, grad, window=100)
    monkeypatch.setattr(attention_cpu, "KEEP", 0)
    again = results("blocked", tensors, grad, window=100)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_small_cache_changes_nothing_but_the_order_of_work(monkeypatch):
    tensors, grad = inputs(300, 300, 2), torch.randn(2, 4, 300, 16)
    whole = results("blocked", tensors, grad, bias=alibi(300, 300))
    monkeypatch.setattr(attention_cpu, "CACHE", 1)
    parts = results("blocked", tensors, grad, bias=alibi(300, 300))
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("n_kv_heads", [1, 2])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("path", ["plain", "blocked"])
def test_attention_gradients_match_finite_differences(path, window, n_kv_heads):
    shapes = [(1, 2, 5, 4), (1, n_kv_heads, 6, 4), (1, n_kv_heads, 6, 4)]
    tensors = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    bias = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda *x: causal_attention(*x, path=path, window=window, bias=bias), tensors
    )


@pytest.mark.parametrize(("keys", "n_kv_heads", "window"), [(130, 4, 20), (300, 2, None)])
def test_the_operators_for_compiled_models_are_the_same_attention(keys, n_kv_heads, window):
    tensors, grad = inputs(130, keys, n_kv_heads), torch.randn(2, 4, 130, 16)
    bias = torch.randn(2, 4, 130, keys)
    wanted = results("blocked", tensors, grad, bias=bias, window=window)
    out = compiled(*tensors, bias, window, True)[0]
    found = [out, *torch.autograd.grad(out, tensors, grad)]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    for keep in (True, False):
        torch.library.opcheck(compiled, (*tensors, bias, window, keep), test_utils=checks)


def test_a_query_sees_its_own_position_and_no_later_one():
    q, k, v = inputs(40, 40, 4)
    before = causal_attention(q, k, v, path="blocked")
    with torch.no_grad():
        k[:, :, 20:] += 1
        v[:, :, 20:] += 1
    after = causal_attention(q, k, v, path="blocked")
    assert torch.equal(before[:, :, :20], after[:, :, :20])
    assert not torch.isclose(before[:, :, 20:], after[:, :, 20:]).all(-1).any()


@pytest.mark.parametrize("path", [None, *PATHS])
def test_decoding_one_by_one_equals_the_whole_sequence(path):
    q, k, v = inputs(40, 40, 2)
    whole = causal_attention(q, k, v, path=path, window=9)
    for t in range(40):
        one = causal_attention(
            q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], path=path, window=9
        )
        torch.testing.assert_close(one[:, :, 0], whole[:, :, t], atol=1e-5, rtol=1e-5)


def test_the_path_follows_device_dtype_length_and_mask():
    def path(length=256, dtype=torch.bfloat16, device="cpu", batch=1, **options):
        x = torch.empty(batch, 4, length, 16, dtype=dtype, device=device)
        given = {"bias": None, "window": None, "dropout": 0.0} | options
        return choose(x, x, **given)

    assert path() == "blocked"
    assert path(dtype=torch.float32) == "blocked"
    assert path(dtype=torch.float32, length=64) == "sdpa"
    assert path(dtype=torch.float32, batch=256) == "sdpa"
    assert path(dtype=torch.float32, batch=256, window=64) == "blocked"
    assert path(dtype=torch.float16) == "sdpa"
    assert path(length=1) == "sdpa"
    assert path(dropout=0.1) == "sdpa"
    assert path(device="meta") == "plain"
    assert path(bias=torch.zeros(4, 256, 256, requires_grad=True)) == "plain"


def test_a_learned_bias_gets_its_gradient():
    tensors, bias = inputs(20, 20, 4), torch.randn(4, 20, 20, requires_grad=True)
    causal_attention(*tensors, bias=bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.any()


def test_flops_on_the_meta_device_are_those_of_the_two_products():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.empty(2, 4, 32, 16, device="meta")
    with FlopCounterMode(display=False) as counter:
        causal_attention(x, x[:, :1], x[:, :1])
    assert counter.get_total_flops() == 2 * (2 * 2 * 4 * 32 * 32 * 16)


# --- bf16 by fp32 products ---


@pytest.fixture(params=[False, True], ids=["no bf16 instructions", "bf16 instructions"])
def processor(request, monkeypatch):
    monkeypatch.setattr(products, "bf16_instructions", lambda: request.param)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_bf16_linear_is_torchs_on_any_processor(processor, biased, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    shapes = [(3, 5, 40), (24, 40)] + [(24,)] * biased
    tensors = [torch.randn(s).to(dtype).requires_grad_() for s in shapes]
    grad = torch.randn(3, 5, 24).bfloat16()
    found = []
    for function in (products.linear, torch.nn.functional.linear):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = function(*tensors)
        found.append([out, *torch.autograd.grad(out, tensors, grad)])
    for ours, torchs in zip(*found, strict=True):
        assert ours.dtype == torchs.dtype
        torch.testing.assert_close(ours.float(), torchs.float(), rtol=2**-7, atol=2**-6)


def test_bf16_attention_is_exact_on_any_processor(processor):
    for (length, keys), n_kv_heads, window, _ in GRID[::4]:
        tensors, grad = inputs(length, keys, n_kv_heads), torch.randn(2, 4, length, 16)
        exact = results("plain", tensors, grad, window=window)
        with torch.autocast("cpu", torch.bfloat16):
            ours = results(None, tensors, grad, window=window)
            torchs = results("sdpa", tensors, grad, window=window)
        assert ours[0].dtype == torch.bfloat16
        for a, b in zip(error(ours, exact), error(torchs, exact), strict=True):
            assert a <= 1.5 * b + 1e-3, (length, keys, n_kv_heads, window, a, b)


def test_bf16_on_a_cpu_without_it_is_warned_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(products, "bf16_instructions", lambda: False)
    rows = {"a": ("bf16", "auto"), "b": ("fp32", "auto"), "c": ("bf16", "cuda")}
    warning = products.slow_bf16(rows)
    assert warning is not None
    assert "bf16 (a):" in warning
    assert "training.precision=fp32" in warning
    assert products.slow_bf16({"": ("fp32", "cpu")}) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert products.slow_bf16(rows) is None
    assert products.slow_bf16({"": ("bf16", "cpu")}) is not None
    monkeypatch.setattr(products, "bf16_instructions", lambda: True)
    assert products.slow_bf16({"": ("bf16", "cpu")}) is None


# --- linear_cross_entropy ---


def tokens(count: int = 37, width: int = 8, words: int = 300, dtype: torch.dtype = torch.float32):
    hidden = torch.randn(count, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(words, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, words, (count,))
    targets[::5] = -100
    return hidden, weight, bias, targets


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("chunk", [None, 1, 10, 1000])
def test_chunked_loss_equals_the_plain_one_in_value_and_gradients(chunk, biased, z_loss):
    hidden, weight, bias, targets = tokens()
    wanted = [hidden, weight, bias] if biased else [hidden, weight]
    b = bias if biased else None
    exact = plain_loss(hidden, weight, b, targets, z_loss)
    found = linear_cross_entropy(hidden, weight, b, targets, z_loss=z_loss, chunk=chunk)
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
    pairs = zip(
        torch.autograd.grad(found / 7, wanted), torch.autograd.grad(exact / 7, wanted), strict=True
    )
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_loss_gradients_match_finite_differences():
    hidden, weight, bias, targets = tokens(5, 3, 6, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, b, targets, z_loss=0.1, chunk=2),
        (hidden, weight, bias),
    )


def test_under_autocast_the_chunked_loss_is_as_exact_as_the_plain_one(processor):
    hidden, weight, _, targets = tokens(200, 32, 400)
    exact = plain_loss(hidden, weight, None, targets)
    right = [exact, *torch.autograd.grad(exact, (hidden, weight))]
    for chunk in (None, 50):
        with torch.autocast("cpu", torch.bfloat16):
            loss = linear_cross_entropy(hidden, weight, None, targets, chunk=chunk)
            reference = plain_loss(hidden, weight, None, targets)
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(reference.item(), rel=1e-6)
        found = [loss, *torch.autograd.grad(loss, (hidden, weight))]
        torchs = [reference, *torch.autograd.grad(reference, (hidden, weight))]
        assert [x.dtype for x in found] == [x.dtype for x in torchs]
        errors = zip(error(found, right), error(torchs, right), strict=True)
        assert all(ours <= 1.2 * theirs + 1e-6 for ours, theirs in errors)


def test_nothing_counted_is_a_loss_of_zero_with_zero_gradients():
    hidden, weight, bias, targets = tokens()
    targets[:] = -100
    loss = linear_cross_entropy(hidden, weight, bias, targets, z_loss=0.1, chunk=10)
    loss.backward()
    assert loss.item() == 0
    assert not any(x.grad.any() for x in (hidden, weight, bias))


def test_only_what_asks_for_a_gradient_gets_one():
    hidden, weight, _, targets = tokens()
    loss = linear_cross_entropy(hidden.detach(), weight, None, targets, chunk=10)
    loss.backward()
    assert weight.grad is not None
    with torch.no_grad():
        alone = linear_cross_entropy(hidden, weight, None, targets, chunk=10)
    assert not alone.requires_grad
    assert alone.item() == loss.item()


def test_loss_of_certain_and_of_hopeless_predictions_is_exact():
    weight = torch.eye(300) * 200.0
    hidden, targets = torch.eye(300)[:2], torch.tensor([0, 5])
    loss = linear_cross_entropy(hidden, weight, None, targets, chunk=10)
    assert loss.item() == pytest.approx(200.0, rel=1e-6)


@pytest.mark.slow
def test_a_compiled_step_equals_the_eager_one_at_any_batch_size():
    def loss(*given: Tensor) -> Tensor:
        q, k, v, weight, targets = given
        mixed = causal_attention(q, k, v).transpose(1, 2).flatten(2)
        return linear_cross_entropy(mixed.flatten(0, 1), weight, None, targets, chunk=100)

    weight = torch.randn(300, 64, requires_grad=True)
    step: Any = torch.compile(loss, fullgraph=True)
    for batch in (2, 3, 4):
        tensors = [torch.randn(batch, heads, 130, 16).requires_grad_() for heads in (4, 2, 2)]
        targets = torch.randint(0, 300, (batch * 130,))
        values = []
        for function in (loss, step):
            value = function(*tensors, weight, targets)
            values.append([value, *torch.autograd.grad(value, [*tensors, weight])])
        for a, b in zip(*values, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
