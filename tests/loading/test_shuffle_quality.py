"""How well the order mixes shards that are sorted by class, in numbers."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.loading.sample_order import Source
from pipeline.loading.shuffle_quality import advice, displacement, entropy, quality

CLASSES, IMAGES, SHARD, SIZE = 100, 500, 50, 256
SORTED = np.arange(CLASSES * IMAGES).reshape(-1, SHARD) // IMAGES  # 1,000 shards of one class each
SHUFFLED = np.random.default_rng(0).permutation(SORTED.reshape(-1)).reshape(-1, SHARD)


def source(segments: int, window: int) -> Source:
    return Source("labelled", np.full(len(SORTED), SHARD, np.int64), 0, segments, window)


def test_entropy() -> None:
    assert entropy(np.array([5, 0, 5])) == 1 and entropy(np.array([7, 0, 0])) == 0
    assert entropy(np.array([1, 1, 2])) == 1.5


# Segments and window, and what was measured: the effective number of classes of a batch of 256 and of all images within
# reach at a time, and how far samples move, as shares of a full shuffle's.
MEASURED = {
    (64, 8): (0.970, 0.941, 0.973),  # the default
    (64, 1): (0.571, 0.456, 0.987),
    (16, 8): (0.718, 0.662, 0.985),
    (4, 8): (0.343, 0.281, 1.018),
    (4, 250): (1.013, 1.000, 1.003),  # whole segments
}


@pytest.mark.parametrize("segments, window", MEASURED)
def test_shards_sorted_by_class(segments: int, window: int) -> None:
    src = source(segments, window)
    found = quality(src, list(SORTED), SIZE)
    shares = found.batch / found.batch_random, found.reach / found.reach_random, displacement(src)
    assert shares == pytest.approx(MEASURED[segments, window], abs=0.005)
    assert found.share == min(shares[:2])


def test_shards_in_random_order_are_as_good_as_a_full_shuffle() -> None:
    for segments, window in ((64, 8), (4, 1)):
        assert quality(source(segments, window), list(SHUFFLED), SIZE).share == pytest.approx(1, abs=0.02)


def test_the_advice_helps() -> None:
    assert advice(list(SHUFFLED), "labelled", 0, 4, 1, SIZE) is None
    text = advice(list(SORTED), "labelled", 0, 4, 8, SIZE)
    assert text is not None and "the labelled shards are sorted by class: with window 8" in text
    [better] = [int(word) for word in text.split("raise `window` to ")[1].split(",")[:1]]
    assert advice(list(SORTED), "labelled", 0, 4, better, SIZE) is None
    assert advice(list(SORTED), "labelled", 0, 4, better // 2, SIZE) is not None


def test_few_images_and_empty_shards() -> None:
    assert advice([np.array([0, 1, 2]), np.array([], int)], "labelled", 0, 1, 8, 256) is None
    alone = [np.array([label] * 4) for label in range(3)]
    assert "raise `window` to 4" in str(advice(alone, "labelled", 0, 1, 1, 4))
