"""Writes the images of a COCO annotation file as shards, each with its objects in a `.json` member.

    train-000.tar …   classes.json   manifest-train.parquet   bad_files.txt   dropped-train.json

Image files are copied byte for byte. An image that is missing, cannot be read or is not of the size that its
annotations are for is bad, and listed in bad_files.txt; an object that cannot be used is dropped, and counted by reason
in its scene and in dropped-<split>.json.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data import images
from pipeline.data.samples import IMAGE_SUFFIXES, MAX_TEXT
from pipeline.detection import coco_file
from pipeline.detection.scene import Scene, to_text
from pipeline.errors import ConfigError, DataError
from pipeline.prepare.class_list import agree_on_classes, holding_classes
from pipeline.prepare.picture_files import suffix_of
from pipeline.prepare.shard_writer import BAD_NAME, Item, split_shards, write_split
from pipeline.prepare.sources import SPLIT, Limits
from pipeline.printable import counted

log = logging.getLogger(__name__)

TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


def coco(path: str, out: str, *, image_folder: str, split: str = "train", **limits: Any) -> dict[str, Any]:
    """Shards `<split>-000.tar` … of the images in `image_folder` that the file at `path` lists, in an order drawn by
    `seed`; `limits`: see sources.Limits.

    Where `out` has a classes.json already (another split was prepared there), its categories must be the same, by name.
    Returns counts: shards, images, bad, objects, classes, and `dropped` objects by reason. DataError, ConfigError.
    """
    limit = Limits(**limits)
    if not SPLIT.fullmatch(split):
        raise ConfigError(f"'{split}' cannot name a split; use letters, digits and underscores")
    found = coco_file.read(path)
    names = _classes(out, found)
    ids_of = [found.category_ids[found.names.index(name)] for name in names]
    bad: list[tuple[str, str]] = []
    items: list[Item] = []
    scenes: list[Scene] = []
    raw: list[str] = []
    order = np.random.RandomState(limit.seed).permutation(len(found.images))
    for number, place in enumerate(order):
        entry = found.images[place]
        name = Path(entry["file_name"])
        file = Path(image_folder, name)
        try:
            if ".." in name.parts or name.is_absolute():
                raise images.BadImage("unreadable", "its name leads out of the folder of images")
            upright = _upright(file, entry["width"], entry["height"])
        except images.BadImage as error:
            bad.append((str(file), str(error)))
            continue
        scene = coco_file.scene_of(entry, upright, found, ids_of)
        text = to_text(scene)
        if len(text) > MAX_TEXT:
            bad.append((str(file), f"too_large: its objects take {len(text):,} bytes, more than {MAX_TEXT:,}"))
            continue
        if not upright:
            raw.append(str(file))
        suffix = suffix_of(file.name)
        suffix = suffix if suffix in IMAGE_SUFFIXES else "jpg"
        items.append(Item(f"{number:08d}", suffix, None, str(file), name=entry["file_name"], text=text))
        scenes.append(scene)
    if not items:
        raise DataError(
            f"none of the {len(bad)} images of {path} can be used: {bad[0][0]} is {bad[0][1]}, for instance"
        )
    if raw:
        log.warning(
            "%s turned by EXIF with annotations of their pixels as they lie in the file, the first is %s: taken so",
            counted(len(raw), "image"), raw[0],
        )  # fmt: skip
    sizes = [Path(item.path).stat().st_size + len(item.text) for item in items]
    shards = [items[part.start : part.stop] for part in split_shards(sizes, limit.shard_bytes, limit.shard_samples)]
    with holding_classes(out, names):
        written = write_split(out, split, shards, workers=limit.workers, progress=limit.progress, skipped=bad)
        dropped = Counter(found.lost)
        for scene in scenes:
            dropped.update(scene.dropped)
        storage.write_json(storage.join(out, f"dropped-{split}.json"), dict(sorted(dropped.items())))
    lost = len(bad) + len(written.bad)
    if lost > limit.max_bad * len(found.images):
        raise DataError(
            f"{lost} of {len(found.images)} images of {path} are missing, bad or of another size, more than --max-bad "
            f"{limit.max_bad:g} allows; {storage.redact(storage.join(out, BAD_NAME))} lists them: mend them, or go on "
            "with the rest, which is written, by a higher --max-bad"
        )
    return {
        "shards": len(shards),
        "images": written.images,
        "objects": sum(len(scene.things) for scene in scenes),
        "bad": lost,
        "classes": len(names),
        "dropped": dict(sorted(dropped.items())),
    }


def _classes(out: str, found: coco_file.Annotations) -> list[str]:
    """The class list of `out`, or that of the file where it has none yet. DataError: they differ."""
    known = agree_on_classes(out, list(found.names))
    if missing := sorted(set(known) - set(found.names)):
        raise DataError(
            f"{found.path} has no category '{missing[0]}', which {storage.redact(out)}/classes.json has: the splits "
            "that are trained and tested on must have the same categories, by name; correct the file, or choose "
            "another folder"
        )
    return known


def _upright(file: Path, width: int, height: int) -> bool:
    """Whether annotations of this size are of the image as EXIF turns it. BadImage: of neither, or there is no
    image."""
    try:
        data = storage.read_bytes(str(file))
    except OSError as error:
        raise images.BadImage("unreadable", error.strerror or str(error)) from error
    with images.telling(data):
        header = images.read_header(data)
        turned = images.orientation(header) in TURNED
    raw: Sequence[int] = header.size
    if (raw[::-1] if turned else raw) == (width, height):
        return True
    if raw == (width, height):
        return False
    raise images.BadImage("other_size", f"{raw[0]}x{raw[1]} pixels, its annotations are for {width}x{height}")
