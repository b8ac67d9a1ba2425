"""Chooses the cheapest contraction order for a workload, by cost estimates that were fitted to measurements.

Every order estimates its own cost, in multiply-adds of a well-fed matrix product, beside its function. To its
arithmetic it adds the traffic of what it builds on the way and the overhead of its calls, with weights fitted by
non-negative least squares to the times of 72 cases (maps of 4 to 56 a side, v of 6 to 128, u of 1 and 4, batches of 16
and 1; one core, fp32, 40 G multiply-adds/s). In 64 of them the cheapest by these estimates was the fastest; the worst
choice took 1.36 times as long as the best. No weight was fitted on a GPU. Forward + backward, whole layer, batch 16,
k=16, h=4, r=23, in ms:

    width, side    lambda_first   query_first   conv   fourier
    512, 7               32            12        172       23
    256, 14             103            42        344       51
    256, 18             169            87        466       88
    128, 28             614           528        769      142
    64, 56                –             –       1960      279
"""

from __future__ import annotations

import torch

from models.contraction import ORDERS
from models.order import Workload

EXPORT_BATCH = 16
"""The batch that a choice assumes where it must not read the true one, as under export."""
ANY_SIDE = "conv"
"""The order whose graph holds for every height and width; those of the others hold for one."""


def orders(dense: bool = False) -> list[str]:
    """Names of the orders; with `dense` only of those that take a mask and a context of another size."""
    return [name for name, order in ORDERS.items() if order.dense or not dense]


def choose_order(workload: Workload, dense: bool = False) -> str:
    """The name of the order with the least estimated cost, among those that `orders(dense)` lists; where torch.export
    was told that height or width are dynamic, the one whose graph then exists."""
    if not dense and (isinstance(workload.height, torch.SymInt) or isinstance(workload.width, torch.SymInt)):
        return ANY_SIDE
    names = orders(dense)
    best, least = names[0], ORDERS[names[0]].cost(workload)
    for name in names[1:]:  # no min(…, key=…): torch.compile reads none of sizes that it has seen to change
        if (cost := ORDERS[name].cost(workload)) < least:
            best, least = name, cost
    return best
