"""Reads the rows of a table's files: Parquet of paths or of images, and CSV of paths.

Only the columns that are asked for are read, of Parquet only the row groups that can hold a row of the conditions, and
of folders such as `lang=en` only those that meet them.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from pipeline import storage
from pipeline.errors import DataError, RemoteError
from pipeline.prepare.conditions import Condition, expression, holds
from pipeline.prepare.picture_files import suffix_of
from pipeline.prepare.sources import Source
from pipeline.prepare.table_patterns import partitions_of

BATCH_ROWS = 256
# What img2dataset adds to an image: those that it could not fetch have another status and no bytes.
FETCHED, FETCHED_OK = ("url", "status", "error_message"), "success"


class Row(NamedTuple):
    image: Any
    label: str | None
    url: str | None
    """Where img2dataset has the image from."""


@dataclass(frozen=True)
class Wanted:
    """Of a table its columns `image` and `label` (None: no labels) in the rows that meet all of `where`."""

    image: str
    label: str | None
    where: tuple[Condition, ...] = ()


@dataclass
class Survey:
    """A file without its images: of each row group its wanted `rows` and about how many `bytes` their images have;
    all `labels`; the rows that img2dataset could not fetch, by its status."""

    rows: list[int] = field(default_factory=list)
    bytes: list[int] = field(default_factory=list)
    labels: set[str] = field(default_factory=set)
    failed: Counter[str] = field(default_factory=Counter)
    whole: bool = False  # of CSV, which is read as one

    def groups(self, number: int) -> tuple[int, ...] | None:
        return None if self.whole else (number,)


def survey(path: str, wanted: Wanted) -> Survey:
    """Read all but the images. DataError: the file cannot be read, lacks a column, or a row lacks its label."""
    found = Survey()
    with _reading(path):
        if suffix_of(path) == "csv":
            rows = _csv_rows(path, wanted)
            return Survey([len(rows)], [0], {row.label for row in rows if row.label is not None}, whole=True)
        with storage.open_read(path) as file:
            table = _Parquet(file, path, wanted)
            for group in table.fragment.row_groups if table.passes else ():
                found.rows.append(0)
                found.bytes.append(table.image_bytes(group.id))
                for batch in table.batches([group.id], [] if wanted.label is None else [wanted.label]):
                    if wanted.label in batch.schema.names:
                        values = batch[wanted.label]
                        first = sum(found.rows)
                        found.labels.update(_texts(_distinct(values, path, wanted, first), path, wanted, first))
                    found.rows[-1] += batch.num_rows
            if wanted.label in table.partitions and any(found.rows):
                found.labels.update(_texts([table.partitions[wanted.label]], path, wanted, 0))
            found.failed = table.failed()
    return found


def read(path: str, wanted: Wanted, groups: Sequence[int] | None = None, first: int = 0) -> Iterator[Row]:
    """The rows of a file, or of some of its row groups, of which the first is row number `first` of those wanted."""
    number = first
    with _reading(path):
        if suffix_of(path) == "csv":
            yield from _csv_rows(path, wanted)
            return
        with storage.open_read(path) as file:
            table = _Parquet(file, path, wanted)
            if not table.passes:
                return
            every = [group.id for group in table.fragment.row_groups] if groups is None else groups
            columns = [
                wanted.image,
                *([] if wanted.label is None else [wanted.label]),
                *(["url"] if table.fetched else []),
            ]
            for batch in table.batches(every, columns):
                cells = {name: batch[name].to_pylist() for name in batch.schema.names}
                if not (count := batch.num_rows):
                    continue
                images = cells.get(wanted.image) or [table.partitions[wanted.image]] * count
                _check_filled(images, path, wanted.image, number)
                labels: list[Any] = [None] * count
                if wanted.label is not None:
                    values = cells.get(wanted.label) or [table.partitions[wanted.label]] * count
                    labels = _texts(values, path, wanted, number)
                urls = cells["url"] if table.fetched else [None] * count
                yield from map(Row, images, labels, urls)
                number += count


class _Parquet:
    """An open Parquet file and the rows that are wanted of it."""

    def __init__(self, file: Any, path: str, wanted: Wanted) -> None:
        self.path, self.wanted = path, wanted
        self.fragment = ds.ParquetFileFormat().make_fragment(file)
        schema = self.fragment.physical_schema
        self.partitions = {name: value for name, value in partitions_of(path).items() if name not in schema.names}
        _check_columns([*schema.names, *self.partitions], path, wanted)
        inside = [one for one in wanted.where if one.column not in self.partitions]
        self.passes = all(holds(one, self.partitions[one.column]) for one in wanted.where if one not in inside)
        self.where = expression(inside, schema, storage.redact(path))
        self.fetched = set(FETCHED) <= set(schema.names) and _is_bytes(schema, wanted.image)

    def batches(self, groups: Sequence[int], columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Of wanted rows, those columns that lie in the file."""
        ok = pc.field("status") == FETCHED_OK if self.fetched else None
        where = self.where if ok is None else ok if self.where is None else self.where & ok
        yield from self._scan(groups, columns, where)

    def failed(self) -> Counter[str]:
        found: Counter[str] = Counter()
        if self.fetched and self.passes:
            for batch in self._scan([group.id for group in self.fragment.row_groups], ["status"], self.where):
                found.update(str(status) for status in batch["status"].to_pylist() if status != FETCHED_OK)
        return found

    def image_bytes(self, group: int) -> int:
        chunks = self.fragment.metadata.row_group(group)
        columns = (chunks.column(number) for number in range(chunks.num_columns))
        inside = (chunk for chunk in columns if chunk.path_in_schema.split(".")[0] == self.wanted.image)
        return sum(chunk.total_uncompressed_size for chunk in inside)

    def _scan(self, groups: Sequence[int], columns: Sequence[str], where: Any) -> Iterator[pa.RecordBatch]:
        inside = [name for name in dict.fromkeys(columns) if name not in self.partitions]
        yield from self.fragment.subset(row_group_ids=list(groups)).to_batches(
            columns=inside, filter=where, batch_size=BATCH_ROWS, batch_readahead=1, use_threads=False
        )


