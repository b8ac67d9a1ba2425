"""The rule that chooses a contraction order: it agrees with measurements and reads shapes only."""

from __future__ import annotations

import pytest

from models.choose_order import choose_order, cost
from models.contraction import ORDERS


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
    assert choose_order(side, side, k=k, v=width // 4, h=4, u=1, r=r, batch=batch, training=training) == best


def test_masks_leave_the_dense_orders():
    chosen = choose_order(56, 56, k=16, v=16, h=4, u=1, r=23, training=True, dense=True)
    assert chosen in ("lambda_first", "query_first")


def test_only_the_dense_orders_cost_more_per_position_on_larger_maps():
    def growth(order: str) -> float:
        small, large = (
            cost(order, side, side, batch=16, k=16, v=16, h=4, u=1, r=7, training=True) / side**2 for side in (32, 128)
        )
        return large / small

    assert growth("conv") == pytest.approx(1, abs=0.2)
    assert all(growth(order) > 10 for order in ("lambda_first", "query_first"))
    assert growth("fourier") < 4  # the transform's length grows with the side, the rest does not
    assert set(ORDERS) == {"lambda_first", "query_first", "conv", "fourier"}
