"""A dirty corpus, made by hand: every kind of damage that a corpus from the web has been seen to hold, and what is
expected of it. `write(folder, canary)` writes the shards; whatever is run from one of them would leave a file in
`canary`.

Damage comes in three sizes: pictures that cannot be used (`pictures`), members that are no samples or look dangerous
(`oddities`), and shards of which only a part can be read, or nothing (`shards`). Pictures and oddities stand in shards
of their own, each between good pictures, so that what one of them did to its neighbours would show.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, features

from tests.data.tars import END, member, pax, picture

Rows = list[tuple[str, str]]  # (key, status) of the rows that are expected
TEN_GB = 10 << 30


@dataclass(frozen=True)
class Kind:
    """One kind of damage: the bytes of its members, the rows it gets, the samples it has without an image."""

    name: str
    data: bytes
    rows: Rows = field(default_factory=list)
    without_image: int = 0


@dataclass(frozen=True)
class DirtyShard:
    """`cut`: a part of the reason why the shard ends early; `error`: of the sentence why it gives nothing."""

    name: str
    data: bytes
    rows: Rows = field(default_factory=list)
    without_image: int = 0
    cut: str | None = None
    error: str | None = None


def corpus(canary: Path) -> list[DirtyShard]:
    """All shards; their names say what is in them."""
    return [_between("pictures", list(pictures())), _between("oddities", list(oddities(canary))), *shards()]


def write(folder: Path, canary: Path) -> list[DirtyShard]:
    made = corpus(canary)
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        (folder / f"{one.name}.tar").write_bytes(one.data)
    return made


def _between(name: str, kinds: list[Kind]) -> DirtyShard:
    """The kinds in one shard, with a good picture before each and after the last."""
    data, rows, without = b"", [], 0
    for number, kind in enumerate([*kinds, Kind("end", END)]):
        key = f"good-{number:03d}"
        data += member(f"{key}.png", picture(number)) + kind.data
        rows += [(key, "ok"), *kind.rows]
        without += kind.without_image
    return DirtyShard(name, data, rows, without)


# Pictures


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int = 8, colour: int = 2, rows: bytes = b"", before: bytes = b"") -> bytes:
    """A PNG by hand: `rows` are raw scanlines, each with its filter byte, `before` chunks ahead of the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def pictures() -> Iterator[Kind]:
    for name, file, data, status in _pictures():
        key = "p-" + name.replace(" ", "-")
        yield Kind(name, member(f"{key}.{file}", data), [(key, status)])


