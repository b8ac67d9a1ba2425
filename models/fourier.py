"""Applies position lambdas by a Fourier transform along the rows, in matrix products only: the order `fourier`.

The position lambdas are a correlation of the values with the table. A transform along the height turns it into one
one-dimensional correlation along the width per frequency, and that is a product with a Toeplitz matrix: transform,
product per frequency, and transform back are all dense, well-shaped matrix products, forward and backward. A
convolution with one input channel has a slow backward instead, and a two-dimensional FFT spends more time on memory
traffic than on arithmetic. The side is so short that a transform as a product costs less than a fast one, and it may
have any length: side + scope//2 keeps the circular correlation from wrapping. Along the width the map is cut into tiles
of T columns that each see T + r − 1 columns of the context; the Toeplitz matrix is the same for every tile.

Shape suffixes as in models.contraction, and: F frequencies, P planes (real, imaginary), T columns of a tile, W columns
of its context, C = (T P K) and E = (W P U) the two sides of a frequency's matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.order import Workload, others_differentiate, weighted

TILE = 8
"""The approximate number of columns of a tile. Wider tiles waste less context, narrower ones make thin products; widths
of 4 to 14 measured alike at sides of 28 and 56."""


def fourier(
    q_BNHK: Tensor, keys_BJK: Tensor | None, v_BJV: Tensor, table_YXKU: Tensor, height: int, width: int
) -> Tensor:
    """Builds lambdas by a transform along the rows and applies them, in at least single precision. Returns y_BNHV."""
    if v_BJV.dtype in (torch.bfloat16, torch.float16):
        keys = None if keys_BJK is None else keys_BJK.float()
        with torch.autocast(v_BJV.device.type, enabled=False):
            y_BNHV = fourier(q_BNHK.float(), keys, v_BJV.float(), table_YXKU.float(), height, width)
        return y_BNHV.to(v_BJV.dtype)
    table_YXKU = centre(table_YXKU, height, width)
    half = table_YXKU.shape[0] // 2
    analysis, synthesis, of_table = transforms(height, half, table_YXKU)
    columns = tile_width(width)
    matrix_FCE = toeplitz(table_YXKU, of_table, columns)
    c_BKV = None if keys_BJK is None else keys_BJK.mT @ v_BJV
    if others_differentiate() or v_BJV.device.type != "cpu":  # accelerators prefer few large products
        return _whole_batch(q_BNHK, c_BKV, v_BJV, matrix_FCE, analysis, synthesis, width, columns)
    tensors = (q_BNHK, c_BKV, v_BJV, matrix_FCE, analysis, synthesis)
    y_BYXHV: Tensor
    if torch.is_grad_enabled():
        y_BYXHV = ApplyByImage.apply(*tensors, width, columns)
    else:
        y_BYXHV = apply_by_image(*tensors, width, columns, keep=False)[0]
    # Not inside the Function: nobody may write to what it gives if that is a view.
    return y_BYXHV.flatten(1, 2)


def fourier_cost(w: Workload) -> float:
    frequencies = (w.height + min(w.r // 2, w.height - 1)) // 2 + 1
    tile = tile_width(w.width)
    count = -(-w.width // tile)
    context = min(w.width, tile + min(w.r, 2 * w.width - 1) - 1)
    products = 4 * frequencies * count * tile * context * w.u * w.k * w.v
    transforms = (2 * frequencies + 1) * w.lambdas
    weights = (2.8, 6.7, 13e6, 0) if w.training else (1.75, 1.75, 3.2e6, 27e6)
    return weighted(weights, (w.batch * products, w.batch * transforms, w.batch * count, 1))


def tile_width(width: int) -> int:
    """The width of the tiles that cut `width` columns evenly into pieces of about TILE."""
    return -(-width // max(1, round(width / TILE)))


def centre(table_YXKU: Tensor, height: int, width: int) -> Tensor:
    """The part of the table whose offsets occur between two positions of a height × width map."""
    for dim, side in enumerate((height, width)):
        scope = table_YXKU.shape[dim]
        half = min(scope // 2, side - 1)
        table_YXKU = table_YXKU.narrow(dim, scope // 2 - half, 2 * half + 1)
    return table_YXKU


def transforms(height: int, half: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The Fourier transform of `height` rows, its inverse, and the transform of a table's 2·half + 1 offsets.

    They are real matrices for the length height + half: [(F P), height], [height, (F P)] and [F, P, 2·half + 1].
    """
    length = height + half
    device = like.device
    f = torch.arange(length // 2 + 1, dtype=torch.float64, device=device) * (2 * math.pi / length)
    by_row = f[:, None] * torch.arange(height, dtype=torch.float64, device=device)
    by_offset = f[:, None] * torch.arange(-half, half + 1, dtype=torch.float64, device=device)
    analysis = torch.stack([by_row.cos(), -by_row.sin()], 1)
    twice = torch.full_like(f, 2 / length)  # a frequency also stands for its conjugate, except the first
    twice[0] = 1 / length
    if length % 2 == 0:  # and, in even lengths, the last
        twice[-1] = 1 / length
    synthesis = (analysis * twice[:, None, None]).flatten(0, 1).T.contiguous()
    of_table = torch.stack([by_offset.cos(), by_offset.sin()], 1)  # conjugate: a correlation, not a convolution
    return analysis.flatten(0, 1).to(like.dtype), synthesis.to(like.dtype), of_table.to(like.dtype)


def toeplitz(table_YXKU: Tensor, of_table: Tensor, columns: int) -> Tensor:
    """One matrix per frequency from the context of a tile to its lambdas, [F, (P T K), (W P U)], W = T + X − 1."""
    scope, k = table_YXKU.shape[1:3]
    t_FPXKU = torch.tensordot(of_table, table_YXKU, 1)
    real, imaginary = t_FPXKU.unbind(1)
    product = torch.stack([torch.stack([real, -imaginary], 1), torch.stack([imaginary, real], 1)], 1)  # F P P X K U
    # Column w of the context is at offset w − t of column t: rows in reverse are the windows of the padded offsets.
    windows = F.pad(product, (0, 0, 0, 0, columns - 1, columns - 1)).unfold(3, columns + scope - 1, 1).flip(3)
    return windows.permute(0, 1, 3, 4, 6, 2, 5).reshape(len(t_FPXKU), 2 * columns * k, -1)


def tiles(width: int, columns: int, half: int) -> list[tuple[int, slice, slice]]:
    """The first column of every tile, the columns of the map in its context, and the columns of its matrix."""
    found = []
    for first in range(0, width, columns):
        start, stop = max(0, first - half), min(width, first + columns + half)
        found.append((first, slice(start, stop), slice(start - first + half, stop - first + half)))
    return found


def times(columns: slice, factor: int) -> slice:
    return slice(columns.start * factor, columns.stop * factor)


def _whole_batch(
    q_BNHK: Tensor,
    c_BKV: Tensor | None,
    v_BJV: Tensor,
    matrix_FCE: Tensor,
    analysis: Tensor,
    synthesis: Tensor,
    width: int,
    columns: int,
) -> Tensor:
    """Applies the lambdas with plain differentiable operations, every product over the whole batch."""
    v, k = v_BJV.shape[2], q_BNHK.shape[3]
    frequencies, height = len(matrix_FCE), len(synthesis)
    u = v_BJV.shape[1] // (height * width)
    half = (matrix_FCE.shape[2] // (2 * u) - columns) // 2
    v_YXUBV = v_BJV.unflatten(1, (height, width, u)).permute(1, 2, 3, 0, 4)
    r = v_BJV.shape[0] * v
    f_FPXUR = (analysis @ v_YXUBV.flatten(1)).view(frequencies, 2, width, u, r)  # R = (B V)
    f_FER = f_FPXUR.transpose(1, 2).flatten(1, 3)
    parts = []
    for first, context, of_matrix in tiles(width, columns, half):
        lambdas_FCR = matrix_FCE[:, :, times(of_matrix, 2 * u)] @ f_FER[:, times(context, 2 * u)]
        by_plane = lambdas_FCR.reshape(2 * frequencies, columns * k * r)
        p_YTKR = (synthesis @ by_plane).view(height, columns, k, r)
        parts.append(p_YTKR[:, : width - first])
    p_BNKV: Tensor = torch.cat(parts, 1).unflatten(3, (v_BJV.shape[0], v)).permute(3, 0, 1, 2, 4).flatten(1, 2)
    return q_BNHK @ (p_BNKV if c_BKV is None else p_BNKV + c_BKV.unsqueeze(1))


def _transformed(v_BJV: Tensor, analysis: Tensor, width: int) -> Tensor:
    """The transform of the values along the rows, [B, F, (W P U), V]."""
    height = analysis.shape[1]
    batch, j, v = v_BJV.shape
    u = j // (height * width)
    rows = v_BJV.unflatten(1, (height, width, u)).flatten(2)
    f = torch.matmul(analysis, rows).view(batch, len(analysis) // 2, 2, width, u, v)
    return f.transpose(2, 3).flatten(2, 4)


def apply_by_image(
    q_BNHK: Tensor,
    c_BKV: Tensor | None,
    v_BJV: Tensor,
    matrix_FCE: Tensor,
    analysis: Tensor,
    synthesis: Tensor,
    width: int,
    columns: int,
    keep: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns y_BYXHV, the lambdas of every tile and image if `keep` is set, and the transformed values.

    It works on one tile of one image at a time: intermediate results stay in a core's cache, and none is transposed.
    """
    batch, _, heads, k = q_BNHK.shape
    v = v_BJV.shape[2]
    height, frequencies = len(synthesis), len(matrix_FCE)
    f_BFEV = _transformed(v_BJV, analysis, width)
    planes = f_BFEV.shape[2] // width
    half = (matrix_FCE.shape[2] // planes - columns) // 2
    length = 1 / synthesis[0, 0]
    all_tiles = tiles(width, columns, half)
    new = q_BNHK.new_empty
    y_BYXHV, q_BYXHK = new(batch, height, width, heads, v), q_BNHK.unflatten(1, (height, width))
    # One tensor per tile: allocators return the largest blocks at once, and fresh memory costs more than arithmetic.
    kept = [new(batch, height * columns, k, v) for _ in all_tiles] if keep else []
    p_NKV = new(height * columns, k, v)
    lambdas_FCV, q_YTHK = new(frequencies, 2 * columns * k, v), q_BNHK.new_zeros(height, columns, heads, k)
    for tile, (first, context, of_matrix) in enumerate(all_tiles):
        matrix = matrix_FCE[:, :, times(of_matrix, planes)].contiguous()
        inside = slice(first, min(width, first + columns))
        there = inside.stop - first
        for image in range(batch):
            torch.bmm(matrix, f_BFEV[image, :, times(context, planes)], out=lambdas_FCV)
            if c_BKV is not None:  # the same everywhere: all of it is in the real part of frequency zero
                lambdas_FCV[0, : columns * k].view(columns, k, v).add_(c_BKV[image] * length)
            if keep:
                p_NKV = kept[tile][image]
            torch.mm(synthesis, lambdas_FCV.view(2 * frequencies, -1), out=p_NKV.view(height, -1))
            q_YTHK[:, :there] = q_BYXHK[image, :, inside]
            y_YTHV = torch.bmm(q_YTHK.view(-1, heads, k), p_NKV).view(height, columns, heads, v)
            y_BYXHV[image, :, inside] = y_YTHV[:, :there]
    return y_BYXHV, kept, f_BFEV


class ApplyByImage(torch.autograd.Function):
    """`apply_by_image` with a backward that also works on one tile of one image at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BNHK: Tensor,
        c_BKV: Tensor | None,
        v_BJV: Tensor,
        matrix_FCE: Tensor,
        analysis: Tensor,
        synthesis: Tensor,
        width: int,
        columns: int,
    ) -> Tensor:
        y_BYXHV, kept, f_BFEV = apply_by_image(
            q_BNHK, c_BKV, v_BJV, matrix_FCE, analysis, synthesis, width, columns, keep=True
        )
        ctx.save_for_backward(q_BNHK, matrix_FCE, analysis, synthesis, f_BFEV, *kept)
        ctx.width, ctx.columns, ctx.content = width, columns, c_BKV is not None
        return y_BYXHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BYXHV: Tensor) -> tuple[Tensor | None, ...]:
        q_BNHK, matrix_FCE, analysis, synthesis, f_BFEV, *kept = ctx.saved_tensors
        width, columns = ctx.width, ctx.columns
        batch, _, heads, k = q_BNHK.shape
        v, height, frequencies = dy_BYXHV.shape[4], len(synthesis), len(matrix_FCE)
        planes = f_BFEV.shape[2] // width
        half = (matrix_FCE.shape[2] // planes - columns) // 2
        new = q_BNHK.new_empty
        dq_BNHK, dmatrix_FCE, df_BFEV = new(q_BNHK.shape), torch.zeros_like(matrix_FCE), torch.zeros_like(f_BFEV)
        dc_BKV = q_BNHK.new_zeros(batch, k, v) if ctx.content else None
        q_BYXHK, dq_BYXHK = (t.unflatten(1, (height, width)) for t in (q_BNHK, dq_BNHK))
        q_YTHK, dy_YTHV = q_BNHK.new_zeros(height, columns, heads, k), q_BNHK.new_zeros(height, columns, heads, v)
        dp_NKV, dlambdas = new(height * columns, k, v), new(2 * frequencies, columns * k * v)
        analyse = synthesis.T.contiguous()
        for tile, (first, context, of_matrix) in enumerate(tiles(width, columns, half)):
            matrix = matrix_FCE[:, :, times(of_matrix, planes)].contiguous()
            dmatrix, df_FEV = torch.zeros_like(matrix), new(frequencies, matrix.shape[2], v)
            inside = slice(first, min(width, first + columns))
            there = inside.stop - first
            if there < columns:  # there are no queries beyond the last column
                q_YTHK.zero_()
                dy_YTHV.zero_()
            for image in range(batch):
                q_YTHK[:, :there] = q_BYXHK[image, :, inside]
                dy_YTHV[:, :there] = dy_BYXHV[image, :, inside]
                q_NHK, dy_NHV = q_YTHK.flatten(0, 1), dy_YTHV.flatten(0, 1)
                dq_YTHK = torch.bmm(dy_NHV, kept[tile][image].mT).view_as(q_YTHK)
                dq_BYXHK[image, :, inside] = dq_YTHK[:, :there]
                torch.bmm(q_NHK.mT, dy_NHV, out=dp_NKV)
                torch.mm(analyse, dp_NKV.view(height, -1), out=dlambdas)
                dlambdas_FCV = dlambdas.view(frequencies, -1, v)
                if dc_BKV is not None:
                    dc_BKV[image] += dlambdas_FCV[0, : columns * k].view(columns, k, v).sum(0)
                torch.bmm(matrix.mT, dlambdas_FCV, out=df_FEV)
                df_BFEV[image, :, times(context, planes)] += df_FEV
                dmatrix.baddbmm_(dlambdas_FCV, f_BFEV[image, :, times(context, planes)].mT)
            dmatrix_FCE[:, :, times(of_matrix, planes)] += dmatrix
        df = df_BFEV.unflatten(2, (width, 2, planes // 2)).transpose(2, 3).flatten(3).flatten(1, 2)
        dv_BJV = torch.matmul(analysis.T, df).view(batch, height * width * (planes // 2), v)
        if dc_BKV is not None:
            dc_BKV *= 1 / synthesis[0, 0]
        return dq_BNHK, dc_BKV, dv_BJV, dmatrix_FCE, None, None, None, None
