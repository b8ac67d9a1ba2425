"""Reads of the manifests that `prepare` wrote which files the samples of a shard were: a part of the file at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.manifest import manifest_name

COLUMNS = ("shard", "index", "path", "sha256")


class ManifestRows:
    """Of the manifests in a folder, where there are any; the latest row group that was read stays in memory."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.known: dict[str, pq.FileMetaData | None] = {}
        self.latest: tuple[str, int, pa.Table] | None = None

    def of(self, shard: str, index: np.ndarray) -> dict[str, pa.Array]:
        """`path` and `sha256` of the samples of a shard, by their numbers int [n]; null where none is written down."""
        place = {int(number): row for row, number in enumerate(index)}
        found: dict[str, list[Any]] = {"path": [None] * len(index), "sha256": [None] * len(index)}
        name = manifest_name(shard.rpartition("-")[0])
        for group in self._groups(name, shard):
            table = self._read(name, group)
            for row in table.filter(pc.equal(table["shard"], shard)).to_pylist():
                if row["index"] in place:
                    for column, values in found.items():
                        values[place[row["index"]]] = row[column]
        return {column: pa.array(values, pa.string()) for column, values in found.items()}

    def _groups(self, name: str, shard: str) -> list[int]:
        """The row groups that may speak of a shard."""
        path = storage.join(self.root, name)
        if name not in self.known:
            self.known[name] = None
            if self.root and storage.exists(path):
                with storage.open_read(path) as source:
                    self.known[name] = pq.read_metadata(source)
        metadata = self.known[name]
        if metadata is None:
            return []
        groups = []
        for number in range(metadata.num_row_groups):
            limits = metadata.row_group(number).column(0).statistics
            if limits is None or not limits.has_min_max or limits.min <= shard <= limits.max:
                groups.append(number)
        return groups

    def _read(self, name: str, group: int) -> pa.Table:
        if self.latest is None or self.latest[:2] != (name, group):
            with storage.open_read(storage.join(self.root, name)) as source, pq.ParquetFile(source) as file:
                self.latest = name, group, file.read_row_group(group, list(COLUMNS))
        return self.latest[2]
