"""The command `predict` with a detector: what it finds in images, on the screen or into a folder.

OUT/detections.json   in COCO's format: images, categories, and annotations with scores
OUT/<number>.png      each image with its boxes, masks and names
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pipeline import storage
from pipeline.data import images
from pipeline.detection import masks
from pipeline.detection.card import DetectorCard
from pipeline.detection.figures import Found
from pipeline.detection.find import find
from pipeline.detection.network import load_detector
from pipeline.errors import ConfigError, DataError
from pipeline.predict import inputs
from pipeline.predict.inputs import Wanted
from pipeline.printable import counted, shown
from pipeline.report.detection import SURE, draw

SIDE = 1024  # most pixels of a drawn image
RESULTS = "detections.json"


def detect(name: str, input: str, out: str | None, *, column: str, device: str) -> int:
    """Look for objects in the images of `input`, and put them into the folder `out`, or onto the screen; the exit
    status. UserError: there is no such image, or none can be read."""
    if out and Path(out).suffix:
        raise ConfigError(f"--out is {out}; of a detector it takes a folder, for {RESULTS} and the drawn images")
    detector, card = load_detector(name.rstrip("/"))
    place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    detector.to(place)
    damages: list[str] = []
    record: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": one} for number, one in enumerate(card.classes, 1)],
    }
    bad = 0
    for number, wanted in enumerate(inputs.find(input, column, damages, card.classes), 1):
        words = " ".join(str(value) for value in wanted.where.values())
        try:
            image = images.decode(_bytes(wanted))
        except (images.BadImage, OSError) as error:
            bad += 1
            print(f"{shown(words)}  ✗ {shown(str(error))}", file=sys.stderr if out else sys.stdout)
            continue
        [found] = find(detector, card, [image], place)
        _note(record, number, words, image, found, card)
        if out:
            _draw(image, found, card).save(_made(out, f"{number:06d}.png"))
        else:
            said = ", ".join(f"{one.name} {100 * one.score:.1f} %" for one in found if one.score >= SURE) or "nothing"
            print(f"{shown(words)}  {shown(said)}")
    seen = len(record["images"])
    if damages:
        raise DataError(damages[0])
    if not seen:
        raise DataError(f"none of the {bad:,} images could be read")
    if out:
        storage.write_json(storage.join(out, RESULTS), record)
        print(
            f"{counted(len(record['annotations']), 'object')} in {counted(seen, 'image')}, {bad} bad, in {shown(out)}"
        )
    return 0


def _bytes(wanted: Wanted) -> bytes:
    return wanted.picture if isinstance(wanted.picture, bytes) else storage.read_bytes(str(wanted.picture))


def _note(
    record: dict[str, list[dict[str, Any]]],
    number: int,
    name: str,
    image: Image.Image,
    found: list[Found],
    card: DetectorCard,
) -> None:
    record["images"].append({"id": number, "file_name": name, "width": image.width, "height": image.height})
    for one in found:
        record["annotations"].append(
            {
                "id": len(record["annotations"]) + 1,
                "image_id": number,
                "category_id": card.classes.index(one.name) + 1,
                "bbox": [round(value, 2) for value in one.box],
                "area": masks.area(one.mask, image.height, image.width),
                "iscrowd": 0,
                "score": round(one.score, 5),
                "segmentation": {"size": [image.height, image.width], "counts": one.mask},
            }
        )


def _draw(image: Image.Image, found: list[Found], card: DetectorCard) -> Image.Image:
    things = [
        (card.classes.index(one.name), one.box, one.mask, f" {one.score:.2f}") for one in found if one.score >= SURE
    ]
    return draw(image, things, card.classes, min(SIDE, max(image.size)))


def _made(folder: str, name: str) -> str:
    Path(folder).mkdir(parents=True, exist_ok=True)
    return str(Path(folder, name))
