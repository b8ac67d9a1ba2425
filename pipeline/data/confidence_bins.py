"""Bins confidences: the reliability diagram and the expected calibration error of Guo et al., On Calibration of Modern
Neural Networks, ICML 2017."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BINS = 15  # equally wide, as in the paper


@dataclass(frozen=True)
class Reliability:
    """Of equally wide bins ((m-1)/M, m/M] of the confidence: images, and their mean confidence and accuracy (0 where
    there is none)."""

    count: Ints
    confidence: Floats
    accuracy: Floats

    @property
    def ece(self) -> float:
        """Expected calibration error: mean over the images of their bin's |accuracy - confidence|."""
        return float(np.sum(self.count * np.abs(self.accuracy - self.confidence)) / max(1, self.count.sum()))


def reliability(confidence: npt.NDArray[np.float32], correct: npt.NDArray[np.bool_], bins: int = BINS) -> Reliability:
    """The reliability diagram of confidences [n] and whether each answer is right [n]."""
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    place = np.searchsorted(edges, confidence.astype(np.float64))
    count = np.bincount(place, minlength=bins).astype(np.int64)
    filled = np.maximum(count, 1)
    return Reliability(
        count,
        np.bincount(place, confidence.astype(np.float64), bins) / filled,
        np.bincount(place, correct.astype(np.float64), bins) / filled,
    )
