"""Corrects label files: what people say of single samples goes before what the teacher said.

The label stage's files stay as they are. The selection stage leaves a corrected copy of those that have corrections,
and whoever reads labels after it reads that copy.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data import images, label_files, parquet_files
from pipeline.data.corrections import DROP, Correction, OfShard
from pipeline.data.samples import DROPPED
from pipeline.data.shards import Shard, read_at
from pipeline.errors import DataError
from pipeline.storage.node_cache import Cache

COLUMNS = [name for name in label_files.SCHEMA.names if name != "crc32"]


def label_path(labels: str, select: str, shard: str, corrected: Collection[str]) -> str:
    """Where the labels of a shard lie that selection, training and report read: in the label stage's folder, or, of
    those that are `corrected`, in the selection stage's. The suffix keeps the copy apart from selection files, whatever
    shards are called."""
    name = label_files.file_name(shard)
    if shard in corrected:
        return storage.join(select, name.removesuffix(".parquet") + ".corrected")
    return storage.join(labels, name)


def correct_labels(
    path: str,
    out: str,
    shard: Shard,
    corrections: OfShard,
    num_classes: int,
    cache: Cache | None = None,
    max_bytes: int | None = None,
) -> None:
    """Write the label file at `path` again as `out`, with what people say of some of its samples: their class with
    confidence 1, or status `dropped`. DataError: a sample is not there, is another one, or cannot be decoded (in
    `max_bytes` of memory)."""
    table, metadata = parquet_files.read_with_metadata(path, COLUMNS, ["crc32"])
    status = table.schema.get_field_index("status")
    table = table.set_column(status, "status", table["status"].cast(pa.string()))
    known = len(table)
    place = np.arange(known)
    rows: list[dict[str, Any]] = []
    for index, correction in sorted(corrections.items()):
        if index >= known:
            raise DataError(correction.missing(index, shard.name, known))
        [row] = table.slice(index, 1).to_pylist()
        where = f"sample {index} ('{row['key']}') of shard {shard.name}"
        data = read_at(shard.path, row["offset"], row["size"], cache)
        correction.check(data, where)
        if correction.label is not None:
            _check_decodable(data, correction, where, max_bytes)
        place[index] = known + len(rows)
        rows.append({**row, **_said(correction, row["classes"] or (), data, num_classes)})
    said = pa.Table.from_pylist(rows, table.schema)
    made = pa.concat_tables([table, said]).take(pa.array(place))
    parquet_files.write_table(out, made, {**metadata, "corrected": len(rows)})


def _check_decodable(data: bytes, correction: Correction, where: str, max_bytes: int | None) -> None:
    try:
        images.decode(data, max_bytes=max_bytes)
    except images.BadImage as error:
        raise DataError(
            f"{correction.line} gives {where} a class, but it cannot be decoded ({error.status}); write '{DROP}' there"
        ) from None


def _said(correction: Correction, ranking: Collection[int], data: bytes, num_classes: int) -> dict[str, Any]:
    """What a correction changes in a row of a label file; `ranking`: the classes as the teacher had them."""
    if correction.label is None:
        return {"status": DROPPED, "label": None, "confidence": None, "classes": None, "probs": None}
    kept = label_files.kept_classes(num_classes)
    classes = list(dict.fromkeys([correction.label, *ranking, *range(num_classes)]))[:kept]
    found = {"status": "ok", "label": correction.label, "confidence": 1.0, "classes": classes}
    found["probs"] = np.eye(1, kept, dtype=np.float16)[0]
    # Of a sample that the labelling skipped nobody has looked at the bytes yet.
    return {**found, "image_hash": label_files.image_hash(data), "crc32": zlib.crc32(data)}