def source_of(row: Row, number: int, path: str) -> Source:
    """The image of a row, the `number`th wanted one of the file at `path`."""
    value, name = row.image, row.url and storage.redact(row.url)
    if isinstance(value, dict):
        if value.get("bytes"):
            shown = f"{value.get('path') or f'row {number}'} of {storage.name(path)}"
            return Source(shown, bytes(value["bytes"]), value.get("path"))
        value = value.get("path") or ""
    if isinstance(value, bytes | bytearray | memoryview):
        return Source(f"row {number} of {storage.name(path)}", bytes(value), name)
    text = str(value)
    if storage.is_url(path) and not text.startswith("/"):
        whole = f"{path.rpartition('/')[0]}/{text}"
    else:
        whole = str(Path(path).absolute().parent / text)
    return Source(text if storage.is_url(text) else whole, name=storage.redact(text))


def _is_bytes(schema: pa.Schema, name: str) -> bool:
    kind = schema.field(name).type if name in schema.names else pa.null()
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _check_columns(names: Sequence[str], path: str, wanted: Wanted) -> None:
    for column in (wanted.image, wanted.label, *(one.column for one in wanted.where)):
        if column is not None and column not in names:
            raise DataError(
                f"{storage.redact(path)} has no column '{column}'; its columns are {', '.join(map(str, names))}"
            )


def _check_filled(values: Sequence[Any], path: str, column: str, first: int) -> None:
    for number, value in enumerate(values, first):
        if _is_nothing(value):
            raise DataError(
                f"{storage.redact(path)}: row {number} has nothing in column '{column}'; fill it or remove the row"
            )


def _texts(values: Sequence[Any], path: str, wanted: Wanted, first: int) -> list[str]:
    assert wanted.label is not None
    _check_filled(values, path, wanted.label, first)
    return [str(value) for value in values]


def _distinct(values: pa.Array, path: str, wanted: Wanted, first: int) -> list[Any]:
    """Each value once; where one is lacking, all, so that its row can be named."""
    distinct: list[Any] = values.unique().to_pylist()
    return values.to_pylist() if any(map(_is_nothing, distinct)) else distinct


def _is_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return not (value.get("bytes") or value.get("path"))
    return value is None or value != value or (isinstance(value, str | bytes) and not value)


def _csv_rows(path: str, wanted: Wanted) -> list[Row]:
    """All that a CSV file holds as text: nothing is guessed of `NA`, `001` or `true`."""
    with storage.open_read(path) as file:
        frame = pandas.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    partitions: Mapping[str, str | None] = partitions_of(path)
    for name, value in partitions.items():
        if name not in frame:
            frame[name] = value
    _check_columns(list(frame.columns), path, wanted)
    kept = np.ones(len(frame), bool)
    for one in wanted.where:
        kept &= [holds(one, value or None) for value in frame[one.column]]
    frame = frame[kept]
    for column in (wanted.image, wanted.label):
        if column is not None:
            _check_filled(list(frame[column]), path, column, 0)
    labels = [None] * len(frame) if wanted.label is None else list(frame[wanted.label])
    return [Row(image, label, None) for image, label in zip(frame[wanted.image], labels, strict=True)]


def no_table(path: str) -> DataError:
    return DataError(f"there is no table {storage.redact(path)}; give a .parquet or .csv file of image paths")


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """What the parsers say of a file as a DataError."""
    try:
        yield
    except FileNotFoundError:
        raise no_table(path) from None
    except (pa.ArrowException, ValueError, OSError) as error:
        of_parser = isinstance(error, pa.ArrowException | ValueError)
        if not of_parser and (isinstance(error, RemoteError) or error.errno is not None):  # type: ignore[union-attr]
            raise  # of the disk or the store
        kind = suffix_of(path)
        raise DataError(f"{storage.redact(path)} cannot be read as a {kind} table: {error}") from error
