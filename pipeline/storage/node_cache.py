"""Caches remote shards, and files of their rows, on a node's own disk, shared by its processes and limited in size.

    <folder>/.lock            held while room is made
    <folder>/.tmp-<key>       a download under way: locked by its process, already as large as it will be
    <folder>/<key>.tar        a whole shard, or parts of one; its time of change is when it was last used
    <folder>/<key>.crc32      the CRC-32 of it as it came in

The key is a hash of URL, size, ETag and parts, so a shard that changed is another one. Processes that want the same
shard wait for the one that downloads it. A download gets its name when it is whole; the locks of a killed process end
with it, and what it left is deleted when room is made. A copy of another size, or, where a whole shard is read, with
other bytes than came in is deleted and fetched again; single images have a hash of their own. The copies used longest
ago make room; one that is being read lives on until it is closed. A shard for which there is no room is read past the
cache.

Where copies are fetched before they are needed (pipeline.loading.prefetch), readers are given `Ready` and wait for no
download.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.storage import remote_file
from pipeline.storage.checked_copy import BLOCK, crc32_of, is_as_it_came

if TYPE_CHECKING:
    from pipeline.storage.byte_ranges import Parts

SPARED = 60.0  # seconds for which a copy that was used makes no room for what is fetched before it is needed
LOCK_SECONDS = 600.0  # another process may download a shard for so long before we read it past the cache
_described: dict[tuple[int, str], tuple[int, str]] = {}  # (process, URL) -> (size, ETag): asked for once


@dataclass(frozen=True)
class Cache:
    """`limit`: bytes that all copies together may take. Picklable; local shards are read where they are."""

    folder: str
    limit: int

    def check(self) -> None:
        """ConfigError where this process cannot write to the folder."""
        try:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise self._unusable(error) from error

    def open_read(self, path: str) -> IO[bytes]:
        """The shard, seekable: its copy, after a download if need be."""
        copy = self._copy(path) if storage.is_url(path) else None
        if copy is not None and not is_as_it_came(copy):
            copy.close()
            self.discard(path)
            copy = self._copy(path)
        return copy or storage.open_read(path)

    def discard(self, path: str, parts: Parts | None = None) -> None:
        """Delete the copies of a shard that turned out to be damaged, and of parts of it."""
        for each in {None, parts}:
            _remove(Path(self.folder, f"{_key(path, each)}.tar"))

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; fewer where the file ends before."""
        copy = self._copy(path) if storage.is_url(path) else None
        if copy is None:
            return storage.read_range(path, offset, size)
        with copy:
            copy.seek(offset)
            return copy.read(size)

    def find(self, path: str, parts: Parts | None) -> IO[bytes] | None:
        """The copy of a remote shard or of parts of it, opened; None where there is none that can be."""
        try:
            return _use(Path(self.folder, f"{_key(path, parts)}.tar"), _size(path, parts))
        except OSError:  # of the folder: whoever fetches says what is wrong with it
            return None

    def fetch(self, path: str, parts: Parts | None, closed: threading.Event) -> bool:
        """Have a copy before it is needed; False where there is no room but that of copies just used, and when
        `closed`. OSError ENOSPC: the disk is full."""
        copy = self._copy(path, parts, time.time_ns() - int(SPARED * 1e9), closed)
        if copy is not None:
            copy.close()
        return copy is not None

    def _copy(
        self, path: str, parts: Parts | None = None, spared: int | None = None, closed: threading.Event | None = None
    ) -> IO[bytes] | None:
        """The whole copy, opened; None where there is no room for it, or once `closed`.

        spared: copies used since this time, in ns, make no room."""
        key, size = _key(path, parts), _size(path, parts)
        whole, half = Path(self.folder, f"{key}.tar"), Path(self.folder, f".tmp-{key}")
        try:
            if (copy := _use(whole, size)) is not None:
                return copy
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            with _locked(half) as file:
                if (copy := _use(whole, size)) is not None:  # another process was faster
                    half.unlink()
                    return copy
                try:
                    fits = self._make_room(file, size, spared) and _download(path, parts, file, size, closed)
                    if fits:
                        file.seek(0)
                        whole.with_suffix(".crc32").write_text(f"{crc32_of(file):08x}\n")
                        half.rename(whole)
                finally:
                    half.unlink(missing_ok=True)
                return _use(whole, size) if fits else None
        except TimeoutError:  # as where there is no room
            return None
        except OSError as error:
            if error.errno == errno.ENOSPC and spared is None:  # a reader reads past the cache
                return None
            if error.errno == errno.ENOSPC or error.filename is None or not str(error.filename).startswith(self.folder):
                raise
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"data.cache: {self.folder} cannot hold copies of shards: {error.strerror}; name a folder on each "
            "node's own disk that its processes may write to"
        )

    def _make_room(self, file: IO[bytes], size: int, spared: int | None) -> bool:
        """Take `size` bytes of the limit for the download `file`, which holds its lock; False where that cannot be."""
        with Path(self.folder, ".lock").open("ab") as door:
            _lock(door)
            copies, taken = [], size
            for entry in Path(self.folder).iterdir():
                with contextlib.suppress(FileNotFoundError):
                    if storage.is_temporary(entry.name):
                        if not os.path.samestat(entry.stat(), os.fstat(file.fileno())) and not _sweep(entry):
                            taken += entry.stat().st_size
                    elif entry.suffix == ".tar":
                        found = entry.stat()
                        taken += found.st_size
                        if spared is None or found.st_mtime_ns < spared:
                            copies.append((found.st_mtime_ns, entry, found.st_size))
            if taken - sum(freed for _, _, freed in copies) > self.limit:
                return False  # before copies are lost for nothing
            copies.sort()
            while taken > self.limit:
                _, oldest, freed = copies.pop(0)
                _remove(oldest)
                taken -= freed
            file.truncate(size)  # seen by others as taken from now on
            return True


