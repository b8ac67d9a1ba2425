"""Ranges of a file that hold what is wanted: against a plain set of bytes."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.storage.byte_ranges import coalesce


def test_ranges_are_merged_over_short_gaps() -> None:
    parts = coalesce([900, 0, 130, 100], [50, 10, 20, 30], total=10_000, gap=89)
    assert parts is not None
    assert parts.start.tolist() == [0, 100, 900] and parts.stop.tolist() == [10, 150, 950]
    assert parts.length == 110
    merged = coalesce([900, 0, 130, 100], [50, 10, 20, 30], total=10_000, gap=90)
    assert merged is not None and merged.start.tolist() == [0, 900] and merged.stop.tolist() == [150, 950]
    assert parts.digest != merged.digest


def test_the_whole_file_is_better_where_most_of_it_is_wanted() -> None:
    assert coalesce([0, 600], [300, 201], total=1000, gap=10) is None
    assert coalesce([0, 600], [300, 200], total=1000, gap=10) is not None
    assert coalesce([], [], total=1000) is None and coalesce([0], [10], total=0) is None


@pytest.mark.parametrize("seed", range(4))
def test_a_copy_of_the_parts_holds_every_sample_at_its_place(seed: int) -> None:
    draw = np.random.default_rng(seed)
    file = draw.bytes(20_000)
    offset = draw.choice(19_000, 30, replace=False)
    size = draw.integers(1, 200, 30)  # some overlap
    parts = coalesce(offset, size, len(file), gap=int(draw.integers(1, 600)))
    assert parts is not None
    copy = b"".join(file[start:stop] for start, stop in zip(parts.start, parts.stop, strict=True))
    assert parts.length == len(copy)
    for at, length in zip(offset.tolist(), size.tolist(), strict=True):
        assert copy[parts.place(at) :][:length] == file[at : at + length]
