"""Chooses the parts of a remote file that are worth fetching, where only some of its samples are used."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.storage.remote_file import SKIP

WORTH = 0.5  # share of a file up to which its parts are fetched in place of the whole

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Parts:
    """Byte ranges of a file, ascending and apart: `start` and `stop` int64 [n]. A copy holds one behind the other."""

    start: Ints
    stop: Ints

    @cached_property
    def ends(self) -> Ints:
        """Where in the copy each range ends."""
        return np.cumsum(self.stop - self.start)

    @property
    def length(self) -> int:
        """Bytes of the copy."""
        return int(self.ends[-1])

    @property
    def nbytes(self) -> int:
        """What this object takes in memory."""
        return 3 * self.start.nbytes

    @cached_property
    def digest(self) -> str:
        """Tells it from other parts of the same file."""
        return hashlib.sha256(np.stack([self.start, self.stop]).astype("<i8").tobytes()).hexdigest()

    def place(self, offset: int) -> int:
        """Where in the copy the byte lies that is at `offset` in the file; it is in one of the ranges."""
        number = int(np.searchsorted(self.start, offset, "right")) - 1
        return int(self.ends[number] - self.stop[number]) + offset


def coalesce(offset: npt.ArrayLike, size: npt.ArrayLike, total: int, gap: int = SKIP) -> Parts | None:
    """The ranges that hold all [offset, offset + size) of a file of `total` bytes; None where the whole file is better.

    What lies between two of them is left out if it is longer than `gap`: a shorter one costs less than one more
    request.
    """
    start, length = np.asarray(offset, np.int64), np.asarray(size, np.int64)
    if not len(start):
        return None
    order = np.argsort(start, kind="stable")
    start = start[order]
    stop = np.maximum.accumulate(start + length[order])
    opens = np.flatnonzero(np.append(True, start[1:] - stop[:-1] > gap))
    closes = np.append(opens[1:], len(start)) - 1
    found = Parts(start[opens], stop[closes])
    return found if found.length <= WORTH * total else None
