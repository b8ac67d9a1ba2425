"""The moving average of weights and batch-norm statistics: what is validated, kept and used as teacher."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """min(decay, (1+t)/(10+t)): short at first, so that short runs are not averages of their beginning."""
    return min(decay, (1 + step) / (10 + step))


class Average:
    """`module`: a copy of the model, in eval mode, that follows it at a distance."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        # Listed once: walking through the modules of a deep network takes milliseconds.
        self.pairs = list(zip(_tensors(self.module), _tensors(model), strict=True))
        self.floats = [pair for pair in self.pairs if pair[0].is_floating_point()]
        self.others = [pair for pair in self.pairs if not pair[0].is_floating_point()]  # counters: copied

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after its update number `step` (from 0)."""
        mine, theirs = [pair[0] for pair in self.floats], [pair[1] for pair in self.floats]
        torch._foreach_lerp_(mine, theirs, 1 - decay_at(step, self.decay))
        for average, value in self.others:
            average.copy_(value)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*(p.data for p in model.parameters()), *model.buffers()]
