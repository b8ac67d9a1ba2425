"""Measures how far a teacher's labels can be trusted, and finds the temperature that makes them honest.

Of n images: what a label file says of each, and its true class. Reliability diagram, expected calibration error and
temperature scaling are those of Guo et al., On Calibration of Modern Neural Networks, ICML 2017.

The probabilities of label files are used, not logits: the audit judges what training and selection will read. Label
files hold them as float16, which keeps a logarithm to about 0.0005 down to p = 6e-5 and loses p below 3e-8; those count
as `FLOOR`. With more than 128 classes a row names the 32 most probable, and the rest of the mass is taken as evenly
spread over the others, at every temperature; NLL and temperature are then approximate, accuracy and ECE are not. On
drawn logits the temperature comes out within 0.2 % of that of the exact logits up to T = 2.5 (10 classes), 5 % too low
at T = 4, where the teacher is so sure that float16 holds little but zeros; with 200 classes within 10 %.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

FLOOR = 2.0**-25  # half of float16's smallest number: what a probability stored as 0 may have been
COOLEST, HOTTEST = 0.05, 20.0  # temperatures that are looked at
STEPS = 64  # Newton's, or halvings where he would leave the bracket


@dataclass(frozen=True)
class Answers:
    """What label rows say of n images whose true classes are known.

    named: log-probabilities float64 [n, k] of the classes that the row names, most probable first; others: [n], the
    log-probability of each of the `unnamed` classes that it does not; true: [n], that of the true class.
    """

    named: Floats
    others: Floats
    unnamed: int
    true: Floats
    predicted: Ints
    truth: Ints

    @property
    def correct(self) -> npt.NDArray[np.bool_]:
        return self.predicted == self.truth


def answers(
    classes: npt.NDArray[np.int32],
    probs: npt.NDArray[np.float16],
    confidence: npt.NDArray[np.float32],
    truth: npt.NDArray[np.int32],
    num_classes: int,
) -> Answers:
    """From the columns of label rows: `classes` and `probs` [n, k], `confidence` and the true class [n]."""
    n, k = classes.shape
    named = np.maximum(probs.astype(np.float64), FLOOR)
    named[:, 0] = confidence  # the one that is also known as float32
    unnamed = num_classes - k
    each = np.maximum(1 - named.sum(axis=1), FLOOR) / max(1, unnamed)
    each = np.minimum(each, named[:, -1])  # rounding may leave more than there can be
    hit = classes == truth[:, None]
    true = np.where(hit.any(axis=1), named[np.arange(n), hit.argmax(axis=1)], each)
    return Answers(
        np.log(named), np.log(each), unnamed, np.log(true), classes[:, 0].astype(np.int64), truth.astype(np.int64)
    )


def joined(parts: Sequence[Answers]) -> Answers:
    """The answers of all parts, which name equally many classes."""
    if not parts:
        nothing = np.zeros(0)
        return Answers(np.zeros((0, 1)), nothing, 0, nothing, np.zeros(0, np.int64), np.zeros(0, np.int64))

    def column(name: str) -> Any:
        return np.concatenate([getattr(part, name) for part in parts])

    columns = [column(name) for name in ("true", "predicted", "truth")]
    return Answers(column("named"), column("others"), parts[0].unnamed, *columns)


def _weights(found: Answers, inverse: float) -> tuple[Floats, Floats, Floats]:
    """At the inverse temperature: probabilities of the named classes [n, k], of all the others together [n], and the
    logarithm of what they were divided by [n]."""
    top = found.named[:, :1]
    named = np.exp(inverse * (found.named - top))
    others = found.unnamed * np.exp(inverse * (found.others - top[:, 0]))
    total = named.sum(axis=1) + others
    return named / total[:, None], others / total, np.log(total) + inverse * top[:, 0]


def nll(found: Answers, temperature: float = 1.0) -> float:
    """Mean negative log-likelihood of the true classes once the logits are divided by `temperature`."""
    _, _, log_total = _weights(found, 1 / temperature)
    return float(np.mean(log_total - found.true / temperature))


def confidence_at(found: Answers, temperature: float) -> npt.NDArray[np.float32]:
    """float32 [n]: confidences once the logits are divided by `temperature`."""
    named, _, _ = _weights(found, 1 / temperature)
    return named[:, 0].astype(np.float32)


def best_temperature(found: Answers) -> float:
    """The temperature from `COOLEST` to `HOTTEST` with the least `nll`.

    In 1/T that is a convex function, whose slope is mean(expected log-probability - that of the true class) and whose
    curvature is the mean variance: Newton's steps, kept inside a bracket.
    """

    def slope(inverse: float) -> tuple[float, float]:
        named, others, _ = _weights(found, inverse)
        mean = (named * found.named).sum(axis=1) + others * found.others
        square = (named * found.named**2).sum(axis=1) + others * found.others**2
        return float(np.mean(mean - found.true)), float(np.mean(square - mean**2))

    low, high = 1 / HOTTEST, 1 / COOLEST
    if slope(low)[0] >= 0:
        return HOTTEST
    if slope(high)[0] <= 0:
        return COOLEST
    inverse = 1.0
    for _ in range(STEPS):
        first, second = slope(inverse)
        low, high = (inverse, high) if first < 0 else (low, inverse)
        step = inverse - first / second if second > 0 else low
        following = step if low < step < high else (low + high) / 2
        if abs(following - inverse) <= 1e-9 * inverse:
            break
        inverse = following
    return 1 / inverse


@dataclass(frozen=True)
class Kept:
    """What a threshold would keep of images whose class is known; arrays [classes]."""

    kept: Ints  # by the class that was said
    right: Ints  # of those, truly of that class
    true: Ints  # images of the class, kept or not

    @property
    def precision(self) -> list[float | None]:
        """Share of the kept images of each class that are right; None where none was kept."""
        return _share(self.right, self.kept)

    @property
    def recall(self) -> list[float | None]:
        """Share of each class's images that are kept under its name; None where there is none."""
        return _share(self.right, self.true)

    @property
    def noise(self) -> float | None:
        """Share of the kept images whose label is wrong; None where none was kept."""
        return 1 - float(self.right.sum() / self.kept.sum()) if self.kept.any() else None


def keep(found: Answers, confidence: npt.NDArray[np.float32], threshold: npt.ArrayLike, num_classes: int) -> Kept:
    """At or above the threshold: one for all, or one for each class that is said [classes]."""
    least = np.broadcast_to(np.asarray(threshold, np.float32), num_classes)[found.predicted]
    sure = confidence >= least
    return Kept(
        np.bincount(found.predicted[sure], minlength=num_classes).astype(np.int64),
        np.bincount(found.predicted[sure & found.correct], minlength=num_classes).astype(np.int64),
        np.bincount(found.truth, minlength=num_classes).astype(np.int64),
    )


def expected_noise(precision: list[float | None], overall: float | None, kept_per_class: npt.ArrayLike) -> float | None:
    """Share of wrong labels to expect in a set with so many images of each class: 1 - the mean precision, weighted by
    them. Classes whose precision is not known count with the `overall` noise; None where that is not known either."""
    weight = np.asarray(kept_per_class, np.float64)
    if overall is None or not weight.any():
        return None
    wrong = np.array([overall if known is None else 1 - known for known in precision])
    return float(np.average(wrong, weights=weight))


def _share(part: Ints, whole: Ints) -> list[float | None]:
    return [float(a / b) if b else None for a, b in zip(part, whole, strict=True)]
