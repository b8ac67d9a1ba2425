"""Divides labelled images into folds: every class alike, identical images together."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def fold_of(hashes: npt.ArrayLike, labels: npt.ArrayLike, folds: int) -> npt.NDArray[np.int64]:
    """The fold of each image [n], from 0; `hashes`: of its bytes.

    The images of a class, sorted by hash, are dealt out to the folds one by one, so the folds hold equally many of
    it, ±1. They depend on the images and their labels alone, not on shards or their order. Copies of an image under
    several labels count for the lowest.
    """
    hash_, label = np.asarray(hashes, np.uint64), np.asarray(labels, np.int64)
    order = np.lexsort((label, hash_))
    known, first = np.unique(hash_[order], return_index=True)
    of = label[order][first]
    by_class = np.argsort(of, kind="stable")  # and by hash inside it
    rank = np.empty(len(known), np.int64)
    rank[by_class] = np.arange(len(known)) - np.searchsorted(of[by_class], of[by_class])
    fold: npt.NDArray[np.int64] = (rank + of) % folds  # + of: classes that do not divide evenly make no fold larger
    return fold[np.searchsorted(known, hash_)]
