"""Selects the pseudo-labelled samples that a student sees, and how often: label files in, selection files out.

Samples at or above the confidence threshold, balanced over the classes (pipeline.selection.radix says what is kept and
how the exact cutoff is found without holding rows). Each shard then selects alone. A selection file has `index` and
`copies` of the samples with copies, in index order, and `weight`, their confidence, where that is wanted in place of
copies.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data import label_files, parquet_files
from pipeline.errors import DataError
from pipeline.selection.candidates import LabelFile, count_group, histogram, reader
from pipeline.selection.radix import Counts, Cutoff, Settings, finish_first_pass, merge, refine, start
from pipeline.selection.sort_keys import Distances, Ints, tie_hash

__all__ = ["SCHEMA", "WEIGHT", "Map", "Settings", "select_all", "select_shard"]

SCHEMA = pa.schema([pa.field("index", pa.int32(), nullable=False), pa.field("copies", pa.int32(), nullable=False)])
WEIGHT = pa.field("weight", pa.float32(), nullable=False)
ENCODING = {"index": "DELTA_BINARY_PACKED", "copies": "DELTA_BINARY_PACKED"}  # a bit or two a row instead of bytes
MANY_COPIES = 16  # a class above this is worth a warning

# Applies a picklable function to every group of label files, here or on a cluster; results in any order.
Map = Callable[[Callable[[tuple[str, ...]], Any], Sequence[tuple[str, ...]]], Iterable[Any]]


@dataclass
class Kept:
    """What was selected from some label files: samples and copies per class, copies per shard."""

    unique: Ints
    copies: Ints
    histogram: Ints  # confidences of the kept samples
    shards: dict[str, int] = field(default_factory=dict)

    def add(self, other: Kept) -> Kept:
        self.unique += other.unique
        self.copies += other.copies
        self.histogram += other.histogram
        self.shards.update(other.shards)
        return self


def select_shard(file: LabelFile, cutoff: Cutoff, greatest: Distances) -> tuple[pa.Table, Kept]:
    """The selection of one label file: its table, and what it adds to the sums. `greatest`: `reach(cutoff)`."""
    found = file.without_held_out(file.within(greatest))
    distance, limit = found.distance, cutoff.cut_distance[found.label]
    extra = cutoff.take[found.label] & (distance <= limit)
    tied = np.flatnonzero(extra & (distance == limit))
    extra[tied] = tie_hash(file.shard, found.row[tied]) <= cutoff.cut_hash[found.label[tied]]
    copies = cutoff.base[found.label] + extra
    kept = np.flatnonzero(copies)
    row, label, copies = found.row[kept], found.label[kept], copies[kept]
    confidence = file.confidence[row]
    columns, schema = [row.astype(np.int32), copies.astype(np.int32)], SCHEMA
    if cutoff.settings.by_confidence:
        columns, schema = [*columns, confidence], SCHEMA.append(WEIGHT)
    classes = cutoff.settings.num_classes
    unique = np.bincount(label, minlength=classes).astype(np.int64)
    # Sums of 64-bit floats: exact below 2**53.
    copied = np.bincount(label, copies, minlength=classes).astype(np.int64)
    return (
        pa.table(columns, schema=schema),
        Kept(unique, copied, histogram(confidence), {file.shard: int(copies.sum())}),
    )


def reach(cutoff: Cutoff) -> Distances:
    """Of each class, the greatest distance with which a sample may have a copy."""
    greatest = np.where(cutoff.take, cutoff.cut_distance, 0)
    return np.where(cutoff.base > 0, cutoff.settings.limits(), greatest).astype(np.uint32)


def select_group(paths: tuple[str, ...], cutoff: Cutoff, out: str) -> Kept:
    """Write the selection files of several label files into the folder `out`."""
    read, greatest = reader(cutoff.settings), reach(cutoff)

    def select(path: str) -> Kept:
        file = read(path)
        table, kept = select_shard(file, cutoff, greatest)
        belongs = {"stage": storage.name(out), "shard": file.shard}  # no other one may lie in its place
        metadata = {**belongs, "samples": table.num_rows, "copies": kept.shards[file.shard]}
        target = storage.join(out, label_files.file_name(file.shard))
        parquet_files.write_table(target, table, metadata, use_dictionary=False, column_encoding=ENCODING)
        return kept

    return functools.reduce(Kept.add, storage.overlapped(select, paths))


def select_all(paths: Sequence[str], settings: Settings, map_fn: Map, out: str, groups: int = 64) -> dict[str, Any]:
    """Select from label files, write one selection file per shard into `out`, and say what was kept.

    The files are dealt into `groups` that `map_fn` hands out; neither their number nor the order of `paths`
    or of results changes a byte. The summary: `samples`, `labelled` (status ok), `confident` (of those, at
    or above the threshold), `excluded` (of those, held-out images), `kept` and `copies` in all; per class
    `available`, `kept_per_class`, `copies_per_class`; `histogram` and `kept_histogram` of confidences in
    100 equal steps from 0 to 1; the classes that are `empty`, `short` of `per_class`, and `much_copied`
    (more than 16 times); `shards`, the copies in each. DataError where nothing can be kept, before a file is written.
    """
    if not paths:
        raise DataError(
            "there is no label file to select from: no unlabelled shard could be labelled; look at the "
            "reasons in the label stage's .failed.json files"
        )
    dealt = [tuple(paths[i::groups]) for i in range(min(groups, len(paths)))]
    state = start(settings)
    first = merge(map_fn(functools.partial(count_group, state=state), dealt))
    available = first.digits.sum(axis=1)
    if not available.any():
        raise _nothing(settings, first)
    begun, cutoff = finish_first_pass(state, first)
    next_state, cutoff = refine(begun, first, cutoff)
    while next_state is not None:
        counts = merge(map_fn(functools.partial(count_group, state=next_state), dealt))
        next_state, cutoff = refine(next_state, counts, cutoff)
    kept = functools.reduce(Kept.add, map_fn(functools.partial(select_group, cutoff=cutoff, out=out), dealt))
    wanted = settings.per_class or 0
    return {
        "samples": first.samples,
        "labelled": first.labelled,
        "confident": first.confident,
        "excluded": first.excluded,
        "kept": int(kept.unique.sum()),
        "copies": int(kept.copies.sum()),
        "available": available.tolist(),
        "kept_per_class": kept.unique.tolist(),
        "copies_per_class": kept.copies.tolist(),
        "histogram": first.histogram.tolist(),
        "kept_histogram": kept.histogram.tolist(),
        "empty": np.flatnonzero(available == 0).tolist(),
        "short": np.flatnonzero((available > 0) & (available < wanted)).tolist(),
        "much_copied": np.flatnonzero(cutoff.base + cutoff.take > MANY_COPIES).tolist(),
        "shards": dict(sorted(kept.shards.items())),
    }


def _nothing(settings: Settings, counts: Counts) -> DataError:
    if not counts.labelled:
        return DataError(
            f"the selection keeps no image: of {counts.samples:,} unlabelled samples none has a label; look at the "
            "reasons in the column `status` of the label files, and mend the shards"
        )
    if counts.excluded:
        return DataError(
            f"the selection keeps no image: all {counts.excluded:,} confident ones are copies of validation or test "
            "images; data.unlabelled must name other images than data.validation and data.test"
        )
    highest = np.flatnonzero(counts.histogram).max() / len(counts.histogram)
    lowest = min([settings.threshold, *settings.thresholds.values()])
    least = f"select.threshold is {lowest:g}; lower it"
    if settings.by_noise:
        least = f"select.max_noise wants {lowest:g} or more; raise it"
    return DataError(
        f"the selection keeps no image: of {counts.labelled:,} labelled ones the most confident has about "
        f"{highest:.2f}, but {least}, or train a better teacher"
    )
