"""Defines what a shard says of an image for detection: its `.json` member, a scene of normalised objects.

    {"image_id": 397133, "width": 640, "height": 427, "upright": true, "category_ids": [1, 2, 3],
     "objects": [{"class": "dog", "box": [x, y, width, height], "area": 812.0, "crowd": false, "mask": "…"}],
     "dropped": {"empty mask": 1}}

Boxes are pixels from the upper left corner, inside the image and of some area; masks are COCO's compressed run lengths
(pipeline.detection.masks). `upright`: of the image as EXIF turns it; else of its pixels as they lie in the file.
`category_ids`: the numbers that the classes of classes.json had where the annotations come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from pipeline.data import images
from pipeline.detection import masks
from pipeline.errors import DataError


@dataclass(frozen=True)
class Thing:
    """An object. `box`: x, y, width, height; `area` decides what is small, medium or large; a `crowd` is a region of
    many, which is neither searched for nor background."""

    name: str
    box: tuple[float, float, float, float]
    area: float
    crowd: bool
    mask: str


@dataclass(frozen=True)
class Scene:
    image_id: int | str
    width: int
    height: int
    upright: bool
    category_ids: tuple[int | str, ...]
    things: tuple[Thing, ...]
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def single(self) -> list[Thing]:
        """Those that are no crowd."""
        return [thing for thing in self.things if not thing.crowd]


def to_text(scene: Scene) -> bytes:
    plain = asdict(scene)
    things = plain.pop("things")
    plain["objects"] = [{"class": thing.pop("name"), **thing} for thing in things]
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()


def parse(text: bytes | str, where: str, classes: Collection[str]) -> Scene:
    """A scene whose objects are all of these classes. DataError, with `where` it stands: it is none."""
    try:
        plain = json.loads(text)
        things = tuple(_thing(entry) for entry in plain["objects"])
        ids = tuple(plain["category_ids"])
        dropped = {str(reason): int(count) for reason, count in plain.get("dropped", {}).items()}
        width, height, upright = int(plain["width"]), int(plain["height"]), bool(plain["upright"])
        image_id = plain["image_id"]
        if not isinstance(image_id, int | str):
            raise TypeError("image_id is neither a number nor text")
        scene = Scene(image_id, width, height, upright, ids, things, dropped)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(
            f"{where} has a .json member that is no scene ({type(error).__name__}: {str(error)[:80]}); write the shard "
            "by `noisy-lambda prepare coco`"
        ) from None
    for thing in things:
        if thing.name not in classes:
            raise DataError(f"{where} has an object of the class '{thing.name[:40]}', which classes.json does not list")
        x, y, w, h = thing.box
        if not (w > 0 and h > 0 and x >= 0 and y >= 0 and x + w <= width + 1e-3 and y + h <= height + 1e-3):
            raise DataError(f"{where} has the box {list(thing.box)}, which is none inside {width}x{height} pixels")
        _check_mask(thing, scene, where)
    if len(ids) != len(classes):
        raise DataError(f"{where} has {len(ids)} category_ids, and classes.json {len(classes)} classes")
    return scene


def _check_mask(thing: Thing, scene: Scene, where: str) -> None:
    try:
        total = sum(masks.uncompressed(thing.mask))
    except ValueError as error:
        raise DataError(f"{where} has a mask that cannot be read ({error})") from None
    if total != scene.width * scene.height:
        raise DataError(
            f"{where} has a mask of {total:,} pixels, and the image has {scene.width}x{scene.height}; masks are of "
            "their image's size"
        )


def _thing(entry: dict[str, Any]) -> Thing:
    x, y, w, h = (float(number) for number in entry["box"])
    area = float(entry["area"])
    if not all(math.isfinite(number) for number in (x, y, w, h, area)):
        raise ValueError("a number that is not finite")
    return Thing(str(entry["class"]), (x, y, w, h), area, bool(entry["crowd"]), str(entry["mask"]))


def picture(data: bytes, scene: Scene, max_bytes: int | None = None) -> Image.Image:
    """The image of a scene as RGB, turned as its annotations are. BadImage: it is not of their size, too."""
    image = images.decode(data, max_bytes=max_bytes, upright=scene.upright)
    if image.size != (scene.width, scene.height):
        raise images.BadImage("other_size", f"{image.width}x{image.height} pixels, not {scene.width}x{scene.height}")
    return image


def boxes_of(things: Collection[Thing]) -> np.ndarray:
    """float32 [n, 4]: left, top, right, bottom; also where there is none."""
    found = np.array([thing.box for thing in things], np.float32).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    return found
