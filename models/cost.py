"""What a network costs on paper: parameters and FLOPs, in the convention that reproduces the LambdaNetworks tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.lambda_layer import LambdaLayer


def parameters(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, size: int, channels: int = 3) -> int:
    """Two per multiply-add of convolutions, linear and lambda layers, for one image of size × size.

    A lambda layer costs what the paper's equations do, not what the chosen contraction order spends: per position the
    position lambda min(r, side)²·k·u·v, its share of the content lambda k·u·v, and one application of each, 2·h·k·v,
    all at the resolution before the pool of a stride. Runs one forward pass; a model on the meta device is enough.
    """
    macs = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, nn.Conv2d):
            macs += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            macs += module.weight.numel()
        elif isinstance(module, LambdaLayer):
            height, width = inputs[0].shape[2:]
            scope = min(module.r, height) * min(module.r, width)
            macs += height * width * module.k * module.v * (module.u * (scope + 1) + 2 * module.h)

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.empty(1, channels, size, size, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return 2 * macs
