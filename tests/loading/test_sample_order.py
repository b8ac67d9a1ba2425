"""The order of training data: numpy against plain loops, and what training relies on.

Run: pytest tests/loading/test_sample_order.py
"""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest

from pipeline.data import hashing
from pipeline.errors import DataError
from pipeline.loading import sample_order
from pipeline.loading.sample_order import Source, batch, mirrored, sample_seed, share

MASK = (1 << 64) - 1
PINNED_CHAIN = 15020427595393229491
PINNED_EPOCH = [1, 1, 1, 1, 0, 1, 1, 0, 1, 1]
PINNED_POSITION = [0, 4, 1, 5, 30, 2, 6, 31, 3, 7]
PINNED_SHARD = [2, 2, 1, 1, 3, 3, 3, 0, 0, 0]
PINNED_SLOT = [4, 2, 6, 4, 2, 5, 4, 1, 1, 2]
PINNED_SEEDS = [7023786054642602454, 3999254270754606063, 4300976417295538578]
SHAPES = [  # counts per shard, segments, window
    ([7, 11, 5, 9], 4, 2),
    ([10] * 12, 4, 1),
    ([100, 1, 0, 1, 37], 3, 8),
    ([1, 1, 1], 64, 8),
    ([0, 0, 1], 5, 3),
    ([13], 1, 1),
    ([250, 3, 3, 3, 3, 3, 250], 6, 2),
    (list(range(40)), 7, 3),
    ([0, 64, 0, 0], 64, 8),
]


def source(counts, segments=4, window=2, seed=3, name="labelled"):
    return Source(name, np.array(counts, np.int64), seed, segments, window)


# A second implementation, from the module's docstring alone: python integers and loops.


def mix(x):
    z = (x + 0x9E3779B97F4A7C15) & MASK
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def chain(*keys):
    h = 0
    for key in keys:
        h = mix(h ^ key)
    return h


