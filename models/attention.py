"""Implements the self-attention layers that LambdaNetworks compares with: global, axial, local and linear.

All have heads of D = dim/heads channels, one 1×1 convolution for queries, keys and values, no bias and no output
projection (the bottleneck's 1×1 convolution does that). Logits are scaled by D^-½, and relative logits follow
Bello et al. 2019 (arXiv 1904.09925): the offset (i, j) of a position from the query adds q·(e_i + f_j), with one
table of e for the height and one of f for the width, shared by all heads.

Shape suffixes: B batch, C channels = H·D, H heads, D depth of a head, Y rows, X columns, N = Y·X positions
(row-major), I queries and J keys along one axis, T entries of a table, W of a window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REACH = 55
"""The farthest offset that occurs in c2 at 224 pixels, where the map has 56 rows and columns."""


class SelfAttention(nn.Module):
    """The common part of the four: it maps x [b, dim, height, width], of any size, to y of the same shape.

    Stride 2 is a 3×3 average pool of y, [b, dim, ⌈height/2⌉, ⌈width/2⌉]. In y's channels the head is the slow axis.
    Projections start as N(0, dim^-½) and tables as N(0, D^-½), as standard deviations. Raises ValueError for sizes
    that do not fit together.
    """

    def __init__(self, dim: int, *, heads: int, stride: int) -> None:
        super().__init__()
        check_arguments(dim, heads=heads)
        if stride not in (1, 2):
            raise ValueError(f"an attention layer has stride 1 or 2, not {stride}")
        self.heads, self.depth = heads, dim // heads
        self.pool = nn.AvgPool2d(3, 2, 1) if stride == 2 else nn.Identity()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():  # projections [3 dim, dim, 1, 1] and tables [T, D]
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [B, H, D, Y, X]."""
        q, k, v = qkv.unflatten(1, (3, self.heads, self.depth)).unbind(1)
        return q, k, v

    def pooled(self, y: Tensor) -> Tensor:
        """Pools y if the layer has stride 2."""
        strided: Tensor = self.pool(y)
        return strided

    def extra_repr(self) -> str:
        return f"heads={self.heads}, depth={self.depth}"


def check_arguments(dim: int, *, heads: int) -> None:
    """Raises a ValueError of one sentence unless an attention layer of this width can be built."""
    for name, value in {"dim": dim, "heads": heads}.items():
        if value < 1:
            raise ValueError(f"{name} of an attention layer is at least 1, not {value}")
    if dim % heads:
        allowed = ", ".join(str(n) for n in range(1, dim + 1) if dim % n == 0)
        raise ValueError(
            f"heads={heads} does not divide the width {dim} of an attention layer; numbers that do are {allowed}"
        )


def check_reach(reach: int) -> None:
    if reach < 1:
        raise ValueError(f"the reach of an attention layer's tables is at least 1, not {reach}")


def project(dim: int) -> nn.Conv2d:
    return nn.Conv2d(dim, 3 * dim, 1, bias=False)


def offset_embeddings(table_TD: Tensor, side: int) -> Tensor:
    """The embedding of the offset from i to j on an axis of `side`, e_IJD; farther offsets take the outermost entry."""
    reach = len(table_TD) // 2
    index = torch.arange(side, device=table_TD.device)
    return table_TD[(index - index.unsqueeze(1)).clamp(-reach, reach) + reach]


