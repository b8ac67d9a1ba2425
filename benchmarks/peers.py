"""The layers that ours is compared with, behind one constructor; peers are an extra, never a runtime dependency.

    build("timm", 256, side=14)      # [b, 256, 14, 14] to the same shape, k=16, h=4, r=23

Needs torch and timm; the lambda-networks package joins where it is installed.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import LambdaLayer


@dataclass(frozen=True)
class Layer:
    """A way to build a lambda layer for maps of side × side: build(dim, k, h, r, side)."""

    build: Callable[[int, int, int, int, int], nn.Module]
    is_global: bool = False
    """Sees the whole map, whatever r; the same function as scope r where 2·side − 1 ≤ r."""
    embeds: bool = False
    """Holds embeddings of n × m × k, so that memory grows with the fourth power of the side."""


def ours(dim: int, k: int, h: int, r: int, side: int) -> nn.Module:
    return LambdaLayer(dim, k=k, h=h, r=r)


def timm(dim: int, k: int, h: int, r: int, side: int) -> nn.Module:
    from timm.layers.lambda_layer import LambdaLayer as TimmLambdaLayer

    return TimmLambdaLayer(dim, num_heads=h, dim_head=k, r=r)


def lambda_networks_local(dim: int, k: int, h: int, r: int, side: int) -> nn.Module:
    from lambda_networks import LambdaLayer as PeerLambdaLayer

    return PeerLambdaLayer(dim, dim_k=k, heads=h, r=r)


def lambda_networks_global(dim: int, k: int, h: int, r: int, side: int) -> nn.Module:
    from lambda_networks import LambdaLayer as PeerLambdaLayer

    with warnings.catch_warnings():  # torch.meshgrid without indexing
        warnings.simplefilter("ignore")
        layer = PeerLambdaLayer(dim, dim_k=k, heads=h, n=side)
    index = layer.rel_pos  # a plain attribute; as a buffer it is not sent to the device again at every call
    del layer.rel_pos
    layer.register_buffer("rel_pos", index, persistent=False)
    return layer


class EinsumLambdaLayer(nn.Module):
    """The paper's pseudo-code (LambdaNetworks, figure 3), with BN on queries and values and a relative table.

    The embeddings, [n, m, k], are gathered at each call and zero beyond the scope, the paper's own default.
    """

    index: Tensor

    def __init__(self, dim: int, *, k: int, h: int, r: int, side: int) -> None:
        super().__init__()
        self.k, self.h, self.side = k, h, side
        self.to_q = nn.Conv2d(dim, h * k, 1, bias=False)
        self.to_k = nn.Conv2d(dim, k, 1, bias=False)
        self.to_v = nn.Conv2d(dim, dim // h, 1, bias=False)
        self.norm_q = nn.BatchNorm2d(h * k)
        self.norm_v = nn.BatchNorm2d(dim // h)
        self.table = nn.Parameter(torch.randn(r * r, k))
        position = torch.arange(side)
        offset = position - position[:, None] + r // 2  # [query, context], along one axis
        rows, columns = offset[:, None, :, None], offset[None, :, None, :]
        inside = (rows >= 0) & (rows < r) & (columns >= 0) & (columns < r)
        index = torch.where(inside, rows * r + columns, r * r)  # r² is the row of zeros
        self.register_buffer("index", index.flatten(2).flatten(0, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.norm_q(self.to_q(x)).flatten(2).unflatten(1, (self.h, self.k))  # b h k n
        keys = self.to_k(x).flatten(2).softmax(-1)  # b k m
        values = self.norm_v(self.to_v(x)).flatten(2)  # b v m
        embeddings = F.pad(self.table, (0, 0, 0, 1))[self.index]  # n m k
        content = torch.einsum("bkm,bvm->bkv", keys, values)
        position = torch.einsum("nmk,bvm->bnkv", embeddings, values)
        y = torch.einsum("bhkn,bkv->bhvn", queries, content) + torch.einsum("bhkn,bnkv->bhvn", queries, position)
        return y.flatten(1, 2).unflatten(2, (self.side, self.side))


def einsum(dim: int, k: int, h: int, r: int, side: int) -> nn.Module:
    return EinsumLambdaLayer(dim, k=k, h=h, r=r, side=side)


OURS = "ours"

LAYERS = {
    OURS: Layer(ours),
    "timm": Layer(timm),
    "lambda-networks": Layer(lambda_networks_local),
    "lambda-networks global": Layer(lambda_networks_global, is_global=True, embeds=True),
    "einsum": Layer(einsum, embeds=True),
}


def missing() -> list[str]:
    """Names of LAYERS whose package is not installed."""
    if importlib.util.find_spec("lambda_networks"):
        return []
    return [name for name in LAYERS if name.startswith("lambda-networks")]


def build(name: str, dim: int, *, side: int, k: int = 16, h: int = 4, r: int = 23) -> nn.Module:
    """The layer of that name, freshly initialised: [b, dim, side, side] to the same shape."""
    return LAYERS[name].build(dim, k, h, r, side)


def embedding_bytes(name: str, *, side: int, k: int = 16, itemsize: int = 4) -> int:
    """Bytes of the n × m × k embeddings that a layer holds; 0 where it builds none."""
    return side**4 * k * itemsize if LAYERS[name].embeds else 0
