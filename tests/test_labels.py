"""`noisy_lambda.labels`: the join of label, selection and manifest files, its filters and forms, and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from pipeline.data import label_files, parquet_files
from pipeline.data.manifest import manifest_name
from pipeline.errors import ConfigError, DataError, UserError
from pipeline.labels import SCHEMA, Labels, open_labels

CLASSES = 4
FILTERS = [
    pc.field("confidence") > 0.6,
    pc.field("label") == 2,
    pc.field("copies") > 1,
    (pc.field("status") != "ok") | (pc.field("copies") == 0),
    pc.field("shard") == "u-1.tar",
    (pc.field("shard") == "u-1.tar") & (pc.field("weight") > 0.2),
    pc.field("label").is_null(),
    pc.field("path") == "p/u-1.tar/4",
    pc.field("shard") == "confidence",  # the name of a column as a constant
]


def write(folder: Path, shards: int, rows: int, seed: int = 0, teacher: str = "t") -> Labels:
    """Label files of random rows, of which some are bad, and a selection of some of the others."""
    rng, names = np.random.default_rng(seed), [f"u-{number}.tar" for number in range(shards)]
    for name in names:
        good = np.flatnonzero(rng.random(rows) > 0.2)
        probs = rng.dirichlet(np.ones(CLASSES), len(good)).astype(np.float32)
        columns: dict[str, Any] = {
            "index": range(rows),
            "key": [f"k{number}" for number in range(rows)],
            "offset": rng.integers(0, 1 << 40, rows).tolist(),
            "size": rng.integers(1, 1 << 20, rows).tolist(),
            "status": ["truncated"] * rows,
            "image_hash": rng.integers((1 << 64) - 9, (1 << 64) - 1, rows, dtype=np.uint64).tolist(),
        }
        for number in good:
            columns["status"][number] = "ok"
        table = label_files.make_table(columns, good, label_files.rows_from_probs(probs))
        path = str(folder / "label" / label_files.file_name(name))
        label_files.write_labels(path, table, {"shard": name, "teacher": teacher})
        kept = np.sort(rng.permutation(good)[: len(good) // 2]).astype(np.int32)
        chosen = {
            "index": kept,
            "copies": rng.integers(1, 4, len(kept), dtype=np.int32),
            "weight": rng.random(len(kept)),
        }
        chosen["weight"] = chosen["weight"].astype(np.float32)
        path = str(folder / "select" / label_files.file_name(name))
        parquet_files.write_table(path, pa.table(chosen), {"shard": name})
    root = folder / "root"
    manifest = [
        {"shard": name, "index": index, "key": "", "path": f"p/{name}/{index}", "sha256": f"{index:064x}"}
        for name in names
        for index in range(0, rows, 2)
    ]
    root.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(manifest), root / manifest_name("u"), row_group_size=7)
    return Labels(
        str(folder / "label"), tuple(names), tuple("wxyz"), str(folder / "select"), root=str(root),
        expected=(("teacher", teacher),),
    )  # fmt: skip


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Labels:
    return write(tmp_path_factory.mktemp("labels"), 3, 40)


def plain(labels: Labels) -> list[dict[str, Any]]:
    """The join, a row at a time."""
    manifest = pq.read_table(Path(labels.root) / manifest_name("u")).to_pylist()
    files = {(row["shard"], row["index"]): row for row in manifest}
    found = []
    for shard in labels.shards:
        rows = pq.read_table(Path(labels.folder) / label_files.file_name(shard)).to_pylist()
        assert labels.selection
        chosen = pq.read_table(Path(labels.selection) / label_files.file_name(shard)).to_pylist()
        kept = {row["index"]: row for row in chosen}
        for row in rows:
            mine, file = kept.get(row["index"], {"copies": 0, "weight": 0.0}), files.get((shard, row["index"]), {})
            more = {"copies": mine["copies"], "weight": mine["weight"]}
            found.append({"shard": shard, **row, **more, "path": file.get("path"), "sha256": file.get("sha256")})
    return found


def test_every_sample_is_a_row_with_all_that_is_known_of_it(labels: Labels) -> None:
    table = labels.to_arrow()
    assert table.schema == SCHEMA and table.to_pylist() == plain(labels)
    assert table["copies"].to_numpy().any() and table["path"].null_count == 60


@pytest.mark.parametrize("where", FILTERS, ids=str)
def test_a_filter_and_columns_are_as_of_the_whole_table(labels: Labels, where: pc.Expression) -> None:
    whole = labels.to_arrow()
    assert labels.filter(where).to_arrow().equals(whole.filter(where))
    narrow = labels.select("key", "probs").filter(where)
    assert narrow.to_arrow().equals(whole.filter(where).select(["key", "probs"]))
    twice = labels.filter(where).filter(pc.field("index") < 20).select("index")
    assert twice.to_arrow().equals(whole.filter(where & (pc.field("index") < 20)).select(["index"]))


def test_only_what_is_needed_is_read(labels: Labels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert labels.filter(pc.field("shard") == "u-1.tar").units == [1]
    assert labels.filter((pc.field("shard") != "u-1.tar") & (pc.field("label") == 1)).units == [0, 2]
    read: list[list[str]] = []
    original = parquet_files.read_with_metadata

    def noting(path: str, columns: list[str], optional: Any = ()) -> Any:
        read.append(sorted({*columns}))
        return original(path, columns, optional)

    monkeypatch.setattr(parquet_files, "read_with_metadata", noting)
    gone = Labels(labels.folder, labels.shards, (), selection=str(tmp_path / "none"), root=str(tmp_path))
    assert gone.filter(pc.field("confidence") > 0.5).select("label").to_arrow().num_rows
    assert read == [["confidence", "index", "label"]] * 3


@pytest.mark.parametrize("where", FILTERS, ids=str)
def test_duckdb_and_polars_say_the_same(labels: Labels, where: pc.Expression) -> None:
    duckdb, pl = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    whole = labels.to_arrow().filter(where)
    rows = labels.filter(where).to_reader()  # noqa: F841 - DuckDB finds it by its name
    columns = "label, count(*), sum(copies), min(confidence), count(DISTINCT image_hash)"
    mine = duckdb.sql(f"SELECT {columns} FROM rows GROUP BY label ORDER BY label NULLS FIRST").fetchall()
    theirs = duckdb.sql(f"SELECT {columns} FROM whole GROUP BY label ORDER BY label NULLS FIRST").fetchall()
    assert mine == theirs
    lazy = labels.filter(where).to_polars()
    assert lazy.collect().equals(pl.from_arrow(whole))
    sure = lazy.filter((pl.col("confidence") > 0.5) & (pl.col("copies") > 0)).select("shard", "index").head(5).collect()
    assert sure.equals(
        pl.from_arrow(whole)
        .filter((pl.col("confidence") > 0.5) & (pl.col("copies") > 0))
        .select("shard", "index")
        .head(5)
    )


def test_pandas_keeps_whole_numbers_whole(labels: Labels) -> None:
    frame, table = labels.select("label", "image_hash", "confidence").to_pandas(), labels.to_arrow()
    assert [None if value is None else int(value) for value in frame.image_hash] == table["image_hash"].to_pylist()
    assert frame.label.isna().sum() == table["label"].null_count > 0 and str(frame.label.dtype) == "Int32"


@pytest.mark.slow
def test_memory_is_that_of_a_shard(tmp_path: Path) -> None:
    """The most that Arrow held: eight times the shards need no more of it."""
    few, many = write(tmp_path / "few", 2, 1500), write(tmp_path / "many", 16, 1500)
    usual, peaks = pa.default_memory_pool(), []
    for labels in (few, many):
        pool = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(pool)
        try:
            rows = sum(batch.num_rows for batch in labels.filter(pc.field("confidence") > 0.3).batches())
        finally:
            pa.set_memory_pool(usual)
        peaks.append(pool.max_memory())
    assert rows > 16 * 400
    assert peaks[1] < 1.3 * peaks[0]


def test_a_mistake_is_one_sentence(labels: Labels) -> None:
    with pytest.raises(ConfigError, match="labels have no column 'confidense'; they have shard, index, key"):
        labels.select("confidense")
    for wrong in (pc.field("confidense") > 1, pc.field("label") == "owl", pc.field("label")):
        with pytest.raises(ConfigError, match="labels cannot be filtered by"):
            labels.filter(wrong)


def test_another_shards_file_is_noticed(tmp_path: Path) -> None:
    labels = write(tmp_path, 2, 10)
    one, other = (tmp_path / "label" / f"u-{number}.parquet" for number in (0, 1))
    one.write_bytes(other.read_bytes())
    with pytest.raises(DataError, match=r"u-0\.parquet is the file of another shard, 'u-1\.tar'"):
        labels.to_arrow()
    fine = write(tmp_path / "fine", 1, 10)
    strange = Labels(fine.folder, fine.shards, (), fine.selection, expected=(("teacher", "another"),))
    with pytest.raises(DataError, match="the teacher"):
        strange.to_arrow()


def test_what_is_no_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run: it has no job\.yaml; name the output of one"):
        open_labels(str(tmp_path))
