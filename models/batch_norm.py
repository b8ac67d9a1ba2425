"""Normalises over the batch, as torch does, with gradients that are right for a batch of one as well."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """torch's layer, of the same names and numbers, whose scale starts at `gamma`.

    On CPUs the backward of torch 2.15 takes the strides of input and gradient for each other's where there is one image
    and one of them has ambiguous strides: that of a batch axis of size 1 is read though it means nothing. So it is for
    whoever transposes the output (`y.flatten(2).mT`), and the gradients are wrong without a word. Here neither strides
    are left in doubt.
    """

    gamma = 1.0

    def __init__(self, channels: int, *, gamma: float = 1.0) -> None:
        super().__init__(channels)
        self.gamma = gamma
        nn.init.constant_(self.weight, gamma)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.weight, self.gamma)

    def forward(self, x: Tensor) -> Tensor:
        # Compilers differentiate it themselves, and may not read the size of the batch.
        if torch.compiler.is_compiling() or x.shape[0] != 1 or x.device.type != "cpu" or not torch.is_grad_enabled():
            return super().forward(x)
        y = super().forward(unambiguous(x))
        if y.requires_grad:
            y.register_hook(unambiguous)
        return y


def unambiguous(x: Tensor) -> Tensor:
    """One image [1, c, height, width] in memory whose strides say which axis is which; a copy if they did not."""
    return x if x.stride(0) >= x.numel() else x.clone(memory_format=torch.channels_last)


def is_foldable(norm: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether a module in eval mode is a scale and a shift per channel and nothing else."""
    return type(norm) in (BatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm) and norm.running_mean is not None
