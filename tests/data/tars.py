"""Tiny tars and images for tests; whole ones by `make`, headers of any kind by `member`, damage by hand."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

END = bytes(1024)


def picture(seed: int = 0, width: int = 12, height: int = 10, file_format: str = "PNG", **options: Any) -> bytes:
    """A random picture, smooth enough for lossy formats."""
    coarse = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR).save(buffer, file_format, **options)
    return buffer.getvalue()


def member(
    name: str | bytes,
    data: bytes = b"",
    *,
    size: int | None = None,
    tar_format: int = tarfile.GNU_FORMAT,
    **fields: Any,
) -> bytes:
    """Header, data and padding of one member. `size` may lie; names in bytes need not be UTF-8."""
    text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    info = tarfile.TarInfo(text)
    info.size = len(data) if size is None else size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tar_format, "utf-8", "surrogateescape") + data + bytes(-len(data) % 512)


def pax(records: dict[str, str | bytes]) -> bytes:
    """An extended header with these records, to be put before a member."""
    whole = b""
    for key, value in records.items():
        text = value if isinstance(value, bytes) else value.encode()
        rest = b" " + key.encode() + b"=" + text + b"\n"
        size = len(rest) + 1
        while len(str(size)) + len(rest) != size:  # a record's length counts its own digits
            size += 1
        whole += str(size).encode() + rest
    return member("pax", whole, type=tarfile.XHDTYPE)


def make(path: Path | str, members: dict[str, bytes] | list[tuple[str, bytes]], **options: Any) -> str:
    """Write a whole tar of (name, data) pairs; its path."""
    pairs = members.items() if isinstance(members, dict) else members
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(b"".join(member(name, data, **options) for name, data in pairs) + END)
    return str(path)


def shard(path: Path | str, images: int = 3, *, labels: list[int] | None = None, start: int = 0) -> str:
    """A whole shard of random PNGs 000.png …, with .cls members where labels are given."""
    members: list[tuple[str, bytes]] = []
    for number in range(images):
        members.append((f"{start + number:03d}.png", picture(start + number)))
        if labels is not None:
            members.append((f"{start + number:03d}.cls", str(labels[number]).encode()))
    return make(path, members)


def truncated(path: Path | str, size: int) -> str:
    """Cut the file at `size` bytes; its path."""
    data = Path(path).read_bytes()
    Path(path).write_bytes(data[:size])
    return str(path)
