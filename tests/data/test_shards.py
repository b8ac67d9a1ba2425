"""Shards: what counts as a sample, what damage costs, what a pattern finds."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
import tracemalloc
from pathlib import Path

import fsspec
import pytest
from tars import END, make, member, picture, shard, truncated

from pipeline.data import images, members
from pipeline.data.shards import Sample, Scan, find_shards, read_at, read_texts, scan, stream
from pipeline.errors import DataError


def both(path: str) -> tuple[Scan, list[bytes]]:
    """Scan and stream a shard, and see that they agree and that every image lies where its sample says."""
    seen = scan(path)
    reader = stream(path)
    pairs = list(reader)
    assert [sample for sample, _ in pairs] == seen.samples
    assert (reader.without_image, reader.cut) == (seen.without_image, seen.cut)
    for sample, data in pairs:
        assert data == (read_at(path, sample.offset, sample.size) if sample.status == "ok" else b"")
        assert sample.status in images.STATUSES
    return seen, [data for _, data in pairs]


def keys(path: str) -> list[str]:
    return [sample.key for sample in both(path)[0].samples]


def test_a_sample_is_a_run_with_an_image(tmp_path: Path) -> None:
    path = make(
        tmp_path / "a.tar",
        [
            ("a/x.cls", b"3"),
            ("a/x.jpg", b"image"),
            ("a/x.2.png", b"second image"),
            ("a/x.json", b"{}"),
            ("b/x.JPG", b"other folder"),
            ("notes.txt", b"no image"),
            ("README", b"no image either"),
            ("a/x.png", b"a key again"),
        ],
    )
    seen, data = both(path)
    assert seen.cut is None and seen.without_image == 2
    assert [(s.index, s.key, s.suffix) for s in seen.samples] == [
        (0, "a/x", "jpg"),
        (1, "b/x", "jpg"),
        (2, "a/x", "png"),
    ]
    assert data == [b"image", b"other folder", b"a key again"]
    assert list(read_texts(path, seen.samples, "cls")) == [b"3", None, None]
    assert list(read_texts(path, seen.samples, "json")) == [b"{}", None, None]


def test_only_cls_and_json_are_read(tmp_path: Path) -> None:
    path = make(tmp_path / "a.tar", {"x.png": b"1", "x.pkl": b"evil", "x.pyd": b"evil", "x.cls": b"1"})
    assert set(both(path)[0].samples[0].texts) == {"cls"}


def test_what_is_no_regular_file_is_skipped(tmp_path: Path) -> None:
    parts = [
        member("a.jpg", b"1"),
        member("folder/", type=tarfile.DIRTYPE),
        member("a.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("b.jpg", type=tarfile.LNKTYPE, linkname="a.jpg", size=5),  # a hard link's size is followed by no data
        member("c.jpg", type=tarfile.CHRTYPE),
        member("d.jpg", type=tarfile.FIFOTYPE),
        member("._a.jpg", b"macOS"),
        member(".DS_Store", b"macOS"),
        member("a.cls", b"7"),  # still the run of a.jpg
        member("../../etc/e.jpg", b"2"),
        member("/f.jpg", b"3"),
        END,
    ]
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(parts))
    seen, data = both(str(path))
    assert [sample.key for sample in seen.samples] == ["a", "../../etc/e", "/f"]
    assert data == [b"1", b"2", b"3"] and seen.without_image == 0
    assert list(seen.samples[0].texts) == ["cls"]


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names(tmp_path: Path, tar_format: int) -> None:
    long = "folder/" + "n" * 300
    path = make(
        tmp_path / "a.tar",
        [(f"{long}.jpg", b"1"), (f"{long}.cls", b"2"), ("./ü/ñ.jpg", b"3"), ("././b.jpg", b"4")],
        tar_format=tar_format,
    )
    assert keys(path) == [long, "ü/ñ", "b"]
    assert list(both(path)[0].samples[0].texts) == ["cls"]


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(member(b"caf\xe9.jpg", b"1") + member(b"x/" + b"\xff" * 200 + b".jpg", b"2") + END)
    assert keys(str(path)) == ["caf\\xe9", "x/" + "\\xff" * 200]
    for key in keys(str(path)):
        key.encode()  # Parquet wants UTF-8


@pytest.mark.parametrize("tool", ["gnu", "pax", "ustar", "v7"])
def test_shards_of_gnu_tar(tmp_path: Path, tool: str) -> None:
    (tmp_path / "in").mkdir()
    names = [f"{i}.jpg" for i in range(5)]
    for name in names:
        (tmp_path / "in" / name).write_bytes(name.encode() * 300)
    path = str(tmp_path / "a.tar")
    command = ["tar", "-C", str(tmp_path / "in"), f"--format={tool}", "--sort=name", "-cf", path, "."]
    assert subprocess.run(command).returncode == 0
    seen, data = both(path)
    assert [s.key for s in seen.samples] == list("01234") and seen.cut is None
    assert data == [name.encode() * 300 for name in names]


def test_sparse_members_are_samples_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with (tmp_path / "in" / "b.jpg").open("wb") as file:
        for block in range(12):  # many holes, so that the map needs more headers
            file.seek(block << 17)
            file.write(b"x" * 4096)
    (tmp_path / "in" / "a.jpg").write_bytes(b"1")
    (tmp_path / "in" / "c.jpg").write_bytes(b"2")
    for flags in (["--format=gnu"], ["--format=pax"], ["--format=pax", "--sparse-version=0.1"]):
        path = str(tmp_path / "a.tar")
        command = ["tar", "-C", str(tmp_path / "in"), "--hole-detection=raw", "-S", *flags, "-cf", path]
        assert subprocess.run([*command, "a.jpg", "b.jpg", "c.jpg"]).returncode == 0
        seen, data = both(path)
        found = [(s.key, s.status) for s in seen.samples]
        assert found == [("a", "ok"), ("b", "unreadable"), ("c", "ok")], flags
        assert data == [b"1", b"", b"2"] and seen.cut is None


def test_the_same_runs_as_tarfile(data_root: Path) -> None:
    for path in [data_root / "cifar10" / "unlabelled-000.tar", data_root / "imagenet-sample" / "photos-000.tar"]:
        seen, _ = both(str(path))
        with tarfile.open(path) as tar:
            inside = [(info.name, info.offset_data, info.size) for info in tar if info.name.endswith(".jpg")]
        assert [(f"{s.key}.jpg", s.offset, s.size) for s in seen.samples] == inside
        assert seen.cut is None


def test_labels_of_real_shards(data_root: Path) -> None:
    path = str(data_root / "cifar10" / "labelled-000.tar")
    samples = scan(path).samples
    labels = [int(text or b"-1") for text in read_texts(path, samples, "cls")]
    assert len(labels) == len(samples) == 1000 and set(labels) == set(range(10))


# Damage


def test_cut_at_every_byte(tmp_path: Path) -> None:
    """Wherever the file ends, whole images survive, a cut one is named, and the rest is said to be missing."""
    whole = Path(make(tmp_path / "whole.tar", [("a.jpg", b"1" * 700), ("a.cls", b"1"), ("b.jpg", b"2" * 10)]))
    data = whole.read_bytes()
    path = tmp_path / "cut.tar"
    for size in range(512, len(data), 64):
        path.write_bytes(data[:size])
        seen, _ = both(str(path))
        expected = [("a", "ok" if size >= 1212 else "truncated")] if size > 0 else []
        if size >= 3072:
            expected.append(("b", "ok" if size >= 3082 else "truncated"))
        assert [(s.key, s.status) for s in seen.samples] == expected, size
        assert seen.samples[0].size == min(700, size - 512)
        # One block of zeros is taken for the end; without any the file may have lost members.
        assert (seen.cut is None) == (size >= 4096), (size, seen.cut)
    with pytest.raises(DataError, match=r"cut\.tar is not an uncompressed tar"):
        scan(truncated(path, 300))


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (b"garbage" * 100, "no tar header at byte 1024"),
        (bytes(1024), "data follows the end-of-archive marker at byte 1024"),
        (bytes(3 << 20), "data follows the end-of-archive marker at byte 1024"),
        (member("x.jpg", size=1 << 40), "inside member 'x.jpg'"),
        (member("x", size=1 << 40, type=tarfile.XHDTYPE), "extended header at byte 1024 declares"),
        (member("x", size=1 << 40, type=tarfile.GNUTYPE_LONGNAME), "extended header at byte 1024 declares"),
        (member("x", b"9 size=-1\n", type=tarfile.XHDTYPE), "that is no number"),
        (member("x", b"999 path=z\n", type=tarfile.XHDTYPE), "is damaged"),
        (member("x", b"0 path=z\n", type=tarfile.XHDTYPE), "is damaged"),
    ],
)
def test_damage_ends_the_shard_and_is_told(tmp_path: Path, middle: bytes, reason: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.jpg", b"1") + middle + bytes(-len(middle) % 512) + member("b.jpg", b"2") + END)
    seen, _ = both(str(path))
    assert seen.samples[0] == Sample(0, "a", 512, 1, "jpg")
    assert seen.cut is not None and reason in seen.cut
    assert [s.status for s in seen.samples[1:]] in ([], ["truncated"])


def test_a_long_chain_of_extended_headers_is_no_recursion(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    extended = member("x", b"12 path=z.b\n", type=tarfile.XHDTYPE)
    path.write_bytes(extended * 5000 + member("a.jpg", b"1", type=tarfile.REGTYPE) + END)
    assert [s.key for s in scan(str(path)).samples] == []  # named z.b by the last of them
    assert scan(str(path)).without_image == 1


def test_huge_images_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(member("a.jpg", b"1") + member("b.jpg", size=3 << 30))
        file.seek(3 << 30, 1)  # a hole
        file.write(member("c.jpg", b"3") + END)
    tracemalloc.start()
    seen, data = both(str(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(s.key, s.status) for s in seen.samples] == [("a", "ok"), ("b", "too_large"), ("c", "ok")]
    assert data == [b"1", b"", b"3"] and seen.samples[1].size == 2**31 - 1
    assert peak < 8 << 20


def test_memory_is_that_of_one_image(tmp_path: Path) -> None:
    path = make(tmp_path / "a.tar", [(f"{i}.jpg", bytes(1 << 20)) for i in range(40)])
    tracemalloc.start()
    assert sum(len(data) for _, data in stream(path)) == 40 << 20
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>" * 100, b"\x1f\x8b" + bytes(2000), b"short"])
def test_what_is_no_tar_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    for use in (scan, lambda path: list(stream(path))):
        with pytest.raises(DataError, match=r"bad\.tar is not an uncompressed tar"):
            use(str(path))


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    assert both(make(tmp_path / "a.tar", []))[0] == Scan([], 0, None)


def test_tarfile_reads_what_our_helper_writes(tmp_path: Path) -> None:
    with tarfile.open(shard(tmp_path / "a.tar", 3, labels=[1, 2, 3])) as tar:
        assert len(tar.getnames()) == 6


# URLs


def test_url(tmp_path: Path) -> None:
    local = shard(tmp_path / "000.tar", 4, labels=[0, 1, 2, 3])
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/test_url/x/000.tar", Path(local).read_bytes())
    fs.pipe_file("/test_url/y/000.tar", Path(local).read_bytes()[:1500])
    found = find_shards("memory://test_url/*/*.tar", "s")
    assert [(s.name, s.path) for s in found] == [
        ("x/000.tar", "memory://test_url/x/000.tar"),
        ("y/000.tar", "memory://test_url/y/000.tar"),
    ]
    assert both(found[0].path)[0] == scan(local)
    assert both(found[1].path)[0].cut
    with pytest.raises(DataError, match="changed since it was indexed"):
        read_at(found[1].path, 1400, 200)
    fs.rm("/test_url", recursive=True)


# Patterns


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
    ],
)
def test_patterns_that_cannot_be(tree: Path, pattern: str | list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        find_shards(pattern, "s", str(tree))


def test_zero_byte_shard(tree: Path) -> None:
    (tree / "a" / "001.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"a/001.tar is empty \(0 bytes\)"):
        find_shards("a/*.tar", "s", str(tree))


def test_a_folder_is_listed_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.data import listing

    asked: list[str] = []
    real = listing._list_local
    monkeypatch.setattr(listing, "_list_local", lambda path: asked.append(path) or real(path))
    find_shards(["a/{000..002}.tar", "{a,b}/../b/000.tar"], "s", str(tree))
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


def test_members_walks_any_seekable_file() -> None:
    tar = members.Tar(io.BytesIO(member("a.json", json.dumps({}).encode()) + member("b.png", picture()) + END))
    first = tar.next()
    assert first is not None and tar.read(first) == b"{}"
    second = tar.next()
    assert second is not None and tar.read(second) == picture()
    assert tar.next() is None
