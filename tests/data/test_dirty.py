"""The dirty corpus (dirty.py) through the labelling worker and through a whole stage: every good image has its row,
every bad one its reason, and nothing in it is run or written anywhere."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.data import images, parquet_files
from pipeline.data.shards import Shard, scan
from pipeline.errors import DataError
from pipeline.labelling.labeller import LabelSpec, make_labeller
from tests import small
from tests.data import dirty

RUN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class", "ctypes.dlopen")
CHANGED = ("os.mkdir", "os.symlink", "os.link", "os.mkfifo", "os.mknod", "shutil.unpack_archive")
watched: list[tuple[str, Any]] | None = None  # audit hooks cannot be removed, but told to rest


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if watched is None:
        return
    if event in RUN or event in CHANGED:
        watched.append((event, arguments[0] if arguments else None))
    elif event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        watched.append((event, arguments[0]))


sys.addaudithook(_hook)


@pytest.fixture
def events() -> Iterator[list[tuple[str, Any]]]:
    """What the interpreter is asked to run, to open for writing and to create."""
    global watched
    watched = []
    yield watched
    watched = None


class Card:
    classes = ("red", "green", "blue")

    def view(self) -> images.View:
        return images.View(8)


class Means(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def load(path: str) -> tuple[nn.Module, Any]:
    return Means(), Card()


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """{path: (size, mtime)} of everything below a folder, links not followed."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        found[str(path.relative_to(folder))] = (stat.st_size, stat.st_mtime_ns if path.is_file() else 0)
    return found


def test_there_are_many_kinds(tmp_path: Path) -> None:
    kinds = [*dirty.pictures(), *dirty.oddities(tmp_path), *dirty.shards()]
    names = [kind.name for kind in kinds]
    assert len(set(names)) == len(names) >= 140


def test_every_good_image_has_its_row_and_every_bad_one_its_reason(
    tmp_path: Path, events: list[tuple[str, Any]]
) -> None:
    canary, out = tmp_path / "canary", tmp_path / "out"
    canary.mkdir()
    corpus = dirty.write(tmp_path / "shards", canary)
    worker = make_labeller(LabelSpec(load, "teacher", "11" * 32, Card.classes, str(out), batch=16, device="cpu"))
    before = tree(tmp_path)
    events.clear()
    for one in corpus:
        path = tmp_path / "shards" / f"{one.name}.tar"
        shard = Shard(path.name, str(path), path.stat().st_size, "", "unlabelled")
        if one.error:
            with pytest.raises(DataError, match=one.error) as failure:
                worker(shard)
            assert path.name in str(failure.value)
            continue
        result = worker(shard)
        rows = parquet_files.read_table(str(out / f"{one.name}.parquet")).to_pylist()
        assert [(row["key"], row["status"]) for row in rows] == one.rows, one.name
        assert [row["index"] for row in rows] == list(range(len(rows)))
        assert all((row["label"] is not None) == (row["status"] == "ok") for row in rows)
        assert result["without_image"] == one.without_image, one.name
        assert (result["cut"] is None) == (one.cut is None) and (one.cut or "") in (result["cut"] or ""), one.name
    # Nothing was run, nothing unpickled, and only the label files were written.
    assert {event for event, _ in events} <= {"open", "os.mkdir"}
    assert all(Path(os.fsdecode(path)).is_relative_to(out) for _, path in events)
    after = tree(tmp_path)
    assert {name: after[name] for name in before} == before
    assert {name for name in after if name not in before} == {
        "out", *(f"out/{one.name}.parquet" for one in corpus if not one.error)
    }  # fmt: skip
    assert not any(canary.iterdir())


def test_the_canary_sings(tmp_path: Path, events: list[tuple[str, Any]]) -> None:
    """Loading the pickle would be seen, by the hook and in the folder."""
    import pickle

    pickle.loads(pickle.dumps(dirty.Evil(tmp_path / "canary"))).close()  # noqa: S301
    assert "pickle.find_class" in {event for event, _ in events}
    assert (tmp_path / "canary").exists()


def test_scanning_and_labelling_see_the_same(tmp_path: Path) -> None:
    """`index` and readers by offset rely on it."""
    for one in dirty.write(tmp_path, tmp_path / "canary"):
        if not one.error:
            assert [sample.key for sample in scan(str(tmp_path / f"{one.name}.tar")).samples] == [
                key.encode("utf-8", "surrogateescape").decode() for key, _ in one.rows
            ]


@pytest.mark.slow
def test_a_whole_stage_over_it(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    for path in world.shards.glob("unlabelled-*.tar"):
        path.unlink()
    corpus = dirty.write(world.shards / "corpus", tmp_path / "canary")
    settings = ["data.unlabelled=corpus", f"data.max_bad_shards={len(corpus)}"]
    refused = world.run("data.unlabelled=corpus")
    assert refused.status == 2 and "zero-bytes.tar is empty (0 bytes)" in refused.err
    refused = world.run(*settings)
    assert refused.status == 2 and "more than data.max_bad_fraction 0.01 allows" in refused.err
    ran = world.run(*settings, "data.max_bad_fraction=1")
    assert ran.status == 0, ran.err
    assert world.done() == small.STAGES

    folder = world.folder("gen1-label")
    for one in corpus:
        if one.error:
            failed = json.loads((folder / f"{one.name}.failed.json").read_text())
            assert one.error in failed["error"] and not (folder / f"{one.name}.parquet").exists()
        else:
            rows = parquet_files.read_table(str(folder / f"{one.name}.parquet")).to_pylist()
            assert [(row["key"], row["status"]) for row in rows] == one.rows
            assert not (folder / f"{one.name}.failed.json").exists()
    info = json.loads((folder / "done.json").read_text())["info"]
    expected = [status for one in corpus for _, status in one.rows]
    skipped = {".svg": 1}  # a picture of a kind that is not decoded here, in no row
    assert info["bad"] == {status: expected.count(status) for status in set(expected) - {"ok"}} | skipped
    assert info["failed"] == sorted(f"{one.name}.tar" for one in corpus if one.error)
    assert not (tmp_path / "canary").exists() and not world.temporary()

    page = next(world.folder("report").glob("index.html")).read_text()
    assert "<script>alert(1)" not in page and "\x1b[31m" not in page and "\u202e" not in page
    again = world.run(*settings, "data.max_bad_fraction=1")
    assert again.status == 0 and tree(folder) == tree(folder)
