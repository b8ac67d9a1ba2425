"""Reading behind URLs through faults: the bytes are right, and no more of them than needed are asked for again."""

from __future__ import annotations

import random

import fsspec
import pytest

from pipeline import storage
from pipeline.data import shards
from pipeline.errors import DataError, RemoteError
from pipeline.storage import remote_file
from tests.conftest import S3
from tests.data import tars
from tests.flaky_proxy import Fault

MIB = 1 << 20


def content(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def reread(seen: list, size: int) -> int:
    """Bytes that were sent more than once."""
    return sum(request.sent for request in seen if request.method == "GET") - size


def test_one_request_reads_a_file_in_order(s3: S3) -> None:
    data = content(12 * MIB)
    url = s3.put("plain/a.bin", data)
    with s3.proxy.faults() as seen, storage.open_read(url) as file:
        assert b"".join(iter(lambda: file.read(300_001), b"")) == data
    assert [(request.method, request.start, request.stop) for request in seen] == [("GET", 0, None)]


def test_faults_cost_no_more_than_what_was_under_way(s3: S3, quick: None) -> None:
    data = content(12 * MIB, 1)
    url = s3.put("faulty/a.bin", data)
    cuts = [
        Fault(cut=700_001),
        Fault(status=503),
        Fault(status=500),
        Fault(cut=0),
        Fault(lost=True),
        Fault(cut=3_000_000),
    ]
    with s3.proxy.faults(*cuts, Fault(status=429), Fault(pause=0.001)) as seen, storage.open_read(url) as file:
        assert file.read() == data
    starts = [request.start for request in seen]
    assert len(seen) == 8 and starts == sorted(starts) and starts[1] > 0, "each goes on where the last one broke"
    # A client may drop what its connection had buffered when it broke: at most 2 × 64 KiB of aiohttp and one read.
    assert 0 <= reread(seen, len(data)) < 2 * 400_000


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_a_shard_streams_through_random_faults(s3: S3, quick: None, tmp_path, seed: int) -> None:
    members = [(f"{number:04d}.png", tars.picture(number)) for number in range(300)]
    members[150:150] = [("big.jpg", content(9 * MIB, seed))]
    local = tars.make(tmp_path / "a.tar", members)
    url = s3.upload(local, f"random{seed}/a.tar")
    with s3.proxy.faults(share=0.7, seed=seed, only="GET") as seen:
        found = list(shards.stream(url))
    assert found == list(shards.stream(local))
    assert any(request.fault for request in seen)


def test_random_access(s3: S3, quick: None, tmp_path) -> None:
    data = content(20 * MIB, 2)
    url = s3.put("random/a.bin", data)
    with s3.proxy.faults(Fault(cut=100), Fault(status=503)) as seen:
        assert shards.read_at(url, 5 * MIB, 300_000) == data[5 * MIB :][:300_000]
    assert [(request.start, request.stop) for request in seen[:1]] == [(5 * MIB, 5 * MIB + 300_000)]
    with storage.open_read(url) as file:
        for offset in (19 * MIB, 3, 10 * MIB, 10 * MIB - 5, 20 * MIB - 1):
            file.seek(offset)
            assert file.read(1000) == data[offset : offset + 1000]
        assert file.seek(-7, 2) == len(data) - 7 and file.read() == data[-7:] and file.read(1) == b""


def test_past_the_end_and_empty(s3: S3) -> None:
    url, empty = s3.put("end/a.bin", b"abc"), s3.put("end/empty.bin", b"")
    with pytest.raises(DataError, match=r"end/a.bin has no 5 bytes at 10"):
        shards.read_at(url, 10, 5)
    assert storage.read_bytes(empty) == b"" and storage.read_range(url, 1, 100) == b"bc"


def test_a_file_that_changes_under_the_reader_is_named(s3: S3, quick: None) -> None:
    url = s3.put("changing/a.bin", content(12 * MIB, 3))
    with s3.proxy.faults(Fault(cut=2 * MIB)), storage.open_read(url) as file:
        file.read(10)
        s3.put("changing/a.bin", content(12 * MIB, 4))
        with pytest.raises(
            DataError, match=r"changing/a.bin changed while it was read: it had 12582912 bytes and the mark"
        ):
            file.read()


def test_what_no_second_try_mends_is_tried_once(s3: S3) -> None:
    with s3.proxy.faults() as seen, pytest.raises(FileNotFoundError, match="no such file"):
        storage.read_bytes(f"{s3.bucket}/nothing/here")
    assert len(seen) == 1
    url = s3.put("forbidden/a.bin", b"abc")
    with s3.proxy.faults(Fault(status=403)) as seen, pytest.raises(DataError, match=r"cannot reach s3://.*rights"):
        storage.read_bytes(url)
    assert len(seen) == 1


def test_patience_ends(s3: S3, quick: None) -> None:
    url = s3.put("down/a.bin", b"abc")
    down = [Fault(status=503)] * 20
    with (
        s3.proxy.faults(*down) as seen,
        pytest.raises(RemoteError, match=r"down/a.bin failed 10 times in a row at byte 0"),
    ):
        storage.read_bytes(url)
    assert len(seen) == remote_file.FAILURES


def test_other_drivers_read_in_blocks() -> None:
    data = content(20 * MIB, 5)
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/remote/a.bin", data)
    with storage.open_read("memory://remote/a.bin") as file:
        assert file.read(9 * MIB) == data[: 9 * MIB]
        fs.pipe_file("/remote/a.bin", data[:-1])
        with pytest.raises(DataError, match=r"a.bin changed while it was read"):
            file.read()
    assert storage.read_range("memory://remote/a.bin", 7, 5) == data[7:12]
    fs.rm("/remote", recursive=True)
