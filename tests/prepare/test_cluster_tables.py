"""Tables of images on a cluster: the bytes of one machine, each shard once, and one sentence for what cannot be."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.inline import Inline
from pipeline.errors import ConfigError, DataError
from pipeline.prepare import cluster_tables, spread, tables
from tests.data.tars import picture

KINDS = ["cat", "dog", "eel"]
IMAGES = [picture(number, file_format="JPEG" if number % 3 else "PNG") for number in range(12)]


def content(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.name != ".lock"
    }


def both(pattern: str, base: Path, **options: Any) -> dict[str, Any]:
    """What both ways give, which is the same to the byte."""
    here = tables.table(pattern, str(base / "here"), **options)
    there = cluster_tables.table(pattern, str(base / "there"), Inline(), **options)
    assert here == there
    assert content(base / "here") == content(base / "there")
    return here


def bytes_table(folder: Path, rows: int, files: int = 3, **columns: Any) -> None:
    """Parquet files of image bytes with a few broken ones, in row groups of 7."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, numbers in enumerate(np.array_split(np.arange(rows), files)):
        made = {
            "image": [b"broken" if number % 17 == 5 else IMAGES[number % len(IMAGES)] for number in numbers.tolist()],
            "label": [KINDS[number % 3] for number in numbers.tolist()],
            "width": numbers,
        }
        pq.write_table(pa.table(made | columns), folder / f"part-{file}.parquet", row_group_size=7)


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_tables, "UNIT_ROWS", 9)
    monkeypatch.setattr(cluster_tables, "SURVEYED_FILES", 2)
    monkeypatch.setattr(spread.Writer.__init__, "__defaults__", (3000,))


def test_image_bytes(tmp_path: Path) -> None:
    bytes_table(tmp_path / "in", 100)
    found = both(str(tmp_path / "in"), tmp_path, image="image", shard_samples=13, seed=4)
    assert found == {"shards": 8, "images": 94, "bad": 6, "skipped": 0, "classes": 3}
    assert "row 5 of part-0.parquet\tnot_an_image" in (tmp_path / "there" / "bad_files.txt").read_text()


def test_shards_of_few_bytes(tmp_path: Path) -> None:
    bytes_table(tmp_path / "in", 50)
    assert both(str(tmp_path / "in"), tmp_path, image="image", shard_bytes=2500)["shards"] > 5


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_paths(tmp_path: Path, suffix: str) -> None:
    """Relative to their table, absolute, and one that leads nowhere."""
    (tmp_path / "in").mkdir()
    paths = []
    for number, data in enumerate(IMAGES):
        (tmp_path / "in" / f"v1.{number} ü.png").write_bytes(data)
        paths.append(f"v1.{number} ü.png" if number % 2 else str(tmp_path / "in" / f"v1.{number} ü.png"))
    frame = pandas.DataFrame({"path": [*paths, "gone.jpg"], "label": [1, 10, 2, 1, 1, 1, 2, 2, 2, 10, 10, 10, 1]})
    getattr(frame, f"to_{suffix}")(tmp_path / "in" / f"t.{suffix}", index=False)
    found = both(str(tmp_path / "in" / f"t.{suffix}"), tmp_path, shard_samples=4)
    assert found == {"shards": 4, "images": 12, "bad": 1, "skipped": 0, "classes": 3}
    assert (tmp_path / "there" / "classes.json").read_text().split() == ["[", '"1",', '"10",', '"2"', "]"]


