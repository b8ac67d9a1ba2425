"""Normalises the keys of a lambda layer over the context, and applies its content lambdas under a mask.

Shape suffixes as in models.contraction.
"""

from __future__ import annotations

import torch
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


def masked_softmax(keys_BMUK: Tensor, mask_NM: Tensor) -> Tensor:
    """Softmax of the keys over the positions that each query sees, [B, N, M, U, K], zero elsewhere."""
    visible_NM = mask_NM | ~mask_NM.any(1, keepdim=True)  # the softmax of nothing is not a number
    logits = at_least_single(keys_BMUK).unsqueeze(1).masked_fill(~visible_NM[:, :, None, None], -torch.inf)
    return logits.softmax(2) * mask_NM[:, :, None, None]


def at_least_single(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