def _pictures() -> Iterator[tuple[str, str, bytes, str]]:
    """(name, suffix, bytes, status)."""
    colours = Image.open(io.BytesIO(picture(7, 40, 30)))
    jpeg = picture(1, 200, 150, "JPEG")
    whole = {name: picture(1, 200, 150, name) for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")}
    if features.check("avif"):
        whole["AVIF"] = picture(1, 200, 150, "AVIF")
    for file_format, data in whole.items():
        suffix = {"JPEG": "jpg", "TIFF": "tif"}.get(file_format, file_format.lower())
        yield f"good {file_format}", suffix, data, "ok"
        yield f"upper-case suffix {file_format}", suffix.upper(), data, "ok"
        yield f"half a {file_format}", suffix, data[: len(data) // 2], "truncated"
        yield f"garbage after a {file_format}", suffix, data + b"garbage" * 99, "ok"
        if file_format not in ("PNG", "GIF"):  # whose last byte is after the pixels
            yield f"{file_format} without its last byte", suffix, data[:-1], "truncated"

    yield "zero bytes", "jpg", b"", "empty"
    yield "one byte", "jpg", b"\xff", "not_an_image"
    yield "all zeros", "jpg", bytes(5000), "not_an_image"
    yield "error page", "jpg", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "not_an_image"
    yield "JSON error", "png", b'{"error": "rate limit"}', "not_an_image"
    yield "zeros before a JPEG", "jpg", bytes(512) + jpeg, "not_an_image"
    yield "gzipped JPEG", "jpg", gzip.compress(jpeg, mtime=0), "not_an_image"
    yield "nested tar as JPEG", "jpg", member("x.jpg", jpeg) + END, "not_an_image"
    yield "zeros at the end of a JPEG", "jpg", jpeg[: len(jpeg) // 2] + bytes(len(jpeg) // 2), "truncated"
    # Damage that Pillow's decoders do not see: the picture is not what was meant.
    yield "hole in a JPEG", "jpg", jpeg[:1500] + bytes(64) + jpeg[1564:], "ok"
    yield "PNG with fewer rows than it declares", "png", png(50, 50, rows=bytes(151)), "ok"

    for name, data in {
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch canary) (w) file\n",
        "PSD": b"8BPS\0\1" + bytes(60),
        "PDF": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
        "HEIC": b"\0\0\0\x18ftypheic" + bytes(60),
        "JPEG 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(60),
        "icon": b"\0\0\1\0\1\0\x10\x10" + bytes(60),
        "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
        "FITS": b"SIMPLE  =                    T" + bytes(60),
    }.items():
        yield f"{name} as JPEG", "jpg", data, "not_an_image"

    yield "PNG of 60,000 x 60,000", "png", png(60_000, 60_000), "too_large"
    yield "JPEG of 65,500 x 65,500", "jpg", _huge_jpeg(jpeg), "too_large"
    yield "GIF of 65,535 x 65,535", "gif", _huge_gif(), "too_large"
    yield "bomb of 50 MB in 50 kB", "png", png(20_000, 20_000, 1, 0, bytes(2501 * 20_000)), "too_large"
    text = chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(100 << 20)))
    yield "bomb in a comment", "png", png(1, 1, rows=b"\0abc", before=text), "unreadable"
    yield "PNG without pixels", "png", png(0, 0), "unreadable"
    yield "PNG with a bad checksum", "png", whole["PNG"][:29] + b"\0\0\0\0" + whole["PNG"][33:], "unreadable"
    yield "header of a PNG alone", "png", whole["PNG"][:40], "unreadable"
    yield "header of a GIF alone", "gif", b"GIF89a", "unreadable"
    yield "WebP of nothing", "webp", b"RIFF\x10\0\0\0WEBPVP8 " + bytes(8), "unreadable"
    yield "floating-point TIFF", "tif", saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "unreadable"

    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "green", "blue")]
    for file_format in ("GIF", "WEBP", "PNG", "TIFF", "AVIF", "MPO"):
        if file_format != "AVIF" or features.check("avif"):
            data = saved(frames[0].copy(), file_format, save_all=True, append_images=frames[1:])
            yield f"{file_format} of three", "jpg" if file_format == "MPO" else file_format.lower(), data, "ok"
    yield "PNG named JPEG", "jpg", whole["PNG"], "ok"
    yield "JPEG named PNG", "png", jpeg, "ok"
    yield "progressive JPEG", "jpg", picture(1, 200, 150, "JPEG", progressive=True), "ok"
    for mode in ("1", "L", "LA", "P", "RGBA"):
        yield f"PNG {mode}", "png", saved(colours.convert(mode), "PNG"), "ok"
    yield "PNG of 16 bits", "png", png(2, 1, 16, 2, b"\0" + bytes(range(12))), "ok"
    yield "grey PNG of 16 bits", "png", saved(Image.fromarray(np.full((4, 4), 4000, np.uint16)), "PNG"), "ok"
    yield "palette with transparency", "png", saved(colours.quantize(16), "PNG", transparency=0), "ok"
    yield "grey JPEG", "jpeg", saved(colours.convert("L"), "JPEG"), "ok"
    yield "CMYK JPEG", "jpeg", saved(colours.convert("CMYK"), "JPEG"), "ok"
    yield "CMYK TIFF", "tiff", saved(colours.convert("CMYK"), "TIFF"), "ok"
    yield "one pixel", "png", picture(1, 1, 1), "ok"
    yield "20,000 x 1 pixels", "png", picture(1, 20_000, 1), "ok"
    yield "1 x 20,000 pixels", "png", picture(1, 1, 20_000), "ok"
    exif = Image.Exif()
    for orientation in (6, 99):
        exif[0x0112] = orientation
        yield f"EXIF orientation {orientation}", "jpg", saved(colours, "JPEG", exif=exif.tobytes()), "ok"
    yield "broken EXIF", "jpg", saved(colours, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage"), "ok"
    yield "broken profile in a JPEG", "jpg", saved(colours, "JPEG", icc_profile=b"broken" * 30), "ok"
    profile = chunk(b"iCCP", b"x\0\0no zlib stream")
    yield "broken profile in a PNG", "png", png(1, 1, rows=b"\0abc", before=profile), "ok"


def _huge_jpeg(data: bytes) -> bytes:
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", 65_500, 65_500) + data[at + 4 :]


def _huge_gif() -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0x80, 0, 0) + bytes(6)
    return screen + b"," + struct.pack("<HHHHB", 0, 0, 65_535, 65_535, 0) + b"\x02\x02\x4c\x01\0;"


