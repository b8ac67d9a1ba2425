"""What public annotation files do wrong: each is dropped and counted, an error, or right in the end."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.data import shards
from pipeline.detection import coco_file, masks, scene
from pipeline.detection.prepare_coco import coco
from pipeline.errors import DataError
from tests.small import command

SQUARE = [[2, 2, 10, 2, 10, 12, 2, 12]]
WIDTH, HEIGHT = 20, 16


def annotation(number: int = 1, image: Any = 1, **changes: Any) -> dict[str, Any]:
    found = {"id": number, "image_id": image, "category_id": 5, "bbox": [2, 2, 8, 10], "area": 80.0, "iscrowd": 0}
    return {**found, "segmentation": SQUARE, **changes}


def dataset(*given: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": list(given),
        "categories": [{"id": 5, "name": "dog"}, {"id": 90, "name": "cat"}],
        **changes,
    }


def write(
    folder: Path, found: dict[str, Any], size: tuple[int, int] = (WIDTH, HEIGHT), name: str = "a.png", **exif: Any
) -> str:
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", size, "green").save(folder / "images" / name, **exif)
    path = folder / "found.json"
    path.write_text(json.dumps(found))
    return str(path)


def things(folder: Path, found: dict[str, Any]) -> tuple[list[scene.Thing], dict[str, int]]:
    """What is kept of the one image, and what is dropped."""
    read = coco_file.read(write(folder, found))
    made = coco_file.scene_of(read.images[0], True, read, read.category_ids)
    assert scene.parse(scene.to_text(made), "here", read.names) == made
    return list(made.things), made.dropped


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bbox": [2, 2, 0, 10]}, "box without area"),
        ({"bbox": [2, 2, 8, -1]}, "box without area"),
        ({"bbox": [float("nan"), 2, 8, 10]}, "box of numbers that are not finite"),
        ({"bbox": [50, 2, 8, 10]}, "box outside the image"),
        ({"bbox": [1, 2, 3]}, "box that is not four numbers"),
        ({"segmentation": [[1, 2, 3, 4]]}, "polygon of fewer than three points"),
        ({"segmentation": [[2, 2, 2, 2, 2, 2]]}, "empty mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [WIDTH * HEIGHT]}}, "empty mask"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [3, 4]}}, "mask that cannot be read"),
        ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "~"}}, "mask that cannot be read"),
        ({"segmentation": []}, "no mask"),
        ({"segmentation": None}, "no mask"),
        ({"category_id": 6}, "unknown category"),
        ({"category_id": None}, "unknown category"),
    ],
)
def test_what_cannot_be_used_is_dropped_and_counted(tmp_path, changes, reason):
    kept, dropped = things(tmp_path, dataset(annotation(), annotation(2, **changes)))
    assert len(kept) == 1 and dropped == {reason: 1}


def test_every_way_to_write_a_mask_is_read(tmp_path):
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[2:12, 2:10] = 1
    text = masks.encode(pixels)
    ways = [SQUARE, SQUARE[0], *({"size": [HEIGHT, WIDTH], "counts": c} for c in (text, masks.uncompressed(text)))]
    assert {masks.read(way, HEIGHT, WIDTH) for way in ways} == {text}
    assert masks.read({"size": [HEIGHT, WIDTH], "counts": text.encode()}, HEIGHT, WIDTH) == text
    assert np.array_equal(masks.decode(text, HEIGHT, WIDTH), pixels)


def test_missing_area_and_crowd_come_from_the_mask(tmp_path):
    given = annotation()
    del given["area"], given["iscrowd"]
    [kept], _ = things(tmp_path, dataset(given))
    assert (kept.area, kept.crowd, kept.name) == (80.0, False, "dog")
    [kept], _ = things(tmp_path, dataset(annotation(bbox=None)))
    assert kept.box == (2, 2, 8, 10)


def test_a_box_is_cut_off_at_the_border(tmp_path):
    [kept], _ = things(tmp_path, dataset(annotation(bbox=[-3, 4, 100, 6])))
    assert kept.box == (0, 4, WIDTH, 6)


def test_a_mask_of_another_size_is_an_error_that_names_it(tmp_path):
    other = {"size": [WIDTH, HEIGHT], "counts": [5, WIDTH * HEIGHT - 5]}
    with pytest.raises(DataError, match=r"annotation 7 of .*found.json has a mask of \[20, 16\]"):
        things(tmp_path, dataset(annotation(7, segmentation=other)))


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (dataset(), "holds no annotations"),
        ({"images": []}, "has no list of annotations"),
        (dataset(annotation(), categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "category id 1 twice"),
        (dataset(annotation(), categories=[{"id": 1, "name": "a"}, {"id": 2, "name": "a "}]), "category 'a' twice"),
        (dataset(annotation(), images=[{"id": 1, "file_name": "a.png"}]), "has no width and height"),
    ],
)
def test_files_that_are_none(tmp_path, found, said):
    with pytest.raises(DataError, match=said):
        coco_file.read(write(tmp_path, found))


def test_images_with_names_for_ids_and_annotations_of_no_image(tmp_path):
    found = dataset(annotation(0, "one"), annotation(0, "two"))
    found["images"][0]["id"] = "one"
    written = coco(write(tmp_path, found), str(tmp_path / "out"), image_folder=str(tmp_path / "images"), workers=1)
    assert (written["images"], written["objects"], written["dropped"]) == (1, 1, {"unknown image": 1})
    assert json.loads((tmp_path / "out/dropped-train.json").read_text()) == {"unknown image": 1}
    [sample] = shards.scan(str(tmp_path / "out/train-000.tar")).samples
    [text] = shards.read_texts(str(tmp_path / "out/train-000.tar"), [sample], "json")
    assert text and json.loads(text)["image_id"] == "one" and json.loads(text)["category_ids"] == [5, 90]


@pytest.mark.parametrize(("size", "upright"), [((WIDTH, HEIGHT), False), ((HEIGHT, WIDTH), True)])
def test_a_turned_photo_is_taken_as_its_annotations_are(tmp_path, caplog, size, upright):
    exif = Image.Exif()
    exif[0x0112] = 6
    found = dataset(annotation(), images=[{"id": 1, "file_name": "a.jpg", "width": WIDTH, "height": HEIGHT}])
    path = write(tmp_path, found, size, "a.jpg", exif=exif)
    with caplog.at_level(logging.WARNING):
        coco(path, str(tmp_path / "out"), image_folder=str(tmp_path / "images"), workers=1)
    assert ("turned by EXIF" in caplog.text) is not upright
    tar = str(tmp_path / "out/train-000.tar")
    [(sample, data)] = list(shards.stream(tar))
    [text] = shards.read_texts(tar, [sample], "json")
    made = scene.parse(text or b"", "here", ["dog", "cat"])
    assert made.upright is upright and scene.picture(data, made).size == (WIDTH, HEIGHT)


def test_images_that_are_missing_or_of_another_size_are_named_in_one_sentence(tmp_path):
    found = dataset(annotation(), annotation(2, 2))
    found["images"] += [{"id": 2, "file_name": "gone.png", "width": WIDTH, "height": HEIGHT}]
    path = write(tmp_path, found)
    ran = command("prepare", "coco", path, "--images", tmp_path / "images", "--out", tmp_path / "out", "--processes", 1)
    assert ran.status == 2 and "1 of 2 images" in ran.err and "--max-bad" in ran.err
    assert "gone.png" in (tmp_path / "out/bad_files.txt").read_text()
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "secret.png")
    found["images"][1]["file_name"] = "../secret.png"
    with pytest.raises(DataError, match="1 of 2 images"):
        coco(write(tmp_path, found), str(tmp_path / "outside"), image_folder=str(tmp_path / "images"), workers=1)
    assert "leads out of the folder" in (tmp_path / "outside/bad_files.txt").read_text()
    write(tmp_path, dataset(annotation()), (WIDTH + 1, HEIGHT))
    with pytest.raises(DataError, match=r"21x16 pixels, its annotations are for 20x16"):
        coco(path, str(tmp_path / "other"), image_folder=str(tmp_path / "images"), workers=1)


def test_splits_agree_on_their_categories_by_name(tmp_path):
    out, images = str(tmp_path / "out"), str(tmp_path / "images")
    coco(write(tmp_path, dataset(annotation())), out, image_folder=images, workers=1)
    turned = dataset(annotation(category_id=0), categories=[{"id": 0, "name": "cat"}, {"id": 3, "name": "dog"}])
    coco(write(tmp_path, turned), out, image_folder=images, split="val", workers=1)
    assert json.loads((tmp_path / "out/classes.json").read_text()) == ["dog", "cat"]
    [(sample, _)] = list(shards.stream(f"{out}/val-000.tar"))
    [text] = shards.read_texts(f"{out}/val-000.tar", [sample], "json")
    made = scene.parse(text or b"", "here", ["dog", "cat"])
    assert [thing.name for thing in made.things] == ["cat"] and made.category_ids == (3, 0)
    for categories in ([{"id": 5, "name": "dog"}], [*dataset()["categories"], {"id": 7, "name": "owl"}]):
        path = write(tmp_path, dataset(annotation(), categories=categories))
        with pytest.raises(DataError, match=r"'cat'|'owl'"):
            coco(path, out, image_folder=images, split="test", workers=1)
