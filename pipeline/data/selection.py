"""Which pseudo-labelled samples a student sees, and how often: label files in, selection files out.

Samples at or above the confidence threshold; in each class exactly the `per_class` most confident, or
copies up to that number (pipeline.data.cut says how the exact cut is found without holding rows). Each
shard then selects alone. A selection file has `index` and `copies` of the samples with copies, in index
order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data import labels
from pipeline.data.cut import (
    Cut,
    Ints,
    Settings,
    candidates,
    count_group,
    finish_first_pass,
    histogram,
    merge,
    refine,
    start,
    tie_hash,
)
from pipeline.errors import DataError

__all__ = ["SCHEMA", "Map", "Settings", "select_all", "select_shard"]

SCHEMA = pa.schema([pa.field("index", pa.int32(), nullable=False), pa.field("copies", pa.int32(), nullable=False)])
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


def select_shard(path: str, cut: Cut) -> tuple[str, pa.Table, Kept]:
    """The selection of one label file: its shard's name, its `SCHEMA` table, what it adds to the sums."""
    found = candidates(path, cut.settings)
    label, distance = found.label, found.distance
    extra = cut.take[label] & (distance <= cut.cut_distance[label])
    tied = np.flatnonzero(extra & (distance == cut.cut_distance[label]))
    extra[tied] = tie_hash(found.shard, found.row[tied]) <= cut.cut_hash[label[tied]]
    copies = cut.base[label] + extra
    kept = copies > 0
    row, label, copies = found.row[kept], label[kept], copies[kept]
    table = pa.table([row.astype(np.int32), copies.astype(np.int32)], schema=SCHEMA)
    classes = cut.settings.num_classes
    copied = np.zeros(classes, np.int64)
    np.add.at(copied, label, copies)
    unique = np.bincount(label, minlength=classes).astype(np.int64)
    return (
        found.shard,
        table,
        Kept(unique, copied, histogram(found.confidence[kept]), {found.shard: int(copies.sum())}),
    )


def select_group(paths: tuple[str, ...], cut: Cut, out: str) -> Kept:
    """Write the selection files of several label files into the folder `out`."""
    sums = []
    for path in paths:
        shard, table, kept = select_shard(path, cut)
        metadata = {"shard": shard, "samples": table.num_rows, "copies": kept.shards[shard]}
        labels.write_table(storage.join(out, labels.file_name(shard)), table, metadata)
        sums.append(kept)
    return functools.reduce(Kept.add, sums)


def select_all(paths: Sequence[str], settings: Settings, map_fn: Map, out: str, groups: int = 64) -> dict[str, Any]:
    """Select from label files, write one selection file per shard into `out`, and say what was kept.

    The files are dealt into `groups` that `map_fn` hands out; neither their number nor the order of `paths`
    or of results changes a byte. The summary: `samples`, `labelled` (status ok), `confident` (of those, at
    or above the threshold), `excluded` (of those, held-out images), `kept` and `copies` in all; per class
    `available`, `kept_per_class`, `copies_per_class`; `histogram` and `kept_histogram` of confidences in
    100 equal steps from 0 to 1; the classes that are `empty`, `short` of `per_class`, and `much_copied`
    (more than 16 times); `shards`, the copies in each.
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
    begun, cut = finish_first_pass(state, first)
    next_state, cut = refine(begun, first, cut)
    while next_state is not None:
        counts = merge(map_fn(functools.partial(count_group, state=next_state), dealt))
        next_state, cut = refine(next_state, counts, cut)
    kept = functools.reduce(Kept.add, map_fn(functools.partial(select_group, cut=cut, out=out), dealt))
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
        "much_copied": np.flatnonzero(cut.base + cut.take > MANY_COPIES).tolist(),
        "shards": dict(sorted(kept.shards.items())),
    }
