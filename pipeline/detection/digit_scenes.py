"""Makes digit scenes: scikit-learn's handwritten digits pasted on a canvas, to learn detection from without a download.

Ten classes; a scene has two to six digits of 12 to 32 pixels, in grey tones over faint noise, which hardly overlap. The
digits of training, validation and test scenes are different ones.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from pipeline.detection import masks
from pipeline.detection.scene import Scene, Thing, to_text
from pipeline.prepare.class_list import agree_on_classes, holding_classes
from pipeline.prepare.digits import CLASSES, SPLIT_SEED, shifted
from pipeline.prepare.shard_writer import Item, Progress, write_split

SIDE = 96  # pixels of a scene
SPLITS = {"train": 400, "val": 100, "test": 100}
SHARE = {"train": (0.0, 0.7), "val": (0.7, 0.85), "test": (0.85, 1.0)}
"""Of the digits, in an order that is fixed."""
SHARD_IMAGES = 100
INK = 6  # of 16, from which on a pixel belongs to the digit
MOST_OVERLAP = 0.05  # of the smaller box


def digit_scenes(out: str, *, seed: int, progress: Progress | None = None) -> dict[str, Any]:
    """Write train, val and test shards and classes.json into the folder `out`; returns images by split. `seed` draws
    the training scenes; those of validation and test are fixed."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # RandomState, because its stream is promised never to change.
    order = np.random.RandomState(SPLIT_SEED).permutation(len(digits.target))
    agree_on_classes(out, CLASSES)
    total, before = sum(SPLITS.values()), 0
    with holding_classes(out, CLASSES):
        for split, count in SPLITS.items():
            low, high = (int(len(order) * share) for share in SHARE[split])
            drawn = np.random.RandomState(seed if split == "train" else SPLIT_SEED + low)
            items = [
                _item(number, *scene(number, digits.images, digits.target, order[low:high], drawn))
                for number in range(count)
            ]
            shards = [items[start : start + SHARD_IMAGES] for start in range(0, count, SHARD_IMAGES)]
            write_split(out, split, shards, workers=1, progress=shifted(progress, before, total))
            before += count
    return {"images": dict(SPLITS), "classes": len(CLASSES)}


def scene(
    number: int, images: np.ndarray, labels: np.ndarray, chosen: np.ndarray, drawn: np.random.RandomState
) -> tuple[np.ndarray, Scene]:
    """Scene `number`, uint8 [SIDE, SIDE], and what is in it: some of the `chosen` digits, as `drawn` has it."""
    canvas = drawn.randint(0, 40, (SIDE, SIDE)).astype(np.float32)
    things: list[Thing] = []
    taken: list[tuple[int, int, int, int]] = []
    for _ in range(drawn.randint(2, 7)):
        digit, side = chosen[drawn.randint(len(chosen))], int(drawn.randint(12, 33))
        ink = _enlarged(images[digit], side)
        mask = ink >= INK
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        ink, mask = (part[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] for part in (ink, mask))
        height, width = mask.shape
        top, left = int(drawn.randint(0, SIDE - height + 1)), int(drawn.randint(0, SIDE - width + 1))
        tone = drawn.randint(150, 256)
        if any(_overlap((left, top, width, height), other) > MOST_OVERLAP for other in taken):
            continue
        taken.append((left, top, width, height))
        here = canvas[top : top + height, left : left + width]
        here[mask] = (tone * np.minimum(ink / 16, 1))[mask]
        whole = np.zeros((SIDE, SIDE), np.uint8)
        whole[top : top + height, left : left + width] = mask
        name = CLASSES[int(labels[digit])]
        things.append(Thing(name, (left, top, width, height), float(mask.sum()), False, masks.encode(whole)))
    ids = tuple(range(1, len(CLASSES) + 1))
    return canvas.round().clip(0, 255).astype(np.uint8), Scene(number + 1, SIDE, SIDE, True, ids, tuple(things))


def _enlarged(digit: np.ndarray, side: int) -> np.ndarray:
    """float32 [side, side], 0 … 16."""
    picture = Image.fromarray(digit.astype(np.float32))
    return np.asarray(picture.resize((side, side), Image.Resampling.BILINEAR))


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> float:
    """Of the smaller of two boxes x, y, width, height."""
    wide = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    high = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    return max(wide, 0) * max(high, 0) / min(one[2] * one[3], other[2] * other[3])


def _item(number: int, pixels: np.ndarray, found: Scene) -> Item:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Item(f"{number:04d}", "png", None, data=buffer.getvalue(), text=to_text(found))
