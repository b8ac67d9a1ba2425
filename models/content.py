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

    Keys are normalised over what a query sees, with one exponential per key, one sum per query and no map per image.
    If all keys that a query sees lie more than 87 below the largest key of the image, it looks like a query that sees
    nothing: both give zero. With `lambdas` the lambdas are built on the way, n·k·v numbers; otherwise a query-context
    map, h·n·j.
    """
    u = keys_BMUK.shape[2]
    if norm == "softmax":
        keys_BMUK = (keys_BMUK - keys_BMUK.amax(1, keepdim=True).detach()).exp()
    mask = mask_NM.to(v_BJV.dtype)
    keys_BMUK = keys_BMUK.to(v_BJV.dtype)
    if norm == "none":
        scale_BNUK = keys_BMUK.new_ones(1, 1, 1, 1)
    else:
        sums_BNUK = torch.einsum("nm,bmuk->bnuk", mask, keys_BMUK if norm == "softmax" else keys_BMUK.square())
        seen = sums_BNUK > 0
        sums_BNUK = torch.where(seen, sums_BNUK, 1)
        scale_BNUK = torch.where(seen, sums_BNUK.reciprocal() if norm == "softmax" else sums_BNUK.rsqrt(), 0)
    v_BMUV = v_BJV.unflatten(1, (-1, u))
    if lambdas:
        c_BMUKV = keys_BMUK.unsqueeze(4) * v_BMUV.unsqueeze(3)
        c_BNUKV = torch.einsum("nm,bmukv->bnukv", mask, c_BMUKV) * scale_BNUK.unsqueeze(4)
        return q_BNHK @ c_BNUKV.sum(2)
    q_BNUHK = q_BNHK.unsqueeze(2) * scale_BNUK.unsqueeze(3)
    a_BNHMU = torch.einsum("bnuhk,bmuk->bnhmu", q_BNUHK.expand(-1, -1, u, -1, -1), keys_BMUK) * mask[:, None, :, None]
    return torch.einsum("bnhmu,bmuv->bnhv", a_BNHMU, v_BMUV)
