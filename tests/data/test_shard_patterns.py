"""Patterns, folders and list files: what they find, what they are called, and how little is asked for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.data import corpus, shard_patterns
from pipeline.data.shards import find_shards, scan
from pipeline.errors import DataError
from tests import small
from tests.data.tars import shard


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ["a/000.tar", "a/001.tar", "a/002.tar", "b/000.tar", "b/deep/010.tar", "b/.hidden.tar"]:
        shard(tmp_path / name, 1)
    (tmp_path / "a" / "000.parquet").write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a/*.tar", ["000.tar", "001.tar", "002.tar"]),
        ("a/00[01].tar", ["000.tar", "001.tar"]),
        ("a/*", ["000.tar", "001.tar", "002.tar"]),
        ("a", ["000.tar", "001.tar", "002.tar"]),
        ("./a/", ["000.tar", "001.tar", "002.tar"]),
        ("a/001.tar", ["001.tar"]),
        ("a/{000..002}.tar", ["000.tar", "001.tar", "002.tar"]),
        ("{a,b}/000.tar", ["a/000.tar", "b/000.tar"]),
        ("{a,b}/*.tar", ["a/000.tar", "a/001.tar", "a/002.tar", "b/000.tar"]),
        ("{a,b/deep}/0{00,10}.tar", None),
        ("*/*.tar", ["a/000.tar", "a/001.tar", "a/002.tar", "b/000.tar"]),
        ("b/**/*.tar", ["000.tar", "deep/010.tar"]),
        (["a/*.tar", "b/*.tar"], ["a/000.tar", "a/001.tar", "a/002.tar", "b/000.tar"]),
        (["b/000.tar", "b/deep"], ["000.tar", "deep/010.tar"]),
    ],
)
def test_patterns(tree: Path, pattern: str | list[str], names: list[str] | None) -> None:
    if names is None:
        with pytest.raises(DataError, match=r"2 shards of the pattern .* are missing, such as .*a/010\.tar"):
            find_shards(pattern, "s", str(tree))
        return
    found = find_shards(pattern, "s", str(tree))
    assert [s.name for s in found] == names
    for one in found:
        stat = Path(one.path).stat()
        assert (one.size, one.stamp, one.source) == (stat.st_size, str(stat.st_mtime_ns), "s")


def test_absolute_pattern_and_a_root_with_brackets(tree: Path) -> None:
    odd = tree / "x[1]{2}"
    shard(odd / "000.tar", 1)
    assert [s.name for s in find_shards("*.tar", "s", str(odd))] == ["000.tar"]
    assert [s.name for s in find_shards(f"{tree}/a/*.tar", "s", "/elsewhere")] == ["000.tar", "001.tar", "002.tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("pipe:cat x.tar", "'pipe:' is refused"),
        ("a/*.tgz", "source 's': no shard matches a/.*.tgz; the folder .*/a holds 4 entries such as 000.parquet"),
        ("nowhere/*.tar", "there is nothing at .*nowhere"),
        ("a/{000..009}.tar", "7 shards of the pattern .* are missing, such as .*003.tar"),
        (["a/*.tar", "a/000.tar"], "two shards are named 000.tar"),
        ("a/{0..99999999}.tar", "more than 1000000 names"),
        ([], "is empty"),
        ("nosuchscheme://x/y.tar", "cannot open"),
        ("{a,b}/../b/000.tar", "gives the shard name a/../b/000.tar; names become paths"),
        ("a/list.txt", "cannot read the list file .*a/list.txt: no such file"),
    ],
)
def test_patterns_that_cannot_be(tree: Path, pattern: str | list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_shards(pattern, "s", str(tree))


def test_zero_byte_shards(tree: Path) -> None:
    (tree / "a" / "001.tar").write_bytes(b"")
    (tree / "a" / "002.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"a/001.tar is empty \(0 bytes\), and 1 more"):
        find_shards("a/*.tar", "s", str(tree), max_empty=1)
    tolerated = find_shards("a/*.tar", "s", str(tree), max_empty=2)
    assert [one.size == 0 for one in tolerated] == [False, True, True]
    with pytest.raises(DataError, match=r"a/001.tar is not an uncompressed tar: the file ends at byte 0"):
        scan(tolerated[1].path)


# List files


def names_of(path: Path, text: str, root: Path | None = None) -> list[str]:
    path.write_text(text)
    return [one.name for one in find_shards(path.name if root else str(path), "s", str(root) if root else None)]


def test_a_list_file(tree: Path) -> None:
    text = "# the corpus\r\n\na/000.tar\n  ./b/deep/010.tar  \n\ufeff"[:-1]
    assert names_of(tree / "list.txt", "\ufeff" + text) == ["a/000.tar", "b/deep/010.tar"]
    assert names_of(tree / "list.txt", text, tree) == ["a/000.tar", "b/deep/010.tar"]
    # Names are relative to the list, so that a longer list changes none of them.
    assert names_of(tree / "list.txt", "a/000.tar\na/001.tar") == ["a/000.tar", "a/001.tar"]
    assert names_of(tree / "list.txt", f"{tree}/a/000.tar\nb/*.tar") == ["a/000.tar", "b/000.tar"]
    assert names_of(tree / "b" / "list.TXT", "../a/000.tar\n../a/001.tar") == ["000.tar", "001.tar"]
    assert names_of(tree / "b" / "list.txt", "../a/000.tar\n000.tar") == ["a/000.tar", "b/000.tar"]
    found = find_shards(str(tree / "list.txt"), "s")
    assert [one.path for one in found] == [f"{tree}/a/000.tar", f"{tree}/b/000.tar"]


def test_a_list_of_urls(tree: Path) -> None:
    fs = fsspec.filesystem("memory")
    for name in ("x/000.tar", "y/000.tar"):
        fs.pipe_file(f"/test_list/{name}", b"1")
    fs.pipe_file("/test_list/list.txt", b"x/000.tar\nmemory://test_list/y/000.tar\n")
    found = find_shards("list.txt", "s", "memory://test_list")
    assert [(one.name, one.path) for one in found] == [
        ("x/000.tar", "memory://test_list/x/000.tar"),
        ("y/000.tar", "memory://test_list/y/000.tar"),
    ]
    assert names_of(tree / "list.txt", "memory://test_list/y/000.tar\nmemory://test_list/x/000.tar") == [
        "x/000.tar",
        "y/000.tar",
    ]
    fs.rm("/test_list", recursive=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "list file .*list.txt names no shard; write one"),
        ("# nothing\n\n", "names no shard"),
        (
            "a/000.tar\n# x\na/nothing.tar",
            "line 3 of the list file .*list.txt: no shard matches a/nothing.tar; the folder",
        ),
        ("a/000.tar\na/000.tar", "two shards are named a/000.tar"),
        ("pipe:touch evil.tar", "line 1 of the list file .*: 'pipe:' is refused"),
        ("other.txt", "line 1 of the list file .*'other.txt' names no shards"),
        ("nosuchscheme://x/y.tar", "line 1 of the list file .*: cannot open"),
        ("a/{000..009}.tar", "line 1 of the list file .*: 7 shards"),
    ],
)
def test_lists_that_cannot_be(tree: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"source 's': .*{message}"):
        names_of(tree / "list.txt", text)


def test_a_list_that_is_no_text(tree: Path) -> None:
    (tree / "list.txt").write_bytes(b"caf\xe9.tar")
    with pytest.raises(DataError, match=r"list\.txt is no UTF-8 text"):
        find_shards("list.txt", "s", str(tree))


def test_a_pattern_may_leave_the_root(tree: Path) -> None:
    assert [one.name for one in find_shards("../a/*.tar", "s", f"{tree}/b")] == ["000.tar", "001.tar", "002.tar"]


def test_a_folder_is_listed_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = shard_patterns._list_local
    monkeypatch.setattr(shard_patterns, "_list_local", lambda path: asked.append(path) or real(path))
    find_shards(["a/{000..001}.tar", "{a,b}/*2.tar", "b/000.tar"], "s", str(tree))
    assert len(asked) == len(set(asked)) and str(tree / "a") in asked


def test_signed_urls_keep_their_query_out_of_names(tmp_path: Path) -> None:
    from functools import partial
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
    from threading import Thread

    shard(tmp_path / "x" / "000.tar", 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{server.server_port}"
        (found,) = find_shards(f"{base}/x/{{000..000}}.tar?sig=secret", "s")
        assert (found.name, found.path) == ("000.tar", f"{base}/x/000.tar?sig=secret")
        assert len(scan(found.path).samples) == 2
        with pytest.raises(DataError) as failure:
            find_shards(f"{base}/x/{{000..001}}.tar?sig=secret", "s")
        assert "secret" not in str(failure.value)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("driver", "told", "stamp"),
    [
        ("s3", {"ETag": '"9b2c-2"', "LastModified": datetime(2026, 1, 2, tzinfo=UTC), "VersionId": "7"}, "9b2c-2"),
        ("memory", {"created": 1767312000.25}, "1767312000.25"),
        ("file", {"created": 1767312000.25, "mtime": 1767312001.5, "ino": 3}, "1767312001.5"),
        ("sftp", {"time": 1, "mtime": datetime(2026, 1, 2, tzinfo=UTC)}, "2026-01-02 00:00:00+00:00"),
        ("gs", {"etag": "CKih", "generation": "17", "mtime": "2026-01-02", "updated": "2026-01-02"}, "CKih"),
        ("abfs", {"etag": "0x8D", "last_modified": datetime(2026, 1, 2, tzinfo=UTC)}, "0x8D"),
        ("https", {"ETag": 'W/"1f"', "Last-Modified": "Fri, 02 Jan 2026 00:00:00 GMT"}, 'W/"1f'),
        # Those of servers without ETags had none, so a shard that was replaced by one of equal size went unseen.
        ("https", {"Last-Modified": "Fri, 02 Jan 2026 00:00:00 GMT"}, "Fri, 02 Jan 2026 00:00:00 GMT"),
        ("hf", {"blob_id": "5e", "last_commit": None}, ""),
    ],
)
def test_the_stamp_of_a_shard_is_what_it_was_when_it_was_indexed(driver: str, told: dict[str, Any], stamp: str) -> None:
    """As `driver` tells of a file: stamps are part of what `index` is known by, so another one reads all shards
    again."""
    info = {"name": "x/000.tar", "size": 10240, "type": "file", **told}
    assert shard_patterns._entry(info) == shard_patterns.Entry(10240, stamp, False)


# What it costs


class Counted(MemoryFileSystem):
    """An object store that counts what it is asked."""

    protocol = "counted"
    store: ClassVar[dict[str, Any]] = {}
    pseudo_dirs: ClassVar[list[str]] = [""]
    asked: ClassVar[Counter[str]] = Counter()

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(path.removeprefix("counted://"))

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self.asked["ls"] += 1
        return super().ls(path, detail, **kwargs)

    def info(self, path: str, **kwargs: Any) -> Any:
        self.asked["info"] += 1
        return super().info(path, **kwargs)

    def exists(self, path: str, **kwargs: Any) -> bool:
        self.asked["exists"] += 1
        return super().exists(path, **kwargs)

    def cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        self.asked["cat_file"] += 1
        return super().cat_file(path, *args, **kwargs)

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        self.asked["open"] += 1
        return super()._open(path, *args, **kwargs)


@pytest.fixture
def asked() -> Iterator[Counter[str]]:
    """What `counted://` was asked so far, by kind."""
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.store.clear()
    Counted.asked.clear()
    yield Counted.asked
    Counted.store.clear()


def test_thirty_thousand_shards_cost_one_listing(tmp_path: Path, asked: Counter[str]) -> None:
    fs = fsspec.filesystem("counted")
    for number in range(30_000):
        fs.pipe_file(f"/corpus/{number:05d}.tar", b"1")
        if number % 10 == 0:
            fs.pipe_file(f"/corpus/{number:05d}.parquet", b"")
    (tmp_path / "list.txt").write_text("\n".join(f"counted://corpus/{number:05d}.tar" for number in range(30_000)))
    for pattern in (
        "counted://corpus",
        "counted://corpus/*.tar",
        "counted://corpus/{00000..29999}.tar",
        str(tmp_path / "list.txt"),
    ):
        asked.clear()
        found = find_shards(pattern, "s")
        assert [found[0].name, found[-1].name, len(found)] == ["00000.tar", "29999.tar", 30_000]
        assert asked == {"ls": 1}, pattern
        first = corpus.freeze(str(tmp_path / "out"), found, "s", pattern)
        assert corpus.freeze(str(tmp_path / "out"), found, "s", pattern) == first
        assert asked == {"ls": 1}, pattern


@pytest.mark.slow
def test_a_rerun_of_a_finished_stage_asks_the_same_whatever_the_number_of_shards(
    tmp_path: Path, asked: Counter[str]
) -> None:
    seen = []
    for number in (1, 25):
        world = small.make(tmp_path / str(number))
        fs = fsspec.filesystem("counted")
        for index in range(number):
            shard(world.shards / f"unlabelled-{index:03d}.tar", 4, start=300 + 4 * index)
        if number == 1:
            (world.shards / "unlabelled-001.tar").unlink()
        fs.put(str(world.shards), f"/{number}", recursive=True)
        settings = (f"data.root=counted://{number}", f"output=counted://{number}/out")
        first = small.command("run", world.job, *settings)
        assert first.status == 0, first.err
        asked.clear()
        again = small.command("run", world.job, *settings)
        assert again.status == 0, again.err
        seen.append(dict(asked))
    assert seen[0] == seen[1]
    assert seen[0]["ls"] < 20
