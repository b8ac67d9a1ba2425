"""Averages a network's answers over views of each image: the image, its mirror image, and small shifts of both."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VIEWS = ("flip", "shift")
SHIFT = 1 / 32  # of the side; one pixel of the smallest images


class OverViews(nn.Module):
    """Logits [b, classes] of images [b, channels, height, width]: the logarithm of the mean probability over the views,
    so that softmax gives that mean. ValueError for a view not in VIEWS.

    "flip" adds the mirror image. "shift" adds, for each of these, two more: moved up and left, and down and right, by
    `SHIFT` of the side; what comes in is mirrored.
    """

    def __init__(self, network: nn.Module, views: Sequence[str]) -> None:
        super().__init__()
        check_views(views)
        self.network = network
        self.views = tuple(view for view in VIEWS if view in views)

    @property
    def count(self) -> int:
        """Passes through the network for each image."""
        return (2 if "flip" in self.views else 1) * (3 if "shift" in self.views else 1)

    def forward(self, x: Tensor) -> Tensor:
        each = [self.network(view).float().log_softmax(1) for view in self._views_of(x)]
        return torch.stack(each).logsumexp(0) - math.log(len(each))

    def _views_of(self, x: Tensor) -> list[Tensor]:
        found = [x, x.flip(3)] if "flip" in self.views else [x]
        if "shift" in self.views:
            height, width = x.shape[2:]
            down, right = (max(1, round(side * SHIFT)) for side in (height, width))
            for view in [*found]:
                wide = F.pad(view, (right, right, down, down), mode="reflect")
                found += [wide[:, :, :height, :width], wide[:, :, 2 * down :, 2 * right :]]
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        return [view.contiguous(memory_format=layout) for view in found]


def check_views(views: Sequence[str]) -> None:
    """ValueError where one of them is not in VIEWS."""
    if unknown := [view for view in views if view not in VIEWS]:
        raise ValueError(f"there is no view {unknown[0]!r}; the views are {', '.join(VIEWS)}")


def answering(network: nn.Module, views: Sequence[str]) -> nn.Module:
    """The network over these views; itself where there are none."""
    return OverViews(network, views) if views else network


def network_of(module: nn.Module) -> nn.Module:
    """What weights belong to, whatever averages its answers."""
    return module.network if isinstance(module, OverViews) else module