def test_hugging_face(tmp_path: Path) -> None:
    """{bytes, path}, of which either may be null."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "file.png").write_bytes(IMAGES[0])
    cells = [{"bytes": data, "path": f"a/{number}.png" if number % 2 else None} for number, data in enumerate(IMAGES)]
    table = pa.table({"image": [*cells, {"bytes": None, "path": "file.png"}], "label": pa.array([0, 1, 2] * 4 + [4])})
    pq.write_table(table, tmp_path / "in" / "0.parquet", row_group_size=4)
    found = both(str(tmp_path / "in" / "*.parquet"), tmp_path, image="image", label_is="index", shard_samples=5)
    assert found == {"shards": 3, "images": 13, "bad": 0, "skipped": 0, "classes": 5}
    rows = pandas.read_parquet(tmp_path / "there" / "manifest-labelled.parquet")
    assert set(rows.path.dropna()) == {f"a/{number}.png" for number in range(1, 12, 2)} | {"file.png"}


def test_img2dataset(tmp_path: Path) -> None:
    """What it could not fetch is skipped, by status; where an image comes from is in the manifest."""
    (tmp_path / "in").mkdir()
    for file in range(2):
        status = ["success"] * 6 + ["failed_to_download", "failed_to_resize", "failed_to_download"]
        table = pa.table(
            {
                "key": [f"{file}{number}" for number in range(9)],
                "url": [f"https://user:secret@host/{file}/{number}.jpg?sign=1" for number in range(9)],
                "status": status,
                "error_message": [None if one == "success" else "why" for one in status],
                "jpg": [IMAGES[number] if one == "success" else None for number, one in enumerate(status)],
            }
        )
        pq.write_table(table, tmp_path / "in" / f"{file:05d}.parquet", row_group_size=2)
    found = both(str(tmp_path / "in"), tmp_path, image="jpg", label=None, split="unlabelled")
    assert found == {"shards": 1, "images": 12, "bad": 0, "skipped": 6, "classes": 0}
    bad = (tmp_path / "there" / "bad_files.txt").read_text()
    assert bad.count("\n") == 4 and "00001.parquet\tskipped: 2 rows of status 'failed_to_download'" in bad
    rows = pandas.read_parquet(tmp_path / "there" / "manifest-unlabelled.parquet")
    assert set(rows.path) == {f"https://host/{file}/{number}.jpg" for file in range(2) for number in range(6)}


def test_conditions_and_partitions(tmp_path: Path) -> None:
    """A folder's `lang=en` is a column; row groups and files that cannot hold a wanted row are not read."""
    for lang in ("de", "en", "fr"):
        bytes_table(tmp_path / "in" / f"lang={lang}", 20, 1)
    (tmp_path / "in" / "lang=fr" / "part-0.parquet").write_bytes(
        (tmp_path / "in" / "lang=fr" / "part-0.parquet").read_bytes().replace(IMAGES[1], bytes(len(IMAGES[1])))
    )
    options = {"image": "image", "label": "lang", "where": ["lang!=fr", "width >= 7"]}
    assert both(str(tmp_path / "in"), tmp_path, **options)["images"] == 26
    assert (tmp_path / "there" / "classes.json").read_text().split() == ["[", '"de",', '"en"', "]"]


def test_it_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was finished when it ended is not done again, and nothing remains of it in the end."""
    bytes_table(tmp_path / "in", 60)
    tables.table(str(tmp_path / "in"), str(tmp_path / "here"), image="image", shard_samples=9)
    done: list[str] = []
    real = cluster_tables.write_shard

    def write(items: Any, target: str) -> Any:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(target)
        return real(items, target)

    monkeypatch.setattr(cluster_tables, "write_shard", write)
    for stop in range(2):
        with pytest.raises(KeyboardInterrupt):
            cluster_tables.table(str(tmp_path / "in"), str(tmp_path / "out"), Inline(), image="image", shard_samples=9)
        assert len(done) == 3, stop
    done.clear()
    monkeypatch.setattr(spread, "Writer", None)  # all rows are spread already
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            cluster_tables.table(str(tmp_path / "in"), str(tmp_path / "out"), Inline(), image="image", shard_samples=9)
        done.clear()
    assert content(tmp_path / "out") == content(tmp_path / "here")


def test_bad_input(tmp_path: Path) -> None:
    bytes_table(tmp_path / "in", 12)
    out, table = str(tmp_path / "out"), str(tmp_path / "in")

    def refused(pattern: str, text: str, kind: type[Exception] = DataError, **options: Any) -> None:
        for prepare in (tables.table, lambda *args, **more: cluster_tables.table(*args, Inline(), **more)):
            with pytest.raises(kind, match=text):
                prepare(pattern, out, **{"image": "image", **options})

    refused(str(tmp_path / "nothing.parquet"), r"there is no table .*nothing\.parquet; give a \.parquet or \.csv file")
    refused(str(tmp_path / "no*.parquet"), r"no table matches .*no\*\.parquet; give")
    refused(table, r"part-0\.parquet has no column 'class'; its columns are image, label, width", label="class")
    refused(table, r"no row of .* meets --where width>99; ask for less", where=["width>99"])
    refused(
        table, r"--where 'width=wide': column 'width' .* is of type int64, and 'wide' is none", where=["width=wide"]
    )
    refused(
        table, r"--where is 'width'; write a column, one of = != < <= > >= and a value", ConfigError, where=["width"]
    )
    refused(table, r"column 'label' holds 'cat'; class indexes are whole numbers from 0", label_is="index")
    refused(table, r"1 of 12 pictures are bad or not decoded here", max_bad=0.0)
    (tmp_path / "in" / "part-9.parquet").write_bytes(b"PAR1 and no more")
    refused(table, r"part-9\.parquet cannot be read as a parquet table")
    (tmp_path / "in" / "part-9.parquet").unlink()
    lacking = pa.table({"image": [IMAGES[0], None], "label": ["cat", "cat"], "width": [0, 1]})
    pq.write_table(lacking, tmp_path / "in" / "z.parquet")
    refused(table, r"z\.parquet: row 1 has nothing in column 'image'; fill it or remove the row")
