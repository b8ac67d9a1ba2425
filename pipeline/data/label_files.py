"""Writes label files: what a teacher said about every sample of a shard, one Parquet file per shard.

A row per sample, in shard order, none left out; row i is sample i. `label`, `confidence`, `classes` and
`probs` are null where `status` is not `ok`. `classes` and `probs` start with the most probable class (so
`classes[0]` is `label`) and hold all classes up to 128 of them, otherwise the top 32; the rest of the mass
is spread evenly over the others. What is true of the whole file is JSON under one key of the file's
metadata (`parquet_files.read_metadata`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.data import parquet_files
from pipeline.data.parquet_files import Metadata
from pipeline.errors import DataError

FORMAT = 1
DENSE_CLASSES = 128
TOP_CLASSES = 32
SCHEMA = pa.schema(
    [
        pa.field("index", pa.int32(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("size", pa.int32(), nullable=False),
        pa.field("status", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("label", pa.int32()),
        pa.field("confidence", pa.float32()),
        pa.field("classes", pa.list_(pa.int32())),
        pa.field("probs", pa.list_(pa.float16())),
        pa.field("image_hash", pa.uint64()),
        pa.field("crc32", pa.uint32()),
    ]
)
# What a reader may insist on, and how an error calls it.
CHECKED = {
    "shard": "the shard",
    "shard_size": "the shard's size",
    "class_list": "the class list (hash)",
    "teacher": "the teacher (sha256 of its weights)",
    "transform": "the teacher's view of images",
    "temperature": "the temperature of the logits",
    "flip": "the mean with the mirror image",
    "max_image_bytes": "the limit on an image's memory",
    "batch_asked": "the batch size that was asked for",
    "selection": "the selection that it follows",
    "rule": "the number of the sample rule",
}


@dataclass(frozen=True)
class Predictions:
    """Of b images: label int32 [b], confidence float32 [b], classes int32 [b, k], probs float16 [b, k]."""

    label: npt.NDArray[np.int32]
    confidence: npt.NDArray[np.float32]
    classes: npt.NDArray[np.int32]
    probs: npt.NDArray[np.float16]


def kept_classes(num_classes: int) -> int:
    """How many (class, probability) pairs a row holds."""
    return num_classes if num_classes <= DENSE_CLASSES else TOP_CLASSES


def rows_from_probs(probs: npt.NDArray[np.float32]) -> Predictions:
    """What a label file keeps of probabilities float32 [b, c]; of equal ones the lower class goes first."""
    count = probs.shape[1]
    keep = kept_classes(count)
    # One integer orders by (probability, lower class first): non-negative floats sort as their bits do.
    bits = np.ascontiguousarray(probs, np.float32).view(np.uint32).astype(np.uint64)
    order = (bits << np.uint64(32)) | np.arange(count - 1, -1, -1, dtype=np.uint64)
    if keep < count:
        order = np.partition(order, count - keep, axis=1)[:, count - keep :]
    order = np.sort(order, axis=1)[:, ::-1]
    classes = (count - 1 - (order & np.uint64(0xFFFFFFFF)).astype(np.int64)).astype(np.int32)
    sorted_probs = np.take_along_axis(probs, classes.astype(np.int64), axis=1)
    return Predictions(classes[:, 0], sorted_probs[:, 0], classes, sorted_probs.astype(np.float16))


def spread_targets(
    classes: npt.NDArray[np.int32],
    probs: npt.NDArray[np.float16],
    num_classes: int,
    *,
    temperature: float = 1.0,
) -> npt.NDArray[np.float32]:
    """Soft targets float32 [b, num_classes], rows summing to 1, of label rows' `classes`, `probs` [b, k].

    The mass that the row does not name is spread evenly over the other classes; then p^(1/temperature),
    renormalised.
    """
    b, k = classes.shape
    targets = np.zeros((b, num_classes), np.float32)
    named = probs.astype(np.float32)
    if k < num_classes:
        rest = np.maximum(0, 1 - named.sum(axis=1, keepdims=True)) / (num_classes - k)
        targets += rest
    np.put_along_axis(targets, classes.astype(np.int64), named, axis=1)
    if temperature != 1:
        # Relative to the largest, so that a small temperature cannot underflow the whole row.
        targets = (targets / targets.max(axis=1, keepdims=True)) ** np.float32(1 / temperature)
    return targets / targets.sum(axis=1, keepdims=True)


def class_list_hash(names: Sequence[str]) -> str:
    """Identity of a class list: the names in index order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()


def image_hash(data: bytes) -> int:
    """64-bit hash of an image file's bytes (blake2b, little-endian)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def printable_key(key: str) -> str:
    """A sample's key as UTF-8 can hold it: bytes that were not UTF-8 become backslash escapes."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def file_name(shard: str) -> str:
    """Where a shard's label or selection file lies in its stage folder: `a/000.tar` -> `a/000.parquet`."""
    return shard.removesuffix(".tar") + ".parquet"


def make_table(columns: Mapping[str, Sequence[Any]], rows: npt.NDArray[np.int64], found: Predictions) -> pa.Table:
    """A label table: `columns` index, key, offset, size, status, image_hash, crc32 (if any) of all n samples.

    `rows` [b], ascending, are those that `found` speaks of, whose status is `ok`.
    """
    n, k = len(columns["index"]), found.classes.shape[1]
    absent = np.ones(n, bool)
    absent[rows] = False
    label, confidence = np.zeros(n, np.int32), np.zeros(n, np.float32)
    label[rows], confidence[rows] = found.label, found.confidence
    # Offsets of the lists; a null list is marked by a null offset at its start.
    ends = np.concatenate([[0], np.cumsum(~absent)]).astype(np.int32) * k
    offsets = pa.array(ends, pa.int32(), mask=np.append(absent, False))
    arrays = [
        pa.array(columns["index"], pa.int32()),
        pa.array(columns["key"], pa.string()),
        pa.array(columns["offset"], pa.int64()),
        pa.array(columns["size"], pa.int32()),
        pa.array(columns["status"], pa.string()).dictionary_encode(),
        pa.array(label, mask=absent),
        pa.array(confidence, mask=absent),
        pa.ListArray.from_arrays(offsets, pa.array(found.classes.reshape(-1))),
        pa.ListArray.from_arrays(offsets, pa.array(found.probs.reshape(-1))),
        pa.array(columns["image_hash"], pa.uint64()),
        pa.array(columns.get("crc32", [None] * n), pa.uint32()),
    ]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def write_labels(path: str, table: pa.Table, metadata: Metadata | Callable[[], Metadata]) -> None:
    """Write a label file in one step; equal table and metadata give equal bytes."""

    def complete() -> Metadata:
        return {"format": FORMAT, **(metadata() if callable(metadata) else metadata)}

    parquet_files.write_table(path, table.cast(SCHEMA), complete)


def check_labels(metadata: Mapping[str, Any], expected: Mapping[str, Any], path: str) -> None:
    """Refuse a file whose shard, shard_size, class_list or teacher (those in `expected`) is another one."""
    differing = [
        f"{CHECKED[name]} is {metadata.get(name)!r} instead of {value!r}"
        for name, value in expected.items()
        if metadata.get(name) != value
    ]
    if differing:
        raise DataError(
            f"the label file {storage.redact(path)} does not fit this run: {', '.join(differing)}; "
            "label these shards again (another `output`, or delete that file)"
        )
