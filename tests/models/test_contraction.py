"""The contraction orders are one function, forward and backward; the rule that chooses reads shapes only."""

from __future__ import annotations

import pytest
import torch

from models.contraction import ORDERS, choose_order, cost, position_embeddings


def inputs(batch: int, height: int, width: int, u: int, r: int) -> list[torch.Tensor]:
    torch.manual_seed(0)
    n, heads, k, v = height * width, 2, 3, 5
    shapes = [(batch, n, heads, k), (batch, k, v), (batch, v, u * n), (r, r, k, u)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("batch, height, width, u, r", [
    (2, 4, 4, 1, 7),
    (1, 5, 3, 1, 3),
    (3, 3, 6, 2, 5),
    (2, 2, 7, 3, 23),
    (2, 1, 1, 1, 3),
])  # fmt: skip
def test_orders_agree_to_rounding_forward_and_backward(batch, height, width, u, r):
    results = {}
    for name, order in ORDERS.items():
        tensors = inputs(batch, height, width, u, r)
        y = order(*tensors, height, width)
        weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)
        results[name] = [y.detach(), *torch.autograd.grad((y * weights).sum(), tensors)]
    reference = results.pop("lambda_first")
    for name, found in results.items():
        for part, a, b in zip(("y", "dq", "dc", "dv", "dtable"), found, reference, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, p=part, n=name: f"{n} {p}: {m}")


@pytest.mark.parametrize("height, width, r", [(4, 4, 3), (3, 5, 5), (2, 3, 9)])
def test_embeddings_are_the_table_at_the_offset_and_zero_beyond(height, width, r):
    table = torch.randn(r, r, 2, 2)
    e_NKJ = position_embeddings(table, height, width)
    e = e_NKJ.unflatten(0, (height, width)).unflatten(-1, (2, height, width))  # y x K U y' x'
    for y in range(height):
        for x in range(width):
            for dy in range(-y, height - y):
                for dx in range(-x, width - x):
                    inside = max(abs(dy), abs(dx)) <= r // 2
                    expected = table[dy + r // 2, dx + r // 2] if inside else torch.zeros(2, 2)
                    assert torch.equal(e[y, x, :, :, y + dy, x + dx], expected)


@pytest.mark.parametrize("side, v, training, best", [
    (7, 128, True, "query_first"),
    (14, 64, True, "query_first"),
    (28, 32, True, "lambda_first"),
    (8, 8, True, "lambda_first"),
    (28, 32, False, "conv"),
    (56, 16, False, "conv"),
    (14, 64, False, "query_first"),
])  # fmt: skip
def test_the_rule_picks_what_was_measured_fastest(side, v, training, best):
    assert choose_order(side**2, k=16, v=v, h=4, u=1, r=23, training=training) == best


def test_costs_grow_with_the_context_except_that_of_the_convolution():
    def both(order: str) -> tuple[float, float]:
        small, large = (cost(order, n, k=16, v=16, h=4, u=1, r=7, training=True) / n for n in (64, 4096))
        return small, large

    assert both("conv")[0] == both("conv")[1]
    assert both("lambda_first")[0] < both("lambda_first")[1]
    assert both("query_first")[0] < both("query_first")[1]
