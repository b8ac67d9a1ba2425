"""Loads what training needs of a shard's rows: which samples, where their images lie, labels or probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data import label_files, parquet_files
from pipeline.errors import DataError
from pipeline.storage.byte_ranges import Parts, coalesce
from pipeline.storage.node_cache import Cache


@dataclass(frozen=True)
class TrainingShard:
    """path: the tar; rows: its index file or label file; selection: its selection file, or None for every row that
    has a label; count: the samples this makes, with copies."""

    path: str
    rows: str
    selection: str | None
    count: int
    cache: Cache | None = None  # of the node, for a remote tar and remote files of its rows
    size: int = 0  # bytes of the tar, where they matter
    expected: Mapping[str, Any] | None = None  # what its file of rows must say of itself
    selected: Mapping[str, Any] | None = None  # the same of its selection file


@dataclass(frozen=True)
class TrainingRows:
    """What is read of a shard's rows: one element a selected row; `row_of_slot` unfolds the copies."""

    index: np.ndarray  # int32 [n]
    offset: np.ndarray  # int64 [n]
    size: np.ndarray  # int32 [n]
    image_hash: np.ndarray  # uint64 [n], of the image's bytes
    crc32: np.ndarray | None  # uint32 [n], of the same; None where the file has none
    label: np.ndarray  # int32 [n]
    classes: np.ndarray  # uint16 [n, k], int32 where there are more classes; k = 0 where the labels are hard
    probs: np.ndarray  # float16 [n, k]
    weight: np.ndarray  # float32 [n], of the image in the loss
    row_of_slot: np.ndarray  # int64 [count]
    checked: np.ndarray  # bool [n], whose bytes this process has compared with the hash
    parts: Parts | None  # of a remote tar of which little is used: what is fetched of it; None: the whole

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in vars(self).values() if column is not None)


def load_rows(shard: TrainingShard, *, soft: bool) -> TrainingRows:
    """The rows of a shard that are trained on; `soft` reads the teacher's probabilities too."""
    columns = ["index", "offset", "size", "image_hash", "label", *(["classes", "probs"] if soft else [])]
    if shard.selection is not None and shard.expected:
        table, metadata = parquet_files.read_with_metadata(shard.rows, columns, ["crc32"], shard.cache)
        label_files.check_labels(metadata, shard.expected, shard.rows)
    else:
        table = parquet_files.read_expected(shard.rows, columns, shard.expected, ["crc32"], shard.cache)
    index = table["index"].to_numpy()
    if (np.diff(index) <= 0).any():
        raise DataError(
            f"{storage.redact(shard.rows)} is damaged: its samples are not in order; delete it and run again"
        )
    if shard.selection is None:
        rows = np.flatnonzero(table["label"].is_valid().to_numpy())
        copies, weight = np.ones(len(rows), np.int64), np.ones(len(rows), np.float32)
    else:
        chosen = parquet_files.read_expected(shard.selection, None, shard.selected, cache=shard.cache)
        wanted, copies = chosen["index"].to_numpy(), chosen["copies"].to_numpy()
        weighted = "weight" in chosen.column_names
        weight = chosen["weight"].to_numpy() if weighted else np.ones(len(wanted), np.float32)
        rows = np.searchsorted(index, wanted)
        if len(rows) and (rows[-1] >= len(index) or (index[rows] != wanted).any()):
            raise DataError(
                f"the selection {storage.redact(shard.selection)} names samples that "
                f"{storage.redact(shard.rows)} does not hold; delete the selection stage's folder and run again"
            )
    table = table.take(rows)
    row_of_slot = np.repeat(np.arange(len(rows)), copies)
    if len(row_of_slot) != shard.count:
        raise DataError(
            f"{storage.redact(shard.selection or shard.rows)} holds {len(row_of_slot)} samples, but "
            f"{shard.count} were counted when training began; delete this training stage's folder and run again"
        )

    def column(name: str) -> np.ndarray:
        return table[name].to_numpy()

    def lists(name: str) -> np.ndarray:
        if not soft or not len(rows):
            return np.empty((len(rows), 0))
        return table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1)

    offset, size = column("offset"), column("size")
    partly = shard.cache is not None and shard.selection is not None
    return TrainingRows(
        index=column("index"),
        offset=offset,
        size=size,
        image_hash=column("image_hash"),
        crc32=column("crc32") if "crc32" in table.column_names and not table["crc32"].null_count else None,
        label=column("label"),
        classes=_narrow(lists("classes")),
        probs=lists("probs"),
        weight=weight,
        row_of_slot=row_of_slot,
        checked=np.zeros(len(rows), bool),
        parts=coalesce(offset, size, shard.size) if partly else None,
    )


def _narrow(classes: np.ndarray) -> np.ndarray:
    """Most of what is kept of a row."""
    return classes.astype(np.uint16) if classes.max(initial=0) < 1 << 16 else classes
