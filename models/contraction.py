"""Applies lambdas in four contraction orders, which all compute one function with a table of relative positions.

    y_n = Σ_j (k_j + e_nj) v_jᵀ applied to q_n,   e_nj = table[offset of j from n], 0 outside the scope

The orders agree to rounding, gradients included. They differ in what they build on the way (per example):

    order          multiply-adds                built on the way
    lambda_first   n·j·k·v                      the lambdas, n·k·v, and the embeddings, n·k·j (once a batch)
    query_first    h·n·j·(k + v)                the query-context map, h·n·j, and the embeddings
    conv           n·r²·u·k·v                   the lambdas only; memory does not grow with n·j
    fourier        n·k·v·2·F·(1 + 2·c·u/side)   the lambdas and their row transform; F ≈ (side + r/2)/2
                                                frequencies, c ≤ r + 7 (models.fourier)

Every order takes (q, keys, v, table, height, width). The keys are normalised, or None if there is no content lambda.
The table may have any odd sides; offsets beyond it count as zero. lambda_first and query_first also take mask_NM, which
says what each query sees of the context, and place_N, the index of the context position at which each query stands.

Shape suffixes: B batch, H heads, N queries, M context positions, K key depth, V value depth, U intra-depth,
J = M·U context entries (U fast), Y and X the table's sides. Positions are row-major over
(height, width).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.fourier import fourier, fourier_cost
from models.order import Order, Workload, others_differentiate, weighted


def position_embeddings(
    table_YXKU: Tensor, height: int, width: int, mask_NM: Tensor | None = None, place_N: Tensor | None = None
) -> Tensor:
    """All relative embeddings of a height × width context, e_NKJ, with its entries in *reverse* order, the last first.

    The table is cut or zero-padded to the 2·side − 1 offsets that occur and flipped; the embeddings of the query at
    (y, x) are then the window that starts at (y, x): the n·k·j numbers are written once and never flipped.
    """
    rows, columns = (side - 1 - scope // 2 for side, scope in zip((height, width), table_YXKU.shape[:2], strict=True))
    fitted = F.pad(table_YXKU, (0, 0, 0, 0, columns, columns, rows, rows)).flip(0, 1, 3)
    windows = fitted.unfold(0, height, 1).unfold(1, width, 1)  # [height, width, K, U, height, width]
    e_NKJ = windows.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(0, 1)
    if place_N is not None:
        e_NKJ = e_NKJ[place_N]
    if mask_NM is not None:
        e_NKJ = e_NKJ * mask_NM.repeat_interleave(table_YXKU.shape[3], 1).flip(1).unsqueeze(1)
    return e_NKJ


def lambda_first(
    q_BNHK: Tensor,
    keys_BJK: Tensor | None,
    v_BJV: Tensor,
    table_YXKU: Tensor,
    height: int,
    width: int,
    mask_NM: Tensor | None = None,
    place_N: Tensor | None = None,
) -> Tensor:
    """Builds every query's lambda in one matrix product over the batch, then applies it. Returns y_BNHV."""
    e_NKJ = position_embeddings(table_YXKU, height, width, mask_NM, place_N)
    n, k = e_NKJ.shape[:2]
    v_JBV = v_BJV.flip(1).transpose(0, 1)
    p_NKBV = (e_NKJ.flatten(0, 1) @ v_JBV.flatten(1)).view(n, k, *v_JBV.shape[1:])
    p_BNKV = p_NKBV.permute(2, 0, 1, 3)
    return q_BNHK @ (p_BNKV if keys_BJK is None else p_BNKV + (keys_BJK.mT @ v_BJV).unsqueeze(1))


def lambda_first_cost(w: Workload) -> float:
    weights = (0.8, 500, 1300, 35e6) if w.training else (0.7, 175, 55, 9e6)
    return weighted(weights, (w.batch * w.map * w.k * w.v, w.batch * w.lambdas, w.embeddings, 1))


