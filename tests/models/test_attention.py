"""Attention layers against their formulas, written out one query and one key at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.attention import ATTENTION, AxialAttention, GlobalAttention, LinearAttention, LocalAttention

Offset = Callable[[int, int], Tensor]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SIZES = [(3, 5), (5, 2), (1, 4)]


def heads_of(weight: Tensor, x: Tensor, heads: int) -> Tensor:
    """Queries, keys and values, [3, b, heads, depth, height, width]."""
    projected = torch.einsum("oc,bchw->bohw", weight[:, :, 0, 0], x)
    return projected.reshape(x.shape[0], 3, heads, -1, *x.shape[2:]).transpose(0, 1)


def written_out(weight: Tensor, x: Tensor, heads: int, embedding: Offset, sees: Callable[[int, int], bool]) -> Tensor:
    """Softmax attention over the offsets (row, column) that a query sees, each with a relative embedding."""
    (batch, dim, height, width), depth = x.shape, x.shape[1] // heads
    q, k, v = heads_of(weight, x, heads)
    out = torch.zeros_like(x)
    for ny in range(height):
        for nx in range(width):
            seen = [(y, x) for y in range(height) for x in range(width) if sees(y - ny, x - nx)]
            y, total = 0, 0
            for my, mx in seen:
                key = k[..., my, mx] + embedding(my - ny, mx - nx)
                weight = ((q[..., ny, nx] * key).sum(2, keepdim=True) / depth**0.5).exp()
                y, total = y + weight * v[..., my, mx], total + weight
            out[:, :, ny, nx] = (y / total).reshape(batch, dim)
    return out


def clipped(table: Tensor) -> Callable[[int], Tensor]:
    reach = len(table) // 2
    return lambda offset: table[max(-reach, min(reach, offset)) + reach]


def global_reference(layer: GlobalAttention, x: Tensor) -> Tensor:
    e, f = clipped(layer.table_height), clipped(layer.table_width)
    return written_out(layer.to_qkv.weight, x, layer.heads, lambda y, x: e(y) + f(x), lambda y, x: True)


def axial_reference(layer: AxialAttention, x: Tensor) -> Tensor:
    e, f = clipped(layer.table_height), clipped(layer.table_width)
    z = written_out(layer.to_qkv_height.weight, x, layer.heads, lambda y, x: e(y), lambda y, x: x == 0)
    return written_out(layer.to_qkv_width.weight, z, layer.heads, lambda y, x: f(x), lambda y, x: y == 0)


def local_reference(layer: LocalAttention, x: Tensor) -> Tensor:
    r = layer.window // 2
    return written_out(
        layer.to_qkv.weight,
        x,
        layer.heads,
        lambda y, x: layer.table_height[y + r] + layer.table_width[x + r],
        lambda y, x: abs(y) <= r and abs(x) <= r,
    )


def linear_reference(layer: LinearAttention, x: Tensor) -> Tensor:
    (batch, dim, height, width), heads = x.shape, layer.heads
    q, k, v = heads_of(layer.to_qkv.weight, x, heads)
    q, k = q.exp() / q.exp().sum(2, keepdim=True), k.exp() / k.exp().sum((3, 4), keepdim=True)
    out = torch.zeros_like(x)
    for ny in range(height):
        for nx in range(width):
            y = 0
            for my in range(height):
                for mx in range(width):
                    y = y + (q[..., ny, nx] * k[..., my, mx]).sum(2, keepdim=True) * v[..., my, mx]
            out[:, :, ny, nx] = y.reshape(batch, dim)
    return out


CASES = {
    "global": (GlobalAttention, {}, global_reference),
    "global, offsets beyond the table": (GlobalAttention, {"reach": 2}, global_reference),
    "axial": (AxialAttention, {}, axial_reference),
    "axial, offsets beyond the table": (AxialAttention, {"reach": 1}, axial_reference),
    "local": (LocalAttention, {"window": 3}, local_reference),
    "local, window beyond the image": (LocalAttention, {}, local_reference),
    "linear": (LinearAttention, {}, linear_reference),
}


@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_the_formula_and_its_gradients(case, height, width):
    kind, arguments, reference = CASES[case]
    torch.manual_seed(1)
    layer = kind(6, heads=2, **arguments).double()
    x = torch.randn(2, 6, height, width, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(y, expected, **EXACT)

    direction, inputs = torch.randn_like(x), [x, *layer.parameters()]
    found = torch.autograd.grad(y, inputs, direction)
    for ours, theirs in zip(found, torch.autograd.grad(expected, inputs, direction), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_a_window_over_the_whole_image_is_global_attention():
    torch.manual_seed(2)
    height, width = 4, 7
    local = LocalAttention(12, heads=3, window=2 * width - 1).double()
    whole = GlobalAttention(12, heads=3, reach=width - 1).double()
    whole.load_state_dict(local.state_dict())
    x = torch.randn(2, 12, height, width, dtype=torch.float64)
    torch.testing.assert_close(local(x), whole(x), **EXACT)


def test_the_fused_kernel_takes_global_attention_with_its_relative_logits():
    layer, x = GlobalAttention(32, heads=4), torch.randn(2, 32, 9, 12)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # an error where the inputs do not suit it
        layer(x).sum().backward()
    assert layer.table_height.grad is not None


@pytest.mark.parametrize("name", ATTENTION)
def test_stride_two_is_a_pool_after_the_attention(name):
    torch.manual_seed(3)
    layer, whole = ATTENTION[name](16, stride=2), ATTENTION[name](16)
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16, 7, 6)
    assert layer(x).shape == (2, 16, 4, 3)
    torch.testing.assert_close(layer(x), F.avg_pool2d(whole(x), 3, 2, 1))


@pytest.mark.parametrize("name", ATTENTION)
def test_neither_batch_nor_memory_format_nor_autocast_changes_the_result(name):
    torch.manual_seed(4)
    layer, x = ATTENTION[name](32, heads=4), torch.randn(3, 32, 12, 9)
    y = layer(x)
    exact = layer.double()(x.double()).float()
    layer.float()
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x[1:2]), y[1:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - y).std() < 0.02 * y.std()


def test_parameters_are_the_projections_and_tables_alone():
    count = {name: sum(p.numel() for p in kind(64).parameters()) for name, kind in ATTENTION.items()}
    projections = 3 * 64 * 64
    assert count == {
        "global_attention": projections + 2 * 111 * 8,
        "axial_attention": 2 * projections + 2 * 111 * 8,
        "local_attention": projections + 2 * 7 * 8,
        "linear_attention": projections,
    }


@pytest.mark.parametrize("name", ATTENTION)
def test_initialisation_makes_values_of_unit_size(name):
    torch.manual_seed(5)
    for parameter in ATTENTION[name](128, heads=4).parameters():
        assert parameter.std().item() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.1)


@pytest.mark.parametrize("name, arguments, words", [
    *[(name, {"heads": 5}, ["heads=5", "32", "1, 2, 4, 8, 16, 32"]) for name in ATTENTION],
    *[(name, {"stride": 3}, ["1 or 2", "3"]) for name in ATTENTION],
    ("linear_attention", {"heads": 0}, ["heads", "at least 1", "0"]),
    ("global_attention", {"reach": 0}, ["reach", "at least 1", "0"]),
    ("axial_attention", {"reach": -1}, ["reach", "at least 1", "-1"]),
    ("local_attention", {"window": 6}, ["window", "odd", "6"]),
])  # fmt: skip
def test_bad_arguments_say_what_is_allowed(name, arguments, words):
    with pytest.raises(ValueError) as error:
        ATTENTION[name](32, **arguments)
    assert all(word in str(error.value) for word in words)
