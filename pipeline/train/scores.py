"""Counts a network's answers, image by image, and computes the figures that the counts give.

Counts add up: those of all workers, or of all shards of a set, are those of the whole set.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.confidence_bins import BINS, Reliability

TOTALS = 5  # images, right ones, those with the truth among the five best, loss, images that cannot be decoded


class Scores:
    """`sums`, float64 [5 + 3·15 + 2·classes], is all that is counted: totals, per bin of confidence images and the sums
    of confidence and of right answers, per class images and right answers. `classes` 0: no count by class."""

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(TOTALS + 3 * BINS + 2 * classes, dtype=torch.float64, device=device)
        self._totals, self._bins, self._classes = self.sums.split([TOTALS, 3 * BINS, 2 * classes])
        self._edges = torch.from_numpy(np.linspace(0, 1, BINS + 1)[1:-1]).to(device)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count the answers to images of known class: logits float32 [b, c], labels int64 [b]; or, where several are
        right for an image, bool [b, c], with the cross-entropy of their sum and no count by class."""
        # One after another without a look at any value: a GPU that is asked for one has to catch up first.
        best = logits.topk(min(5, logits.shape[1])).indices
        if labels.dtype == torch.bool:
            hits = labels.gather(1, best)
            losses = (logits.logsumexp(dim=1) - logits.masked_fill(~labels, -torch.inf).logsumexp(dim=1)).double()
        else:
            hits = best == labels[:, None]
            losses = F.cross_entropy(logits, labels, reduction="none").double()
        right = hits[:, 0].double()
        ones = torch.ones_like(right)
        sure = logits.softmax(dim=1).amax(dim=1).double()
        totals = torch.stack([ones, right, hits.any(dim=1).double(), losses])
        self._totals[:4] += totals.sum(dim=1)
        place = torch.bucketize(sure, self._edges)  # bins ((m-1)/M, m/M], as in data.calibration
        self._bins.view(3, BINS).index_add_(1, place, torch.stack([ones, sure, right]))
        if len(self._classes):
            self._classes.view(2, -1).index_add_(1, labels, torch.stack([ones, right]))

    def add_bad(self, number: int) -> None:
        """Count images that cannot be decoded, and so are in no other figure."""
        if number:
            self._totals[4] += number

    def figures(self) -> dict[str, Any]:
        """Fractions `top1` and `top5`, mean cross-entropy `loss`, expected calibration error `ece` (Guo et al. 2017, 15
        equally wide bins), the `count` of images, and how many more were `bad`. Counted by class: `per_class`, lists of
        `images` and of `right` answers."""
        sums = self.sums.tolist()
        count, top1, top5, loss, bad = sums[:TOTALS]
        images, sure, right = np.array(sums[TOTALS : TOTALS + 3 * BINS]).reshape(3, BINS)
        filled, seen = np.maximum(images, 1), max(count, 1)
        found: dict[str, Any] = {
            "top1": top1 / seen,
            "top5": top5 / seen,
            "loss": loss / seen,
            "ece": Reliability(images, sure / filled, right / filled).ece,
            "count": int(count),
            "bad": int(bad),
        }
        if len(self._classes):
            per_class = np.array(sums[TOTALS + 3 * BINS :], np.int64).reshape(2, -1)
            found["per_class"] = dict(zip(("images", "right"), per_class.tolist(), strict=True))
        return found
