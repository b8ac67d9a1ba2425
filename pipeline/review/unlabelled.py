"""Finds the unlabelled images that a person's label would help most: where the teacher wavers, and where two disagree.

Label files are read one by one; memory is one file's rows and what is found so far.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data import parquet_files
from pipeline.labelling import audit

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Found:
    """Rows of label files, the most interesting first: `file` and `row` [n]; `images`: how many there were to choose
    from."""

    file: Ints
    row: Ints
    images: int


def close(files: Iterable[str], most: int) -> Found:
    """Up to `most` images with a small margin between the two most probable classes, equally many of each class that is
    said where there are so many; of identical images one."""
    kept = np.empty((5, 0))  # label, margin, hash's place, file, row
    hashes: npt.NDArray[np.uint64] = np.empty(0, np.uint64)
    images = 0
    for number, path in enumerate(files):
        table = parquet_files.read_table(path, ["label", "confidence", "classes", "probs", "image_hash"])
        row = np.flatnonzero(table["confidence"].is_valid())
        said = table.take(row)
        probs = audit.lists(said, "probs").astype(np.float64) if len(row) else np.empty((0, 0))
        images += len(row)
        if probs.shape[1] < 2:
            continue
        margin, label = probs[:, 0] - probs[:, 1], said["label"].to_numpy()
        here = np.stack([label, margin, len(hashes) + np.arange(len(row)), np.full(len(row), number), row])
        hashes = np.concatenate([hashes, said["image_hash"].to_numpy()])
        kept, hashes = _closest(np.concatenate([kept, here], axis=1), hashes, most)
    order = np.lexsort((kept[1], _rank(kept)))[:most]
    return Found(kept[3, order].astype(np.int64), kept[4, order].astype(np.int64), images)


def disagreements(pairs: Iterable[tuple[str, str]], most: int) -> Found:
    """Up to `most` images to which two teachers give different classes, those first of which the less confident of the
    two is most confident; `pairs`: of each shard their label files."""
    kept, images = np.empty((3, 0)), 0  # confidence, file, row
    for number, (before, after) in enumerate(pairs):
        old, new = (parquet_files.read_table(path, ["label", "confidence", "image_hash"]) for path in (before, after))
        if len(old) != len(new):  # labelled under another rule of what a sample is
            continue
        label, sure, hash_ = (
            [table[name].combine_chunks().fill_null(0).to_numpy() for table in (old, new)]
            for name in ("label", "confidence", "image_hash")
        )
        both = old["confidence"].is_valid().to_numpy() & new["confidence"].is_valid().to_numpy()
        row = np.flatnonzero(both & (label[0] != label[1]) & (hash_[0] == hash_[1]))
        images += len(row)
        here = np.stack([np.minimum(*sure)[row], np.full(len(row), number), row])
        kept = np.concatenate([kept, here], axis=1)
        kept = kept[:, np.argsort(-kept[0], kind="stable")[:most]]
    return Found(kept[1].astype(np.int64), kept[2].astype(np.int64), images)


def _closest(
    rows: npt.NDArray[np.float64], hashes: npt.NDArray[np.uint64], most: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint64]]:
    """The `most` rows of each label with the smallest margins, one an image; and their hashes, in their order."""
    rows = rows[:, np.sort(np.unique(hashes[rows[2].astype(np.int64)], return_index=True)[1])]
    rows = rows[:, _rank(rows) < most]
    left = hashes[rows[2].astype(np.int64)]
    rows[2] = np.arange(rows.shape[1])
    return rows, left


def _rank(rows: npt.NDArray[np.float64]) -> Ints:
    """The place of each row by margin, among those of its label, from 0."""
    order = np.lexsort((rows[1], rows[0]))
    label = rows[0, order]
    rank = np.empty(rows.shape[1], np.int64)
    rank[order] = np.arange(rows.shape[1]) - np.searchsorted(label, label)
    return rank
