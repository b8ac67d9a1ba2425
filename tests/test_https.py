"""Shards on plain web servers: one with ranges, one that ignores them, one that says too little."""

from __future__ import annotations

import contextlib
import email.utils
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.config.load import load_job, resolve_output
from pipeline.data import shards
from pipeline.errors import ConfigError, DataError
from pipeline.storage import range_requests
from pipeline.storage.node_cache import Cache
from tests.conftest import ROOT
from tests.data import tars
from tests.flaky_proxy import Fault, Proxy

MIB = 1 << 20


class Plain(SimpleHTTPRequestHandler):
    """The standard library's server: no ranges; Last-Modified, no ETag."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass


class Ranges(Plain):
    """The same with ranges of the one form that is used here."""

    def send_head(self):
        asked = self.headers.get("Range", "")
        path = Path(self.translate_path(self.path))
        if not asked or not path.is_file():
            return super().send_head()
        stat = path.stat()
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, stop = int(first), min(int(last or stat.st_size) + 1, stat.st_size)
        if start >= stat.st_size:
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{stat.st_size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{stat.st_size}")
        self.send_header("Content-Length", str(stop - start))
        self.send_header("Last-Modified", email.utils.formatdate(stat.st_mtime, usegmt=True))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            with contextlib.suppress(ConnectionError):
                self.wfile.write(file.read(stop - start))
        return None


class Silent(Plain):
    """Sends files in chunks, without their length."""

    def do_GET(self) -> None:
        data = Path(self.translate_path(self.path)).read_bytes()
        self.send_response(HTTPStatus.OK)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n0\r\n\r\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "www").mkdir()
    return tmp_path / "www"


@contextlib.contextmanager
def serving(handler: type[Plain], folder: Path) -> Iterator[Proxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: handler(*args, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    proxy = Proxy("127.0.0.1", server.server_port)
    try:
        yield proxy
    finally:
        proxy.close()
        server.shutdown()
        server.server_close()


def big_tar(folder: Path) -> str:
    """20 MiB, a third of it skipped by a reader of headers."""
    members = [(f"{number:03d}.png", tars.picture(number)) for number in range(50)]
    return tars.make(folder / "a.tar", [*members, ("big.jpg", os.urandom(20 * MIB)), ("z.png", tars.picture(1))])


def test_a_server_with_ranges_goes_on_where_it_broke(folder: Path, quick: None) -> None:
    local = big_tar(folder)
    with serving(Ranges, folder) as proxy:
        faults = Fault(cut=5 * MIB), Fault(status=502), Fault(lost=True), Fault(status=429), Fault(cut=100)
        with proxy.faults(*faults) as seen:
            assert list(shards.stream(f"{proxy.url}/a.tar")) == list(shards.stream(local))
        starts = [request.start or 0 for request in seen]
        assert len(seen) == 6 and starts == sorted(starts) and starts[1] > 4.5 * MIB
        assert sum(request.sent for request in seen) - Path(local).stat().st_size < 1_000_000
        with proxy.faults(Fault(cut=10)) as seen:
            assert shards.read_at(f"{proxy.url}/a.tar", 12345, 678) == Path(local).read_bytes()[12345:][:678]
        assert (seen[0].start, seen[0].stop) == (12345, 12345 + 678)
        with pytest.raises(DataError, match=r"a.tar has no 5 bytes at 99999999"):
            shards.read_at(f"{proxy.url}/a.tar", 99999999, 5)


def test_a_server_without_ranges_starts_over_and_skips(folder: Path, quick: None, caplog, monkeypatch) -> None:
    monkeypatch.setattr(range_requests, "_no_ranges", set())
    local = big_tar(folder)
    with serving(Plain, folder) as proxy:
        with proxy.faults(Fault(cut=5 * MIB), Fault(cut=0)) as seen, caplog.at_level(logging.WARNING):
            assert list(shards.stream(f"{proxy.url}/a.tar")) == list(shards.stream(local))
        assert len(seen) == 3 and sum(request.sent for request in seen) == Path(local).stat().st_size + 5 * MIB
        with proxy.faults(Fault(cut=100)):
            assert shards.read_at(f"{proxy.url}/a.tar", 12345, 678) == Path(local).read_bytes()[12345:][:678]
        warned = [record.message for record in caplog.records]
        assert warned == [
            "127.0.0.1 ignores ranges: whatever lies before the wanted byte is read again; data.cache helps"
        ]
        cache = Cache(str(folder.parent / "cache"), 100 * MIB)
        with proxy.faults() as seen:
            for at in (12345, 10 * MIB, 7):
                assert shards.read_at(f"{proxy.url}/a.tar", at, 678, cache) == Path(local).read_bytes()[at:][:678]
        assert [request.method for request in seen] == ["HEAD", "GET"]


def test_a_file_that_changes_is_named(folder: Path, quick: None) -> None:
    local = Path(big_tar(folder))
    with serving(Ranges, folder) as proxy, proxy.faults(Fault(cut=2 * MIB)):
        file = storage.open_read(f"{proxy.url}/a.tar")
        file.read(10)
        os.utime(local, (1, 1))
        with pytest.raises(DataError, match=r"a.tar changed while it was read: it had \d+ bytes and the mark \w+, "):
            file.read()


READ = """
import resource, sys
from pipeline import storage
with storage.open_read(sys.argv[1]) as file:
    for stop in (20, 200):
        while file.tell() < stop << 20:
            file.read(100_000)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_memory_does_not_grow_with_the_file(folder: Path) -> None:
    with (folder / "a.tar").open("wb") as file:
        file.truncate(200 * MIB)
    with serving(Ranges, folder) as server:
        url = f"http://127.0.0.1:{server.target[1]}/a.tar"
        command = [sys.executable, "-c", READ, url]
        early, late = map(
            int, subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
        )
    assert late - early < 4 << 10, "KiB"


def test_refusals_are_told_at_once_and_without_secrets(folder: Path) -> None:
    tars.shard(folder / "a.tar")
    with serving(Ranges, folder) as proxy:
        with proxy.faults() as seen, pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{proxy.url}/b.tar")
        assert len(seen) == 1
        url = f"{proxy.url.replace('//', '//user:word@')}/a.tar?token=secret"
        with proxy.faults(Fault(status=403)) as seen, pytest.raises(DataError, match="your rights there") as caught:
            storage.read_bytes(url)
        assert len(seen) == 1 and "word" not in str(caught.value) and "secret" not in str(caught.value)


def test_a_server_that_does_not_tell_the_size_is_refused(folder: Path) -> None:
    tars.shard(folder / "a.tar")
    with serving(Silent, folder) as server, pytest.raises(DataError, match="does not tell the file's size"):
        # Past the proxy, which would tell it.
        storage.read_bytes(f"http://127.0.0.1:{server.target[1]}/a.tar")


def test_an_output_on_a_web_server_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"output 'https://host/run' cannot be written to: https:// is for reading"):
        resolve_output("https://user:word@host/run")


def test_a_cache_that_is_no_local_folder_is_refused(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: x\nteacher: {model: m}\ndata: {root: /data, cache: 's3://bucket/cache'}\n")
    with pytest.raises(ConfigError, match=r"data.cache is 's3://bucket/cache'; .* name a local folder"):
        load_job(str(job))
