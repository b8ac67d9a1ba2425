"""Cross-entropy over labelled and pseudo-labelled images of one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.loader import SOURCE_CODES


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-Σ target · log softmax(logits), per image [b], in fp32; both are [b, classes]."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1)


def batch_loss(logits: Tensor, targets: Tensor, source: Tensor, pseudo_weight: float) -> Tensor:
    """Σ cross-entropy over the batch, pseudo-labelled images (`source` [b] tells) weighted.

    The caller divides by the GLOBAL number of images: a mean here would weigh unequal slices unequally.
    """
    losses = cross_entropy(logits, targets)
    if pseudo_weight != 1.0:
        losses = torch.where(source == SOURCE_CODES["pseudo"], losses * pseudo_weight, losses)
    return losses.sum()
