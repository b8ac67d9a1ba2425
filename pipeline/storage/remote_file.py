"""Reads a file behind a URL though the connection breaks: with patience, going on at the byte where it broke.

A `RemoteFile` asks once for everything from where it stands and reads that answer to its end: a shard read in
order costs one request. Where an answer breaks off, stays away or is an error that may pass (5xx, 408, 429, a lost
connection, too few bytes), the next request asks from the first byte that is still missing; before it lies a wait
that doubles from 0.1 s to 20 s, with jitter. Every answer must be of the object that the first one was of (ETag
or time of change, and size). Memory: one chunk of 1 MiB and what a connection buffers; a file of at most 8 MiB is
kept whole. Nothing is written to disk.
"""

from __future__ import annotations

import errno
import io
import os
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.errors import DataError, RemoteError, UserError
from pipeline.storage import range_requests
from pipeline.storage.range_requests import Answer

CHUNK = 1 << 20  # bytes taken from an answer at a time
SMALL = 8 << 20  # a file up to this size is kept whole, so that seeking in it costs no request
SKIP = 4 << 20  # a gap up to this is read and thrown away; beyond it a new request is cheaper
PROGRESS = 1 << 18  # bytes after which earlier failures are forgiven
FAILURES = 10  # in a row, without such progress, until reading is given up
FIRST_WAIT, LONGEST_WAIT = 0.1, 20.0  # seconds

Value = TypeVar("Value")
_jitter = random.SystemRandom()  # the global generator belongs to training


class Patience:
    """How often something may fail before it is given up. `shown` is the URL as messages may have it, `kind` the error
    for what no further try would mend; what is not there is a FileNotFoundError, what is there already a
    FileExistsError."""

    def __init__(self, shown: str, kind: type[UserError] = DataError) -> None:
        self.shown, self.kind = shown, kind
        self.failures = self.gained = 0

    def progress(self, number: int) -> None:
        self.gained += number
        if self.gained >= PROGRESS:
            self.failures = 0

    def failed(self, error: Exception, at: str = "") -> None:
        """Wait before the next try, or raise: at once where a try more would end the same."""
        if not range_requests.may_pass(error):
            raise _refusal(error, self.shown, self.kind) from error
        self.failures += 1
        self.gained = 0
        if self.failures >= FAILURES:
            raise RemoteError(
                f"{self.shown} failed {self.failures} times in a row{at}, at last with {range_requests.words(error)}; "
                "look at the server or the network and run again: what is finished is kept"
            ) from error
        time.sleep(min(LONGEST_WAIT, FIRST_WAIT * 2 ** (self.failures - 1)) * _jitter.uniform(0.5, 1.0))


def persist(shown: str, call: Callable[[], Value], kind: type[UserError] = DataError) -> Value:
    """`call()`, an idempotent request, tried again while its errors may pass."""
    patience = Patience(shown, kind)
    while True:
        try:
            return call()
        except Exception as error:
            patience.failed(error)


def read_range(fs: Any, inner: str, shown: str, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` by one request where it goes well; fewer where the file ends before."""
    if range_requests.streams(fs):
        with RemoteFile(fs, inner, shown, offset, offset + size) as file:
            return file.read(size)
    return persist(shown, lambda: bytes(fs.cat_file(inner, start=offset, end=offset + size)))


def _refusal(error: Exception, shown: str, kind: type[UserError]) -> Exception:
    """What to raise for an error that no further try would mend."""
    if isinstance(error, (UserError, FileExistsError)):
        return error
    if isinstance(error, FileNotFoundError) or range_requests.status_of(error) == 404:
        return FileNotFoundError(errno.ENOENT, "there is no such file", shown)
    return kind(
        f"cannot reach {shown}: {range_requests.words(error)}; look at its name, at your rights there, and at the "
        "credentials and the endpoint in the environment (for s3:// AWS_ACCESS_KEY_ID …, AWS_ENDPOINT_URL_S3)"
    )


class RemoteFile(io.RawIOBase):
    """A read-only, seekable file. `start` and `stop`: the part that will be read, where it is known beforehand."""

    def __init__(self, fs: Any, inner: str, shown: str, start: int = 0, stop: int | None = None) -> None:
        self.shown = shown
        self._source = range_requests.source(fs, inner)
        self._stop = stop
        self._patience = Patience(shown)
        self._answer: Answer | None = None
        self._identity: tuple[int, str] | None = None  # size and ETag, or what the server has for it
        self._position = start  # of the reader
        self._data, self._offset = b"", start  # the latest chunk and where in the file it begins

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        if self._identity is None:
            self._connect()
        assert self._identity is not None
        return self._identity[0]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: 0}[whence]
        self._position = max(0, offset + (self.size if whence == os.SEEK_END else base))
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """`size` bytes, fewer only where the file (or `stop`) ends; all that is left for -1."""
        left = self._end() - self._position
        wanted = left if size is None or size < 0 else min(size, left)
        parts = []
        while wanted > 0:
            self._move()
            at = self._position - self._offset
            part = self._data[at : at + wanted]
            parts.append(part)
            self._position += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        self._hang_up()
        self._data = b""
        super().close()

    def _end(self) -> int:
        return self.size if self._stop is None else min(self.size, self._stop)

    def _move(self) -> None:
        """Make the chunk in hand the one that holds the position."""
        gap = self._position - (self._offset + len(self._data))
        if gap < 0 and self._position >= self._offset:
            return
        if gap < 0 or gap > SKIP:
            self._hang_up()
            self._data, self._offset = b"", self._position
        while self._position >= self._offset + len(self._data):
            self._offset += len(self._data)
            self._data = b""
            self._data = self._next_chunk()

    def _next_chunk(self) -> bytes:
        """What follows the chunk in hand, at least one byte of it."""
        while True:
            try:
                answer = self._answer or self._ask(self._offset)
                data = answer.read(SMALL if self._offset == 0 and self.size <= SMALL else CHUNK)
                if not data:
                    raise EOFError(f"the answer ended at byte {self._offset} of {self._end()}")
            except Exception as error:
                self._failed(error)
                continue
            self._patience.progress(len(data))
            return data

    def _connect(self) -> None:
        while self._answer is None:
            try:
                self._ask(self._offset + len(self._data))
            except Exception as error:
                self._failed(error)

    def _ask(self, start: int) -> Answer:
        answer = self._answer = self._source.ask(start, self._stop)
        found = (answer.size, answer.stamp)
        if self._identity is None:
            self._identity = found
        elif self._identity != found:
            raise DataError(
                f"{self.shown} changed while it was read: it had {_describe(*self._identity)} and has "
                f"{_describe(*found)}; bring the old file back and run again, or begin anew with what is there"
            )
        return answer

    def _failed(self, error: Exception) -> None:
        self._hang_up()
        self._patience.failed(error, f" at byte {self._offset}")

    def _hang_up(self) -> None:
        if self._answer is not None:
            self._answer.close()
            self._answer = None


def _describe(size: int, stamp: str) -> str:
    return f"{size} bytes" + (f" and the mark {stamp}" if stamp else "")
