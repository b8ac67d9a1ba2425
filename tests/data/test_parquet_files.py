"""Parquet files: what is read is what was written, and everything else is named."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

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


def random_table(draw: random.Random) -> pa.Table:
    """Columns of all kinds that our files have, with nulls or without, in one chunk or several."""
    rows = draw.choice([0, 1, 7, 300])

    def maybe(value: Any) -> Any:
        return None if draw.random() < 0.2 else value

    def numbers(most: int, null: bool) -> list[int | None]:
        values = [draw.randrange(most) for _ in range(rows)]
        return [maybe(value) for value in values] if null else list(values)

    columns = {
        "index": pa.array(numbers(1 << 31, False), pa.int32()),
        "hash": pa.array(numbers(1 << 63, True), pa.uint64()),
        "key": pa.array([maybe("".join(draw.choices("aä/\0", k=draw.randrange(4)))) for _ in range(rows)], pa.string()),
        "status": pa.array([draw.choice(["ok", "bad"]) for _ in range(rows)], pa.string()).dictionary_encode(),
        "confidence": pa.array([maybe(draw.random()) for _ in range(rows)], pa.float32()),
        "probs": pa.array(
            [maybe([draw.random() for _ in range(draw.randrange(4))]) for _ in range(rows)], pa.list_(pa.float16())
        ),
    }
    table = pa.table(columns)
    return pa.concat_tables([table.slice(0, rows // 2), table.slice(rows // 2)]) if draw.random() < 0.5 else table


def test_flipped_bits_are_found_or_without_effect(tmp_path: Path) -> None:
    draw = random.Random(0)
    found = 0
    for number in range(60):
        table, path = random_table(draw), tmp_path / f"{number}.parquet"
        parquet_files.write_table(str(path), table, {"stage": "a"})
        assert parquet_files.read_table(str(path)).equals(table)
        whole = path.read_bytes()
        for _ in range(10):
            damaged = bytearray(whole)
            damaged[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
            path.write_bytes(damaged)
            wanted = draw.choice([None, ["index"], ["key", "probs"], ["status", "hash"]])
            try:
                read, metadata = parquet_files.read_table(str(path), wanted), parquet_files.read_metadata(str(path))
            except DataError as error:
                assert f"{number}.parquet" in str(error)
                found += 1
            else:
                assert read.to_pydict() == (table if wanted is None else table.select(wanted)).to_pydict()
                assert metadata == {"stage": "a"}
    assert found > 300


def test_a_file_that_says_it_belongs_elsewhere_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    parquet_files.write_table(path, TABLE, {"stage": "gen1", "shard": "a"})
    assert parquet_files.read_expected(path, None, {"stage": "gen1", "shard": "a"}).equals(TABLE)
    with pytest.raises(DataError, match=r"a\.parquet is another file .*: shard is 'a' instead of 'b'; bring the right"):
        parquet_files.read_expected(path, None, {"stage": "gen1", "shard": "b"})
    pq.write_table(TABLE, path)  # as 0.1.0 wrote index files
    assert parquet_files.read_expected(path, ["index"], {"shard": "b"}).num_rows == 2
    moved = str(tmp_path / "c.parquet")
    parquet_files.write_table(moved, TABLE, {"stage": "gen1", "shard": "folder/c.tar"})
    for read in (parquet_files.read_table, parquet_files.read_metadata):
        with pytest.raises(DataError, match=r"c\.parquet is the file of another shard, 'folder/c\.tar'"):
            read(moved)


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
