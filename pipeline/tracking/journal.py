"""Keeps the journal of a stage: what it measured, in order, in its folder; the truth for trackers and reports.

Local folder: `metrics.jsonl`, one line appended per record. A process killed in the middle of a line leaves a torn one:
readers skip it, the next writer removes it.

Object store: numbered parts, 1, 2, …, of whole lines, `metrics-000001.jsonl`, one every ten seconds and at `flush` and
`close`. A part is never changed: a line {"truncated": step} takes back the records before it that are of later steps.
Other files lie in the folder too, hundred thousands of them, so nobody lists it while a stage runs: the writer counts,
and who follows asks for the next number, every 15 s for all followers in a process; what this process wrote it need not
ask for.

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
PREFIX = "metrics-"
PART = re.compile(PREFIX + r"(\d{6,})\.jsonl")
TRUNCATED = "truncated"
PART_SECONDS = 10.0
ASK_SECONDS = 15.0  # between two questions for a part that was not there yet
KEPT = 32  # parts that a process remembers of a journal, for the next of its followers
TAIL = 512  # bytes before a position that must still be the same for reading to go on there


class Journal:
    """Writer of one stage's journal; one at a time. Opening it again continues it."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.waiting: list[bytes] = []  # lines not yet in a part (object stores only)
        self.part_time = time.monotonic()
        self.tail: _Tail | None = None  # once the first part is written, of that `number`
        self.number = 0
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
            if self.tail is None:
                self.number = max((_number(name) for name in _parts(self.folder)), default=0)
                self.tail = _tails[self.folder] = _Tail(short=not self.number)
            number, lines = self.number + 1, b"".join(self.waiting)
            storage.write_bytes(_part(self.folder, number), lines)
            self.waiting.clear()
            self.tail.keep(number, lines)
            self.number = self.tail.written = number
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
        if any(record["step"] > step for record in read(self.folder)[0]):
            self.waiting.append(json.dumps({TRUNCATED: step}).encode() + b"\n")
            self.flush()

    def close(self) -> None:
        self.flush()
        if self.file is not None:
            self.file.close()
        elif self.tail is not None:
            self.tail.written, self.tail = None, None  # another process may write the next part

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read(folder: str, position: int = 0, *, follow: bool = False) -> tuple[list[dict[str, Any]], int]:
    """(records after `position`, new position). Start with 0 and hand the position back to follow a journal.

    A position is opaque. Where the journal was truncated before it, all records are returned again, from the first
    on: a follower skips the steps that it knows. No journal yet: ([], 0). With `follow` it may be called as often as
    one likes, and what another process wrote to an object store in the last 30 s may be missing.
    """
    if storage.is_url(folder):
        return _read_parts(folder, position, follow)
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
    return _records(new[:end])[0], (offset << 32) + check


class _Tail:
    """The newest parts of a journal in an object store, as far as this process knows them."""

    def __init__(self, short: bool = False) -> None:
        self.parts: dict[int, bytes] = {}
        self.written: int | None = None  # the last part, while the journal is written here
        self.asked = -math.inf  # when one was asked for that was not there
        self.short = short  # no more than it remembers: no need of a listing

    def keep(self, number: int, lines: bytes) -> None:
        self.parts[number] = lines
        self.parts.pop(number - KEPT, None)
        self.short &= number <= KEPT


_tails: dict[str, _Tail] = {}  # by folder


def _read_parts(folder: str, position: int, follow: bool) -> tuple[list[dict[str, Any]], int]:
    """As `read`; a position is the number of the last part read."""
    tail = _tails.setdefault(folder, _Tail())
    if not position and not (follow and tail.short):
        return _read_all(folder, tail)
    new = []
    while (lines := _find(folder, tail, position + 1, follow)) is not None:
        new.append(lines)
        position += 1
    records, truncated = _records(b"".join(new))
    return _read_all(folder, tail) if truncated else (records, position)


def _read_all(folder: str, tail: _Tail) -> tuple[list[dict[str, Any]], int]:
    """All parts, by one listing."""
    names = _parts(folder)
    tail.short = not names
    tail.asked = time.monotonic()
    fs, inner = storage.filesystem(folder)
    content = _fetch(fs, inner, names)
    return _records(b"".join(content))[0], _number(names[-1]) if names else 0


def _find(folder: str, tail: _Tail, number: int, follow: bool) -> bytes | None:
    """A part, from memory if it can be; None where it is not there, or cannot be there yet."""
    if number in tail.parts:
        return tail.parts[number]
    if tail.written is not None:
        there = number <= tail.written
    else:
        there = not follow or time.monotonic() - tail.asked >= ASK_SECONDS
    if not there:
        return None
    asked, tail.asked = tail.asked, time.monotonic()  # before it is: two followers shall not both ask
    try:
        lines = storage.read_bytes(_part(folder, number))
    except FileNotFoundError:
        return None
    tail.keep(number, lines)
    tail.asked = asked  # the next one may be there too
    return lines


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
    names = storage.listdir(folder, prefix=PREFIX)
    return sorted((name for name in names if PART.fullmatch(name)), key=_number)


def _part(folder: str, number: int) -> str:
    return storage.join(folder, f"{PREFIX}{number:06d}.jsonl")


def _number(name: str) -> int:
    found = PART.fullmatch(name)
    return int(found[1]) if found else 0


def _keep(lines: bytes, step: int) -> bytes:
    kept = [line for line in lines.split(b"\n") if any(record["step"] <= step for record in _records(line)[0])]
    return b"".join(line + b"\n" for line in kept)


def _records(lines: bytes) -> tuple[list[dict[str, Any]], bool]:
    """The records in whole lines, without those that were taken back, and whether any were; lines that are no JSON (a
    power cut can leave zero bytes) are skipped."""
    records: list[dict[str, Any]] = []
    truncated = False
    for line in lines.split(b"\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
        elif isinstance(record, dict) and TRUNCATED in record:
            records = [known for known in records if known["step"] <= record[TRUNCATED]]
            truncated = True
    return records, truncated
