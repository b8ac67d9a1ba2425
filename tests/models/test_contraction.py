"""The contraction orders are one function, forward and backward, however they are run."""

from __future__ import annotations

import shutil

import pytest
import torch

from models import fourier
from models.contraction import ORDERS, position_embeddings

SHAPES = [  # batch, height, width, u, rows and columns of the table
    (2, 4, 4, 1, 7, 7),
    (1, 5, 3, 1, 3, 3),
    (3, 3, 6, 2, 5, 5),
    (2, 2, 7, 3, 23, 23),
    (2, 1, 1, 1, 3, 3),
    (2, 1, 9, 1, 1, 5),  # a sequence
    (2, 6, 19, 2, 5, 3),  # several tiles, the last one narrower
    (1, 4, 5, 1, 7, 9),  # the table of a global layer
]


def inputs(shape: tuple[int, ...], keys: bool = True) -> list[torch.Tensor | None]:
    torch.manual_seed(0)
    batch, height, width, u, rows, columns = shape
    n, heads, k, v = height * width, 2, 3, 5
    shapes = [(batch, n, heads, k), (batch, u * n, k), (batch, u * n, v), (rows, columns, k, u)]
    made = [torch.randn(each, dtype=torch.float64, requires_grad=True) for each in shapes]
    return made if keys else [made[0], None, *made[2:]]


def with_gradients(y: torch.Tensor, tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), [t for t in tensors if t is not None])]


def written_out(tensors: list[torch.Tensor | None], height: int, width: int) -> torch.Tensor:
    """The definition, one query and one context position at a time."""
    q, keys, v, table = tensors
    rows, columns, _, u = table.shape
    out = []
    for n in range(height * width):
        lambdas = 0 if keys is None else torch.einsum("bjk,bjv->bkv", keys, v)
        for m in range(height * width):
            dy, dx = m // width - n // width + rows // 2, m % width - n % width + columns // 2
            if 0 <= dy < rows and 0 <= dx < columns:
                lambdas = lambdas + torch.einsum("ku,buv->bkv", table[dy, dx], v[:, m * u : (m + 1) * u])
        out.append(torch.einsum("bkv,bhk->bhv", lambdas, q[:, n]))
    return torch.stack(out, 1)


@pytest.mark.parametrize("keys", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_orders_agree_to_rounding_forward_and_backward(shape, keys):
    tensors = inputs(shape, keys)
    expected = with_gradients(written_out(tensors, *shape[1:3]), tensors)
    for name, order in ORDERS.items():
        found = with_gradients(order.apply(*tensors, *shape[1:3]), tensors)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        with torch.inference_mode():
            torch.testing.assert_close(order.apply(*tensors, *shape[1:3]), expected[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[6]])
def test_fourier_over_the_whole_batch_is_fourier_by_image(shape, monkeypatch):
    tensors = inputs(shape)
    expected = with_gradients(fourier.fourier(*tensors, *shape[1:3]), tensors)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = with_gradients(fourier.fourier(*tensors, *shape[1:3]), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def compiles() -> bool:
    return any(shutil.which(name) for name in ("g++", "clang++", "c++"))


BACKENDS = [
    "aot_eager",  # our part of it: one graph, forward and backward
    pytest.param(
        "inductor",  # and its code in C++, which takes most of a minute to be compiled
        marks=[pytest.mark.slow, pytest.mark.skipif(not compiles(), reason="Inductor needs a C++ compiler")],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("shape", [(2, 3, 4, 2, 5, 5), (2, 2, 2, 1, 3, 3)])  # query_first meets keys in another way
def test_compiled_orders_agree(shape, name, backend):
    tensors = inputs(shape)
    expected = with_gradients(written_out(tensors, *shape[1:3]), tensors)
    torch._dynamo.reset()
    compiled = torch.compile(ORDERS[name].apply, fullgraph=True, backend=backend)
    found = with_gradients(compiled(*tensors, *shape[1:3]), tensors)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_masks_and_placed_queries_agree():
    batch, height, width, u, rows, columns = 2, 3, 4, 2, 5, 3
    q, _, v, table = inputs((batch, height, width, u, rows, columns))
    torch.manual_seed(1)
    place = torch.tensor([0, 5, 5, 11, 2])
    mask = torch.rand(5, height * width) < 0.6
    e = torch.zeros(5, 3, height * width, u, dtype=torch.float64)
    for n, at in enumerate(place.tolist()):
        for m in range(height * width):
            dy, dx = m // width - at // width + rows // 2, m % width - at % width + columns // 2
            if mask[n, m] and 0 <= dy < rows and 0 <= dx < columns:
                e[n, :, m] = table[dy, dx]
    expected = torch.einsum("bnhk,nkj,bjv->bnhv", q[:, :5], e.flatten(2), v)
    expected = with_gradients(expected, [q, v])
    for order in [order for order in ORDERS.values() if order.dense]:
        y = order.apply(q[:, :5], None, v, table, height, width, mask, place)
        for a, b in zip(with_gradients(y, [q, v]), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("height, width, r", [(4, 4, 3), (3, 5, 5), (2, 3, 9)])
def test_embeddings_are_the_table_at_the_offset_and_zero_beyond(height, width, r):
    table = torch.randn(r, r, 2, 2)
    e_NKJ = position_embeddings(table, height, width).flip(2)  # they come last first
    e = e_NKJ.unflatten(0, (height, width)).unflatten(-1, (height, width, 2))  # y x K y' x' U
    for y in range(height):
        for x in range(width):
            for dy in range(-y, height - y):
                for dx in range(-x, width - x):
                    inside = max(abs(dy), abs(dx)) <= r // 2
                    expected = table[dy + r // 2, dx + r // 2] if inside else torch.zeros(2, 2)
                    assert torch.equal(e[y, x, :, y + dy, x + dx], expected)


@pytest.mark.parametrize("width, tile", [(1, 1), (7, 7), (9, 9), (14, 7), (18, 9), (28, 7), (36, 9), (56, 8), (72, 8)])
def test_tiles_cover_the_width_in_pieces_of_about_eight(width, tile):
    assert fourier.tile_width(width) == tile
    covered = [column for first, _, _ in fourier.tiles(width, tile, 3) for column in range(first, first + tile)]
    assert covered[:width] == list(range(width)) and len(covered) - width < tile