def conv(q_BNHK: Tensor, keys_BJK: Tensor | None, v_BJV: Tensor, table_YXKU: Tensor, height: int, width: int) -> Tensor:
    """Builds position lambdas as a convolution of every value channel with the table as kernel. Returns y_BNHV."""
    rows, columns, k, u = table_YXKU.shape
    maps = v_BJV.unflatten(1, (height, width, u)).permute(0, 4, 3, 1, 2).flatten(0, 1)
    p = F.conv2d(maps, table_YXKU.permute(2, 3, 0, 1), padding=(rows // 2, columns // 2))  # [(B V), K, height, width]
    p_BVKN = p.view(*v_BJV.shape[::2], k, height * width)
    p_BNKV = p_BVKN.permute(0, 3, 2, 1)
    return q_BNHK @ (p_BNKV if keys_BJK is None else p_BNKV + (keys_BJK.mT @ v_BJV).unsqueeze(1))


def conv_cost(w: Workload) -> float:
    weights = (7.7, 0, 190e6) if w.training else (0.33, 260, 15e6)
    return weighted(weights, (w.batch * w.r * w.r * w.u * w.lambdas, w.batch * w.lambdas, 1))


def query_first(
    q_BNHK: Tensor,
    keys_BJK: Tensor | None,
    v_BJV: Tensor,
    table_YXKU: Tensor,
    height: int,
    width: int,
    mask_NM: Tensor | None = None,
    place_N: Tensor | None = None,
) -> Tensor:
    """Multiplies queries and embeddings first, as attention does, and builds no position lambda. Returns y_BNHV."""
    e_NKJ = position_embeddings(table_YXKU, height, width, mask_NM, place_N)
    v_BJV, keys_BJK = v_BJV.flip(1), None if keys_BJK is None else keys_BJK.flip(1)
    n, heads = q_BNHK.shape[1:3]
    j, v = v_BJV.shape[1:]
    c_BKV = None
    if keys_BJK is not None and heads * n * j > (j + heads * n) * v:  # on small maps keys are cheaper in the map
        c_BKV, keys_BJK = keys_BJK.mT @ v_BJV, None
    y_BQV: Tensor
    if others_differentiate() or not torch.is_grad_enabled():
        y_BQV = apply_map(q_BNHK, c_BKV, keys_BJK, v_BJV, e_NKJ)[0]
    else:
        y_BQV = ApplyMap.apply(q_BNHK, c_BKV, keys_BJK, v_BJV, e_NKJ)
    # Not inside the Function: nobody may write to what it gives if that is a view.
    return y_BQV.view(y_BQV.shape[0], n, heads, v)


def query_first_cost(w: Workload) -> float:
    weights = (1.2, 72, 1100, 55e6) if w.training else (0.9, 54, 55, 9e6)
    return weighted(weights, (w.batch * w.h * w.map * (w.k + w.v), w.batch * w.h * w.map, w.embeddings, 1))


def apply_map(
    q_BNHK: Tensor, c_BKV: Tensor | None, keys_BJK: Tensor | None, v_BJV: Tensor, e_NKJ: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y_BQV, Q = (N H), and the map and the queries in the layout [N, H, B, …].

    In that layout one product per query writes the map and one per image reads it, both with plain strides. Any other
    layout transposes the map, the largest tensor of all, between the two.
    """
    batch, _, heads, _ = q_BNHK.shape
    q_NHBK = q_BNHK.permute(1, 2, 0, 3).contiguous()
    a_NHBJ = torch.bmm(q_NHBK.flatten(1, 2), e_NKJ).unflatten(1, (heads, batch))
    a_BQJ = a_NHBJ.flatten(0, 1).transpose(0, 1)
    q_BQK = q_BNHK.flatten(1, 2)
    if keys_BJK is not None:
        add = torch.baddbmm if others_differentiate() else torch.Tensor.baddbmm_  # exporters write to no view
        a_BQJ = add(a_BQJ, q_BQK, keys_BJK.mT)
    if c_BKV is None:
        y_BQV = torch.bmm(a_BQJ, v_BJV)
    else:
        y_BQV = torch.bmm(q_BQK, c_BKV).baddbmm_(a_BQJ, v_BJV)
    return y_BQV, a_NHBJ, q_NHBK


class ApplyMap(torch.autograd.Function):
    """`apply_map` with a backward that keeps its layout."""

    @staticmethod
    def forward(
        ctx: Any, q_BNHK: Tensor, c_BKV: Tensor | None, keys_BJK: Tensor | None, v_BJV: Tensor, e_NKJ: Tensor
    ) -> Tensor:
        y_BQV, a_NHBJ, q_NHBK = apply_map(q_BNHK, c_BKV, keys_BJK, v_BJV, e_NKJ)
        ctx.save_for_backward(q_BNHK, c_BKV, keys_BJK, v_BJV, e_NKJ, a_NHBJ, q_NHBK)
        return y_BQV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BQV: Tensor) -> tuple[Tensor | None, ...]:
        q_BNHK, c_BKV, keys_BJK, v_BJV, e_NKJ, a_NHBJ, q_NHBK = ctx.saved_tensors
        heads, batch = q_NHBK.shape[1:3]
        q_BQK = q_BNHK.flatten(1, 2)
        dv_BJV = torch.bmm(a_NHBJ.flatten(0, 1).permute(1, 2, 0), dy_BQV)
        da_NHBJ = torch.empty_like(a_NHBJ)
        da_BQJ = da_NHBJ.flatten(0, 1).transpose(0, 1).baddbmm_(dy_BQV, v_BJV.mT, beta=0)
        da_NRJ = da_NHBJ.flatten(1, 2)  # R = (H B)
        de_NKJ = torch.bmm(q_NHBK.flatten(1, 2).mT, da_NRJ)
        dq_BNHK = torch.bmm(da_NRJ, e_NKJ.mT).unflatten(1, (heads, batch)).permute(2, 0, 1, 3)
        dc_BKV = dkeys_BJK = None
        if c_BKV is not None:
            dc_BKV = torch.bmm(q_BQK.mT, dy_BQV)
            dq_BNHK = torch.bmm(dy_BQV, c_BKV.mT).view_as(q_BNHK).add_(dq_BNHK)
        if keys_BJK is not None:
            dkeys_BJK = torch.bmm(da_BQJ.mT, q_BQK)
            dq_BNHK = torch.bmm(da_BQJ, keys_BJK).view_as(q_BNHK).add_(dq_BNHK)
        return dq_BNHK, dc_BKV, dkeys_BJK, dv_BJV, de_NKJ


ORDERS: dict[str, Order] = {
    "lambda_first": Order(lambda_first, lambda_first_cost, dense=lambda_first, content_lambdas=True),
    "query_first": Order(query_first, query_first_cost, dense=query_first),
    "conv": Order(conv, conv_cost, content_lambdas=True),
    "fourier": Order(fourier, fourier_cost),
}
"""All orders by name. One more is its function, its cost and an entry here."""
