"""Unlabelled images for people: small margins spread over classes, and where two teachers disagree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data import parquet_files
from pipeline.review import unlabelled
from tests.review import written

RNG = np.random.default_rng(0)


def drawn(images: int, classes: int, sharpness: float = 1.0) -> np.ndarray:
    probs = np.exp(sharpness * RNG.normal(0, 1, (images, classes)))
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("files", [1, 4])
def test_the_closest_images_equally_many_of_each_class(files: int, tmp_path: Path) -> None:
    probs = drawn(400, 5)
    found = unlabelled.close([path for _, path in written(tmp_path, np.zeros(400, int), probs, files)], 20)
    parts = np.array_split(np.arange(400), files)
    images = np.array([parts[f][r] for f, r in zip(found.file, found.row, strict=True)])
    ordered = np.sort(probs.astype(np.float16).astype(float), axis=1)
    margin, said = ordered[:, -1] - ordered[:, -2], probs.argmax(axis=1)
    for number in range(5):
        mine = images[said[images] == number]
        of_class = np.flatnonzero(said == number)
        assert len(mine) == 4
        assert set(margin[mine]) == set(np.sort(margin[of_class])[:4])
    assert (np.diff(margin[images][:5]) >= 0).all() and found.images == 400


def test_a_class_that_is_hardly_said_leaves_its_places_to_others(tmp_path: Path) -> None:
    probs = np.array([[0.6, 0.4], [0.51, 0.49], [0.45, 0.55], [0.7, 0.3]], np.float32)
    found = unlabelled.close([written(tmp_path, np.zeros(4, int), probs)[0][1]], 3)
    assert found.row.tolist() == [1, 2, 0]


def test_copies_are_shown_once(tmp_path: Path) -> None:
    probs = np.array([[0.6, 0.4], [0.51, 0.49]], np.float32)
    files = [written(tmp_path / str(copy), np.zeros(2, int), probs)[0][1] for copy in range(3)]
    assert len(unlabelled.close(files, 10).row) == 2


def test_one_class_has_no_margin(tmp_path: Path) -> None:
    files = written(tmp_path, np.zeros(3, int), np.ones((3, 1), np.float32))
    assert len(unlabelled.close([files[0][1]], 10).row) == 0


@pytest.mark.parametrize("files", [1, 3])
def test_disagreements_come_in_the_order_of_the_less_sure_teacher(files: int, tmp_path: Path) -> None:
    one, two = drawn(300, 4, 3.0), drawn(300, 4, 3.0)
    pairs = [
        (a, b)
        for (_, a), (_, b) in zip(
            written(tmp_path / "1", np.zeros(300, int), one, files),
            written(tmp_path / "2", np.zeros(300, int), two, files),
            strict=True,
        )
    ]
    found = unlabelled.disagreements(pairs, 25)
    parts = np.array_split(np.arange(300), files)
    images = [int(parts[f][r]) for f, r in zip(found.file, found.row, strict=True)]
    differ = np.flatnonzero(one.argmax(axis=1) != two.argmax(axis=1))
    sure = np.minimum(one.max(axis=1), two.max(axis=1))
    assert images == sorted(differ.tolist(), key=lambda image: (-sure[image], image))[:25]
    assert found.images == len(differ)


def test_other_images_are_not_compared(tmp_path: Path) -> None:
    one, two = np.array([[0.9, 0.1]] * 3, np.float32), np.array([[0.1, 0.9]] * 3, np.float32)
    first, second = (written(tmp_path / name, np.zeros(3, int), p)[0][1] for name, p in (("1", one), ("2", two)))
    table, metadata = parquet_files.read_table(second), parquet_files.read_metadata(second)
    place = table.column_names.index("image_hash")
    hashes = table["image_hash"].to_pylist()
    changed = table.set_column(place, "image_hash", pa.array([hashes[0], 77, hashes[2]], pa.uint64()))
    parquet_files.write_table(second, changed, metadata)
    assert unlabelled.disagreements([(first, second)], 9).row.tolist() == [0, 2]
