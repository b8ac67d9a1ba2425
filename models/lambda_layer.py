"""The lambda layer of LambdaNetworks (arXiv 2102.08602) for images: long range without attention maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.contraction import ORDERS, choose_order

PAPER_SCOPE = 23
PAPER_SCOPE_DEEP = 7  # with intra-depth u > 1


class LambdaLayer(nn.Module):
    """Turns the context of each position into a linear function, a lambda, and applies it to its queries.

        Q = BN(x W_Q),  K̄ = softmax over positions of x W_K,  V = BN(x W_V)
        λᶜ = Σ_m Σ_u k̄_mu v_muᵀ       content lambda, one per image, always global
        λᵖ_n = Σ_m Σ_u e_(m−n)u v_muᵀ     position lambda, one per query; e is zero outside the r × r scope
        y_n = concat over heads (λᶜ + λᵖ_n)ᵀ q_n^head

    x is [b, dim, height, width] of any size; y has its shape, in channels-last memory. Stride 2 is a 3×3 average
    pool of y, [b, dim, ⌈height/2⌉, ⌈width/2⌉]. In y's channels the head is the slow axis, v = dim/h the fast one.
    All h queries of a position share its lambda, so with n = m = height·width time is Θ(b n m k u dim/h) and
    space Θ(n m k u + b n k dim/h); as a convolution Θ(b n r² k u dim/h) and Θ(r² k u + b n k dim/h). `order` is
    "auto" (models.contraction.choose_order, by shape and training mode) or names one of the orders.

    Initialisation is the paper's: W_K, W_V ~ N(0, dim^-½), W_Q ~ N(0, (k·dim)^-½), e ~ N(0, 1), as standard
    deviations; no projection has a bias. Raises ValueError for sizes that do not fit together.

    Shape suffixes are those of models.contraction.
    """

    def __init__(
        self,
        dim: int,
        *,
        k: int = 16,
        h: int = 4,
        u: int = 1,
        r: int = PAPER_SCOPE,
        stride: int = 1,
        order: str = "auto",
    ) -> None:
        super().__init__()
        check_arguments(dim, k=k, h=h, u=u, r=r, order=order)
        if stride not in (1, 2):
            raise ValueError(f"a lambda layer has stride 1 or 2, not {stride}")
        self.k, self.v, self.h, self.u, self.r, self.order = k, dim // h, h, u, r, order
        self.to_qv = nn.Conv2d(dim, h * k + self.v * u, 1, bias=False)  # channels (h k) then (v u)
        self.to_k = nn.Conv2d(dim, k * u, 1, bias=False)  # channels (k u)
        self.norm_qv = nn.BatchNorm2d(h * k + self.v * u)
        self.table = nn.Parameter(torch.empty(r, r, k, u))
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        dim = self.to_k.in_channels
        queries = self.h * self.k
        nn.init.normal_(self.to_k.weight, std=dim**-0.5)
        with torch.no_grad():
            self.to_qv.weight[:queries].normal_(std=(self.k * dim) ** -0.5)
            self.to_qv.weight[queries:].normal_(std=dim**-0.5)
        nn.init.normal_(self.table)
        self.norm_qv.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        q, v = self.norm_qv(self.to_qv(x)).split([self.h * self.k, self.v * self.u], dim=1)
        q_BNHK = q.flatten(2).mT.unflatten(2, (self.h, self.k))
        v_BVJ = v.flatten(2).unflatten(1, (self.v, self.u)).flatten(2)
        k_BKJ = self.to_k(x).flatten(2).softmax(-1).unflatten(1, (self.k, self.u)).flatten(2).to(v.dtype)
        c_BKV = k_BKJ @ v_BVJ.mT
        contract = ORDERS[self.order if self.order != "auto" else self._best_order(height * width)]
        y_BNHV = contract(q_BNHK, c_BKV, v_BVJ, self.table.to(v.dtype), height, width)
        y = y_BNHV.flatten(2).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return self.pool(y)

    def _best_order(self, positions: int) -> str:
        return choose_order(positions, k=self.k, v=self.v, h=self.h, u=self.u, r=self.r, training=self.training)

    def extra_repr(self) -> str:
        return f"k={self.k}, v={self.v}, h={self.h}, u={self.u}, r={self.r}, order={self.order!r}"


def check_arguments(dim: int, *, k: int, h: int, u: int, r: int, order: str) -> None:
    """Raises a ValueError of one sentence unless a lambda layer of this width can be built."""
    for name, value in {"dim": dim, "k": k, "h": h, "u": u, "r": r}.items():
        if value < 1:
            raise ValueError(f"{name} of a lambda layer is at least 1, not {value}")
    if dim % h:
        raise ValueError(f"h={h} heads do not divide the width {dim} of a lambda layer")
    if r % 2 == 0:
        raise ValueError(f"the scope r of a lambda layer is odd, so that it has a centre, not {r}")
    if order not in ("auto", *ORDERS):
        raise ValueError(f"order {order!r} of a lambda layer is none of {', '.join(['auto', *ORDERS])}")
