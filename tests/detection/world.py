"""Scenes of a few bright rectangles on 40 x 32 pixels, as shards; and a detector that is small enough for tests."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.config.settings_detection import Detector
from pipeline.data.classes import write_classes
from pipeline.data.index_files import metadata_of, rows_path
from pipeline.data.shards import find_shards
from pipeline.detection import masks, rows
from pipeline.detection.scene import Scene, Thing, to_text
from pipeline.detection.spec import DetectorSpec, make_spec
from pipeline.loading.training_rows import TrainingShard
from pipeline.prepare.shard_writer import Item, write_split

CLASSES = ["red", "blue"]
WIDTH, HEIGHT, CANVAS = 40, 32, 32
BODY: dict[str, Any] = {
    "depths": [1, 1],
    "widths": [8, 16],
    "stem_width": 8,
    "lambdas": {"3": "all"},
    "se": [],
    "k": 4,
    "r": 3,
}


def scene(number: int, things: int = 2, crowds: int = 0) -> tuple[np.ndarray, Scene]:
    drawn = np.random.RandomState(number)
    pixels = drawn.randint(0, 60, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    found = []
    for place in range(things + crowds):
        wide, high = drawn.randint(8, 16, 2)
        x, y = drawn.randint(0, WIDTH - wide), drawn.randint(0, HEIGHT - high)
        label = int(drawn.randint(2))
        pixels[y : y + high, x : x + wide, 2 * label] = 220
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y : y + high, x : x + wide] = 1
        box = (float(x), float(y), float(wide), float(high))
        found.append(Thing(CLASSES[label], box, float(mask.sum()), place >= things, masks.encode(mask)))
    return pixels, Scene(f"image {number}", WIDTH, HEIGHT, True, (7, 3), tuple(found))


def item(number: int, things: int = 2, crowds: int = 0) -> Item:
    pixels, found = scene(number, things, crowds)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return Item(f"{number:04d}", "png", None, data=buffer.getvalue(), text=to_text(found))


def write(folder: Path, train: int = 8, validation: int = 5) -> None:
    """Two training shards and two of validation; an image has 0 to 3 objects, some a crowd besides."""
    write_classes(str(folder), CLASSES)
    for split, start, count in (("train", 0, train), ("val", 100, validation)):
        items = [item(number, number % 4, number % 3 == 0) for number in range(start, start + count)]
        half = -(-count // 2)
        write_split(str(folder), split, [items[:half], items[half:]], workers=1)


def indexed(folder: Path, index: Path, pattern: str, source: str) -> list[TrainingShard]:
    work = rows.make_indexer(str(index), CLASSES)
    found = []
    for shard in find_shards(pattern, source, str(folder)):
        count = work((source, shard)).images
        expected = metadata_of(str(index), source, shard.name)
        found.append(
            TrainingShard(shard.path, rows_path(str(index), source, shard.name), None, count, expected=expected)
        )
    return found


def settings(**changes: Any) -> Detector:
    small: dict[str, Any] = dict(  # noqa: C408
        name="small", model="lambda_resnet_50", overrides=BODY, canvas=CANVAS, mean=[0.3] * 3, std=[0.3] * 3, fpn=8,
        head=16, anchor=3.0, proposals=20, regions=16, jitter=[0.8, 1.3], duration="20st", warmup="2st", batch=3,
        optimizer="adamw", lr=0.01, lr_images=0, ema=0.9, segments=2, checkpoint_every="10st",
    )  # fmt: skip
    return Detector(**{**small, **changes})


def spec(data: Path, index: Path, folder: Path, **changes: Any) -> DetectorSpec:
    """A run on the shards that `write` left in `data`."""
    return make_spec(
        settings(**changes), stage="detector-small", folder=str(folder), classes=CLASSES,
        train=indexed(data, index, "train-*.tar", "detection.train"),
        validation=indexed(data, index, "val-*.tar", "detection.validation"),
        seed=0, threads=1,
    )  # fmt: skip
