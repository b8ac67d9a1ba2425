"""Shards: what counts as a sample, what damage costs, what a pattern finds."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from pipeline.data import images, samples, tar
from pipeline.data.shards import Sample, Scan, find_shards, read_at, read_texts, scan, stream
from pipeline.errors import DataError
from tests.data.tars import END, make, member, pax, picture, shard, truncated


def both(path: str) -> tuple[Scan, list[bytes]]:
    """Scan and stream a shard, and see that they agree and that every image lies where its sample says."""
    seen = scan(path)
    reader = stream(path)
    pairs = list(reader)
    assert [sample for sample, _ in pairs] == seen.samples
    assert (reader.left.number, reader.damage) == (seen.left.number, seen.damage)
    for sample, data in pairs:
        assert data == (read_at(path, sample.offset, sample.size) if sample.status == "ok" else b"")
        assert sample.status in images.STATUSES
    return seen, [data for _, data in pairs]


@contextlib.contextmanager
def traced(most: int) -> Iterator[None]:
    """No more than `most` bytes are allocated at any moment."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


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
    assert seen.damage is None and seen.left.number == 2
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
    assert data == [b"1", b"2", b"3"] and seen.left.number == 0
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
    assert [s.key for s in seen.samples] == list("01234") and seen.damage is None
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
        assert data == [b"1", b"", b"2"] and seen.damage is None


BSDTAR = shutil.which("bsdtar")


@pytest.mark.skipif(BSDTAR is None, reason="needs bsdtar")
@pytest.mark.parametrize("tool", ["pax", "gnutar", "ustar"])
def test_shards_of_bsdtar(tmp_path: Path, tool: str) -> None:
    long = "n" * 90 + "/" + "m" * (150 if tool != "ustar" else 50)
    names = ["a.JPG", "sub/b.jpg", f"{long}.jpg"] + (["ü.jpg"] if tool == "pax" else [])
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(name.encode() * 20)
    path = str(tmp_path / "a.tar")
    assert (
        BSDTAR
        and subprocess.run([BSDTAR, "-C", str(tmp_path / "in"), "--format", tool, "-cf", path, "."]).returncode == 0
    )
    seen, data = both(path)
    assert {s.key for s in seen.samples} == {name.rpartition(".")[0] for name in names} and seen.damage is None
    assert sorted(data) == sorted(name.encode() * 20 for name in names)


def test_shards_as_bsdtar_writes_them(tmp_path: Path) -> None:
    """PAX headers for fractional times and whatever else, AppleDouble twins on macOS, a global header in front."""
    extra = {"mtime": "1700000000.123456789", "LIBARCHIVE.creationtime": "1", "SCHILY.xattr.user.x": "y\nz"}
    parts = [
        member("pax_global_header", b"19 comment=0123456\n", type=tarfile.XGLTYPE),
        member("./", type=tarfile.DIRTYPE),
    ]
    for name in ("./a.JPG", "./sub/b.jpg", f"./{'n' * 300}.jpg", "./ü.jpg"):
        folder, _, base = name.rpartition("/")
        parts.append(member(f"{folder}/._{base}", b"macOS", tar_format=tarfile.PAX_FORMAT, pax_headers=extra))
        parts.append(member(name, name.encode(), tar_format=tarfile.PAX_FORMAT, pax_headers=extra))
    path = tmp_path / "a.tar"
    path.write_bytes(b"".join(parts) + END)
    seen, data = both(str(path))
    assert [s.key for s in seen.samples] == ["a", "sub/b", "n" * 300, "ü"] and seen.damage is None
    assert data[1] == b"./sub/b.jpg" and seen.left.number == 0


