"""Keeps the journal of a stage: what it measured, in order, in its folder; the truth for trackers and reports.

Local folder: `metrics.jsonl`, one line appended per record. Object store: numbered parts
`metrics-000001.jsonl` of whole lines, one every ten seconds and at `flush` and `close`. A process killed in
the middle of a line leaves a torn one: readers skip it, the next writer removes it.

A record is strict JSON: {"step": int, "total": int or null, "time": seconds since 1970, name: value …}. JSON
has no number for NaN and infinities: they are written as null, so readers skip values that are no numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from pipeline import storage
from pipeline.errors import OutputError
from pipeline.storage import remote_file

NAME = "metrics.jsonl"
PART = re.compile(r"metrics-(\d{6,})\.jsonl")
PART_SECONDS = 10.0
TAIL = 512  # bytes before a position that must still be the same for reading to go on there


class Journal:
    """Writer of one stage's journal; one at a time. Opening it again continues it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.waiting: list[bytes] = []  # lines not yet in a part (object stores only)
        self.part_time = time.monotonic()
        self.file = None if storage.is_url(folder) else _open(folder)

    def log(self, step: int, total: int | None = None, **values: float | int | str) -> None:
        """Append one record. `step` counts from 0 up to `total` (None: unknown). OutputError: it cannot be written."""
        record: dict[str, Any] = {"step": int(step), "total": total, "time": round(time.time(), 3)}
        record.update((name, _plain(value)) for name, value in values.items())
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        if self.file is not None:
            with self._telling():
                self.file.write(line)
                self.file.flush()
            return
        self.waiting.append(line)
        if time.monotonic() - self.part_time >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Make all records durable: before a checkpoint counts as written, or its records may be lost."""
        if self.file is not None:
            with self._telling():
                self.file.flush()
                os.fsync(self.file.fileno())
        elif self.waiting:
            last = max((_number(name) for name in _parts(self.folder)), default=0)
            part = storage.join(self.folder, f"metrics-{last + 1:06d}.jsonl")
            storage.write_bytes(part, b"".join(self.waiting))
            self.waiting.clear()
        self.part_time = time.monotonic()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"cannot write {storage.join(self.folder, NAME)}: {(error.strerror or str(error)).lower()}; make room "
                "there and run again"
            ) from error

    def truncate(self, step: int) -> None:
        """Drop the records after `step`: a run resumed from the checkpoint of `step` measures them again."""
        if self.file is not None:
            self.file.close()
            path = storage.join(self.folder, NAME)
            old = storage.read_bytes(path)
            kept = _keep(old, step)
            if kept != old:
                storage.write_bytes(path, kept)
            self.file = _open(self.folder)
            return
        self.flush()
        for name in reversed(_parts(self.folder)):  # last first: interrupted, a beginning remains
            path = storage.join(self.folder, name)
            old = storage.read_bytes(path)
            kept = _keep(old, step)
            if not kept:
                storage.remove(path)
            elif kept != old:
                storage.write_bytes(path, kept)

    def close(self) -> None:
        self.flush()
        if self.file is not None:
            self.file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read(folder: str, position: int = 0) -> tuple[list[dict[str, Any]], int]:
    """(records after `position`, new position). Start with 0 and hand the position back to follow a journal.

    A position is opaque. Where the journal was truncated before it, all records are returned again, from the first
    on: a follower skips the steps that it knows. No journal yet: ([], 0).
    """
    if storage.is_url(folder):
        return _read_parts(folder, position)
    offset, check = divmod(position, 1 << 32)
    try:
        with storage.open_read(storage.join(folder, NAME)) as file:
            file.seek(max(0, offset - TAIL))
            if zlib.crc32(file.read(min(offset, TAIL))) != check:
                offset = 0
            file.seek(offset)
            new = file.read()
            end = new.rfind(b"\n") + 1
            offset += end
            file.seek(max(0, offset - TAIL))
            check = zlib.crc32(file.read(min(offset, TAIL)))
    except FileNotFoundError:
        return [], 0
    return _records(new[:end]), (offset << 32) + check


def _read_parts(folder: str, position: int) -> tuple[list[dict[str, Any]], int]:
    """As `read`; a position is the number of the last part read and a checksum of it."""
    number, check = divmod(position, 1 << 32)
    fs, inner = storage.filesystem(folder)
    names = _parts(folder)
    wanted = [name for name in names if _number(name) >= number]
    content = _fetch(fs, inner, wanted)
    if number and (not wanted or _number(wanted[0]) != number or zlib.crc32(content[0]) != check):
        wanted, number = names, 0
        content = _fetch(fs, inner, wanted)
    if not wanted:
        return [], 0
    new = content[1:] if number else content
    return _records(b"".join(new)), (_number(wanted[-1]) << 32) + zlib.crc32(content[-1])


def _fetch(fs: Any, inner: str, names: list[str]) -> list[bytes]:
    """Contents of the parts, fetched concurrently where the file system can."""
    if not names:
        return []
    paths = [fs._strip_protocol(storage.join(inner, name)) for name in names]
    found = remote_file.persist(inner, lambda: fs.cat(paths))
    if isinstance(found, bytes):
        return [found]
    return [found[path] for path in paths]


def _open(folder: str) -> BinaryIO:
    """The journal opened for appending, without the torn line that a killed process may have left."""
    storage.make_folder(folder)
    file = Path(folder, NAME).open("ab+")  # noqa: SIM115 - open as long as the stage runs
    size = end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 4096)
        file.seek(start)
        newline = file.read(end - start).rfind(b"\n")
        end = start + newline + 1 if newline >= 0 else start
        if newline >= 0:
            break
    if end < size:
        file.truncate(end)
    return file


def _plain(value: Any) -> float | int | str | None:
    """`value` (numpy and torch scalars too) as JSON can hold it."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parts(folder: str) -> list[str]:
    return sorted((name for name in storage.listdir(folder) if PART.fullmatch(name)), key=_number)


def _number(name: str) -> int:
    found = PART.fullmatch(name)
    return int(found[1]) if found else 0


def _keep(lines: bytes, step: int) -> bytes:
    kept = [line for line in lines.split(b"\n") if any(record["step"] <= step for record in _records(line))]
    return b"".join(line + b"\n" for line in kept)


def _records(lines: bytes) -> list[dict[str, Any]]:
    """The records in whole lines; lines that are no JSON (a power cut can leave zero bytes) are skipped."""
    records = []
    for line in lines.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records
