"""Counts what a network costs on paper, by the conventions of the papers: parameters, FLOPs and activations."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.attention import AxialAttention, GlobalAttention, LinearAttention, LocalAttention, SelfAttention
from models.lambda_layer import LambdaLayer


class Cost(NamedTuple):
    """The cost of one image through a network."""

    parameters: int
    """Trained parameters."""
    flops: int
    """Two per multiply-add of convolutions, linear, lambda and attention layers. This convention reproduces the tables
    of LambdaNetworks and ResNet-RS.

    A lambda layer counts as the paper's equations do, whatever the chosen contraction order: per position
    min(r, side)²·k·u·v for the position lambda, k·u·v for its share of the content lambda, and h·k·v to apply each, all
    at the resolution before the pool of a stride. Self-attention counts its logits, relative ones included, and the
    weighted sum; linear attention counts its summary of the context and the application."""
    activations: int
    """Numbers in the outputs of convolutions, as Radosavovic et al. (2020) count them, and of lambda and attention
    layers, before the pool of a stride. The projections inside those layers, 1×1 convolutions, count as well; nothing
    else that they build on the way does."""


def parameters(model: nn.Module) -> int:
    """Number of trained parameters."""
    return sum(p.numel() for p in model.parameters())


def flops(model: nn.Module, size: int, channels: int = 3) -> int:
    """FLOPs of one image of size × size, see Cost."""
    return costs(model, size, channels).flops


def activations(model: nn.Module, size: int, channels: int = 3) -> int:
    """Activations of one image of size × size, see Cost."""
    return costs(model, size, channels).activations


def costs(model: nn.Module, size: int, channels: int = 3) -> Cost:
    """All three numbers for one image of size × size. Runs one forward pass; the model may be on the meta device."""
    macs = numbers = 0

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal macs, numbers
        if isinstance(module, nn.Conv2d):
            macs += output[0].numel() * module.weight[0].numel()
            numbers += output[0].numel()
        elif isinstance(module, nn.Linear):
            macs += module.weight.numel()
        elif isinstance(module, LambdaLayer):
            macs += _lambda_macs(module, *inputs[0].shape[2:])
            numbers += inputs[0][0].numel()
        elif isinstance(module, SelfAttention):
            macs += _attention_macs(module, *inputs[0].shape[2:])
            numbers += inputs[0][0].numel()

    hooks = [m.register_forward_hook(count) for m in model.modules()]
    training = model.training
    try:
        with torch.no_grad(), _ShapesOnly():
            model.eval()(torch.empty(1, channels, size, size, device=next(model.parameters()).device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return Cost(parameters(model), 2 * macs, numbers)


def _lambda_macs(layer: LambdaLayer, height: int, width: int) -> int:
    """Multiply-adds of the layer's equations on a height × width map, without projections."""
    scope = height * width if layer.r is None else min(layer.r, height) * min(layer.r, width)
    per_position = layer.content * (layer.u + layer.h) + layer.position * (layer.u * scope + layer.h)
    return height * width * layer.k * layer.v * per_position


def _attention_macs(layer: SelfAttention, height: int, width: int) -> int:
    """The same for a self-attention layer: the keys and values that every query meets, per channel."""
    match layer:
        case GlobalAttention():
            met = 2 * height * width + height + width
        case AxialAttention():
            met = 3 * (height + width)
        case LocalAttention():
            met = 2 * layer.window**2 + 2 * layer.window
        case LinearAttention():
            met = 2 * layer.depth
    return height * width * layer.heads * layer.depth * met


class _ShapesOnly(TorchFunctionMode):
    """Skips operations that change no shape: on the meta device they take most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.batch_norm, F.relu, torch.relu):
            return args[0]
        return func(*args, **(kwargs or {}))
