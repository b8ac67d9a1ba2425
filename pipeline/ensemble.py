"""Several models as one: what it answers is the mean of their probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

ARCHITECTURE = "ensemble"  # in model.yaml, with `overrides: {members: [{architecture, overrides}, …]}`


class Ensemble(nn.Module):
    """Logits of images [b, 3, s, s]: the logarithm of the members' mean probability, so that softmax gives that mean."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        each = torch.stack([member(x).float().log_softmax(1) for member in self.members])
        return each.logsumexp(0) - math.log(len(self.members))


def joined(states: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The state dict of an ensemble of members with these."""
    return {f"members.{number}.{name}": value for number, state in enumerate(states) for name, value in state.items()}
