"""Folds of labelled images: every image in one, every class alike, copies together, whatever the order."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.data.folds import fold_of

RNG = np.random.default_rng(0)
HASHES = RNG.integers(0, 2**63, 997, dtype=np.uint64) * np.uint64(2)
LABELS = RNG.integers(0, 7, 997)


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_each_fold_has_as_many_images_of_each_class(folds: int) -> None:
    fold = fold_of(HASHES, LABELS, folds)
    counts = np.stack([np.bincount(LABELS[fold == number], minlength=7) for number in range(folds)])
    assert (np.ptp(counts, axis=0) <= 1).all() and np.ptp(counts.sum(axis=1)) <= 7
    assert counts.sum() == 997


def test_classes_of_one_image_do_not_all_go_to_the_same_fold() -> None:
    assert np.bincount(fold_of(np.arange(10), np.arange(10), 2)).tolist() == [5, 5]


def test_the_order_of_images_does_not_matter() -> None:
    order = RNG.permutation(997)
    assert (fold_of(HASHES[order], LABELS[order], 3) == fold_of(HASHES, LABELS, 3)[order]).all()


def test_copies_lie_in_one_fold_also_under_different_labels() -> None:
    hashes, labels = np.concatenate([HASHES, HASHES[:100]]), np.concatenate([LABELS, (LABELS[:100] + 1) % 7])
    fold = fold_of(hashes, labels, 2)
    assert (fold[997:] == fold[:100]).all()
    order = RNG.permutation(len(hashes))
    assert (fold_of(hashes[order], labels[order], 2) == fold[order]).all()
