"""Finds images that lie in several splits, or under several labels, by the hashes of index files.

What models are tested on must not be trained on: labelled copies of held-out images are dropped from the index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.data import parquet_files
from pipeline.data.index_files import content_digest, image_hashes, metadata_of, rows_path
from pipeline.data.samples import RULE

Place = tuple[str, str]
"""(source, shard name)"""


@dataclass(frozen=True)
class Dropped:
    """What is left of a labelled shard: `per_class`, images int64 [classes], and `digest`; `keys` of what is not."""

    per_class: np.ndarray
    digest: str
    keys: list[str]


def shared(folder: str, one: Sequence[Place], other: Sequence[Place], further: Sequence[int] = ()) -> np.ndarray:
    """Sorted hashes uint64 of the images that both hold, the other with `further` ones."""
    others = np.union1d(image_hashes(folder, other), np.array(further, np.uint64))
    return np.intersect1d(image_hashes(folder, one), others, assume_unique=True)


def drop(folder: str, place: Place, held_out: np.ndarray, classes: int) -> Dropped | None:
    """Write an index file again without the images whose hashes are among the sorted ones; None where it has none."""
    path = rows_path(folder, *place)
    table = parquet_files.read_table(path)
    leaked = np.isin(table["image_hash"].to_numpy(), held_out)
    if not leaked.any():
        return None
    kept = table.filter(pa.array(~leaked))
    parquet_files.write_table(path, kept, {**metadata_of(folder, *place), "rule": RULE})
    labels = kept["label"].to_numpy()
    return Dropped(
        np.bincount(labels.astype(np.int64), minlength=classes),
        content_digest(kept["image_hash"].to_numpy(), labels),
        table.filter(pa.array(leaked))["key"].to_pylist(),
    )


def ambiguous(folder: str, places: Sequence[Place]) -> tuple[int, str]:
    """How many images lie under several labels, and the key of one."""
    tables = [parquet_files.read_table(rows_path(folder, *place), ["image_hash", "label", "key"]) for place in places]
    table = pa.concat_tables(tables)
    hashes, labels = table["image_hash"].to_numpy(), table["label"].to_numpy()
    order = np.lexsort((labels, hashes))
    same, other = np.diff(hashes[order]) == 0, np.diff(labels[order]) != 0
    found = np.flatnonzero(same & other)
    if not len(found):
        return 0, ""
    return len(np.unique(hashes[order][found])), str(table["key"][int(order[found[0]])])
