"""Averages weights and batch-norm statistics: what is validated, kept and used as teacher."""

from __future__ import annotations

import copy

import torch
from torch import nn

from pipeline.train.parallel import parts


def decay_at(step: int, decay: float) -> float:
    """min(decay, (1+t)/(10+t)): short at first, so that short runs are not averages of their beginning."""
    return min(decay, (1 + step) / (10 + step))


class Average:
    """`module`: a copy of a model, in eval mode, that follows it at a distance."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.follow(model)

    def follow(self, model: nn.Module) -> None:
        """List what is averaged; again, where several workers have since split up model and average alike."""
        # Listed once: walking through the modules of a deep network takes milliseconds.
        pairs = list(zip(parts(self.module), parts(model), strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        counters = [pair for pair in pairs if not pair[0].is_floating_point()]  # copied
        self.floats = [mine for mine, _ in floats], [theirs for _, theirs in floats]
        self.counters = [mine for mine, _ in counters], [theirs for _, theirs in counters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move towards the model after its update number `step` (from 0)."""
        torch._foreach_lerp_(*self.floats, 1 - decay_at(step, self.decay))
        if self.counters[0]:
            torch._foreach_copy_(*self.counters)
