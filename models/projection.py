"""Projects inputs to the queries, values and keys of a lambda layer.

The projections are 1×1 convolutions without bias, with batch norm on queries and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SelfProjection(nn.Module):
    """Maps [b, dim, …] to queries [b, h·k, …], values [b, u·v, …] and raw keys [b, u·k, …], in one product."""

    def __init__(self, dim: int, queries: int, values: int, keys: int) -> None:
        super().__init__()
        self.sizes = (queries, values, keys)
        self.to_qvk = nn.Conv2d(dim, sum(self.sizes), 1, bias=False)
        self.norm_qv: nn.Module = nn.BatchNorm2d(queries + values)

    def forward(self, x: Tensor, context: None = None) -> tuple[Tensor, Tensor, Tensor]:
        queries, values, keys = self.sizes
        qv, k = self.to_qvk(x).split([queries + values, keys], dim=1)
        # Batch norm is many times slower on a slice of channels than on a copy of the slice.
        q, v = self.norm_qv(contiguous(qv)).split([queries, values], dim=1)
        return q, v, k

    def reset_parameters(self, query_scale: float) -> None:
        reset(self.to_qvk, self.sizes[0], query_scale)
        if isinstance(self.norm_qv, nn.BatchNorm2d):
            self.norm_qv.reset_parameters()

    def fold(self) -> None:
        """Makes the norm, as it is in eval mode, part of the convolution."""
        self.to_qvk = folded(self.to_qvk, self.norm_qv)
        self.norm_qv = nn.Identity()


class CrossProjection(nn.Module):
    """Does the same with values and keys from a context [b, dim_context, …]."""

    def __init__(self, dim: int, dim_context: int, queries: int, values: int, keys: int) -> None:
        super().__init__()
        self.sizes = (values, keys)
        self.to_q = nn.Conv2d(dim, queries, 1, bias=False)
        self.to_vk = nn.Conv2d(dim_context, values + keys, 1, bias=False)
        self.norm_q: nn.Module = nn.BatchNorm2d(queries)
        self.norm_v: nn.Module = nn.BatchNorm2d(values)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, k = self.to_vk(context).split(self.sizes, dim=1)
        return self.norm_q(self.to_q(x)), self.norm_v(contiguous(v)), k

    def reset_parameters(self, query_scale: float) -> None:
        reset(self.to_q, self.to_q.out_channels, query_scale)
        reset(self.to_vk, 0, query_scale)
        for norm in (self.norm_q, self.norm_v):
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_parameters()

    def fold(self) -> None:
        """Makes the norms, as they are in eval mode, part of the convolutions."""
        self.to_q, self.to_vk = folded(self.to_q, self.norm_q), folded(self.to_vk, self.norm_v)
        self.norm_q, self.norm_v = nn.Identity(), nn.Identity()


def contiguous(x: Tensor) -> Tensor:
    """x without gaps in channels-last memory, the layout of everything in the layer."""
    return x.contiguous(memory_format=torch.channels_last)


def reset(projection: nn.Conv2d, queries: int, query_scale: float) -> None:
    """Fills the weight from N(0, fan-in^-½), a standard deviation, and scales the first `queries` rows."""
    std = projection.in_channels**-0.5
    nn.init.normal_(projection.weight, std=std)
    with torch.no_grad():
        projection.weight[:queries].mul_(query_scale)


def folded(projection: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """Merges a convolution and a batch norm of its first channels, as it is in eval mode, into one with bias."""
    if not isinstance(norm, nn.BatchNorm2d):
        return projection
    assert norm.running_mean is not None and norm.running_var is not None
    with torch.no_grad():
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        one = nn.Conv2d(projection.in_channels, projection.out_channels, 1).to(projection.weight)
        one.weight.copy_(projection.weight)
        one.weight[: len(scale)].mul_(scale[:, None, None, None])
        assert one.bias is not None
        nn.init.zeros_(one.bias)
        one.bias[: len(scale)].copy_(norm.bias - norm.running_mean * scale)
    return one
