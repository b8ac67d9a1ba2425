"""Estimates how many labels a threshold lets through are wrong, and finds the thresholds that keep them few.

Of images whose class is known: a class (the one that was said) with k images at or above a threshold, w of them wrong.
Its noise is estimated as (w + m q) / (k + m): q is the noise of the other classes at this threshold, and m = 20 images
of them stand beside the class's own, so that a class of few images is not taken for a perfect one. The interval is
Wilson's, of 95 %, for k + m images.

The least threshold that passes has passed partly by luck, so where thresholds are chosen, `CAUTION` standard errors are
added to the estimate: with it the noise of drawn corpora stayed below what was asked for, over all classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

BORROWED = 20  # images of other classes
CAUTION = 0.5
SCORE = 1.96  # of a 95 % interval
CANDIDATES = 1000  # thresholds that are looked at
THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.9, 0.95, 0.99)  # what `plan` and the report show
NOISES = (0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Estimates:
    """Over thresholds `at` [t], ascending: of each class [classes, t] the images at or above it (`kept`), the estimated
    share of wrong labels among them (`noise`), and how many images stand behind that (`weight`)."""

    at: npt.NDArray[np.float32]
    kept: Ints
    noise: Floats
    weight: Floats

    @property
    def error(self) -> Floats:
        """Standard errors of `noise`."""
        return np.sqrt(self.noise * (1 - self.noise) / self.weight)

    def choose(self, most: float) -> list[int | None]:
        """Of each class, the place of the least threshold whose expected noise is at most `most`; None: no one's is."""
        passes = (self.noise + CAUTION * self.error <= most) & (self.kept.sum(axis=0) > 0)
        return [int(row.argmax()) if row.any() else None for row in passes]

    def look_up(self, thresholds: Sequence[float]) -> list[int | None]:
        """The places of given thresholds, one of each class."""
        return [int(place) for place in np.searchsorted(self.at, np.asarray(thresholds, np.float32))]

    def describe(self, places: Sequence[int | None], *, chosen: bool) -> dict[str, Any]:
        """What these thresholds keep: per class `thresholds`, `kept` and expected `noise` with `low` and `high` (None
        where no threshold will do, or no audited image of any class reaches it), and `in_all` the same of all classes
        together, weighted by what is kept of each."""
        classes = np.array([number for number, place in enumerate(places) if place is not None], np.int64)
        taken = (classes, np.array([place for place in places if place is not None], np.int64))
        kept, noise, weight = self.kept[taken], self.noise[taken], self.weight[taken]
        expected = noise + CAUTION * self.error[taken] if chosen else noise
        low, high = interval(noise, weight)
        found: dict[str, Any] = {
            "thresholds": _spread(self.at[taken[1]], classes, len(places)),
            "kept": [count or 0 for count in _spread(kept, classes, len(places))],
        }
        known = self.kept.sum(axis=0)[taken[1]] > 0
        for name, values in (("noise", expected), ("low", low), ("high", high)):
            found[name] = _spread(np.round(values, 6)[known], classes[known], len(places))
        return found | {"in_all": in_all(found, found["kept"])}


def estimate(
    predicted: Ints,
    correct: npt.NDArray[np.bool_],
    confidence: npt.NDArray[np.float32],
    classes: int,
    more: Sequence[float] = (),
) -> Estimates:
    """From n audited images: the class that was said, whether it is right, and the confidence. The thresholds are
    `CANDIDATES` of their confidences, THRESHOLDS and `more`."""
    distinct = np.unique(confidence)
    some = distinct[np.unique(np.linspace(0, len(distinct) - 1, CANDIDATES).round().astype(int))]
    at = np.unique(np.concatenate([some, np.asarray([*THRESHOLDS, *more], np.float32)]))

    def above(which: npt.NDArray[np.bool_]) -> Ints:
        return np.count_nonzero(which) - np.searchsorted(np.sort(confidence[which]), at)

    kept = np.stack([above(predicted == number) for number in range(classes)])
    wrong = np.stack([above((predicted == number) & ~correct) for number in range(classes)])
    others = kept.sum(axis=0) - kept
    share = (wrong.sum(axis=0) - wrong + 0.5) / (others + 1)  # Jeffreys' prior: nothing wrong of few is no proof
    borrowed = np.minimum(BORROWED, others + 1)
    return Estimates(at, kept, (wrong + borrowed * share) / (kept + borrowed), (kept + borrowed).astype(np.float64))


def interval(share: Floats, images: Floats) -> tuple[Floats, Floats]:
    """Wilson's interval (low, high) of shares that were found on so many images."""
    square = SCORE**2 / images
    middle = (share + square / 2) / (1 + square)
    half = np.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return middle - half, middle + half


def in_all(level: dict[str, Any], weights: Sequence[int]) -> dict[str, Any]:
    """`noise`, `low` and `high` of a set with so many images of each class, by what is known of each (a level of
    `Estimates.describe`); None where there are none, or nothing is known of any of them. The classes' errors are taken
    to go one way, as they do where all thresholds passed partly by luck."""
    known = [number for number, weight in enumerate(weights) if weight and level["noise"][number] is not None]
    columns = {name: [level[name][number] for number in known] for name in ("noise", "low", "high")}
    if not known:
        return dict.fromkeys(columns)
    weight = [float(weights[number]) for number in known]
    return {name: round(float(np.average(column, weights=weight)), 6) for name, column in columns.items()}


def levels(found: Estimates) -> list[dict[str, Any]]:
    """What each of THRESHOLDS and each noise of NOISES would keep: `describe`, with `threshold` or `max_noise`."""
    classes = len(found.kept)
    fixed = [
        {"threshold": least} | found.describe(found.look_up([least] * classes), chosen=False) for least in THRESHOLDS
    ]
    return fixed + [{"max_noise": most} | found.describe(found.choose(most), chosen=True) for most in NOISES]


def _spread(values: npt.NDArray[Any], classes: Ints, number: int) -> list[Any]:
    """The values of some classes in a list of all; None of the others."""
    found: list[Any] = [None] * number
    for place, value in zip(classes.tolist(), values.tolist(), strict=True):
        found[place] = value
    return found
