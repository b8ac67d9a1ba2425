"""Spreads samples over output shards: the files in which they lie on their way, and what of each file an output reads.

    .spread-…/000017-0.rows      samples of unit 17 by place: length of a header, header (JSON), bytes
    .spread-…/000017.parquet     their part (file), place, end (byte) and size (of the image); written last

A unit reads a part of the input and writes rows files of at most `buffer` bytes; an output reads a piece of every file,
one run of bytes, for its places are a range. So neither holds more than one output. A sample's place is its identity:
whatever is done twice, an output knows what it lacks and what it has.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.data import parquet_files
from pipeline.errors import DataError

BUFFER_BYTES = 128 << 20
READERS = 16  # threads: of an object store each piece is a request
LENGTH = struct.Struct("<I")
SCHEMA = pa.schema([("part", pa.int32()), ("place", pa.int64()), ("end", pa.int64()), ("size", pa.int64())])

Ints = npt.NDArray[np.int64]


class Row(NamedTuple):
    place: int
    head: dict[str, Any]
    blobs: list[bytes]


class Writer:
    """Writes the files of one unit; `close` makes them count."""

    def __init__(self, folder: str, unit: str, buffer: int = BUFFER_BYTES) -> None:
        self.folder, self.unit, self.buffer = folder, unit, buffer
        self._rows: list[tuple[int, int, bytes]] = []  # (place, size, row)
        self._held = 0
        self._indexes: list[pa.Table] = []

    def add(self, place: int, head: dict[str, Any], blobs: Sequence[bytes], size: int) -> None:
        """`size`: of the image, which need not be among the `blobs`."""
        text = json.dumps([place, head, [len(blob) for blob in blobs]]).encode()
        row = b"".join([LENGTH.pack(len(text)), text, *blobs])
        if self._rows and self._held + len(row) > self.buffer:
            self._flush()
        self._rows.append((place, size, row))
        self._held += len(row)

    def close(self, facts: dict[str, Any]) -> None:
        """`facts`: what else is known of the unit, for `facts_of`."""
        if self._rows:
            self._flush()
        index = pa.concat_tables([SCHEMA.empty_table(), *self._indexes])
        parquet_files.write_table(index_path(self.folder, self.unit), index, facts)

    def _flush(self) -> None:
        rows = sorted(self._rows, key=lambda row: row[0])
        part = len(self._indexes)
        with storage.writing(rows_path(self.folder, self.unit, part)) as temporary, open(temporary, "wb") as file:  # noqa: PTH123
            for _, _, row in rows:
                file.write(row)
        columns = [
            np.full(len(rows), part),
            np.array([place for place, _, _ in rows], np.int64),
            np.cumsum([len(row) for _, _, row in rows]),
            np.array([size for _, size, _ in rows], np.int64),
        ]
        arrays = [pa.array(column, kind.type) for column, kind in zip(columns, SCHEMA, strict=True)]
        self._indexes.append(pa.Table.from_arrays(arrays, schema=SCHEMA))
        self._rows, self._held = [], 0


def unit_name(number: int) -> str:
    return f"{number:06d}"


def index_path(folder: str, unit: str) -> str:
    return storage.join(folder, f"{unit}.parquet")


def rows_path(folder: str, unit: str, part: int) -> str:
    return storage.join(folder, f"{unit}-{part}.rows")


def facts_of(folder: str, unit: str) -> dict[str, Any]:
    return parquet_files.read_metadata(index_path(folder, unit))


def places_and_sizes(folder: str, unit: str) -> tuple[Ints, Ints]:
    """Of all samples of a unit."""
    table = parquet_files.read_table(index_path(folder, unit), ["place", "size"])
    return table["place"].to_numpy(), table["size"].to_numpy()


@dataclass(frozen=True)
class Pieces:
    """The runs of bytes that one output reads, each of another rows file, and how many samples are in them."""

    folder: str
    unit: Ints
    part: Ints
    begin: Ints
    end: Ints
    rows: Ints

    @property
    def samples(self) -> int:
        return int(self.rows.sum())


def pieces(folder: str, units: Sequence[str], bounds: Ints) -> list[Pieces]:
    """Of each output. units: their names, which are numbers; bounds: [outputs + 1], ascending: output k has the places
    from bounds[k] up to bounds[k + 1]."""
    found: list[list[Ints]] = []  # output, unit, part, begin, end, rows
    for unit in units:
        table = parquet_files.read_table(index_path(folder, unit), ["part", "place", "end"])
        part, place, end = (table[name].to_numpy() for name in ("part", "place", "end"))
        for number in np.unique(part).tolist():
            mine = part == number
            edges = np.searchsorted(place[mine], bounds)
            ends = np.concatenate([[0], end[mine]])
            some = np.flatnonzero(np.diff(edges))
            first, last = edges[some], edges[some + 1]
            here = [np.full(len(some), value) for value in (int(unit), number)]
            found.append([some, *here, ends[first], ends[last], last - first])
    output, *columns = (np.concatenate([np.zeros(0, np.int64), *(one[i] for one in found)]) for i in range(6))
    order = np.argsort(output, kind="stable")
    edges = np.searchsorted(output[order], np.arange(1, len(bounds) - 1))
    return [
        Pieces(folder, *of_one) for of_one in zip(*(np.split(column[order], edges) for column in columns), strict=True)
    ]


def gather(wanted: Pieces) -> list[Row]:
    """The samples of an output, by place. DataError: a file is not what its index says."""

    def read(unit: int, part: int, begin: int, end: int, count: int) -> list[Row]:
        path = rows_path(wanted.folder, unit_name(unit), part)
        data = storage.read_range(path, begin, end - begin)
        found = list(_rows(data)) if len(data) == end - begin else []
        if len(found) != count:
            raise DataError(f"{storage.redact(path)} is not what was written there; delete its folder and run again")
        return found

    columns = (wanted.unit, wanted.part, wanted.begin, wanted.end, wanted.rows)
    with ThreadPoolExecutor(READERS) as threads:
        rows = [row for found in threads.map(read, *(column.tolist() for column in columns)) for row in found]
    return sorted(rows, key=lambda row: row.place)


def _rows(data: bytes) -> Iterator[Row]:
    at = 0
    while at < len(data):
        (length,) = LENGTH.unpack_from(data, at)
        at += LENGTH.size
        place, head, sizes = json.loads(data[at : at + length])
        at += length
        blobs = []
        for size in sizes:
            blobs.append(data[at : at + size])
            at += size
        yield Row(place, head, blobs)
