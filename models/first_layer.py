"""Starts a network's first convolution with filters that whiten small patches of images (Jordan, arXiv 2404.00498).

The directions in which patches vary most, each scaled to unit variance, make half of the filters, and their negatives
the other half, so that a ReLU loses neither side. What is learnt later is learnt from there; nothing is fixed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LEAST = 5e-4  # added to variances, so that directions without any are not blown up
AT_ONCE = 64  # images


def first_convolution(network: nn.Module, channels: int = 3) -> nn.Conv2d:
    """The first convolution in the order of definition. ValueError: it does not take images of so many channels."""
    found = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)
    if found is None or found.in_channels != channels or found.groups != 1:
        raise ValueError(f"the network does not begin with a convolution of {channels} channels")
    return found


@torch.no_grad()
def whiten(network: nn.Module, images: Tensor) -> None:
    """Sets filters of the first convolution by the patches of normalised images [n, channels, height, width].

    Of f filters and d numbers in a patch, min(f // 2, d) directions are taken; the other filters stay as they are.
    ValueError: see `first_convolution`.
    """
    conv = first_convolution(network, images.shape[1])
    height, width = conv.kernel_size
    numbers = images.shape[1] * height * width
    scatter, patches = torch.zeros(numbers, numbers, dtype=torch.float64), 0
    for some in images.double().split(AT_ONCE):
        found = F.unfold(some, (height, width), stride=conv.stride).transpose(1, 2).flatten(0, 1)
        scatter, patches = scatter + found.mT @ found, patches + len(found)
    variances, directions = torch.linalg.eigh(scatter / patches)
    count = min(conv.out_channels // 2, len(variances))
    kept = directions.flip(1)[:, :count].mT / (variances.flip(0)[:count, None] + LEAST).sqrt()
    largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
    kept = (kept * largest.sign()).view(count, *conv.weight.shape[1:])  # an eigenvector's own sign means nothing
    conv.weight[: 2 * count] = torch.cat([kept, -kept]).to(conv.weight)
