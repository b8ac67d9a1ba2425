"""Reads a COCO annotation file, and normalises it: what cannot be used is dropped and counted by reason.

Public data sets break the format in many ways, of which most train a detector wrongly without a word: see
docs/detection.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.data.classes import plain
from pipeline.detection import masks
from pipeline.detection.scene import Scene, Thing
from pipeline.errors import DataError

ImageId = int | str


@dataclass(frozen=True)
class Annotations:
    """`names` and `category_ids` in the order of the file; `lost`: what belongs to no image of it, by reason."""

    path: str
    names: list[str]
    category_ids: list[ImageId]
    images: list[dict[str, Any]]
    of_image: dict[ImageId, list[dict[str, Any]]]
    lost: Counter[str]


def read(path: str) -> Annotations:
    """DataError: it is no such file, holds no annotation, or names a category or an image twice."""
    shown = storage.redact(path)
    try:
        found = json.loads(storage.read_bytes(path))
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"there is no annotation file {shown}; give one in COCO's format") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{shown} is not JSON ({str(error)[:80]}); give annotations in COCO's format") from None
    parts = [found.get(part) if isinstance(found, dict) else None for part in ("images", "annotations", "categories")]
    for name, part in zip(("images", "annotations", "categories"), parts, strict=True):
        if not isinstance(part, list) or not all(isinstance(entry, dict) for entry in part):
            raise DataError(f"{shown} has no list of {name}; give annotations of instances in COCO's format")
    images, annotations, categories = parts
    assert images is not None and annotations is not None and categories is not None
    if not annotations:
        raise DataError(
            f"{shown} holds no annotations, so there is nothing to learn or to score; give the file that does"
        )
    names = [plain(_text(entry, "name", "a category", shown)) for entry in categories]
    ids = [_known(entry, "id", f"category '{name}'", shown) for entry, name in zip(categories, names, strict=True)]
    image_ids = [_known(entry, "id", "an image", shown) for entry in images]
    for values, what in ((names, "the category"), (ids, "the category id"), (image_ids, "the image id")):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise DataError(f"{shown} has {what} {twice[0]!r} twice; give each one of its own")
    for entry in images:
        _text(entry, "file_name", f"image {entry['id']}", shown)
        if not all(isinstance(entry.get(side), int) and entry[side] > 0 for side in ("width", "height")):
            raise DataError(f"image {entry['id']} of {shown} has no width and height in whole pixels")
    known = set(image_ids)
    of_image: dict[ImageId, list[dict[str, Any]]] = defaultdict(list)
    lost: Counter[str] = Counter()
    for entry in annotations:
        image_id = entry.get("image_id")
        if isinstance(image_id, int | str) and image_id in known:
            of_image[image_id].append(entry)
        else:
            lost["unknown image"] += 1
    return Annotations(path, names, ids, images, of_image, lost)


def _text(entry: dict[str, Any], key: str, what: str, where: str) -> str:
    if not isinstance(entry.get(key), str) or not entry[key].strip():
        raise DataError(f"{what} of {where} has no {key}; give annotations in COCO's format")
    found: str = entry[key]
    return found


def _known(entry: dict[str, Any], key: str, what: str, where: str) -> ImageId:
    found = entry.get(key)
    if not isinstance(found, int | str) or isinstance(found, bool):
        raise DataError(f"{what} of {where} has the {key} {found!r}; it takes a whole number or text")
    return found


def scene_of(image: dict[str, Any], upright: bool, found: Annotations, ids_of: Sequence[ImageId]) -> Scene:
    """One image's objects. `ids_of`: the file's category ids in the order of classes.json. DataError: a mask is of
    another size than the image."""
    by_id = dict(zip(found.category_ids, found.names, strict=True))
    things, dropped = [], Counter[str]()
    for entry in found.of_image.get(image["id"], []):
        try:
            things.append(_thing(entry, image, by_id))
        except masks.BadMask as bad:
            dropped[str(bad)] += 1
        except masks.OtherSize as other:
            raise DataError(
                f"annotation {entry.get('id')} of {storage.redact(found.path)} has a mask of {other.size} (height, "
                f"width), and its image {image['file_name']} is {[image['height'], image['width']]}; correct one"
            ) from None
    return Scene(image["id"], image["width"], image["height"], upright, tuple(ids_of), tuple(things), dict(dropped))


def _thing(entry: dict[str, Any], image: dict[str, Any], names: dict[ImageId, str]) -> Thing:
    """BadMask: it is dropped, for the reason in the text."""
    width, height = image["width"], image["height"]
    category = entry.get("category_id")
    if not isinstance(category, int | str) or category not in names:
        raise masks.BadMask("unknown category")
    box = _box(entry["bbox"], width, height) if entry.get("bbox") else None
    mask = masks.read(entry.get("segmentation"), height, width)
    box = box or tuple(masks.box(mask, height, width))  # type: ignore[assignment]
    assert box is not None
    area = entry.get("area")
    if not isinstance(area, int | float) or not math.isfinite(area) or area <= 0:
        area = masks.area(mask, height, width)
    return Thing(names[category], box, float(area), bool(entry.get("iscrowd", 0)), mask)


def _box(numbers: Any, width: int, height: int) -> tuple[float, float, float, float]:
    """x, y, width, height, cut off at the image's borders. BadMask."""
    try:
        x, y, w, h = (float(number) for number in numbers)
    except (TypeError, ValueError):
        raise masks.BadMask("box that is not four numbers") from None
    if not all(math.isfinite(number) for number in (x, y, w, h)):
        raise masks.BadMask("box of numbers that are not finite")
    if w <= 0 or h <= 0:
        raise masks.BadMask("box without area")
    left, top, right, bottom = max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height))
    if right <= left or bottom <= top:
        raise masks.BadMask("box outside the image")
    return left, top, right - left, bottom - top
