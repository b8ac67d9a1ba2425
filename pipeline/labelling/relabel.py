"""Passes over what the generation before did not keep, where only the rest is labelled again.

The other samples have a row all the same: with the status `skipped`, and nobody looks at their images. A shard of which
nothing was kept is not read at all, for its label file of the generation before says where its samples lie.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipeline import storage
from pipeline.data import label_files, parquet_files
from pipeline.data.samples import RULE, SKIPPED, Left, Sample
from pipeline.data.shards import Reader, Shard, stream
from pipeline.errors import DataError
from pipeline.storage.node_cache import Cache


class Pass(Protocol):
    """One pass over a shard: iterate, then look at the rest, as with shards.Reader."""

    left: Left
    damage: str | None
    sha256: str

    def __iter__(self) -> Iterator[tuple[Sample, bytes]]: ...


@dataclass(frozen=True)
class Before:
    """The generation before; picklable. Folders of its label and selection files, the identity of the selection, and
    the shards that have neither file because they could not be labelled."""

    labels: str
    select: str
    selection: str
    failed: frozenset[str]

    def walk(self, shard: Shard, cache: Cache | None) -> Pass:
        """The shard's samples, of which those that were not kept are `skipped`; DataError for a shard that failed."""
        if shard.name in self.failed:
            raise DataError(
                f"shard {shard.name} could not be labelled in the generation before, so nothing of it was kept; mend "
                "it and take it in by --refreeze, or go on without it"
            )
        name = label_files.file_name(shard.name)
        kept = parquet_files.read_table(storage.join(self.select, name), ["index"])["index"].to_pylist()
        if not kept:
            return _Remembered(storage.join(self.labels, name), shard)
        return _Partly(stream(shard.path, cache), frozenset(kept))


class _Partly:
    """A pass that leaves out the images of all samples but some."""

    def __init__(self, reader: Reader, kept: frozenset[int]) -> None:
        self.reader, self.kept = reader, kept
        self.left = Left()
        self.damage: str | None = None
        self.sha256 = ""

    def __iter__(self) -> Iterator[tuple[Sample, bytes]]:
        for sample, data in self.reader:
            if sample.index in self.kept:
                yield sample, data
            else:
                yield dataclasses.replace(sample, status=SKIPPED), b""
        self.left, self.damage, self.sha256 = self.reader.left, self.reader.damage, self.reader.sha256


class _Remembered:
    """The samples that a label file of the same shard names, all of them skipped."""

    def __init__(self, path: str, shard: Shard) -> None:
        self.table, metadata = parquet_files.read_with_metadata(path, ["index", "key", "offset", "size"])
        expected = {"shard": shard.name, "shard_size": shard.size, "rule": RULE}
        label_files.check_labels(metadata, expected, path)
        self.left = Left(**metadata["left"])
        self.damage: str | None = metadata["cut"]
        self.sha256: str = metadata["shard_sha256"]

    def __iter__(self) -> Iterator[tuple[Sample, bytes]]:
        for row in self.table.to_pylist():
            yield Sample(**row, suffix="", status=SKIPPED), b""
