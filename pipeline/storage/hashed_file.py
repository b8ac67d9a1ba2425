"""Takes the sha256 of a file while something else reads it."""

from __future__ import annotations

import hashlib
import io
import os
from typing import IO

BLOCK = 1 << 20


class Hashed(io.RawIOBase):
    """A seekable file that is read from its beginning; what is sought over is read too, for the sha256 of it all."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._hashed = self._position = 0
        self._size = file.seek(0, os.SEEK_END)
        file.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        self._hash_to(self._position)
        self._file.seek(self._position)
        data = self._file.read(size)
        end = self._position + len(data)
        if end > self._hashed:
            self._digest.update(memoryview(data)[self._hashed - self._position :])
            self._hashed = end
        self._position = end
        return data

    def sha256(self) -> str:
        """Hex digest of the whole file; reads what has not been read."""
        self._hash_to(self._size)
        return self._digest.hexdigest()

    def _hash_to(self, end: int) -> None:
        if self._hashed < end:
            self._file.seek(self._hashed)
        while self._hashed < end and (data := self._file.read(min(BLOCK, end - self._hashed))):
            self._digest.update(data)
            self._hashed += len(data)
