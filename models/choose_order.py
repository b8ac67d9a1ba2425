"""Which contraction order is cheapest: a small cost model over shapes, fitted to measurements."""

from __future__ import annotations

from models.contraction import DENSE, ORDERS
from models.fourier import tile_width

EXPORT_BATCH = 16
"""The batch that a choice assumes where it must not read the true one, as under export."""


def cost(
    order: str, height: int, width: int, *, batch: int, k: int, v: int, h: int, u: int, r: int, training: bool
) -> float:
    """Estimated cost of a contraction order, in multiply-adds of a well-fed matrix product.

    To its arithmetic come the traffic of what it builds on the way and the overhead of its calls, with weights fitted
    by non-negative least squares to the times of 72 cases (maps of 4 to 56 a side, v of 6 to 128, u of 1 and 4, batches of
    16 and 1; one core, fp32, 40 G multiply-adds/s). In 64 of them the cheapest by this model was the fastest; the worst
    choice took 1.36 times the best. No weight was fitted on a GPU. Forward + backward, whole layer, batch 16, k=16, h=4,
    r=23, in ms:

        width, side    lambda_first   query_first   conv   fourier
        512, 7               32            12        172       23
        256, 14             103            42        344       51
        256, 18             169            87        466       88
        128, 28             614           528        769      142
        64, 56                –             –       1960      279
    """
    n = height * width
    weights: tuple[float, ...]
    terms: tuple[float, ...]
    map_, lambdas, embeddings = n * n * u, n * k * v, n * n * u * k
    if order == "lambda_first":
        weights = (0.8, 500, 1300, 35e6) if training else (0.7, 175, 55, 9e6)
        terms = (batch * map_ * k * v, batch * lambdas, embeddings, 1)
    elif order == "query_first":
        weights = (1.2, 72, 1100, 55e6) if training else (0.9, 54, 55, 9e6)
        terms = (batch * h * map_ * (k + v), batch * h * map_, embeddings, 1)
    elif order == "conv":
        weights = (7.7, 0, 0, 190e6) if training else (0.33, 260, 0, 15e6)
        terms = (batch * r * r * u * lambdas, batch * lambdas, 0, 1)
    else:
        frequencies = (height + min(r // 2, height - 1)) // 2 + 1
        tile = tile_width(width)
        tiles = -(-width // tile)
        context = min(width, tile + min(r, 2 * width - 1) - 1)
        weights = (2.8, 6.7, 13e6, 0) if training else (1.75, 1.75, 3.2e6, 27e6)
        products = 4 * frequencies * tiles * tile * context * u * k * v
        transforms = (2 * frequencies + 1) * lambdas
        terms = (batch * products, batch * transforms, batch * tiles, 1)
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def choose_order(
    height: int,
    width: int,
    *,
    k: int,
    v: int,
    h: int,
    u: int,
    r: int,
    training: bool,
    batch: int = EXPORT_BATCH,
    dense: bool = False,
) -> str:
    """The order of least estimated `cost` for a context of height × width; `dense` leaves those that take a mask."""

    def estimated(order: str) -> float:
        return cost(order, height, width, batch=batch, k=k, v=v, h=h, u=u, r=r, training=training)

    return min(DENSE if dense else ORDERS, key=estimated)
