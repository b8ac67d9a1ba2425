"""Measures how far the order of training data is from a full shuffle, where the shards are sorted by class.

    index-1a2b3c4d/classes.parquet   shard int32 (its number), label int32, images int32: of the labelled shards

What `index` counts is known before training: `plan` says then what is wrong, and training stages when they begin.

A step reads from all segments, in each from the `window` shards of the block being read, so two things can be too few:
the classes of a batch, and the classes that many steps in a row have within reach. Classes are counted by their
effective number, 2 to the power of the entropy in bits, and compared with as many images drawn at random, for a small
sample of many classes is uneven whatever the order. Numpy only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.config.settings_train import Train
from pipeline.data import parquet_files
from pipeline.loading import sample_order
from pipeline.plan.stage import CLASS_COUNTS
from pipeline.printable import counted

COLUMNS = ("shard", "label", "images")  # of classes.parquet
ENOUGH = 0.9  # of a random sample's effective number of classes
PLACES, RUN = 6, 4  # of an epoch that are looked at, and batches in a row at each
DRAWS = 16  # random samples to compare with

Ints = npt.NDArray[np.integer]


@dataclass(frozen=True)
class Quality:
    """Effective numbers of classes, means over an epoch; `_random` those of as many images drawn at random."""

    batch: float
    batch_random: float
    reach: float
    """Of the images of all blocks that are being read at a time."""
    reach_random: float

    @property
    def share(self) -> float:
        """1 for a full shuffle: the worse of the two ratios."""
        return min(self.batch / self.batch_random, self.reach / self.reach_random)


def entropy(counts: npt.NDArray[np.integer]) -> float:
    """Of images per class, in bits."""
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def quality(source: sample_order.Source, labels: Sequence[Ints], size: int) -> Quality:
    """Of steps of `size` images; labels[i]: the classes of the samples of shard i [counts[i]]."""
    classes = 1 + max(int(of.max(initial=0)) for of in labels)
    per_class = np.bincount(np.concatenate(labels), minlength=classes)
    batches, reaches, held = [], [], []
    for place in range(PLACES):
        within = _within_reach(source, labels, classes, place / PLACES)
        reaches.append(2 ** entropy(within))
        held.append(int(within.sum()))
        first = source.total * place // PLACES // size
        for step in range(first, first + RUN):
            taken = sample_order.batch(source, step, size)
            found = [labels[shard][slot] for shard, slot in zip(taken.shard.tolist(), taken.slot.tolist(), strict=True)]
            batches.append(2 ** entropy(np.bincount(found, minlength=classes)))
    return Quality(
        float(np.mean(batches)),
        _random(per_class, size),
        float(np.mean(reaches)),
        _random(per_class, int(np.mean(held))),
    )


def _within_reach(source: sample_order.Source, labels: Sequence[Ints], classes: int, share: float) -> Ints:
    """Images per class of the blocks being read when this share of an epoch is over."""
    found = np.zeros(classes, np.int64)
    for segment in source.in_segments:
        _, pieces = segment.block_at(0, int(segment.total * share))
        for shard, low, length in zip(segment.shard[pieces], segment.low[pieces], segment.length[pieces], strict=True):
            found += np.bincount(labels[shard][low : low + length], minlength=classes)
    return found


def _random(per_class: Ints, images: int) -> float:
    """The effective number of classes of that many images drawn at random, the mean of some draws."""
    draws = np.random.default_rng(0).multivariate_hypergeometric(
        per_class, min(images, int(per_class.sum())), DRAWS, method="marginals"
    )
    return float(np.mean([2 ** entropy(draw) for draw in draws]))


def displacement(source: sample_order.Source) -> float:
    """Mean distance between a sample's place in the shards and its place in the first epoch, as a share of what a full
    shuffle has, N / 3."""
    taken = sample_order.batch(source, 0, source.total)
    begin = np.cumsum(source.counts) - source.counts
    return float(np.abs(begin[taken.shard] + taken.slot - taken.position).mean() / (source.total / 3))


def advice(labels: Sequence[Ints], name: str, seed: int, segments: int, window: int, size: int) -> str | None:
    """What to say to a user whose order is far from a full shuffle; None where it is not.

    labels[i]: the classes of the samples of shard i; in which order they lie there hardly matters.
    """
    counts = np.array([len(of) for of in labels], np.int64)

    def of_window(shards: int) -> Quality:
        return quality(sample_order.Source(name, counts, seed, segments, shards), labels, size)

    found = of_window(window)
    if found.share >= ENOUGH:
        return None
    most = -(-len(counts) // segments) + 1  # pieces of a segment
    better = next((wide for wide in _doubled(window, most) if of_window(wide).share >= ENOUGH), None)
    remedy = f"raise `window` to {better}" if better else "lower `segments`"
    reach = counted(round(found.reach), "class", "classes")
    return (
        f"the {name} shards are sorted by class: with window {window} the images within reach at a time are of about "
        f"{reach} (drawn at random: {found.reach_random:,.0f}), those of a batch of about {found.batch:,.0f} "
        f"({found.batch_random:,.0f}); {remedy}, or write them in a random order: `noisy-lambda reshard "
        f"SOURCE --out FOLDER --shards {len(counts)}`"
    )


def _doubled(window: int, most: int) -> list[int]:
    """Larger windows to try, up to one that holds a whole segment."""
    found = []
    while window < most:
        window = min(2 * window, most)
        found.append(window)
    return found


def write_class_counts(folder: str, per_class: Sequence[Mapping[int, int]]) -> None:
    """Write classes.parquet; per_class: of every labelled shard, in order, {class: images}."""
    rows = [(number, *held) for number, found in enumerate(per_class) for held in found.items()]
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    table = pa.table({name: pa.array(column, pa.int32()) for name, column in zip(COLUMNS, columns, strict=True)})
    parquet_files.write_table(storage.join(folder, CLASS_COUNTS), table)


def advice_on(folder: str, settings: Train, seed: int) -> str | None:
    """`advice` on the labelled images that `index` found and left in `folder`, in the order of these settings."""
    path = storage.join(folder, CLASS_COUNTS)
    if not storage.exists(path):  # made by an earlier version
        return None
    table = parquet_files.read_table(path, COLUMNS)
    shard, label, images = (table[name].to_numpy() for name in COLUMNS)
    held = np.split(np.repeat(label, images), np.cumsum(np.bincount(shard, images).astype(np.int64))[:-1])
    segments = sample_order.segments_for(len(held), settings.segments)
    return advice(held, "labelled", seed, segments, settings.window, settings.batch)
