"""The rule that chooses a contraction order: it agrees with measurements and reads sizes only."""

from __future__ import annotations

import pytest
import torch

from models import LambdaLayer
from models.choose_order import choose_order, orders
from models.contraction import ORDERS, lambda_first
from models.order import Order, Workload


def square(side: int, *, width: int, batch: int = 16, k: int = 16, r: int = 23, training: bool = True) -> Workload:
    return Workload(height=side, width=side, batch=batch, k=k, v=width // 4, h=4, u=1, r=r, training=training)


@pytest.mark.parametrize("width, side, batch, training, best", [
    (512, 7, 16, True, "query_first"),
    (256, 14, 16, True, "query_first"),
    (256, 20, 16, True, "fourier"),
    (128, 28, 16, True, "fourier"),
    (64, 56, 16, True, "fourier"),
    (32, 8, 16, True, "lambda_first"),
    (512, 7, 16, False, "query_first"),
    (256, 14, 16, False, "query_first"),
    (64, 56, 16, False, "fourier"),
    (512, 7, 1, False, "query_first"),
    (128, 28, 1, False, "fourier"),
])  # fmt: skip
def test_the_rule_picks_what_was_measured_fastest(width, side, batch, training, best):
    k, r = (8, 15) if width == 32 else (16, 23)
    assert choose_order(square(side, width=width, batch=batch, k=k, r=r, training=training)) == best


# height, width, batch, k, v, h, u, r, training; the costs of lambda_first, query_first, conv and fourier; the choice
# among all and among those that take a mask
PINNED = [
    (
        (7, 7, 16, 16, 128, 4, 1, 23, True),
        (950697574.4, 134874547.2, 6730220825.6, 495247564.8),
        "query_first",
        "query_first",
    ),
    (
        (14, 14, 16, 16, 64, 4, 1, 23, True),
        (2943210995.2, 1144170432.0, 13270441651.2, 1464477696.0),
        "query_first",
        "query_first",
    ),
    (
        (28, 28, 16, 16, 32, 4, 1, 23, True),
        (20059318361.6, 15971148326.4, 26350883302.4, 4034914713.6000004),
        "fourier",
        "query_first",
    ),
    (
        (56, 56, 16, 16, 16, 4, 1, 23, True),
        (243240721292.8, 242628744537.6, 52511766604.8, 10014660812.8),
        "fourier",
        "query_first",
    ),
    (
        (7, 7, 1, 16, 128, 4, 1, 23, False),
        (32116553.6, 12876174.4, 58609968.64, 37751488.0),
        "query_first",
        "query_first",
    ),
    (
        (14, 14, 1, 16, 64, 4, 1, 23, False),
        (105465868.8, 62167744.0, 102219937.28, 61147328.0),
        "fourier",
        "query_first",
    ),
    (
        (28, 28, 1, 16, 32, 4, 1, 23, False),
        (840436390.4, 788875532.8, 189439874.56, 124798144.0),
        "fourier",
        "query_first",
    ),
    (
        (56, 56, 1, 16, 16, 4, 1, 23, False),
        (10566190963.2, 11920541555.2, 363879749.12, 248699072.0),
        "fourier",
        "lambda_first",
    ),
    (
        (8, 8, 16, 8, 8, 4, 1, 15, True),
        (113721843.2, 114952332.8, 303541120.0, 221336576.0),
        "lambda_first",
        "lambda_first",
    ),
    (
        (1, 100, 4, 16, 64, 4, 1, 23, True),
        (480568000.0, 257880000.0, 1858423680.0, 785823129.6),
        "query_first",
        "query_first",
    ),
    ((5, 13, 3, 8, 24, 2, 4, 7, True), (237267520.0, 214914560.0, 246504448.0, 104241696.0), "fourier", "query_first"),
    ((5, 13, 3, 8, 24, 2, 4, 7, False), (29802080.0, 24831920.0, 27156019.2, 61597200.0), "query_first", "query_first"),
    (
        (18, 18, 128, 16, 64, 4, 1, 35, False),
        (17164751270.4, 6873590592.0, 28223922624.0, 8946842816.0),
        "query_first",
        "query_first",
    ),
    (
        (72, 40, 2, 16, 16, 8, 4, 7, True),
        (704455904960.0, 642585672640.0, 2415405952.0, 1378837632.0),
        "fourier",
        "query_first",
    ),
    ((1, 1, 1, 1, 1, 1, 1, 1, False), (9000230.7, 9000110.8, 15000260.33, 30200012.25), "query_first", "query_first"),
]


@pytest.mark.parametrize("sizes, costs, best, best_dense", PINNED)
def test_costs_and_choices_stay_what_they_were(sizes, costs, best, best_dense):
    height, width, batch, k, v, h, u, r, training = sizes
    workload = Workload(height=height, width=width, batch=batch, k=k, v=v, h=h, u=u, r=r, training=training)
    names = ("lambda_first", "query_first", "conv", "fourier")
    assert tuple(ORDERS[name].cost(workload) for name in names) == costs
    assert (choose_order(workload), choose_order(workload, dense=True)) == (best, best_dense)


def test_masks_leave_the_dense_orders():
    assert choose_order(square(56, width=64), dense=True) in orders(dense=True) == ["lambda_first", "query_first"]


def test_only_the_dense_orders_cost_more_per_position_on_larger_maps():
    def growth(name: str) -> float:
        small, large = (ORDERS[name].cost(square(side, width=64, r=7)) / side**2 for side in (32, 128))
        return large / small

    assert growth("conv") == pytest.approx(1, abs=0.2)
    assert all(growth(name) > 10 for name in ("lambda_first", "query_first"))
    assert growth("fourier") < 4  # the transform's length grows with the side, the rest does not
    assert set(ORDERS) == {"lambda_first", "query_first", "conv", "fourier"}


def test_an_entry_is_all_that_a_new_order_needs(monkeypatch):
    monkeypatch.setitem(ORDERS, "free", Order(lambda_first, lambda workload: 0.0, dense=lambda_first))
    monkeypatch.setitem(ORDERS, "plain", Order(lambda_first, lambda workload: -1.0))
    assert choose_order(square(7, width=32)) == "plain"
    assert choose_order(square(7, width=32), dense=True) == "free"
    torch.manual_seed(0)
    layer, x, mask = LambdaLayer(8, order="free"), torch.randn(2, 8, 3, 4), torch.rand(12, 12) < 0.5
    y = layer(x, mask=mask)
    layer.order = "lambda_first"
    torch.testing.assert_close(y, layer(x, mask=mask))
    with pytest.raises(ValueError, match=r"'plain' .* takes no mask .* lambda_first, query_first, free"):
        LambdaLayer(8, order="plain")(x, mask=mask)
