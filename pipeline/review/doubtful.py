"""Finds labels that may be wrong, by confident learning over probabilities of models that have not seen them.

Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels, JAIR 70, 2021. An image is
confidently of a class where its probability reaches the class's threshold, the mean probability that images with that
label get for it; with several such classes it is of its most probable class. A label is doubtful where that is another
class (the off-diagonals of the confident joint) and the label is not the most probable one. These are the images, in
the order, of cleanlab's `find_label_issues(filter_by="confident_learning",
return_indices_ranked_by="normalized_margin")`.

Files are read one by one, twice. Memory is one file's rows, classes², and what is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data import label_files
from pipeline.labelling import audit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NEAR = 1e-6  # probabilities that differ by less count as equal, as in cleanlab
ABSENT = 2.0  # the threshold of a class without a label: no probability reaches it
ROWS = 4096  # whose probabilities of all classes are in memory at a time


@dataclass(frozen=True)
class Doubtful:
    """n doubtful labels, the least probable first: `file` and `row` (of its index file) say which images they are of.

    given: the label; guess: the class that the image confidently shows; own: the label's probability; margin: (own -
    that of the most probable other class + 1) / 2. joint [classes, classes]: images by label and by the class that they
    confidently show; images: how many were looked at.
    """

    file: Ints
    row: Ints
    given: Ints
    guess: Ints
    own: Floats
    margin: Floats
    joint: Ints
    images: int

    def confused(self, most: int) -> list[tuple[int, int, int]]:
        """The most frequent (label, class that is shown, doubtful labels)."""
        pairs, counts = np.unique(np.stack([self.given, self.guess]), axis=1, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:most]
        return [
            (int(given), int(guess), int(n)) for (given, guess), n in zip(pairs.T[order], counts[order], strict=True)
        ]


def find(files: Sequence[tuple[str, str]], classes: int) -> Doubtful:
    """The doubtful labels among those of some (index file, label file)s."""
    totals, counts = np.zeros(classes), np.zeros(classes, np.int64)
    for part in _parts(files, classes):
        totals += np.bincount(part.given, part.own, classes)
        counts += np.bincount(part.given, minlength=classes)
    least = np.where(counts > 0, np.maximum(totals / np.maximum(counts, 1), 2 * NEAR), ABSENT)
    joint = np.zeros((classes, classes), np.int64)
    found = [np.empty((6, 0))]
    for part in _parts(files, classes):
        confident = part.probs >= least - NEAR
        guess = np.where(confident.sum(axis=1) > 1, part.probs.argmax(axis=1), confident.argmax(axis=1))
        some = confident.any(axis=1)
        np.add.at(joint, (part.given[some], guess[some]), 1)
        others = part.probs.copy()
        np.put_along_axis(others, part.given[:, None], -np.inf, axis=1)
        other = others.max(axis=1, initial=-np.inf)
        here = np.flatnonzero(some & (guess != part.given) & (other > part.own + NEAR))
        columns = (part.row, part.given, guess, part.own, (part.own - other + 1) / 2)
        found.append(np.stack([np.full(len(here), part.file), *(column[here] for column in columns)]))
    file, row, given, guess, own, margin = np.concatenate(found, axis=1)
    order = np.argsort(margin, kind="stable")
    file, row, given, guess = (column[order].astype(np.int64) for column in (file, row, given, guess))
    return Doubtful(file, row, given, guess, own[order], margin[order], joint, int(counts.sum()))


@dataclass(frozen=True)
class _Part:
    """Some rows of a file: row, given, own [b], their labels' probabilities, and probs [b, c], those of all classes."""

    file: int
    row: Ints
    given: Ints
    own: Floats
    probs: Floats


def _parts(files: Iterable[tuple[str, str]], classes: int) -> Iterator[_Part]:
    for number, (indexed, labelled) in enumerate(files):
        known, rows = audit.aligned(indexed, labelled)
        answered = np.flatnonzero(rows["confidence"].is_valid())
        for start in range(0, len(answered), ROWS):
            row = answered[start : start + ROWS]
            said, given = rows.take(row), known["label"].to_numpy()[row].astype(np.int64)
            probs = label_files.spread_targets(audit.lists(said, "classes"), audit.lists(said, "probs"), classes)
            whole = probs.astype(np.float64)
            yield _Part(number, row, given, whole[np.arange(len(row)), given], whole)
