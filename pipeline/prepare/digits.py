"""Writes the demo's data: scikit-learn's handwritten digits (1,797 real scans of 8 x 8 pixels) as shards."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.prepare.class_list import agree_on_classes, holding_classes
from pipeline.prepare.shard_writer import Item, Progress, write_split

CLASSES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
SPLIT_SEED = 20200420  # test and validation images are the same whatever `seed` is


def digits(
    out: str,
    *,
    seed: int,
    labels_per_class: int = 5,
    test: int = 450,
    validation: int = 190,
    shard_samples: int = 200,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write labelled, unlabelled, val and test shards and classes.json into the folder `out`.

    `seed` draws the labelled images and the order of the unlabelled ones; test and validation images are
    stratified and fixed. Unlabelled shards hold `shard_samples` images and no labels. Returns the number of images by
    split and of unlabelled shards. A key is the image's number in scikit-learn's data set.
    """
    if labels_per_class < 1:
        raise ConfigError(f"{labels_per_class} labels per class are too few to learn from; give at least 1")
    from sklearn.datasets import load_digits

    data = load_digits()
    labels = data.target.astype(int)
    pixels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    # RandomState, because its stream is promised never to change.
    fixed, drawn = np.random.RandomState(SPLIT_SEED), np.random.RandomState(seed)
    pool = fixed.permutation(len(labels))
    tested, pool = _stratified(pool, labels, test)
    validated, pool = _stratified(pool, labels, validation)
    labelled, rest = _stratified(drawn.permutation(pool), labels, labels_per_class * len(CLASSES))
    if len(rest) == 0 or min(np.bincount(labels[labelled], minlength=len(CLASSES))) < labels_per_class:
        raise ConfigError(
            f"{labels_per_class} labels per class, {validation} validation and {test} test images leave none of the "
            f"{len(labels)} digits unlabelled; lower one of them"
        )
    agree_on_classes(out, CLASSES)
    splits = {
        "labelled": [labelled],
        "unlabelled": [rest[start : start + shard_samples] for start in range(0, len(rest), shard_samples)],
        "val": [validated],
        "test": [tested],
    }
    total = len(labelled) + len(rest) + len(validated) + len(tested)
    before = 0
    with holding_classes(out, CLASSES):
        for split, parts in splits.items():
            shards = [
                [
                    Item(f"{i:04d}", "png", None if split == "unlabelled" else int(labels[i]), data=_png(pixels[i]))
                    for i in part
                ]
                for part in parts
            ]
            write_split(out, split, shards, workers=1, progress=shifted(progress, before, total))
            before += sum(map(len, parts))
    counts = {split: sum(map(len, parts)) for split, parts in splits.items()}
    return {"images": counts, "unlabelled_shards": len(splits["unlabelled"]), "classes": len(CLASSES)}


def _stratified(pool: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(the first images of each class in `pool`, `count` in all and as equal as can be; the rest), in pool order."""
    base, more = divmod(count, len(CLASSES))
    quota = np.array([base + (label < more) for label in range(len(CLASSES))])
    rank = np.zeros(len(pool), dtype=int)
    for label in range(len(CLASSES)):
        of_class = labels[pool] == label
        rank[of_class] = np.arange(of_class.sum())
    taken = rank < quota[labels[pool]]
    return pool[taken], pool[~taken]


def shifted(progress: Progress | None, before: int, total: int) -> Progress | None:
    if progress is None:
        return None
    return lambda done, _: progress(before + done, total)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
