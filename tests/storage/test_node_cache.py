"""The node's cache: one download for all processes, a limit that holds, and no half file taken for whole."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.data import known_image, label_files, shards
from pipeline.errors import ConfigError, DataError
from pipeline.storage import checked_copy, node_cache
from pipeline.storage.node_cache import Cache, Ready
from tests.conftest import ROOT, S3
from tests.data import tars
from tests.flaky_proxy import Fault

READ = """
import sys
from pipeline.storage.node_cache import Cache
folder, limit, *urls = sys.argv[1:]
for url in urls:
    print(hash_of := __import__("hashlib").sha256(Cache(folder, int(limit)).open_read(url).read()).hexdigest(),
    flush=True)
"""
KIB = 1 << 10


def process(folder: Path, limit: int, *urls: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", READ, str(folder), str(limit), *urls]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.tar"))


def temporary(folder: Path) -> list[Path]:
    return sorted(folder.glob(".tmp-*"))


def fetched(seen: list) -> list[str]:
    return [request.path for request in seen if request.method == "GET" and "list-type" not in request.path]


def test_a_shard_is_downloaded_once_and_read_from_its_copy(s3: S3, tmp_path: Path) -> None:
    local = tars.shard(tmp_path / "a.tar", 20)
    url, cache = s3.upload(local, "cached/a.tar"), Cache(str(tmp_path / "cache"), 1 << 20)
    with s3.proxy.faults() as seen:
        found = list(shards.stream(url, cache))
        again = list(shards.stream(url, cache))
        pieces = [shards.read_at(url, sample.offset, sample.size, cache) for sample, _ in found]
    assert found == again == list(shards.stream(local)) and pieces == [data for _, data in found]
    assert [request.method for request in seen] == ["HEAD", "GET"]
    assert [path.read_bytes() for path in copies(tmp_path / "cache")] == [Path(local).read_bytes()]


def test_local_shards_are_read_where_they_are(tmp_path: Path) -> None:
    local = tars.shard(tmp_path / "a.tar", 2)
    cache = Cache(str(tmp_path / "cache"), 1 << 20)
    assert list(shards.stream(local, cache)) == list(shards.stream(local))
    assert shards.read_at(local, 0, 512, cache) == Path(local).read_bytes()[:512]
    assert not (tmp_path / "cache").exists()


def test_processes_share_one_download(s3: S3, tmp_path: Path) -> None:
    url = s3.put("shared/a.bin", bytes(200 * KIB) + b"end")
    with s3.proxy.faults(Fault(pause=0.3), only="GET") as seen:  # the second process comes while it lasts
        both = [process(tmp_path, 1 << 20, url) for _ in range(2)]
        sums = [one.communicate()[0] for one in both]
    assert sums[0] == sums[1] and len(sums[0]) == 65
    assert len(fetched(seen)) == 1 and len(copies(tmp_path)) == 1 and not temporary(tmp_path)


def test_threads_share_one_download(s3: S3, tmp_path: Path) -> None:
    url, cache = s3.put("threads/a.bin", bytes(100 * KIB)), Cache(str(tmp_path), 1 << 20)
    with s3.proxy.faults() as seen, concurrent.futures.ThreadPoolExecutor(8) as pool:
        pieces = list(pool.map(lambda at: cache.read_range(url, at * KIB, KIB), range(100)))
    assert b"".join(pieces) == bytes(100 * KIB) and len(fetched(seen)) == 1


def test_the_shard_used_longest_ago_makes_room(s3: S3, tmp_path: Path) -> None:
    urls = [s3.put(f"room/{number}.bin", bytes([number]) * 100 * KIB) for number in range(4)]
    cache = Cache(str(tmp_path), 300 * KIB)
    for url in urls[:3]:
        cache.open_read(url).close()
    held = cache.open_read(urls[0])  # used again: the oldest is now 1
    assert held.read(5) == bytes(5)
    cache.open_read(urls[3]).close()
    assert {path.read_bytes()[0] for path in copies(tmp_path)} == {0, 2, 3}
    cache.open_read(urls[1]).close()
    cache.open_read(urls[2]).close()
    assert {path.read_bytes()[0] for path in copies(tmp_path)} == {1, 2, 3}
    assert held.read() == bytes(100 * KIB - 5), "what is being read outlives its name"
    assert sum(path.stat().st_size for path in copies(tmp_path)) <= 300 * KIB
    assert len(list(tmp_path.glob("*.crc32"))) == 3


def test_a_shard_for_which_there_is_no_room_is_read_past_the_cache(s3: S3, tmp_path: Path) -> None:
    small, large = s3.put("past/s.bin", b"s" * 100), s3.put("past/l.bin", b"l" * 1000)
    cache = Cache(str(tmp_path), 900)
    assert cache.open_read(small).read() == b"s" * 100
    assert cache.open_read(large).read() == b"l" * 1000 and cache.read_range(large, 5, 3) == b"lll"
    assert len(copies(tmp_path)) == 1, "and nothing had to go for it"
    # A download under way counts as large as it will be.
    with (tmp_path / ".tmp-other").open("wb") as other:
        other.truncate(850)
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cache.open_read(s3.put("past/m.bin", b"m" * 90)).read() == b"m" * 90
        assert (tmp_path / ".tmp-other").exists()
    assert len(copies(tmp_path)) == 1, "whose end would not have made room enough"


def test_a_shard_whose_download_another_process_stopped_in_is_read_past_the_cache(
    s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_cache, "LOCK_SECONDS", 0.1)
    url, cache = s3.put("stopped/a.bin", b"a" * 100), Cache(str(tmp_path), 900)
    with (tmp_path / f".tmp-{node_cache._key(url, None)}").open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert cache.open_read(url).read() == b"a" * 100
    assert not copies(tmp_path)


def test_a_killed_download_leaves_nothing_that_counts(s3: S3, tmp_path: Path) -> None:
    url = s3.put("killed/a.bin", b"k" * (600 * KIB))
    with s3.proxy.faults(Fault(pause=1.0), only="GET"):
        one = process(tmp_path, 1 << 20, url)
        while not any(path.stat().st_size for path in temporary(tmp_path)):  # room was made, the download begins
            assert one.poll() is None
            time.sleep(0.01)
        os.kill(one.pid, signal.SIGKILL)
        one.communicate()
    assert len(temporary(tmp_path)) == 1 and not copies(tmp_path)
    cache = Cache(str(tmp_path), 1 << 20)
    # 600 KiB of the dead process and 600 KiB of another shard are more than the limit: what is left must go.
    other = s3.put("killed/b.bin", b"o" * (600 * KIB))
    assert cache.open_read(other).read() == b"o" * (600 * KIB)
    assert not temporary(tmp_path) and len(copies(tmp_path)) == 1
    assert cache.open_read(url).read() == b"k" * (600 * KIB)


def test_a_shard_that_changed_is_another_one(s3: S3, tmp_path: Path) -> None:
    url = s3.put("changed/a.bin", b"old")
    first = process(tmp_path, 1000, url).communicate()[0]
    s3.put("changed/a.bin", b"new")
    assert process(tmp_path, 1000, url).communicate()[0] != first


def test_faults_while_downloading(s3: S3, quick: None, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4096
    url, cache = s3.put("faults/a.bin", data), Cache(str(tmp_path), 2 << 20)
    with s3.proxy.faults(Fault(cut=300_000), Fault(status=503), Fault(lost=True), only="GET"):
        assert cache.open_read(url).read() == data


def test_a_folder_that_cannot_be_made_is_one_sentence(s3: S3, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    url = s3.put("unwritable/a.bin", b"abc")
    with pytest.raises(
        ConfigError, match=r"data.cache: .*/file/cache cannot hold copies of shards: Not a directory; name"
    ):
        Cache(str(tmp_path / "file" / "cache"), 1000).open_read(url)


def test_a_copy_that_is_damaged_is_fetched_again(s3: S3, tmp_path: Path) -> None:
    """Cut off or with other bytes, whether the whole is read or one image."""
    local = tars.shard(tmp_path / "a.tar", 20)
    whole = list(shards.stream(local))
    sample, image = whole[3]
    url, cache = s3.upload(local, "cached/damaged.tar"), Cache(str(tmp_path / "cache"), 1 << 20)
    known = known_image.Known(label_files.image_hash(image), None)
    for read in ("whole", "image", "image without a download"):
        assert list(shards.stream(url, cache)) == whole
        [copy] = copies(tmp_path / "cache")
        content = bytearray(copy.read_bytes())
        content[sample.offset + 50] ^= 1
        for damaged in (content, content[: len(content) // 2]):
            copy.write_bytes(damaged)
            checked_copy._checked.clear()  # as another process has it
            if read == "whole":
                assert list(shards.stream(url, cache)) == whole
            else:
                source = cache if read == "image" else Ready(cache, None)
                assert known_image.read(url, sample.offset, sample.size, known, "image 3", source) == image
            assert not copies(tmp_path / "cache") or copy.read_bytes() == Path(local).read_bytes()
            assert list(shards.stream(url, cache)) == whole and copy.read_bytes() == Path(local).read_bytes()
    with pytest.raises(DataError, match=r"^image 3 of s3://.* has other bytes than when it was indexed or labelled"):
        known_image.read(
            url, sample.offset, sample.size, known_image.Known(known.image_hash + 1, None), "image 3", cache
        )
