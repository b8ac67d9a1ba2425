"""Names and writes the manifest of a split: where each sample of its shards comes from.

manifest-labelled.parquet   shard, index (of the sample), key, path (relative to what was prepared; null where an image
                            was no file), sha256 (of the image)
"""

from __future__ import annotations

import pyarrow as pa

SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("index", pa.int64()),
        ("key", pa.string()),
        ("path", pa.string()),
        ("sha256", pa.string()),
    ]
)
Row = tuple[str, str | None, str]
"""(key, path, sha256) of a shard's sample."""


def manifest_name(split: str) -> str:
    """No pattern of shards matches it."""
    return f"manifest-{split}.parquet"


def rows_of(shard: str, rows: list[Row]) -> pa.Table:
    """The manifest's rows of one shard, whose samples these are, in their order."""
    columns = [[shard] * len(rows), range(len(rows)), *(zip(*rows, strict=True) if rows else ((), (), ()))]
    arrays = [pa.array(values, kind.type) for values, kind in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)
