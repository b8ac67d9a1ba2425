"""The order of a network's weights in memory."""

from __future__ import annotations

import torch
from torch import nn


def channels_last(model: nn.Module) -> nn.Module:
    """`model`, its 2-d convolutions' weights in channels-last order, which their kernels are fastest with.

    torch's own `model.to(memory_format=…)` fails where there is a 3-d convolution, such as in timm's lambda layer.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)
    return model