def name_of(name):
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def plain_epoch(src, epoch):
    """[(shard, slot)] by position."""
    name = name_of(src.name)
    shards = sorted(range(len(src.counts)), key=lambda i: mix(chain(src.seed, name, 1) ^ i))
    flat = [(shard, slot) for shard in shards for slot in range(src.counts[shard])]
    number = min(src.segments, len(flat))
    segments, start = [], 0
    for s in range(number):
        stop = start + len(flat) // number + (s < len(flat) % number)
        pieces = []
        for shard, slot in flat[start:stop]:
            if not pieces or pieces[-1][0][0] != shard:
                pieces.append([])
            pieces[-1].append((shard, slot))
        key = chain(src.seed, name, 2, epoch, s)
        pieces = [pieces[i] for i in sorted(range(len(pieces)), key=lambda i: mix(key ^ i))]
        sequence = []
        for block, first in enumerate(range(0, len(pieces), src.window)):
            samples = [sample for piece in pieces[first : first + src.window] for sample in piece]
            key = chain(src.seed, name, 3, epoch, s, block)
            sequence += [samples[i] for i in sorted(range(len(samples)), key=lambda i: mix(key ^ i))]
        segments.append(sequence)
        start = stop
    return [segments[p % number][p // number] for p in range(len(flat))]


def plain_batch(src, step, size):
    """[(epoch, position, shard, slot)] sorted by segment."""
    total = sum(map(int, src.counts))
    epochs = {}
    rows = []
    for place in range(step * size, (step + 1) * size):
        epoch, position = divmod(place, total)
        if epoch not in epochs:
            epochs[epoch] = plain_epoch(src, epoch)
        rows.append((epoch, position, *epochs[epoch][position]))
    return sorted(rows, key=lambda row: row[1] % min(src.segments, total))


def rows(b):
    return list(zip(b.epoch.tolist(), b.position.tolist(), b.shard.tolist(), b.slot.tolist(), strict=True))


@pytest.mark.parametrize(("counts", "segments", "window"), SHAPES)
@pytest.mark.parametrize("size", [1, 10, 129])
def test_equals_the_plain_implementation(counts, segments, window, size):
    src = source(counts, segments, window, seed=11)
    for step in range(8):
        assert rows(batch(src, step, size)) == plain_batch(src, step, size)


@pytest.mark.parametrize(("counts", "segments", "window"), SHAPES)
@pytest.mark.parametrize("size", [3, 16, 50])
def test_every_epoch_visits_every_sample_exactly_once(counts, segments, window, size):
    src, total, epochs = source(counts, segments, window), sum(counts), 3
    seen = Counter()
    for step in range(-(-epochs * total // size)):
        seen.update((e, shard, slot) for e, _, shard, slot in rows(batch(src, step, size)) if e < epochs)
    expected = {(e, s, i) for e in range(epochs) for s, n in enumerate(counts) for i in range(n)}
    assert set(seen) == expected
    assert max(seen.values()) == 1


def test_segments_are_equal_to_one_and_the_first_are_longer():
    cut = source([10, 13, 20], segments=8).in_segments
    assert [int(segment.length.sum()) for segment in cut] == [6, 6, 6, 5, 5, 5, 5, 5]


@pytest.mark.parametrize("size", [8, 50, 97])
def test_shares_of_any_number_of_ranks_make_up_the_batch(size):
    src = source([100, 50, 3, 90], segments=8, window=1)
    for step in range(12):
        whole = rows(batch(src, step, size))
        for world in (1, 2, 3, 5, 8):
            parts = [rows(batch(src, step, size, share(size, rank, world))) for rank in range(world)]
            assert [row for part in parts for row in part] == whole
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_run_resumes_at_any_step():
    undisturbed = source([31, 17, 40, 5], segments=5)
    steps = [rows(batch(undisturbed, step, 23)) for step in range(20)]
    for start in (1, 4, 7, 19):
        fresh = source([31, 17, 40, 5], segments=5)
        assert [rows(batch(fresh, step, 23)) for step in range(start, 20)] == steps[start:]
    assert rows(batch(undisturbed, 2, 23)) == steps[2]  # going back is no different


def test_a_rank_reads_the_same_shards_every_epoch():
    src, size, world = source([64] * 32, segments=16, window=2), 64, 4
    steps = src.total // size
    read = [
        [
            {
                shard
                for step in range(epoch * steps, (epoch + 1) * steps)
                for shard in batch(src, step, size, share(size, rank, world)).shard.tolist()
            }
            for rank in range(world)
        ]
        for epoch in range(3)
    ]
    assert read[0] == read[1] == read[2]
    assert sorted(shard for shards in read[0] for shard in shards) == list(range(32))


def test_a_window_bounds_the_shards_in_use():
    src = source([50] * 40, segments=2, window=3)
    for step in range(src.total // 20):
        assert len(set(batch(src, step, 20).shard.tolist())) <= 2 * (3 + 3)  # two blocks where they meet


def test_orders_differ_by_seed_source_and_epoch_but_not_by_object():
    def first(step=0, **kw):
        return [(s, i) for _, _, s, i in rows(batch(source([50] * 6, **kw), step, 300))]

    assert first() == first()
    variants = [first(), first(seed=4), first(name="pseudo"), first(step=1)]
    assert len({tuple(v) for v in variants}) == 4
    assert len({tuple(sorted(v)) for v in variants}) == 1


def test_the_permutation_is_uniform_enough():
    src = source([1000], segments=1, window=1)
    slots = np.stack([batch(src, epoch, 1000).slot for epoch in range(40)])
    correlation = np.corrcoef(np.vstack([np.arange(1000), slots]))
    assert np.abs(correlation - np.eye(41)).max() < 0.15  # 1/√1000 = 0.03, 820 pairs


def test_pinned_vector():
    """If this fails, runs no longer resume on what older versions began: change the format version."""
    src = source([7, 11, 5, 9], segments=4, window=2, seed=2024)
    b = batch(src, 3, 10)
    assert hashing.chain(1, 2, 3) == PINNED_CHAIN
    assert b.epoch.tolist() == PINNED_EPOCH
    assert b.position.tolist() == PINNED_POSITION
    assert b.shard.tolist() == PINNED_SHARD
    assert b.slot.tolist() == PINNED_SLOT
    assert sample_seed(2024, "labelled", b.epoch, b.position)[:3].tolist() == PINNED_SEEDS


def test_mix_is_splitmix64():
    state = np.array([0, 0x9E3779B97F4A7C15], np.uint64)  # the published first outputs for seed 0
    assert hashing.mix(state).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_augmentation_seeds_are_all_different():
    epoch, position = np.divmod(np.arange(20_000), 1000)
    seeds = [sample_seed(seed, name, epoch, position) for seed in (0, 1) for name in ("labelled", "pseudo")]
    assert len(np.unique(seeds)) == 80_000
    assert seeds[0].dtype == np.uint64


def test_a_source_without_images_is_refused():
    with pytest.raises(DataError, match="pseudo source holds no image in its 3 shards"):
        source([0, 0, 0], name="pseudo")


def test_large_segments_are_not_sorted_again_every_step():
    """Two million samples in one segment: the first step sorts, the others look up."""
    import time

    src = source([500_000] * 4, segments=1, window=4)
    batch(src, 0, 256)
    started = time.perf_counter()
    for step in range(1, 101):
        batch(src, step, 256)
    assert time.perf_counter() - started < 1.0  # sorting took 0.2 s each


def test_segments_for_few_shards():
    assert [sample_order.segments_for(n) for n in (1, 12, 64, 5000)] == [1, 12, 64, 64]


# ---- an alternating flip -----------------------------------------------------------------------------------


def test_each_sample_is_mirrored_in_every_other_epoch_and_half_of_them_in_the_first():
    src = source([250, 3, 250, 100], segments=6)
    seen = {}
    for step in range(4):
        found = batch(src, step, 603)
        for epoch, shard, slot, turned in zip(
            found.epoch, found.shard, found.slot, mirrored(3, "labelled", found), strict=True
        ):
            seen.setdefault((shard, slot), {})[int(epoch)] = bool(turned)
    assert len(seen) == 603
    assert all(turns[e] != turns[e + 1] for turns in seen.values() for e in range(3))
    first = [turns[0] for turns in seen.values()]
    assert 0.42 < np.mean(first) < 0.58
    other = mirrored(4, "labelled", batch(src, 0, 603))
    assert 0.3 < np.mean(other != mirrored(3, "labelled", batch(src, 0, 603))) < 0.7, "another seed, another draw"
