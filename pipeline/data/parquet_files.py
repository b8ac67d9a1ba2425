"""Writes and reads Parquet files in one step, with metadata of our own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import DataError

Metadata = Mapping[str, Any]
METADATA_KEY = b"noisy_lambda"


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
        if metadata is not None:
            text = json.dumps(metadata() if callable(metadata) else metadata, sort_keys=True, allow_nan=False)
            writer.add_key_value_metadata({METADATA_KEY.decode(): text})


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The rows of a file; DataError where it is not a whole Parquet file."""
    return _open(path, lambda file: file.read(columns=None if columns is None else list(columns)))


def read_metadata(path: str) -> dict[str, Any]:
    """What the file says of itself; DataError where it is not one of ours. Reads the footer only."""
    return _metadata(path, _open(path, lambda file: file.metadata.metadata))


def read_with_metadata(path: str, columns: Sequence[str]) -> tuple[pa.Table, dict[str, Any]]:
    """`read_table` and `read_metadata` in one opening of the file."""
    table, found = _open(path, lambda file: (file.read(columns=list(columns)), file.metadata.metadata))
    return table, _metadata(path, found)


def _open(path: str, use: Any) -> Any:
    try:
        with storage.open_read(path) as source, pq.ParquetFile(source) as file:
            return use(file)
    except FileNotFoundError as error:
        raise DataError(f"there is no file {storage.redact(path)}; run the stage that writes it again") from error
    except pa.ArrowException as error:
        raise DataError(
            f"{storage.redact(path)} is not a readable Parquet file ({error}); delete it and run again"
        ) from error


def _metadata(path: str, of_file: Mapping[bytes, bytes] | None) -> dict[str, Any]:
    text = (of_file or {}).get(METADATA_KEY)
    if text is None:
        raise DataError(
            f"{storage.redact(path)} was not written by this pipeline (no '{METADATA_KEY.decode()}' in its "
            "metadata); delete it and run again"
        )
    found: dict[str, Any] = json.loads(text)
    return found