class GlobalAttention(SelfAttention):
    """Every position attends to every other (Bello et al. 2019, "attention augmented convolutions").

        y_n = concat over heads Σ_m softmax_m(q_n·(k_m + e_(row m − row n) + f_(column m − column n)) / √D) v_m

    The tables hold offsets up to `reach`; farther ones share the outermost entry (Shaw et al. 2018), so any image
    size works. With n = height·width positions time is Θ(b n² dim) and space, for the maps, Θ(b heads n²). If torch
    uses its fused kernel for scaled_dot_product_attention, no map is kept and space falls to
    Θ(b n (dim + heads (height + width))).
    """

    def __init__(self, dim: int, *, heads: int = 8, stride: int = 1, reach: int = REACH) -> None:
        super().__init__(dim, heads=heads, stride=stride)
        check_reach(reach)
        self.to_qkv = project(dim)
        self.table_height = nn.Parameter(torch.empty(2 * reach + 1, self.depth))
        self.table_width = nn.Parameter(torch.empty(2 * reach + 1, self.depth))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        q_BHDYX, k_BHDYX, v_BHDYX = self.split(self.to_qkv(x))
        rows = torch.einsum("bhdyx,yjd->bhyxj", q_BHDYX, offset_embeddings(self.table_height, height))
        columns = torch.einsum("bhdyx,xjd->bhyxj", q_BHDYX, offset_embeddings(self.table_width, width))
        # Relative logits are extra channels: the query holds its logit for each row and column, the key selects its own
        # with a one-hot. An additive N × N mask with a gradient would keep the maps that the fused kernel avoids.
        # The kernel needs the same depth for all three, so v is padded with zeros.
        q, k, v = (each.flatten(3).mT for each in (q_BHDYX, k_BHDYX, v_BHDYX))  # [B, H, N, D]
        own_row = torch.eye(height, dtype=k.dtype, device=k.device).repeat_interleave(width, 0)
        own_column = torch.eye(width, dtype=k.dtype, device=k.device).repeat(height, 1)
        own = torch.cat([own_row, own_column], 1).expand(*k.shape[:2], -1, -1)
        y_BHND = F.scaled_dot_product_attention(
            torch.cat([q, rows.flatten(2, 3), columns.flatten(2, 3)], 3),
            torch.cat([k, own], 3),
            F.pad(v, (0, height + width)),
            scale=self.depth**-0.5,
        )[..., : self.depth]
        return self.pooled(y_BHND.transpose(1, 2).flatten(2).unflatten(1, (height, width)).permute(0, 3, 1, 2))


class AxialAttention(SelfAttention):
    """Attention along the columns, then along the rows of the result (Ho et al. 2019, arXiv 1912.12180; with
    relative positions, Wang et al. 2020, arXiv 2003.07853). Two steps reach every position.

        z_yx = concat over heads Σ_j softmax_j(q_yx·(k_jx + e_(j−y)) / √D) v_jx,  q, k, v from x
        y_yx = concat over heads Σ_j softmax_j(q_yx·(k_yj + f_(j−x)) / √D) v_yj,  q, k, v from z

    The tables are those of GlobalAttention. With n positions on a square time is Θ(b n √n dim) and space
    Θ(b heads n √n).
    """

    def __init__(self, dim: int, *, heads: int = 8, stride: int = 1, reach: int = REACH) -> None:
        super().__init__(dim, heads=heads, stride=stride)
        check_reach(reach)
        self.to_qkv_height, self.to_qkv_width = project(dim), project(dim)
        self.table_height = nn.Parameter(torch.empty(2 * reach + 1, self.depth))
        self.table_width = nn.Parameter(torch.empty(2 * reach + 1, self.depth))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        z_BCXY = self.along_last_axis(self.to_qkv_height(x).mT, self.table_height)
        return self.pooled(self.along_last_axis(self.to_qkv_width(z_BCXY.mT), self.table_width))

    def along_last_axis(self, qkv: Tensor, table_TD: Tensor) -> Tensor:
        """Attention within each row of the projections [B, 3 C, Y, X]; returns y_BCYX."""
        batch, _, height, width = qkv.shape
        q, k, v = (each.permute(0, 3, 1, 4, 2).flatten(0, 1) for each in self.split(qkv))  # [(B Y), H, X, D]
        bias = torch.einsum("bhid,ijd->bhij", q * self.depth**-0.5, offset_embeddings(table_TD, width))
        y: Tensor = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(0, (batch, height))
        return y.permute(0, 2, 4, 1, 3).flatten(1, 2)