def test_a_pax_header_overrides_name_and_size(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    data = b"7" * 600
    entry = member("short", size=0)
    path.write_bytes(pax({"path": "z.jpg", "size": "600"}) + entry + data + bytes(424) + END)
    seen, found = both(str(path))
    assert [(s.key, s.size) for s in seen.samples] == [("z", 600)] and found == [data] and seen.damage is None


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_shards_of_webdataset(tmp_path: Path, suffix: str) -> None:
    path = str(tmp_path / f"a.{suffix}")
    with webdataset.TarWriter(path) as writer:
        for number in range(3):
            writer.write({"__key__": f"sub/{number:06d}", "png": picture(number), "cls": number, "json": {"a": number}})
    if suffix == "tar.gz":
        with pytest.raises(DataError, match="without gzip"):
            scan(path)
        return
    seen, data = both(path)
    assert [s.key for s in seen.samples] == ["sub/000000", "sub/000001", "sub/000002"] and seen.damage is None
    assert data == [picture(number) for number in range(3)]
    assert list(read_texts(path, seen.samples, "cls")) == [b"0", b"1", b"2"]
    theirs = list(webdataset.WebDataset(path, shardshuffle=False))
    assert [sample["__key__"] for sample in theirs] == [s.key for s in seen.samples]


def test_a_folder_of_img2dataset(tmp_path: Path) -> None:
    for number in range(2):
        name = f"{number:05d}"
        members: list[tuple[str, bytes]] = []
        for i in range(3):
            key = f"{number:05d}{i:04d}"
            status = {"key": key, "status": "success", "exif": "{}"}
            members += [(f"{key}.jpg", picture(i, file_format="JPEG")), (f"{key}.txt", b"a caption")]
            members += [(f"{key}.json", json.dumps(status).encode())]
        make(tmp_path / f"{name}.tar", members)
        pq.write_table(
            pa.table({"url": ["https://x/y.jpg"] * 3, "status": ["success"] * 3}), tmp_path / f"{name}.parquet"
        )
        (tmp_path / f"{name}_stats.json").write_text(json.dumps({"count": 3, "successes": 3}))
    found = find_shards(str(tmp_path), "s")
    assert [one.name for one in found] == ["00000.tar", "00001.tar"]
    seen, data = both(found[1].path)
    assert [s.key for s in seen.samples] == ["000010000", "000010001", "000010002"]
    assert [set(s.texts) for s in seen.samples] == [{"json"}] * 3 and seen.left.number == 0
    assert data[2] == picture(2, file_format="JPEG")


def test_the_same_runs_as_tarfile(data_root: Path) -> None:
    for path in [data_root / "cifar10" / "unlabelled-000.tar", data_root / "imagenet-sample" / "photos-000.tar"]:
        seen, _ = both(str(path))
        with tarfile.open(path) as tar:
            inside = [(info.name, info.offset_data, info.size) for info in tar if info.name.endswith(".jpg")]
        assert [(f"{s.key}.jpg", s.offset, s.size) for s in seen.samples] == inside
        assert seen.damage is None


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
        assert (seen.damage is None) == (size >= 4096), (size, seen.damage)
    with pytest.raises(DataError, match=r"cut\.tar is not an uncompressed tar"):
        scan(truncated(path, 300))


@pytest.mark.parametrize(
    ("middle", "reason"),
    [
        (b"garbage" * 100, "no tar header at byte 1024"),
        (bytes(1024), "data follows the end-of-archive marker at byte 1024"),
        (bytes(3 << 20), "bytes follow the end-of-archive marker at byte 1024, more than any padding"),
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
    assert seen.damage is not None and reason in seen.damage
    assert [s.status for s in seen.samples[1:]] in ([], ["truncated"])


def test_a_long_chain_of_extended_headers_is_no_recursion(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    extended = member("x", b"12 path=z.b\n", type=tarfile.XHDTYPE)
    path.write_bytes(extended * 5000 + member("a.jpg", b"1", type=tarfile.REGTYPE) + END)
    assert [s.key for s in scan(str(path)).samples] == []  # named z.b by the last of them
    assert scan(str(path)).left.number == 1


def test_huge_images_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    size = samples.MAX_IMAGE + 1
    with path.open("wb") as file:
        file.write(member("a.jpg", b"1") + member("b.jpg", size=size))
        file.seek(size + -size % 512, 1)  # a hole
        file.write(member("c.jpg", b"3") + END)
    with traced(8 << 20):
        seen, data = both(str(path))
    assert [(s.key, s.status) for s in seen.samples] == [("a", "ok"), ("b", "too_large"), ("c", "ok")]
    assert data == [b"1", b"", b"3"] and seen.samples[1].size == size


TEN_GB = 10 << 30


@pytest.mark.parametrize("name", ["b.jpg", "b.cls", "b.txt", "b"])
def test_ten_gigabytes_that_are_there_are_stepped_over(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(member("a.jpg", b"1") + member(name, size=TEN_GB))
        file.seek(TEN_GB, 1)  # a hole: no byte of it is on the disk
        file.write(member("c.jpg", b"3") + END)
    with traced(1 << 20):
        seen = scan(str(path))
    image = [("b", "too_large", 2**31 - 1)] if name == "b.jpg" else []
    assert [(s.key, s.status, s.size) for s in seen.samples] == [("a", "ok", 1), *image, ("c", "ok", 1)]
    assert seen.damage is None and not any(s.texts for s in seen.samples)


HUGE: list[dict[str, Any]] = [
    {"size": TEN_GB},
    {"size": 1 << 70},  # base-256
    {"size": TEN_GB, "tar_format": tarfile.PAX_FORMAT},
    {"size": TEN_GB, "type": tarfile.CONTTYPE},
]


@pytest.mark.parametrize("fields", HUGE)
@pytest.mark.parametrize("name", ["b.jpg", "b.cls", "b.txt"])
def test_ten_gigabytes_that_are_not_there_cost_nothing(tmp_path: Path, name: str, fields: dict[str, Any]) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(member("a.jpg", b"1") + member(name, **fields) + member("c.jpg", b"3") + END)
    with traced(1 << 20):
        seen, data = both(str(path))
    image = [("b", "truncated")] if name == "b.jpg" else []
    assert [(s.key, s.status) for s in seen.samples] == [("a", "ok"), *image]
    assert data[0] == b"1" and not any(data[1:])
    assert seen.damage is not None and f"declares {fields['size']} bytes" in seen.damage


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_of_ten_gigabytes_costs_nothing(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(member("a.jpg", b"1") + member("x", size=TEN_GB, type=kind))
        file.seek(TEN_GB, 1)
        file.write(member("c.jpg", b"3") + END)
    with traced(1 << 20):
        seen = scan(str(path))
    skipped = kind in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)  # nothing in them is wanted
    assert [s.key for s in seen.samples] == (["a", "c"] if skipped else ["a"])
    assert skipped or "extended header at byte 1024 declares" in str(seen.damage)


def test_random_damage_ends_in_a_cut_or_a_sentence(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    long = "folder/" + "n" * 200
    parts = [member(f"{i}.png", bytes(100)) + member(f"{long}{i}.jpg", b"1", tar_format=i % 2 + 1) for i in range(4)]
    whole = np.frombuffer(b"".join(parts) + END, np.uint8)
    headers = np.flatnonzero(np.arange(len(whole)) % 1024 < 512)
    for number in range(300):
        data = whole.copy()
        places = random.choice(headers, 1 + number % 8)
        data[places] = random.integers(0, 256, len(places))
        for at in range(0, len(data), 512):  # a damaged header that its checksum vouches for is the worse one
            if number % 2 and data[at + 257 : at + 262].tobytes() == b"ustar":
                data[at + 148 : at + 156] = 32
                data[at + 148 : at + 156] = np.frombuffer(b"%06o\0 " % data[at : at + 512].sum(), np.uint8)
        path = tmp_path / "a.tar"
        path.write_bytes(data.tobytes())
        with traced(1 << 20):
            try:
                both(str(path))
            except DataError as error:
                assert "is not an uncompressed tar" in str(error)


def test_memory_is_that_of_one_image(tmp_path: Path) -> None:
    path = make(tmp_path / "a.tar", [(f"{i}.jpg", bytes(1 << 20)) for i in range(40)])
    with traced(6 << 20):
        assert sum(len(data) for _, data in stream(path)) == 40 << 20


@pytest.mark.parametrize("data", [b"", b"<html>not found</html>" * 100, b"\x1f\x8b" + bytes(2000), b"short"])
def test_what_is_no_tar_is_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(data)
    for use in (scan, lambda path: list(stream(path))):
        with pytest.raises(DataError, match=r"bad\.tar is not an uncompressed tar"):
            use(str(path))


def test_an_empty_tar_has_no_samples(tmp_path: Path) -> None:
    assert both(make(tmp_path / "a.tar", []))[0] == Scan([], samples.Left(), None)


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
    assert both(found[1].path)[0].damage
    with pytest.raises(DataError, match="changed since it was indexed"):
        read_at(found[1].path, 1400, 200)
    fs.rm("/test_url", recursive=True)


def test_members_walks_any_seekable_file() -> None:
    walked = tar.Tar(io.BytesIO(member("a.json", json.dumps({}).encode()) + member("b.png", picture()) + END))
    first = walked.next()
    assert first is not None and walked.read(first) == b"{}"
    second = walked.next()
    assert second is not None and walked.read(second) == picture()
    assert walked.next() is None
