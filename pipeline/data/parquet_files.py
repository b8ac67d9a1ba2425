"""Writes and reads Parquet files in one step, with metadata of our own, and checks that bytes are what they were.

Beside its metadata (JSON under one key) a file has the number of its rows and a CRC-32 of the values of every column
and of that metadata. What is read is checked against them; files of 0.1.0 have none and are taken as they are. A file
that says of which shard it is has the shard's name.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.storage.node_cache import Cache

Metadata = Mapping[str, Any]
METADATA_KEY = b"noisy_lambda"
CHECKSUMS_KEY = b"noisy_lambda.crc32"


def write_table(
    path: str, table: pa.Table, metadata: Metadata | Callable[[], Metadata] | None = None, **options: Any
) -> None:
    """Write a file in one step, `metadata`, if any, as JSON under its one key; called once the rows are written, where
    it is a function. `options` are pyarrow's ParquetWriter's."""
    table = table.replace_schema_metadata(None)
    with (
        storage.writing(path) as temporary,
        pq.ParquetWriter(temporary, table.schema, compression="zstd", **options) as writer,
    ):
        writer.write_table(table)
        text = ""
        if metadata is not None:
            text = json.dumps(metadata() if callable(metadata) else metadata, sort_keys=True, allow_nan=False)
            writer.add_key_value_metadata({METADATA_KEY.decode(): text})
        columns = {name: checksum(table[name]) for name in table.column_names}
        found = {"columns": columns, "rows": table.num_rows, "metadata": zlib.crc32(text.encode())}
        writer.add_key_value_metadata({CHECKSUMS_KEY.decode(): json.dumps(found, sort_keys=True)})


def write_stream(path: str, tables: Iterable[pa.Table]) -> None:
    """Write a file of more rows than memory holds, a row group a table; it has no checksums, which are of all rows."""
    with storage.writing(path) as temporary, contextlib.ExitStack() as stack:
        writer = None
        for table in tables:
            plain = table.replace_schema_metadata(None)
            writer = writer or stack.enter_context(pq.ParquetWriter(temporary, plain.schema, compression="zstd"))
            writer.write_table(plain)


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a file; DataError where it is not a whole Parquet file, or not the one that was written."""
    return _open(path, columns, rows=True)[0]


def read_metadata(path: str) -> dict[str, Any]:
    """What the file says of itself; DataError where it is not one of ours. Reads the footer only."""
    return _metadata(path, _open(path, (), rows=False)[1])


def read_with_metadata(
    path: str, columns: Sequence[str], optional: Sequence[str] = (), cache: Cache | None = None
) -> tuple[pa.Table, dict[str, Any]]:
    """`read_table` and `read_metadata` in one opening of the file; `optional` columns are read where there are any;
    `cache`: of the node, for a remote file that is read time and again."""
    table, found = _open(path, columns, rows=True, optional=optional, cache=cache)
    return table, _metadata(path, found)


def read_expected(
    path: str,
    columns: Sequence[str] | None,
    expected: Metadata | None,
    optional: Sequence[str] = (),
    cache: Cache | None = None,
) -> pa.Table:
    """The rows of a file that says of itself what is `expected`: no other one may lie in its place. DataError.
    `cache` as in `read_with_metadata`."""
    table, found = _open(path, columns, rows=True, optional=optional, cache=cache)
    if expected and METADATA_KEY in found:
        metadata = _metadata(path, found)
        if differing := [
            f"{name} is {metadata[name]!r} instead of {value!r}"
            for name, value in expected.items()
            if name in metadata and metadata[name] != value  # earlier versions did not say everything
        ]:
            raise DataError(
                f"{storage.redact(path)} is another file than the one that belongs there: {', '.join(differing)}; "
                "bring the right one back, or delete it and run again"
            )
    return table


def checksum(column: pa.ChunkedArray) -> int:
    """CRC-32 of a column's type and values, however they lie in memory or in a file."""
    return _checksum(column.combine_chunks(), 0)


