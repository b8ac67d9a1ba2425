"""Computes the cross-entropy over labelled and pseudo-labelled images of one batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.loading.loader import SOURCE_CODES


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-Σ target · log softmax(logits), per image [b], in fp32; both are [b, classes]."""
    return -(targets * F.log_softmax(logits.float(), dim=1)).sum(dim=1)


def weigh(targets: Tensor, source: Tensor, pseudo_weight: float) -> Tensor:
    """`targets` [b, classes], those of pseudo-labelled images (`source` [b] tells) times their weight: the loss is
    linear in its targets, and where images are mixed the weight goes with the class that it belongs to."""
    if pseudo_weight == 1.0:
        return targets
    return torch.where(source[:, None] == SOURCE_CODES["pseudo"], targets * pseudo_weight, targets)


def batch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ cross-entropy over the batch.

    The caller divides by the GLOBAL number of images: a mean here would weigh unequal slices unequally.
    """
    return cross_entropy(logits, targets).sum()
