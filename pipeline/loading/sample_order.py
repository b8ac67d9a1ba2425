"""Decides which sample is read when: a pure function of (seed, epoch, step).

Numpy in, numpy out, no IO, no memory of the past. A source's shards, permuted once by its seed, are laid end
to end and divided into S segments equal to ±1 (N samples: the first N mod S segments are one longer). Position p of an
epoch is element p÷S of segment p mod S, so consecutive positions come from all segments. A segment is made of pieces
(the parts of shards it covers). In every epoch its pieces are permuted, `window` of them in a row form a block, and
the samples inside a block are permuted: a block is what must be within reach at one time.

All randomness is one hash (pipeline.data.hashing has mix, chain and name), the same in any language and version of
numpy:

    shards        sorted by mix(chain(seed, name, 1) ^ shard)
    pieces        sorted by mix(chain(seed, name, 2, epoch, segment) ^ piece)          piece = its rank in the segment
    samples       sorted by mix(chain(seed, name, 3, epoch, segment, block) ^ i)       i = its rank in the block
    augmentation  mix(mix(chain(seed, name, 4) ^ epoch) ^ position)

mix is a bijection, so no two hashes of one sort are equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pipeline.data.hashing import chain, mix, name_key, permutation
from pipeline.errors import DataError

SHARDS, PIECES, SAMPLES, AUGMENTATION = 1, 2, 3, 4
SEGMENTS = 64


def segments_for(shards: int, most: int = SEGMENTS) -> int:
    """The number of segments a stage fixes at its start: `most` unless there are fewer shards."""
    return max(1, min(most, shards))


def share(n: int, rank: int, world: int) -> slice:
    """Rank's part of a batch of n: [⌊rank·n/world⌋, ⌊(rank+1)·n/world⌋)."""
    return slice(rank * n // world, (rank + 1) * n // world)


def sample_seed(seed: int, source_name: str, epoch: np.ndarray, position: np.ndarray) -> np.ndarray:
    """The 64-bit augmentation seed of every (epoch, position) of a source; uint64, of the inputs' shape."""
    key = np.uint64(chain(seed, name_key(source_name), AUGMENTATION))
    return mix(mix(np.asarray(epoch, np.uint64) ^ key) ^ np.asarray(position, np.uint64))


def mirrored(seed: int, source_name: str, batch: Batch) -> np.ndarray:
    """Whether an alternating flip mirrors each sample: in its every other epoch, from the first or the second one on by
    a draw for each sample; bool [b]."""
    drawn = sample_seed(seed, f"{source_name} mirrored", batch.shard, batch.slot)
    return ((drawn + batch.epoch.astype(np.uint64)) & np.uint64(1)).astype(bool)


@dataclass(frozen=True)
class Batch:
    """Samples of one step, sorted by segment; all int64 [b].

    shard: an index into Source.counts; slot: 0 … counts[shard]-1 (a shard's copies laid end to end in index order).
    """

    epoch: np.ndarray
    position: np.ndarray
    shard: np.ndarray
    slot: np.ndarray


@dataclass(frozen=True, eq=False)
class Source:
    """One set of shards with its own order and epochs; `counts` are samples per shard, copies included.

    Each segment keeps the permutation of its latest block (4 bytes a sample), because steps walk through a
    block one after another; what has been used is forgotten, and any step can be asked for at any time.
    """

    name: str
    counts: np.ndarray
    seed: int
    segments: int = SEGMENTS
    window: int = 8

    def __post_init__(self) -> None:
        if self.total == 0:
            raise DataError(
                f"the {self.name} source holds no image in its {len(self.counts)} shards, so there is "
                "nothing to train on; check the shard pattern, or lower the selection's threshold"
            )

    @cached_property
    def total(self) -> int:
        """Samples of one epoch, N."""
        return int(np.sum(self.counts, dtype=np.int64))

    @cached_property
    def in_segments(self) -> list[_Segment]:
        """The segments: min(`segments`, N) of them."""
        order = permutation(len(self.counts), self.seed, name_key(self.name), SHARDS)
        ends = np.cumsum(np.asarray(self.counts, np.int64)[order])
        number = min(self.segments, self.total)
        length, longer = divmod(self.total, number)
        borders = [s * length + min(s, longer) for s in range(number + 1)]
        return [self._segment(s, borders[s], borders[s + 1], order, ends) for s in range(number)]

    def _segment(self, number: int, start: int, stop: int, order: np.ndarray, ends: np.ndarray) -> _Segment:
        among = slice(np.searchsorted(ends, start, "right"), np.searchsorted(ends, stop, "left") + 1)
        shard, end = order[among], ends[among]
        begin = end - np.asarray(self.counts, np.int64)[shard]
        low = np.maximum(begin, start) - begin
        length = np.minimum(end, stop) - begin - low
        full = length > 0  # an empty shard gives no piece
        return _Segment((self.seed, name_key(self.name)), number, self.window, shard[full], low[full], length[full])


class _Segment:
    """The pieces of one segment, and its orders in different epochs."""

    def __init__(
        self, keys: tuple[int, int], number: int, window: int, shard: np.ndarray, low: np.ndarray, length: np.ndarray
    ) -> None:
        self.keys, self.number, self.window = keys, number, window
        self.shard, self.low, self.length = shard, low, length
        self.epoch = -1

    def enter_epoch(self, epoch: int) -> None:
        if epoch == self.epoch:
            return
        seed, name = self.keys
        self.order = permutation(len(self.shard), seed, name, PIECES, epoch, self.number)
        length = self.length[self.order]
        self.ends = np.cumsum(length)
        self.block_ends = np.append(self.ends[self.window - 1 : -1 : self.window], self.ends[-1])
        self.shard_of = self.shard[self.order]
        self.to_slot = self.low[self.order] - (self.ends - length)  # added to a place of the epoch's sequence of pieces
        self.epoch = epoch
        self.block_start = self.block_end = 0

    @property
    def total(self) -> int:
        """Samples of the segment."""
        return int(self.length.sum())

    def block_at(self, epoch: int, element: int) -> tuple[int, np.ndarray]:
        """Of the block that holds this element of an epoch: the element at which it ends, and its pieces."""
        self.enter_epoch(epoch)
        block = int(np.searchsorted(self.block_ends, element, "right"))
        return int(self.block_ends[block]), self.order[block * self.window : (block + 1) * self.window]

    def enter_block(self, element: int) -> None:
        """The block that holds this element."""
        if self.block_start <= element < self.block_end:
            return
        seed, name = self.keys
        block = int(np.searchsorted(self.block_ends, element, "right"))
        self.block_start = int(self.block_ends[block - 1]) if block else 0
        self.block_end = int(self.block_ends[block])
        length = self.block_end - self.block_start
        order = permutation(length, seed, name, SAMPLES, self.epoch, self.number, block)
        self.inside = order.astype(np.uint32 if length < 1 << 32 else np.int64)

    def take(self, epoch: int, element: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, slot) of the given elements, ascending, of this segment in one epoch."""
        self.enter_epoch(epoch)
        at = np.empty(len(element), np.int64)  # places in the epoch's sequence of pieces
        start = 0
        while start < len(element):  # nearly always once: a batch rarely touches two blocks of a segment
            self.enter_block(int(element[start]))
            stop = start + int(np.searchsorted(element[start:], self.block_end))
            at[start:stop] = self.inside[element[start:stop] - self.block_start]
            at[start:stop] += self.block_start
            start = stop
        piece = np.searchsorted(self.ends, at, "right")
        return self.shard_of[piece], at + self.to_slot[piece]


def batch(source: Source, step: int, size: int, part: slice = slice(None)) -> Batch:
    """The `size` samples of one global step, or only a `part` of them (see `share`).

    Global positions step·size … (step+1)·size-1 run on from one epoch into the next, sorted by segment; only
    the segments of `part` are permuted, so a rank holds the blocks of its own segments.
    """
    number = len(source.in_segments)
    epoch, position = np.divmod(step * size + np.arange(size, dtype=np.int64), source.total)
    segment = position % number
    chosen = np.argsort(segment, kind="stable")[part]
    epoch, position, segment = epoch[chosen], position[chosen], segment[chosen]
    shard, slot = np.empty((2, len(chosen)), np.int64)
    element = position // number
    turns = (np.flatnonzero(np.diff(segment) | np.diff(epoch)) + 1).tolist()
    for start, stop in zip([0, *turns], [*turns, len(chosen)], strict=True):
        if start < stop:
            taken = source.in_segments[segment[start]].take(int(epoch[start]), element[start:stop])
            shard[start:stop], slot[start:stop] = taken
    return Batch(epoch, position, shard, slot)