class LocalAttention(SelfAttention):
    """Each position attends to the window × window around it (stand-alone self-attention, Ramachandran et al. 2019,
    arXiv 1906.05909); positions outside the image are masked.

        y_n = concat over heads Σ_m softmax_m(q_n·(k_m + e_(row m − row n) + f_(column m − column n)) / √D) v_m

    over the m in the window of n. Each axis has whole vectors as relative embeddings, which are added; Ramachandran
    gives each axis half the channels, which equals zeros in the other half here. With m = window² time is
    Θ(b n m dim) and space Θ(b heads n m). The code goes through shifted views of keys and values one by one: at 56×56,
    64 wide, this is 3 times faster in training and 10 times in inference than gathering the windows, in a fifth of the
    memory (one CPU core).
    """

    def __init__(self, dim: int, *, heads: int = 8, stride: int = 1, window: int = 7) -> None:
        super().__init__(dim, heads=heads, stride=stride)
        if window < 1 or window % 2 == 0:
            raise ValueError(f"the window of local attention is odd and at least 1, not {window}")
        self.window = window
        self.to_qkv = project(dim)
        self.table_height = nn.Parameter(torch.empty(window, self.depth))
        self.table_width = nn.Parameter(torch.empty(window, self.depth))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.to_qkv(x))  # [B, H, D, Y, X]
        q = q * self.depth**-0.5
        rows = torch.einsum("bhdyx,td->bhtyx", q, self.table_height)
        columns = torch.einsum("bhdyx,td->bhtyx", q, self.table_width)
        content = torch.stack([(q * each).sum(2) for each in neighbours(k, self.window)], 2)  # [B, H, W, Y, X]
        logits = content + (rows.unsqueeze(3) + columns.unsqueeze(2)).flatten(2, 3)
        inside = torch.stack(neighbours(torch.ones(x.shape[2:], dtype=torch.bool, device=x.device), self.window))
        weights = logits.masked_fill(~inside, -torch.inf).softmax(2).to(v.dtype)
        y = torch.zeros_like(v)
        for weight, each in zip(weights.unbind(2), neighbours(v, self.window), strict=True):
            y = y + weight.unsqueeze(2) * each
        return self.pooled(y.flatten(1, 2))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, window={self.window}"


def neighbours(x: Tensor, window: int) -> list[Tensor]:
    """Views of the zero-padded x […, Y, X], one for each offset of a window, row-major: the neighbour at that offset of
    every position."""
    height, width = x.shape[-2:]
    padded = F.pad(x, (window // 2,) * 4)
    return [padded[..., i : i + height, j : j + width] for i in range(window) for j in range(window)]


class LinearAttention(SelfAttention):
    """Efficient attention (Shen et al. 2018, arXiv 1812.01243): each head keeps a D × D summary of the context, no map.

        y_n = concat over heads Gᵀ softmax over channels of q_n,   G = Σ_m (softmax over positions of k)_m v_mᵀ

    It uses content only and scales no logits. Time is Θ(b n dim²/heads) and space Θ(b dim²/heads).
    """

    def __init__(self, dim: int, *, heads: int = 8, stride: int = 1) -> None:
        super().__init__(dim, heads=heads, stride=stride)
        self.to_qkv = project(dim)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.flatten(3) for each in self.split(self.to_qkv(x)))  # [B, H, D, N]
        context = k.softmax(3) @ v.mT  # [B, H, D of the keys, D of the values]
        y_BHDN = context.mT @ q.softmax(2)
        return self.pooled(y_BHDN.flatten(1, 2).unflatten(2, x.shape[2:]))


ATTENTION: dict[str, type[SelfAttention]] = {
    "global_attention": GlobalAttention,
    "axial_attention": AxialAttention,
    "local_attention": LocalAttention,
    "linear_attention": LinearAttention,
}
