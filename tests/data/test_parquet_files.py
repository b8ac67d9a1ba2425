"""Parquet files: what is written is pyarrow's own, with a key of ours; what is no such file is named."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data import parquet_files
from pipeline.errors import DataError

TABLE = pa.table({"index": pa.array([0, 1], pa.int32()), "key": ["a", None]}, metadata={"theirs": "1"})


def test_rows_and_metadata_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "x.parquet")
    parquet_files.write_table(path, TABLE, {"b": [1, None], "a": "ä"})
    assert parquet_files.read_table(path).equals(TABLE)
    assert parquet_files.read_table(path, ["key"]).column_names == ["key"]
    assert parquet_files.read_metadata(path) == {"a": "ä", "b": [1, None]}
    table, metadata = parquet_files.read_with_metadata(path, ["index"])
    assert table.equals(TABLE.select(["index"])) and metadata == {"a": "ä", "b": [1, None]}
    assert b"theirs" not in pq.read_metadata(path).metadata


def test_metadata_may_be_known_only_when_the_rows_are_written_and_their_failure_leaves_no_file(tmp_path: Path) -> None:
    def fail() -> dict[str, int]:
        raise RuntimeError("no")

    parquet_files.write_table(str(tmp_path / "x"), TABLE, lambda: {"late": 1})
    assert parquet_files.read_metadata(str(tmp_path / "x")) == {"late": 1}
    for metadata in (fail, {"loss": float("nan")}):
        with pytest.raises((RuntimeError, ValueError)):
            parquet_files.write_table(str(tmp_path / "y"), TABLE, metadata)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_without_metadata_the_bytes_are_pyarrows(tmp_path: Path) -> None:
    """So files of stages that need none are what they were when those called pyarrow themselves."""
    plain = TABLE.replace_schema_metadata(None)
    pq.write_table(plain, tmp_path / "theirs", compression="zstd")
    parquet_files.write_table(str(tmp_path / "ours"), plain)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("content", [None, b"", b"PAR1 not really", b"x" * 1000])
def test_what_is_no_parquet_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.parquet"
    if content is not None:
        path.write_bytes(content)
    for read in (parquet_files.read_metadata, parquet_files.read_table):
        with pytest.raises(DataError, match=r"bad\.parquet"):
            read(str(path))


def test_a_foreign_parquet_file_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"label": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(DataError, match=r"foreign\.parquet was not written by this pipeline"):
        parquet_files.read_metadata(str(tmp_path / "foreign.parquet"))
