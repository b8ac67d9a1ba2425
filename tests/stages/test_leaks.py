"""Images that lie in several splits are named, and never trained on where they are tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.data import label_files, parquet_files
from tests import small
from tests.data import tars
from tests.data.tars import picture
from tests.small import World


def info(world: World) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((world.folder("index") / "done.json").read_text())["info"]
    return found


def shard(path: Path, images: list[tuple[int, int]]) -> None:
    """Images by their number, each with a label."""
    tars.make(
        path,
        [
            pair
            for place, (number, label) in enumerate(images)
            for pair in ((f"{place}.png", picture(number)), (f"{place}.cls", str(label).encode()))
        ],
    )


def test_labelled_copies_of_held_out_images_are_dropped_and_named(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    shard(world.shards / "labelled-000.tar", [(1, 0), (2, 1), (3, 2), (4, 0)])
    shard(world.shards / "labelled-001.tar", [(5, 0), (6, 1), (7, 2), (8, 0)])
    shard(world.shards / "val-000.tar", [(20, 0), (2, 1), (22, 2)])
    shard(world.shards / "test-000.tar", [(30, 0), (7, 2), (22, 2)])
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    assert "6 labelled, 3 validation, 3 test" in ran.out
    assert "1 labelled image found among the validation images too, the first is '1' of labelled-000.tar" in ran.out
    assert "1 labelled image found among the test images too, the first is '2' of labelled-001.tar: not" in ran.out
    assert "1 image found in both the validation and the test shards" in ran.out
    found = info(world)
    assert found["per_class"]["labelled"] == [4, 1, 1]
    rows = [
        parquet_files.read_table(str(world.folder("index") / "labelled" / f"labelled-00{number}.parquet"))
        for number in range(2)
    ]
    hashes = {row for table in rows for row in table["image_hash"].to_pylist()}
    assert hashes == {label_files.image_hash(picture(number)) for number in (1, 3, 4, 5, 6, 8)}
    assert "all is done" in world.run().out


def test_an_index_without_leaks_is_the_one_of_the_images_that_are_left(tmp_path: Path) -> None:
    contents = []
    clean = [(1, 0), (3, 2), (4, 0), (5, 1)]
    for name, labelled in (("with", [clean[0], (2, 1), *clean[1:]]), ("without", clean)):
        folder = tmp_path / name
        folder.mkdir()
        world = small.make(folder, generations=[])
        shard(world.shards / "labelled-000.tar", labelled)
        shard(world.shards / "val-000.tar", [(20, 0), (2, 1), (22, 2)])
        assert world.run().status == 0
        contents.append(info(world)["content"]["labelled"])
    assert contents[0] == contents[1]


def test_one_image_under_two_labels_is_named(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    shard(world.shards / "labelled-000.tar", [(1, 0), (2, 1), (3, 2), (1, 2), (4, 1), (4, 1)])
    ran = world.run()
    assert ran.status == 0 and "1 image found under several labels, '" in ran.out


def test_nothing_is_said_where_nothing_leaks(tmp_path: Path) -> None:
    ran = small.make(tmp_path, generations=[]).run()
    assert ran.status == 0 and "too, the first" not in ran.out and "lie" not in ran.out
