"""Remote shards are in the node's cache before training reads them, and the batches are those of local ones."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.augment.view import Augment
from pipeline.data import label_files
from pipeline.errors import ConfigError, DataError
from pipeline.loading import loader, prefetch
from pipeline.loading.loader import TrainingShard, TrainingSource, batches
from pipeline.loading.prefetch import Feed, Fill
from pipeline.loading.sample_order import share
from pipeline.loading.targets import SoftTargets
from pipeline.loading.training_rows import load_rows
from pipeline.storage import node_cache as caches
from pipeline.storage.node_cache import Cache
from tests.conftest import S3
from tests.data import tars
from tests.flaky_proxy import Fault, Seen
from tests.train.tiny import CLASSES, SIZE, write_shard

MIB = 1 << 20
SHARDS, IMAGES, STEPS = 12, 10, 60  # five images a step: two and a half epochs
WHOLE = 1 << 30  # a limit that holds everything


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> TrainingSource:
    folder = tmp_path_factory.mktemp("fill")
    shards = tuple(write_shard(folder / f"{number:02d}.tar", IMAGES, seed=number) for number in range(SHARDS))
    return TrainingSource("labelled", shards, per_step=5, segments=2, window=2)


@pytest.fixture(scope="module")
def uploaded(local: TrainingSource, s3: S3) -> TrainingSource:
    """The same tars on S3; the index files stay where they are."""
    shards = (
        dataclasses.replace(
            shard, path=s3.upload(shard.path, f"fill/{Path(shard.path).name}"), size=Path(shard.path).stat().st_size
        )
        for shard in local.shards
    )
    return dataclasses.replace(local, shards=tuple(shards))


def test_files_of_rows_come_from_the_cache_too(uploaded: TrainingSource, s3: S3, tmp_path: Path) -> None:
    """Each loading process reads them in every epoch."""
    shard = uploaded.shards[0]
    far = dataclasses.replace(shard, rows=s3.upload(shard.rows, "fill/rows.parquet"))
    near = dataclasses.replace(far, cache=Cache(str(tmp_path / "cache"), WHOLE))
    for one, asked in (near, 1), (far, 3):
        with s3.proxy.faults() as seen:
            found = [load_rows(one, soft=False).index.tolist() for _ in range(3)]
        assert found == [load_rows(shard, soft=False).index.tolist()] * 3
        assert sum(request.method == "GET" for request in seen) == asked


def cached(source: TrainingSource, folder: Path, limit: int = WHOLE) -> TrainingSource:
    cache = Cache(str(folder), limit)
    return dataclasses.replace(source, shards=tuple(dataclasses.replace(s, cache=cache) for s in source.shards))


def stream(source: TrainingSource, stop: int = STEPS, **options: Any) -> Iterator[dict[str, Any]]:
    augment = Augment(SIZE, policy="rand-m5-n1-p1")
    settings: dict[str, Any] = {"augment": augment, "classes": CLASSES, "soft": SoftTargets(), "seed": 3}
    return batches([source], start_step=0, stop_step=stop, **settings, **options)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in ("images", "targets", "hard"))


def wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 60
    while not true():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def follower(source: TrainingSource, stop: int = STEPS) -> Fill:
    """The plan that the loader makes for itself."""
    data = loader.TrainingData(
        [source], augment=Augment(SIZE), classes=CLASSES, soft=SoftTargets(), seed=3, rank=0, world=1
    )
    return Fill([Feed(data.orders[0], source.shards, source.per_step, share(source.per_step, 0, 1))], stop)


def here(shard: TrainingShard) -> bool:
    assert shard.cache is not None
    if (copy := shard.cache.find(shard.path, None)) is None:
        return False
    copy.close()
    return True


def wholes(seen: list[Seen]) -> Counter[str]:
    """How often each shard was asked for as a whole; whatever else was asked for are single images."""
    return Counter(request.path for request in seen if request.method == "GET" and request.stop is None)


def singles(seen: list[Seen]) -> int:
    return sum(request.method == "GET" and request.stop is not None for request in seen)


def test_a_rank_without_images_of_a_source_fetches_nothing_of_it(uploaded: TrainingSource, tmp_path: Path) -> None:
    """Three images of a step for eight ranks; of the first none."""
    plan = follower(cached(uploaded, tmp_path))
    [feed] = plan.feeds
    assert Fill([dataclasses.replace(feed, per_step=3, part=share(3, 0, 8))], STEPS).feeds == []
    assert Fill([dataclasses.replace(feed, per_step=3, part=share(3, 7, 8))], STEPS).wanted(0)[0]


def test_shards_are_there_before_the_window_reaches_them(
    local: TrainingSource, uploaded: TrainingSource, s3: S3, tmp_path: Path
) -> None:
    remote = cached(uploaded, tmp_path)
    plan = follower(remote)
    with s3.proxy.faults() as before:
        found = stream(remote)
        taken = [next(found)]
        wait_until(lambda: all(here(shard) for _, _, shard in plan.wanted(0)[0]))
    first = plan.wanted(0)[0]
    assert 0 < len({number for _, number, _ in first}) < SHARDS, "not the whole source at once"
    assert sum(begins == 0 for begins, _, _ in first) < len(first), "those after the window too"
    assert singles(before) <= 5, "at most the images of the first step were asked for alone"
    with s3.proxy.faults() as seen:
        for step in range(1, STEPS):
            taken.append(next(found))
            wait_until(lambda at=step: all(here(shard) for _, _, shard in plan.wanted(at)[0]))
    found.close()
    assert all(same(a, b) for a, b in zip(taken, stream(local), strict=True))
    assert singles(seen) == 0, "from then on every image lay in the cache when it was read"
    assert len(wholes(before + seen)) == SHARDS and set(wholes(before + seen).values()) == {1}


def test_loader_processes_share_the_downloads(
    local: TrainingSource, uploaded: TrainingSource, s3: S3, tmp_path: Path
) -> None:
    remote = cached(uploaded, tmp_path)
    with s3.proxy.faults() as seen:
        taken = list(stream(remote, stop=24, workers=2))
    assert all(same(a, b) for a, b in zip(taken, stream(local, stop=24), strict=True))
    assert set(wholes(seen).values()) == {1}, "nobody fetches what another one does"
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_cache_that_is_too_small_holds_its_limit(
    local: TrainingSource, uploaded: TrainingSource, s3: S3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = max(shard.size for shard in uploaded.shards)
    remote = cached(uploaded, tmp_path, limit=2 * size)
    with s3.proxy.faults() as seen:
        for mine, theirs in zip(stream(remote, stop=10), stream(local, stop=10), strict=True):
            assert same(mine, theirs)
            assert sum(path.stat().st_size for path in tmp_path.glob("*.tar")) <= 2 * size
    assert singles(seen) > 25, "the other images were asked for one by one"
    assert sum(wholes(seen).values()) <= SHARDS, "and no shard made room for another one that was in use"
    assert "has no room for all shards that training reads from at a time" in caplog.text


def test_copies_that_nobody_used_lately_make_room(uploaded: TrainingSource, tmp_path: Path, monkeypatch: Any) -> None:
    one, other = uploaded.shards[:2]
    cache, closed = Cache(str(tmp_path), max(one.size, other.size)), threading.Event()
    assert cache.fetch(one.path, None, closed) and not cache.fetch(other.path, None, closed)
    assert cache.fetch(one.path, None, closed), "what is there needs no room"
    monkeypatch.setattr(caches, "SPARED", 0.0)
    assert cache.fetch(other.path, None, closed)
    assert cache.find(one.path, None) is None and len(list(tmp_path.glob("*.tar"))) == 1


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> TrainingShard:
    """A tar of 18 MiB, of which a selection keeps three small images: two side by side, one far away."""
    folder = tmp_path_factory.mktemp("sparse")
    noise = np.random.default_rng(0).bytes(9 * MIB)
    members = [
        ("a.png", tars.picture(1)),
        ("b.png", tars.picture(2)),
        ("big0.jpg", noise),
        ("big1.jpg", noise),
        ("c.png", tars.picture(3)),
    ]
    path = tars.make(folder / "sparse.tar", members)
    ends = np.cumsum([512 + -(-len(data) // 512) * 512 for _, data in members])
    columns = {
        "index": range(5),
        "key": [name.split(".")[0] for name, _ in members],
        "offset": [int(end) - -(-len(data) // 512) * 512 for end, (_, data) in zip(ends, members, strict=True)],
        "size": [len(data) for _, data in members],
        "status": ["ok"] * 5,
        "image_hash": [label_files.image_hash(data) for _, data in members],
    }
    table = label_files.make_table(
        columns, np.arange(5), label_files.rows_from_probs(np.full((5, CLASSES), 0.25, np.float32))
    )
    label_files.write_labels(str(folder / "rows.parquet"), table, {})
    chosen = {"index": pa.array([0, 1, 4], pa.int32()), "copies": pa.array([1, 1, 1], pa.int32())}
    pq.write_table(pa.table(chosen), folder / "selection.parquet")
    rows, selection = str(folder / "rows.parquet"), str(folder / "selection.parquet")
    return TrainingShard(path, rows, selection, 3, size=Path(path).stat().st_size)


def test_of_a_shard_of_which_little_is_kept_only_that_is_fetched(sparse: TrainingShard, s3: S3, tmp_path: Path) -> None:
    source = TrainingSource("pseudo", (sparse,), per_step=3, segments=1)
    path = s3.upload(sparse.path, "fill/sparse.tar")
    remote = cached(dataclasses.replace(source, shards=(dataclasses.replace(sparse, path=path),)), tmp_path)
    shard = remote.shards[0]
    rows = load_rows(shard, soft=False)
    parts = rows.parts
    assert parts is not None and len(parts.start) == 2 and parts.length < 5000
    with s3.proxy.faults() as seen:
        found = stream(remote, stop=4)
        taken = [next(found)]
        wait_until(lambda: bool(list(tmp_path.glob("*.tar"))))
        taken += list(found)
    assert all(same(a, b) for a, b in zip(taken, stream(source, stop=4), strict=True))
    assert not wholes(seen) and sum(request.sent for request in seen) < 20_000
    assert [path.stat().st_size for path in tmp_path.glob("*.tar")] == [parts.length]
    with s3.proxy.faults() as again:
        assert all(same(a, b) for a, b in zip(stream(remote, stop=4), taken, strict=True))
    assert not [request for request in again if request.method == "GET"]
    # Where the whole shard is there already, nothing of it is fetched again.
    assert shard.cache is not None
    shard.cache.open_read(path).close()
    next(file for file in tmp_path.glob("*.tar") if file.stat().st_size == parts.length).unlink()
    with s3.proxy.faults() as whole:
        assert [prefetch.read_image(shard, rows, row) for row in range(3)] == [tars.picture(seed) for seed in (1, 2, 3)]
    assert not whole


def test_a_closed_loader_ends_its_download(s3: S3, tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "long.tar", IMAGES, seed=1)
    Path(shard.path).write_bytes(Path(shard.path).read_bytes() + bytes(4 * MIB))
    url = s3.upload(shard.path, "fill/long.tar")
    folder = tmp_path / "cache"
    remote = cached(TrainingSource("labelled", (dataclasses.replace(shard, path=url),), per_step=2, segments=1), folder)
    slow = [Fault(pause=0.01)] * 100
    with s3.proxy.faults(*slow, only="GET"):
        found = stream(remote)
        next(found)
        wait_until(lambda: bool(list(folder.glob(".tmp-*"))))
        found.close()
        wait_until(lambda: not list(folder.glob(".tmp-*")))
    assert not list(folder.glob("*.tar"))


def test_a_cache_that_cannot_be_is_one_sentence(uploaded: TrainingSource, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remote = cached(uploaded, tmp_path / "file" / "cache")
    for workers in (0, 1):
        with pytest.raises(
            ConfigError, match=r"data.cache: .*/file/cache cannot hold copies of shards: Not a directory"
        ):
            for _ in stream(remote, stop=100_000, workers=workers):
                pass


def test_a_shard_that_is_gone_is_named(uploaded: TrainingSource, tmp_path: Path) -> None:
    gone = tuple(dataclasses.replace(shard, path=f"{shard.path}.old") for shard in uploaded.shards)
    with pytest.raises(DataError, match=r"cannot read image \d of s3://.*\.tar\.old .*bring the shard back"):
        next(stream(cached(dataclasses.replace(uploaded, shards=gone), tmp_path)))


def test_local_shards_are_left_where_they_are(local: TrainingSource, tmp_path: Path) -> None:
    for _ in stream(cached(local, tmp_path / "cache"), stop=3):
        pass
    assert not (tmp_path / "cache").exists()
    assert follower(local).feeds == [] == follower(cached(local, tmp_path)).feeds
