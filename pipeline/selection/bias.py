"""Measures how far the confident labels are spread over the classes unlike the labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

NAMED = 3  # classes that are named on either side


def bias(confident: Sequence[int], labelled: Sequence[int]) -> dict[str, Any]:
    """How far the confident images' distribution over the classes, before balancing, is from the labelled images'.

    `distance`: total variation, ½ Σ |p - q|, the share of images that would have to change class; `chance`: what two
    draws of these sizes from one distribution over equal classes would have; `over` and `under`: the classes by which
    it is too many and too few, most first, as [class, share of the confident, share of the labelled].
    """
    p, q = (np.asarray(counts) / sum(counts) for counts in (confident, labelled))
    order = np.argsort(q - p, kind="stable")
    chance = np.sqrt(len(p) / (2 * np.pi) * (1 / sum(confident) + 1 / sum(labelled)))

    def named(numbers: np.ndarray) -> list[list[Any]]:
        return [[int(number), round(float(p[number]), 6), round(float(q[number]), 6)] for number in numbers[:NAMED]]

    return {
        "distance": round(float(np.abs(p - q).sum() / 2), 6),
        "chance": round(float(chance), 6),
        "over": named(order[(p > q)[order]]),
        "under": named(order[::-1][(p < q)[order[::-1]]]),
    }