# Members


class Evil:
    """Loading its pickle would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, (str(self.path), "w")


def oddities(canary: Path) -> Iterator[Kind]:
    good = picture(3)
    evil = pickle.dumps(Evil(canary / "pickle"))
    code = f"open({str(canary / 'code')!r}, 'w')\n".encode()
    shell = f"#!/bin/sh\ntouch {canary}/shell\n".encode()

    for suffix, data in {
        "pkl": evil,
        "pickle": evil,
        "pth": evil,
        "pt": evil,
        "npy": b"\x93NUMPY\1\0\x76\0{'descr': '|O', 'fortran_order': False, 'shape': (1,)}".ljust(128) + evil,
        "pyd": evil,
        "py": code,
        "pyc": code,
        "so": b"\x7fELF" + bytes(60),
        "sh": shell,
        "exe": b"MZ" + bytes(60),
        "yaml": b"!!python/object/apply:os.system ['touch x']",
        "html": b"<script>alert(1)</script>",
        "tar": member("x.jpg", good) + END,
        "zip": b"PK\3\4" + bytes(60),
    }.items():
        key = f"m-beside-{suffix}"
        yield Kind(
            f".{suffix} beside an image", member(f"{key}.{suffix}", data) + member(f"{key}.png", good), [(key, "ok")]
        )
    yield Kind("pickle named JPEG", member("m-pickle.jpg", evil), [("m-pickle", "not_an_image")])
    yield Kind("pickle alone", member("m-alone.pkl", evil), without_image=1)
    yield Kind("pickle named .cls", member("m-cls.png", good) + member("m-cls.cls", evil), [("m-cls", "ok")])
    yield Kind("__init__.py", member("__init__.py", code), without_image=1)

    outside = f"{canary}/absolute"
    yield Kind("absolute name", member(f"{outside}.png", good), [(outside, "ok")])
    yield Kind("name that climbs", member("../../canary/climbs.png", good), [("../../canary/climbs", "ok")])
    link = member("m-link", type=tarfile.SYMTYPE, linkname=str(canary))
    yield Kind("symlink out and a file behind it", link + member("m-link/x.png", good), [("m-link/x", "ok")])
    for name, kind in {
        "symlink": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "character device": tarfile.CHRTYPE,
        "block device": tarfile.BLKTYPE,
        "fifo": tarfile.FIFOTYPE,
        "folder": tarfile.DIRTYPE,
    }.items():
        yield Kind(name, member("m-none.jpg", type=kind, linkname="/etc/passwd", devmajor=1, devminor=5))
    yield Kind("hard link with a size", member("m-none.jpg", type=tarfile.LNKTYPE, linkname="good-000.png", size=99))
    yield Kind("member of unknown type", member("m-none.jpg", good, type=b"Z"))
    yield Kind("volume label", member("a label.jpg", type=b"V"))
    yield Kind("global header", member("pax_global_header", b"19 comment=0123456\n", type=tarfile.XGLTYPE))
    yield Kind("sparse member", _sparse(), [("m-sparse", "unreadable")])

    yield Kind("macOS twin", member("._m-mac.jpg", b"\0\5\x16\7") + member("m-mac.png", good), [("m-mac", "ok")])
    yield Kind("hidden file", member(".DS_Store", b"x") + member(".hidden.jpg", good))
    yield Kind("thumbnail folder", member("__MACOSX/._x.jpg", b"\0\5\x16\7"))
    yield Kind("member without a suffix", member("README", b"text"), without_image=1)
    yield Kind("caption alone", member("m-text.txt", b"text") + member("m-text.json", b"{}"), without_image=1)
    yield Kind("vector image alone", member("m-svg.svg", b"<svg/>"), without_image=1)
    yield Kind("archive in the archive", member("m-inner.tar", member("x.jpg", good) + END), without_image=1)

    def three(*names: str) -> bytes:
        return b"".join(member(name, good) for name in names)

    yield Kind("a key twice, apart", three("m-twice.png", "m-else.png", "m-twice.png"),
               [("m-twice", "ok"), ("m-else", "ok"), ("m-twice", "ok")])  # fmt: skip
    yield Kind("a key twice, together", three("m-double.png", "m-double.png"), [("m-double", "ok")])
    yield Kind("keys split apart", three("m-s1.png", "m-s2.png", "m-s1.txt", "m-s2.txt"),
               [("m-s1", "ok"), ("m-s2", "ok")], without_image=2)  # fmt: skip
    yield Kind("two images in a sample", three("m-two.jpg", "m-two.seg.png"), [("m-two", "ok")])
    yield Kind("good after bad in a sample", member("m-gb.jpg", b"x") + three("m-gb.png"), [("m-gb", "not_an_image")])
    yield Kind("one key in two folders", three("m/a/x.png", "m/b/x.png"), [("m/a/x", "ok"), ("m/b/x", "ok")])

    yield Kind("name not in UTF-8", member(b"m-caf\xe9.png", good), [("m-caf\\xe9", "ok")])
    yield Kind("PAX name not in UTF-8", pax({"path": b"m-\xff\xfe.png"}) + member("x", good), [("m-\\xff\\xfe", "ok")])
    yield Kind("control characters in a name", three("m-\x1b[31m\r\x07.png"), [("m-\x1b[31m\r\x07", "ok")])
    yield Kind("line break in a name", three("m-a\nb.png"), [("m-a\nb", "ok")])
    html = "m-<script>alert(1)</script>"
    yield Kind("HTML in a name", three(f"{html}.png"), [(html, "ok")])
    yield Kind("right-to-left mark in a name", three("m-\u202egnp.png"), [("m-\u202egnp", "ok")])
    yield Kind("formula in a name", three("=cmd|' ', {0} %s ${HOME}.png"), [("=cmd|' ', {0} %s ${HOME}", "ok")])
    yield Kind("backslashes in a name", three("C:\\m\\x.png"), [("C:\\m\\x", "ok")])
    yield Kind("dot folder", three("././m-dot.png"), [("m-dot", "ok")])
    for name, tar_format in (("GNU", tarfile.GNU_FORMAT), ("PAX", tarfile.PAX_FORMAT)):
        key = f"m-{name}-" + "n" * 300
        yield Kind(f"300 characters by {name}", member(f"{key}.png", good, tar_format=tar_format), [(key, "ok")])
    yield Kind("PAX name over another", pax({"path": "m-pax.png"}) + member("x.txt", good), [("m-pax", "ok")])
    header = member("m-size.png", size=0)
    padded = good + bytes(-len(good) % 512)
    yield Kind("PAX size over another", pax({"size": str(len(good))}) + header + padded, [("m-size", "ok")])
    yield Kind("PAX name of a folder and a comment",
               pax({"path": "m-c/x.png", "comment": "é" * 99, "mtime": "1.5"}) + member("x", good),
               [("m-c/x", "ok")])  # fmt: skip
    chain = pax({"path": "m-chain.png"}) * 500
    yield Kind("500 extended headers in a row", chain + member("x", good), [("m-chain", "ok")])


def _sparse() -> bytes:
    """A GNU sparse member of 1 MiB that holds 512 bytes."""
    block = bytearray(member("m-sparse.jpg", size=512, type=tarfile.GNUTYPE_SPARSE))
    block[257:265] = b"ustar  \0"
    block[345:500] = bytes(155)
    block[386:410] = b"%011o\0%011o\0" % ((1 << 20) - 512, 512)
    block[483:495] = b"%011o\0" % (1 << 20)
    return signed(bytes(block)) + b"x" * 512


def signed(header: bytes) -> bytes:
    """The header block with the checksum that it should have."""
    blank = header[:148] + b" " * 8 + header[156:512]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:] + header[512:]


# Shards


def shards() -> Iterator[DirtyShard]:
    a, b = member("a.png", picture(1)), member("b.png", picture(2))
    first: Rows = [("a", "ok")]
    broken = bytearray(b)
    broken[150] ^= 1

    yield DirtyShard("empty", END)
    yield DirtyShard("empty-padded", bytes(10_240))
    yield DirtyShard("text-alone", member("a.txt", b"x") + member("b.txt", b"y") + END, without_image=2)
    yield DirtyShard("archive-in-archive", member("inner.tar", a + b + END) + END, without_image=1)
    yield DirtyShard("without-end", a + b, [*first, ("b", "ok")], cut="without an end-of-archive marker")
    yield DirtyShard("cut-in-header", a + b[:300], first, cut="inside the header at byte")
    yield DirtyShard("cut-in-data", a + b[:600], [*first, ("b", "truncated")], cut="inside member 'b.png'")
    yield DirtyShard("cut-in-text", a + member("a.txt", b"x" * 900)[:600], first, cut="inside member 'a.txt'")
    long = member("n" * 300 + ".png", picture(2))
    yield DirtyShard("cut-in-long-name", a + long[:600], first, cut="inside the extended header")
    yield DirtyShard("garbage-between", a + b"garbage!" * 128 + b + END, first, cut="no tar header at byte")
    yield DirtyShard("bad-checksum", a + bytes(broken) + a + END, first, cut="no tar header at byte")
    yield DirtyShard("zeros-between", a + bytes(4096) + b + END, first, cut="data follows the end-of-archive marker")
    yield DirtyShard("two-tars", a + END + b + END, first, cut="data follows the end-of-archive marker")
    yield DirtyShard("page-after-end", a + END + b"<html>", first, cut="data follows the end-of-archive marker")
    yield DirtyShard("zeros-to-the-end", a + bytes(2 << 20), first, cut="more than any padding")
    huge = member("b.png", size=TEN_GB)
    yield DirtyShard("huge-size", a + huge + END, [*first, ("b", "truncated")], cut=f"declares {TEN_GB} bytes")
    base256 = member("b.png", size=1 << 70)
    yield DirtyShard("base-256-size", a + base256 + END, [*first, ("b", "truncated")], cut=f"declares {1 << 70} bytes")
    negative = member("b.png", size=-512, tar_format=tarfile.GNU_FORMAT)
    yield DirtyShard("negative-size", a + negative + END, first, cut="declares a negative size")
    yield DirtyShard("huge-text", a + member("a.cls", size=TEN_GB) + END, first, cut=f"declares {TEN_GB} bytes")
    yield DirtyShard("huge-pax", a + member("x", size=TEN_GB, type=tarfile.XHDTYPE) + END, first, cut="extended header")
    name = member("x", size=TEN_GB, type=tarfile.GNUTYPE_LONGNAME)
    yield DirtyShard("huge-long-name", a + name + END, first, cut="extended header")
    yield DirtyShard(
        "pax-size-no-number", a + pax({"size": "-1"}) + b + END, first, cut="gives a size that is no number"
    )
    damaged = member("x", b"999 path=z\n", type=tarfile.XHDTYPE)
    yield DirtyShard("pax-damaged", a + damaged + b + END, first, cut="is damaged")

    yield DirtyShard("zero-bytes", b"", error="not an uncompressed tar")
    yield DirtyShard("zeros", bytes(3 << 20), error="more than any padding")
    yield DirtyShard("gzip", gzip.compress(a + b + END, mtime=0), error="without gzip or zstd")
    yield DirtyShard("zstd", b"\x28\xb5\x2f\xfd" + bytes(range(256)) * 9, error="not an uncompressed tar")
    yield DirtyShard("zip", b"PK\3\4" + bytes(range(256)) * 9, error="not an uncompressed tar")
    yield DirtyShard("error-page", b"<html>403 Forbidden</html>" * 99, error="not an uncompressed tar")
    yield DirtyShard("image", picture(1, 200, 150, "JPEG"), error="not an uncompressed tar")
    yield DirtyShard("short", a[:300], error="not an uncompressed tar")
    yield DirtyShard("first-checksum", bytes(broken) + a + END, error="not an uncompressed tar")
    yield DirtyShard("damage-before-images", member("a.txt", b"x") + b"garbage!" * 64, error="before its first image")
