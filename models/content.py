"""Normalises the keys of a lambda layer over the context, and applies its content lambdas under a mask.

Shape suffixes as in models.contraction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_NORMS = ("softmax", "l2", "none")


def normalise_keys(keys_BMUK: Tensor, norm: str) -> Tensor:
    """Normalises every key channel over the context positions: by softmax, to unit L2 norm, or not at all."""
    if norm == "softmax":
        return keys_BMUK.softmax(1)
    if norm == "l2":
        return torch.nn.functional.normalize(keys_BMUK, dim=1)
    return keys_BMUK


def masked_content(
    q_BNHK: Tensor, keys_BMUK: Tensor, v_BJV: Tensor, mask_NM: Tensor, norm: str, lambdas: bool
) -> Tensor:
    """Applies content lambdas when query n sees only mask_n of the context (appendix B.2). Returns y_BNHV.

    Keys are normalised over what a query sees, in at least single precision; a query that sees nothing gives zero. With
    `lambdas` the lambdas are built on the way, n·k·v numbers; otherwise a query-context map, h·n·j. A softmax takes
    n·k·j numbers more: the largest key is another one for every query, and those that it does not see may be larger.
    """
    u = keys_BMUK.shape[2]
    v_BMUV = v_BJV.unflatten(1, keys_BMUK.shape[1:3])
    if norm == "softmax":
        weights_BNMUK = masked_softmax(keys_BMUK, mask_NM).to(v_BJV.dtype)
        if lambdas:
            return q_BNHK @ torch.einsum("bnmuk,bmuv->bnkv", weights_BNMUK, v_BMUV)
        a_BNHMU = torch.einsum("bnhk,bnmuk->bnhmu", q_BNHK, weights_BNMUK)
        return torch.einsum("bnhmu,bmuv->bnhv", a_BNHMU, v_BMUV)
    mask = mask_NM.to(v_BJV.dtype)
    scale_BNUK = torch.ones((), dtype=v_BJV.dtype, device=v_BJV.device).expand(1, 1, u, 1)
    if norm == "l2":
        squares_BMUK = at_least_single(keys_BMUK).square()
        sums_BNUK = torch.einsum("nm,bmuk->bnuk", mask_NM.to(squares_BMUK.dtype), squares_BMUK)
        seen = sums_BNUK > 0
        scale_BNUK = torch.where(seen, torch.where(seen, sums_BNUK, 1).rsqrt(), 0).to(v_BJV.dtype)
    keys_BMUK = keys_BMUK.to(v_BJV.dtype)
    if lambdas:
        c_BMUKV = keys_BMUK.unsqueeze(4) * v_BMUV.unsqueeze(3)
        c_BNUKV = torch.einsum("nm,bmukv->bnukv", mask, c_BMUKV) * scale_BNUK.unsqueeze(4)
        return q_BNHK @ c_BNUKV.sum(2)
    q_BNUHK = q_BNHK.unsqueeze(2) * scale_BNUK.unsqueeze(3)
    a_BNHMU = torch.einsum("bnuhk,bmuk->bnhmu", q_BNUHK.expand(-1, -1, u, -1, -1), keys_BMUK) * mask[:, None, :, None]
    return torch.einsum("bnhmu,bmuv->bnhv", a_BNHMU, v_BMUV)


CHUNK = 16
"""Positions of a causal layer that look at each other one by one; to those of chunks before, they look in sum."""


def causal_content(q_BNHK: Tensor, keys_BMUK: Tensor, v_BJV: Tensor, norm: str) -> Tensor:
    """`masked_content` where query n sees the context up to and with position n. Returns y_BNHV.

    Time is Θ(b n (h C (k + v) + k v n/C²)) with chunks of C positions, in place of Θ(b n² k v): what all chunks before
    say is added up once a chunk. The largest key is that of what a query sees, so later ones cannot zero it.
    """
    n, u, k = keys_BMUK.shape[1:]
    end = -n % CHUNK
    # What fills the last chunk is seen by no query that is kept; G chunks of C positions.
    pad = (0, 0, 0, 0, 0, end)
    keys_BGCUK = F.pad(at_least_single(keys_BMUK), pad, value=-torch.inf if norm == "softmax" else 0.0)
    keys_BGCUK = keys_BGCUK.unflatten(1, (-1, CHUNK))
    v_BGCUV = F.pad(v_BJV.unflatten(1, (n, u)), pad).unflatten(1, (-1, CHUNK)).to(keys_BGCUK.dtype)
    chunks = keys_BGCUK.shape[1]
    inside_CC, before_GG = (
        torch.ones(size, size, dtype=torch.bool, device=q_BNHK.device).tril(diagonal)
        for size, diagonal in ((CHUNK, 0), (chunks, -1))
    )
    if norm == "softmax":
        top_BGCUK = keys_BGCUK.detach().flatten(1, 2).cummax(1).values.unflatten(1, (-1, CHUNK))
        own_BGUK = keys_BGCUK.detach().amax(2)
        # The largest key before each chunk; before the first one any that is not above the others.
        past_BGUK = torch.cat([top_BGCUK[:, :1, 0], top_BGCUK[:, :-1, -1]], 1)
        logits_BGCCUK = keys_BGCUK.unsqueeze(2) - top_BGCUK.unsqueeze(3)
        inside_BGCCUK = logits_BGCCUK.masked_fill(~inside_CC[:, :, None, None], -torch.inf).exp()
        weights_BGCUK = (keys_BGCUK - own_BGUK.unsqueeze(2)).exp()
        share_BGGUK = (
            (own_BGUK.unsqueeze(1) - past_BGUK.unsqueeze(2)).masked_fill(~before_GG[:, :, None, None], -torch.inf).exp()
        )
        past_sums_BGUK = torch.einsum("bgfuk,bfuk->bguk", share_BGGUK, weights_BGCUK.sum(2))
        fade_BGCUK = (past_BGUK.unsqueeze(2) - top_BGCUK).exp()
        scale_BGCUK = 1 / (fade_BGCUK * past_sums_BGUK.unsqueeze(2) + inside_BGCCUK.sum(3))
    else:
        weights_BGCUK = keys_BGCUK
        inside_BGCCUK = keys_BGCUK.unsqueeze(2) * inside_CC[:, :, None, None]
        share_BGGUK = before_GG[:, :, None, None].to(keys_BGCUK.dtype).expand(1, -1, -1, u, k)
        fade_BGCUK = scale_BGCUK = torch.ones_like(keys_BGCUK[:1, :1, :1])
        if norm == "l2":
            sums_BGCUK = keys_BGCUK.square().flatten(1, 2).cumsum(1).unflatten(1, (-1, CHUNK))
            seen = sums_BGCUK > 0
            scale_BGCUK = torch.where(seen, torch.where(seen, sums_BGCUK, 1).rsqrt(), 0)
    chunk_BGUKV = torch.einsum("bgcuk,bgcuv->bgukv", weights_BGCUK, v_BGCUV)
    past_BGUKV = torch.einsum("bgfuk,bfukv->bgukv", share_BGGUK.expand(v_BJV.shape[0], -1, -1, -1, -1), chunk_BGUKV)
    # All scales belong to a query and a key channel: on the queries' side no lambda of a single position is built.
    q_BGCHK = F.pad(q_BNHK, pad).unflatten(1, (-1, CHUNK)).to(keys_BGCUK.dtype)
    q_BGCHUK = q_BGCHK.unsqueeze(4) * scale_BGCUK.unsqueeze(3)
    a_BGCHDU = torch.einsum("bgchuk,bgcduk->bgchdu", q_BGCHUK, inside_BGCCUK)
    y_BGCHV = torch.einsum("bgchdu,bgduv->bgchv", a_BGCHDU, v_BGCUV)
    y_BGCHV = y_BGCHV + torch.einsum("bgchuk,bgukv->bgchv", q_BGCHUK * fade_BGCUK.unsqueeze(3), past_BGUKV)
    return y_BGCHV.flatten(1, 2)[:, :n].to(q_BNHK.dtype)


def masked_softmax(keys_BMUK: Tensor, mask_NM: Tensor) -> Tensor:
    """Softmax of the keys over the positions that each query sees, [B, N, M, U, K], zero elsewhere."""
    visible_NM = mask_NM | ~mask_NM.any(1, keepdim=True)  # the softmax of nothing is not a number
    logits = at_least_single(keys_BMUK).unsqueeze(1).masked_fill(~visible_NM[:, :, None, None], -torch.inf)
    return logits.softmax(2) * mask_NM[:, :, None, None]


def at_least_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
