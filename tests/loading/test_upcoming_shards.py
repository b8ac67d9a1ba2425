"""What is announced is what is read: the shards' side of the order against the order itself.

Run: pytest tests/loading/test_upcoming_shards.py
"""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.loading.sample_order import Source, batch, share
from pipeline.loading.upcoming_shards import segments_read, upcoming

SHAPES = [  # counts per shard, segments, window, images of a step
    ([30] * 40, 4, 2, 8),
    ([30] * 40, 4, 2, 13),
    ([17, 40, 3, 0, 25] * 6, 5, 3, 3),
    ([50, 60, 70], 3, 8, 6),
    ([5] * 32, 32, 8, 16),
]


def source(counts: list[int], segments: int, window: int) -> Source:
    return Source("pseudo", np.array(counts, np.int64), 3, segments, window)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize(("counts", "segments", "window", "size"), SHAPES)
def test_whatever_is_read_was_announced(counts: list[int], segments: int, window: int, size: int, world: int) -> None:
    read, asked = source(counts, segments, window), source(counts, segments, window)
    for rank in range(world):
        part = share(size, rank, world)
        for step in range(0, 2 * sum(counts) // size, 7):
            blocks, changes = upcoming(asked, step, size, part)
            assert [block.begins >= step for block in blocks] == [True] * len(blocks) and changes > step
            now = {shard for block in blocks if block.begins == step for shard in block.shards}
            assert set(batch(read, step, size, part).shard.tolist()) <= now, (rank, step)


@pytest.mark.parametrize(("counts", "segments", "window", "size"), SHAPES[:4])
def test_a_block_is_first_read_when_it_is_said_to_begin(
    counts: list[int], segments: int, window: int, size: int
) -> None:
    """Every shard in a block, one segment alone: then nothing else reads them in that epoch."""
    counts = [count + 1 for count in counts]
    read, asked = source(counts, 1, window), source(counts, 1, window)
    per_epoch = sum(counts) // size
    steps = [set(batch(read, step, size).shard.tolist()) for step in range(per_epoch)]
    for step in range(per_epoch):
        (current, after), _ = upcoming(asked, step, size, slice(None))
        assert current.begins == step and steps[step] & set(current.shards)
        if after.begins < per_epoch:
            first = next(at for at in range(step, per_epoch) if steps[at] & set(after.shards) - set(current.shards))
            assert after.begins == first


@pytest.mark.parametrize(("counts", "segments", "window", "size"), SHAPES)
def test_the_answer_changes_when_it_is_said_to(counts: list[int], segments: int, window: int, size: int) -> None:
    asked = source(counts, segments, window)

    def shards(step: int) -> list[tuple[int, ...]]:
        return [block.shards for block in upcoming(asked, step, size, slice(None))[0]]

    step = 0
    for _ in range(4):
        changes = upcoming(asked, step, size, slice(None))[1]
        assert all(shards(other) == shards(step) for other in {(step + changes) // 2, changes - 1})
        if window < len(counts) / segments:  # else the next epoch's block is the same
            assert shards(changes) != shards(step)
        step = changes


def test_a_rank_reads_its_own_segments() -> None:
    src = source([10] * 64, 64, 8)
    assert segments_read(src, 5, 128, share(128, 1, 4)).tolist() == list(range(16, 32))
    assert segments_read(src, 5, 8, share(8, 0, 2)).tolist() == [s for s in range(64) if s % 8 < 4]