def _checksum(array: pa.Array, crc: int) -> int:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if array.null_count:
        crc = _of_numbers(array.is_valid().to_numpy(zero_copy_only=False), crc)
    if pa.types.is_list(array.type):
        lengths = pc.fill_null(array.value_lengths(), -1).to_numpy(zero_copy_only=False)
        return _checksum(array.flatten(), _of_numbers(lengths, crc))
    crc = zlib.crc32(str(array.type).encode(), crc)
    if pa.types.is_string(array.type):
        lengths = pc.fill_null(pc.binary_length(array), -1).to_numpy(zero_copy_only=False)
        joined = pc.binary_join(pa.ListArray.from_arrays([0, len(array)], pc.fill_null(array, "")), "")
        return zlib.crc32(joined[0].as_buffer(), _of_numbers(lengths, crc))
    values = pc.fill_null(array, pa.scalar(0, array.type)) if array.null_count else array
    return _of_numbers(values.to_numpy(zero_copy_only=False), crc)


def _of_numbers(values: np.ndarray, crc: int) -> int:
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8).data, crc)


def _open(
    path: str,
    columns: Sequence[str] | None,
    rows: bool,
    optional: Sequence[str] = (),
    cache: Cache | None = None,
) -> tuple[pa.Table, dict[bytes, bytes]]:
    """The rows, if they are wanted, and the key-value metadata."""
    shown, table = storage.redact(path), pa.table({})
    try:
        opened = cache.open_read(path) if cache else storage.open_read(path)
        with opened as source, pq.ParquetFile(source) as file:
            found = dict(file.metadata.metadata or {})
            if rows:
                more = [name for name in optional if name in file.schema_arrow.names]
                table = file.read(columns=None if columns is None else [*columns, *more])
    except FileNotFoundError as error:
        raise DataError(f"there is no file {shown}; run the stage that writes it again") from error
    except (pa.ArrowException, OSError, ValueError, MemoryError) as error:
        if isinstance(error, OSError) and not isinstance(error, pa.ArrowException) and error.errno is not None:
            raise  # of the disk or the store
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{shown} is not a readable Parquet file ({reason[:200]}); delete it and run again") from error
    lacking = [name for name in columns or () if rows and name not in table.column_names]
    if lacking:
        raise DataError(
            f"{shown} has no column '{lacking[0]}'; it is another file, or damaged: delete it and run again"
        )
    if CHECKSUMS_KEY in found:
        wrong = _differing(table if rows else None, found, columns)
        if wrong:
            raise DataError(f"{shown} is damaged: {wrong} are not those that were written; delete it and run again")
    shard = _metadata(path, found).get("shard") if METADATA_KEY in found else None
    if shard is not None and not str(PurePath(path).with_suffix("")).endswith(f"/{str(shard).removesuffix('.tar')}"):
        raise DataError(
            f"{shown} is the file of another shard, '{shard}': two files changed places; bring them back, or delete "
            "both and run again"
        )
    return table, found


def _differing(table: pa.Table | None, found: Mapping[bytes, bytes], wanted: Sequence[str] | None) -> str | None:
    """What of the file is not what was written."""
    try:
        expected = json.loads(found[CHECKSUMS_KEY])
        columns, number, metadata = expected["columns"], expected["rows"], expected["metadata"]
    except (ValueError, KeyError, TypeError):
        return "its checksums"
    if zlib.crc32(found.get(METADATA_KEY, b"")) != metadata:
        return "its metadata"
    if table is None:
        return None
    if wanted is None and sorted(table.column_names) != sorted(columns):
        return "its columns"
    for name in table.column_names:
        if checksum(table[name]) != columns.get(name):
            return f"the values of column '{name}'"
    return "its rows" if table.num_rows != number else None


def _metadata(path: str, of_file: Mapping[bytes, bytes]) -> dict[str, Any]:
    text = of_file.get(METADATA_KEY)
    if text is None:
        raise DataError(
            f"{storage.redact(path)} was not written by this pipeline (no '{METADATA_KEY.decode()}' in its "
            "metadata); delete it and run again"
        )
    try:
        found: dict[str, Any] = dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{storage.redact(path)} is damaged: its metadata is no JSON; delete it and run again"
        ) from error
    return found
