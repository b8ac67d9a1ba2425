"""What the report shows of a model's mistakes, against the label files of a real run."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
from PIL import Image

from pipeline import storage
from pipeline.data import index_files, parquet_files, shards
from pipeline.report import mistakes
from tests.small import CLASSES, Store


def test_a_matrix_counts_every_image_once() -> None:
    found = mistakes.matrix([[0, 2, 3], [2, 1, 1]], [5, 0, 4])
    assert [[cell.images for cell in line] for line in found] == [[2, 0, 3], [0, 0, 0], [0, 1, 3]]
    assert [cell.share for cell in found[0]] == [0.4, 0.0, 0.6]
    assert [[cell.right for cell in line].index(True) for line in found] == [0, 1, 2]


def test_of_many_classes_the_pairs_that_are_mixed_up_most() -> None:
    names = [f"class {number}" for number in range(1000)]
    confusion = [[number, 999 - number, 500 - number] for number in range(400)]
    found = mistakes.pairs(confusion, [1000] * 1000, names)
    assert len(found) == mistakes.PAIRS
    assert (found[1].true, found[1].said, found[1].images, found[1].share) == ("class 1", "class 998", 499, 0.499)


def test_the_page_shows_the_mistakes_of_the_best_model(worlds: Store) -> None:
    """As many as the label files have, the surest first, each with its own picture."""
    world = worlds.original()
    summary = json.loads((world.folder("report") / "summary.json").read_text())
    page = (world.folder("report") / "index.html").read_text()
    [shard] = world.shards.glob("val-*.tar")
    rows = world.folder("evaluate") / "validation" / summary["best"] / "val-000.parquet"
    said = parquet_files.read_table(str(rows), ["label", "confidence", "offset", "size"]).to_pylist()
    known = parquet_files.read_table(index_files.rows_path(str(world.folder("index")), "validation", "val-000.tar"))
    truth = dict(zip(known["index"].to_pylist(), known["label"].to_pylist(), strict=True))
    wrong = [(row, truth[number]) for number, row in enumerate(said) if row["label"] != truth[number]]
    wrong.sort(key=lambda one: -one[0]["confidence"])
    assert wrong, "a model of two steps gets nothing wrong: choose another seed"
    assert f"{len(wrong)} of 3 validation images wrong" in page
    gallery = page.split('<div class="card gallery">')[1].split('<p class="caption">')[0]
    tiles = re.findall(r'base64,([^"]*)".*?<b><bdi>(.*?)</bdi> → <bdi>(.*?)</bdi></b>(.*?)</span>', gallery)
    assert [tile[1:] for tile in tiles] == [
        (CLASSES[true], CLASSES[row["label"]], f"{row['confidence']:.3f}") for row, true in wrong
    ]
    for (image, *_), (row, _) in zip(tiles, wrong, strict=True):
        original = Image.open(io.BytesIO(shards.read_at(str(shard), row["offset"], row["size"]))).convert("RGB")
        middle = np.asarray(original)[:, 1:-1]  # 12 x 10 pixels
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))), middle)
    [matrix] = re.findall(r'<table class="confusion">.*?</table>', page, re.DOTALL)
    assert sum(int(number) for number in re.findall(r">(\d+)</td>", matrix)) == 3
    assert storage.read_json(str(world.folder("evaluate") / "evaluate.json"))["load"]["cores"] >= 1
