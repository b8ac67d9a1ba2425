"""Do batches mix the classes? Known once `index` is done; `plan` says so then, and training stages when they begin.

index-1a2b3c4d/classes.parquet   shard int32 (its number), label int32, images int32: of the labelled shards
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline import storage
from pipeline.config.settings_train import Train

CLASSES = "classes.parquet"


def write_classes(folder: str, per_class: Sequence[Mapping[int, int]]) -> None:
    """per_class: of every labelled shard, in order, {class: images}."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [(number, *held) for number, found in enumerate(per_class) for held in found.items()]
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    names = ("shard", "label", "images")
    table = pa.table({name: pa.array(column, pa.int32()) for name, column in zip(names, columns, strict=True)})
    with storage.writing(storage.join(folder, CLASSES)) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def advice(folder: str, settings: Train, seed: int) -> str | None:
    """What is wrong with the order of the labelled images that `index` found, if anything is; `folder`: of that stage."""
    path = storage.join(folder, CLASSES)
    if not storage.exists(path):  # made by an earlier version
        return None
    import numpy as np

    from pipeline.data import label_files
    from pipeline.loading import sample_order, shuffle_quality

    table = label_files.read_labels(path)
    shard, label, images = (table[name].to_numpy() for name in ("shard", "label", "images"))
    held = np.split(np.repeat(label, images), np.cumsum(np.bincount(shard, images).astype(np.int64))[:-1])
    segments = sample_order.segments_for(len(held), settings.segments)
    return shuffle_quality.advice(held, "labelled", seed, segments, settings.window, settings.batch)
