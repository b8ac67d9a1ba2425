"""Projects inputs to the queries, values and keys of a lambda layer.

The projections are 1×1 convolutions without bias, with batch norm on queries and values.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_weights

from models.batch_norm import BatchNorm2d, is_foldable


class SelfProjection(nn.Module):
    """Maps [b, dim, …] to queries [b, h·k, …], values [b, u·v, …] and raw keys [b, u·k, …], in one product."""

    def __init__(self, dim: int, queries: int, values: int, keys: int, query_scale: float) -> None:
        super().__init__()
        self.query_scale = query_scale
        self.sizes = (queries, values, keys)
        self.to_qvk = nn.Conv2d(dim, sum(self.sizes), 1, bias=False)
        self.norm_qv: nn.Module = BatchNorm2d(queries + values)

    def forward(self, x: Tensor, context: None = None) -> tuple[Tensor, Tensor, Tensor]:
        queries, values, keys = self.sizes
        qv, k = self.to_qvk(x).split([queries + values, keys], dim=1)
        # Batch norm is many times slower on a slice of channels than on a copy of the slice.
        q, v = self.norm_qv(contiguous(qv)).split([queries, values], dim=1)
        return q, v, k

    def reset_parameters(self) -> None:
        reset(self.to_qvk, self.sizes[0], self.query_scale)
        reset_norm(self.norm_qv)

    def fold(self) -> None:
        """Makes the norm, as it is in eval mode, part of the convolution."""
        self.to_qvk = folded(self.to_qvk, self.norm_qv)
        self.norm_qv = nn.Identity()


class CrossProjection(nn.Module):
    """Does the same with values and keys from a context [b, dim_context, …]."""

    def __init__(self, dim: int, dim_context: int, queries: int, values: int, keys: int, query_scale: float) -> None:
        super().__init__()
        self.query_scale = query_scale
        self.sizes = (values, keys)
        self.to_q = nn.Conv2d(dim, queries, 1, bias=False)
        self.to_vk = nn.Conv2d(dim_context, values + keys, 1, bias=False)
        self.norm_q: nn.Module = BatchNorm2d(queries)
        self.norm_v: nn.Module = BatchNorm2d(values)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        v, k = self.to_vk(context).split(self.sizes, dim=1)
        return self.norm_q(self.to_q(x)), self.norm_v(contiguous(v)), k

    def reset_parameters(self) -> None:
        reset(self.to_q, self.to_q.out_channels, self.query_scale)
        reset(self.to_vk, 0, 1.0)
        reset_norm(self.norm_q)
        reset_norm(self.norm_v)

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


def reset_norm(norm: nn.Module) -> None:
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):  # SyncBatchNorm too; a folded one is none
        norm.reset_parameters()


def folded(projection: nn.Conv2d, norm: nn.Module) -> nn.Conv2d:
    """Merges a convolution and a batch norm of its first channels, as it is in eval mode, into one with bias.

    Raises ValueError for a norm that is no scale and shift; an identity, which is a folded one, is left out."""
    if isinstance(norm, nn.Identity):
        return projection
    if not is_foldable(norm):
        raise ValueError(
            f"the norm of a lambda layer's projection is a {type(norm).__name__}, which cannot be folded; "
            "fold before it is replaced, or leave the layer as it is"
        )
    assert norm.running_mean is not None and norm.running_var is not None
    one = nn.Conv2d(projection.in_channels, projection.out_channels, 1).to(projection.weight)
    with torch.no_grad():
        channels = slice(norm.num_features)
        one.weight.copy_(projection.weight)
        assert one.bias is not None
        nn.init.zeros_(one.bias)
        one.weight[channels], one.bias[channels] = fuse_conv_bn_weights(
            projection.weight[channels], None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    return one
