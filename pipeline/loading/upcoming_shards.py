"""Finds which shards a rank reads next, and from which step on.

It is the order (pipeline.loading.sample_order) from the shards' side; no IO.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from pipeline.loading import sample_order

DEPTH = 2  # blocks of a segment that are looked at: the one being read, and the one that follows


@dataclass(frozen=True)
class Block:
    """Shards that are read together from global step `begins` on; `shards`: indices into Source.counts, ascending."""

    begins: int
    shards: tuple[int, ...]


def upcoming(source: sample_order.Source, step: int, size: int, part: slice) -> tuple[list[Block], int]:
    """Of every segment that `part` (see order.share) of steps of `size` reads, the block being read at `step`, which
    begins there, and the one that follows it, if need be in the next epoch. And the first step whose answer is another.

    Segments keep the permutation of the epoch asked for last: give it a Source that nobody else steps through.
    """
    blocks, changes = [], []
    number, total = len(source.in_segments), source.total
    epoch, position = divmod(step * size, total)
    for segment in segments_read(source, step, size, part).tolist():
        part_of_order = source.in_segments[segment]
        turn, element, begins = epoch, -((segment - position) // number), step  # the first element not before `step`
        if element == part_of_order.total:
            turn, element = epoch + 1, 0
        for depth in range(DEPTH):
            end, pieces = part_of_order.block_at(turn, element)
            blocks.append(Block(begins, tuple(np.unique(part_of_order.shard[pieces]).tolist())))
            if depth == 0:
                changes.append((turn * total + (end - 1) * number + segment) // size + 1)
            turn, element = (turn, end) if end < part_of_order.total else (turn + 1, 0)
            begins = (turn * total + element * number + segment) // size
    return blocks, min(changes)


def segments_read(source: sample_order.Source, step: int, size: int, part: slice) -> np.ndarray:
    """The segments, int64, that `part` of each step reads, from `step` on until the same ones come again."""
    number = min(source.segments, source.total)  # without making the segments
    steps = number // math.gcd(number, size)
    position = (step * size + np.arange(steps * size, dtype=np.int64).reshape(steps, size)) % source.total
    return np.unique(np.sort(position % number, axis=1)[:, part])
