"""One function, three contraction orders: applying lambdas whose position part comes from a relative table.

    y_n = (c + λ_n)ᵀ q_n,   λ_n = Σ_j e_nj v_jᵀ,   e_nj = table[offset of j from n], 0 outside the scope

The orders agree to rounding, gradients included; they differ in what they build on the way (per example):

    order          multiply-adds           built on the way
    lambda_first   n·j·k·v                 the lambdas, n·k·v, and the embeddings, n·k·j (once a batch)
    query_first    h·n·j·(k + v)           the query-context map, h·n·j, and the embeddings
    conv           n·r²·u·k·v              the lambdas only; memory does not grow with n·j

Shape suffixes: B batch, H heads, N queries, K key depth, V value depth, U intra-depth, J = U·N context
entries (u slow, positions fast), R scope (table side). Positions are row-major over (height, width).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Order = Callable[[Tensor, Tensor, Tensor, Tensor, int, int], Tensor]


def position_embeddings(table_RRKU: Tensor, height: int, width: int) -> Tensor:
    """All relative embeddings of a height × width map, e_NKJ; offsets beyond the table's scope are zero.

    The table is cut or zero-padded to the 2·side − 1 offsets that occur; the queries of row y then see its window
    that starts at offset −y, so the windows in reverse order are the embeddings.
    """
    scope = table_RRKU.shape[0]
    rows, columns = height - 1 - scope // 2, width - 1 - scope // 2
    fitted = F.pad(table_RRKU, (0, 0, 0, 0, columns, columns, rows, rows))
    windows = fitted.unfold(0, height, 1).unfold(1, width, 1).flip(0, 1)  # [height, width, K, U, height, width]
    return windows.flatten(0, 1).flatten(2)


def lambda_first(q_BNHK: Tensor, c_BKV: Tensor, v_BVJ: Tensor, table_RRKU: Tensor, height: int, width: int) -> Tensor:
    """Builds every query's lambda in one matrix product over the batch, then applies it. Returns y_BNHV."""
    e_NKJ = position_embeddings(table_RRKU, height, width)
    n, k, _ = e_NKJ.shape
    p = e_NKJ.flatten(0, 1) @ v_BVJ.flatten(0, 1).mT  # [(N K), (B V)]
    p_BNKV = p.reshape(n, k, -1, v_BVJ.shape[1]).permute(2, 0, 1, 3)
    return q_BNHK @ (p_BNKV + c_BKV.unsqueeze(1))


def query_first(q_BNHK: Tensor, c_BKV: Tensor, v_BVJ: Tensor, table_RRKU: Tensor, height: int, width: int) -> Tensor:
    """Meets queries and embeddings first, as attention does; no position lambda is built. Returns y_BNHV."""
    e_NKJ = position_embeddings(table_RRKU, height, width)
    n, heads = q_BNHK.shape[1:3]
    a = q_BNHK.transpose(0, 1).flatten(1, 2) @ e_NKJ  # [N, (B H), J]
    a_BQJ = a.unflatten(1, (-1, heads)).transpose(0, 1).flatten(1, 2)  # Q = (N H)
    y_BQV = torch.baddbmm(q_BNHK.flatten(1, 2) @ c_BKV, a_BQJ, v_BVJ.mT)
    return y_BQV.unflatten(1, (n, heads))


def conv(q_BNHK: Tensor, c_BKV: Tensor, v_BVJ: Tensor, table_RRKU: Tensor, height: int, width: int) -> Tensor:
    """Position lambdas as a convolution of every value channel with the table as kernel. Returns y_BNHV."""
    scope, _, k, u = table_RRKU.shape
    maps = v_BVJ.reshape(-1, u, height, width)  # [(B V), U, height, width]
    p = F.conv2d(maps, table_RRKU.permute(2, 3, 0, 1), padding=scope // 2)  # [(B V), K, height, width]
    p_BNKV = p.reshape(-1, v_BVJ.shape[1], k, height * width).permute(0, 3, 2, 1)
    return q_BNHK @ (p_BNKV + c_BKV.unsqueeze(1))


ORDERS: dict[str, Order] = {"lambda_first": lambda_first, "query_first": query_first, "conv": conv}


def cost(order: str, positions: int, *, k: int, v: int, h: int, u: int, r: int, training: bool) -> float:
    """Estimated cost per example of a contraction order, in multiply-adds of a well-fed matrix product.

    Beside its arithmetic, every entry of a map costs the memory traffic of 100 multiply-adds and every entry of
    a lambda that of 50; a convolution runs at twice the speed of the products forward, at half with its backward.
    Fitted to medians on 2 CPU cores, batch 16, fp32, k=16, h=4, r=23. Forward + backward, ms:

        map, v           lambda_first   query_first   conv
        4×4, v=16 ¹          1.1            0.7          3
        7×7, v=128          10.5            2.2         80
        14×14, v=64         34             18          156
        28×28, v=32        208            304          524
        8×8, v=8 ²           3.7           38           15
        16×16, v=6 ²        14            129           47

    forward alone at 28×28: 75, 175, 19. (¹ batch 64, r=7; ² batch 64, r=15, k=16 and 8.)
    """
    context = positions * u
    lambdas = 50 * positions * k * v
    if order == "lambda_first":
        return positions * context * k * v + lambdas
    if order == "query_first":
        return h * positions * context * (k + v + 100)
    return (2.0 if training else 0.5) * positions * r * r * u * k * v + lambdas


def choose_order(positions: int, *, k: int, v: int, h: int, u: int, r: int, training: bool) -> str:
    """The order of least estimated `cost`; it depends on shapes alone, never the batch, so an export fixes it."""
    return min(ORDERS, key=lambda order: cost(order, positions, k=k, v=v, h=h, u=u, r=r, training=training))