@dataclass(frozen=True)
class Ready:
    """A cache for a reader who waits for no download: where no copy is there yet, the bytes are asked for alone."""

    cache: Cache
    parts: Parts | None

    def read_range(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, which lie in the parts, if there are any; fewer where the file ends before."""
        if storage.is_url(path):
            for parts in dict.fromkeys([self.parts, None]):
                if (copy := self.cache.find(path, parts)) is not None:
                    with copy:
                        copy.seek(parts.place(offset) if parts else offset)
                        return copy.read(size)
        return storage.read_range(path, offset, size)

    def discard(self, path: str) -> None:
        """`Cache.discard` of the shard and of the parts."""
        self.cache.discard(path, self.parts)


def _key(path: str, parts: Parts | None) -> str:
    size, stamp = _describe(path)
    which = f"\n{parts.digest}" if parts else ""
    return hashlib.sha256(f"{storage.redact(path)}\n{size}\n{stamp}{which}".encode()).hexdigest()[:32]


def _describe(path: str) -> tuple[int, str]:
    key = (os.getpid(), path)
    if key not in _described:
        _described[key] = storage.describe(path)
    return _described[key]


def _size(path: str, parts: Parts | None) -> int:
    return parts.length if parts else _describe(path)[0]


def _remove(whole: Path) -> None:
    whole.unlink(missing_ok=True)
    whole.with_suffix(".crc32").unlink(missing_ok=True)


def _use(whole: Path, size: int) -> IO[bytes] | None:
    """A copy, opened and marked as used now; None where there is none of this size."""
    try:
        file = whole.open("rb")
    except FileNotFoundError:
        return None
    if os.fstat(file.fileno()).st_size != size:
        file.close()
        _remove(whole)
        return None
    with contextlib.suppress(PermissionError):  # another user's
        os.utime(file.fileno())
    return file


def _lock(file: IO[bytes]) -> None:
    """Take the lock of a file. TimeoutError where another process, stopped perhaps, does not let go of it."""
    end = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise TimeoutError from None
        time.sleep(0.02)


@contextlib.contextmanager
def _locked(half: Path) -> Iterator[IO[bytes]]:
    """The file of a download, created if need be, once no other process works on it."""
    while True:
        with os.fdopen(os.open(half, os.O_RDWR | os.O_CREAT, 0o666), "rb+") as file:
            _lock(file)
            # Whoever held the lock may have given the file its final name, or deleted it: this is another one then.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(half.stat(), os.fstat(file.fileno())):
                    file.truncate(0)
                    yield file
                    return


def _download(path: str, parts: Parts | None, file: IO[bytes], size: int, closed: threading.Event | None) -> bool:
    """Fill the file; False once `closed`."""
    for start, stop in zip(parts.start.tolist(), parts.stop.tolist(), strict=True) if parts else [(0, None)]:
        with remote_file.RemoteFile(*storage.filesystem(path), storage.redact(path), start, stop) as source:
            while block := source.read(BLOCK):
                if closed is not None and closed.is_set():
                    return False
                file.write(block)
    if file.tell() != size:
        raise DataError(
            f"shard {storage.redact(path)} changed since its samples were found: of {size} bytes only {file.tell()} "
            "are there; bring the old file back, or start a new output"
        )
    file.flush()
    os.fsync(file.fileno())  # or a power cut could leave the name without the bytes
    return True


def _sweep(half: Path) -> bool:
    """Delete what a killed process left; False where its process lives."""
    with half.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        with contextlib.suppress(FileNotFoundError):  # nor one that another process has made meanwhile
            if os.path.samestat(half.stat(), os.fstat(file.fileno())):
                half.unlink()
                return True
        return False
