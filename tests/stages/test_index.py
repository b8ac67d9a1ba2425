"""What a job takes for changed data: what the shards hold, and neither their time stamps nor their sizes alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests import small
from tests.data import tars
from tests.small import World

WHEN = 1_700_000_000


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A job that is done, on shards with known time stamps."""
    world = small.make(tmp_path_factory.mktemp("finished"))
    for number, shard in enumerate(sorted(world.shards.glob("*.tar"))):
        os.utime(shard, (WHEN + number, WHEN + number))
    assert world.run().status == 0
    return world


@pytest.fixture
def world(finished: World, tmp_path: Path) -> World:
    return small.copy(finished, tmp_path)


def states(world: World, *settings: str) -> dict[str, str]:
    """{stage: 'done before' or 'finished'} of another run."""
    ran = world.run(*settings)
    assert ran.status == 0, ran
    lines = [line.split(maxsplit=2) for line in ran.out.splitlines() if line.startswith(("· ", "✓ "))]
    return {name: "done before" if state.startswith("done before") else "finished" for _, name, state in lines}


def ran(world: World, *settings: str) -> list[str]:
    """The stages that another run did."""
    return [name for name, state in states(world, *settings).items() if state == "finished"]


def rewrite(shard: Path, labels: list[int], start: int = 0) -> None:
    """Other labels or images in a file of the same size, with a time stamp of its own."""
    size = shard.stat().st_size
    tars.shard(shard, len(labels), labels=labels, start=start)
    content = shard.read_bytes()
    shard.write_bytes(content + bytes(size - len(content)))
    assert shard.stat().st_size == size
    os.utime(shard, (WHEN + 100, WHEN + 100))


def test_a_touched_shard_is_read_again_and_nothing_else(world: World) -> None:
    for name in ("labelled-000.tar", "val-000.tar", "test-000.tar"):
        os.utime(world.shards / name, (WHEN + 50, WHEN + 50))
    assert ran(world) == ["index"]
    assert ran(world) == []
    os.utime(world.shards / "unlabelled-000.tar", (WHEN + 50, WHEN + 50))
    assert ran(world) == []


def test_other_labels_in_a_file_of_the_same_size_train_everything_anew(world: World) -> None:
    rewrite(world.shards / "labelled-000.tar", [1, 2, 0, 1, 2, 0])
    assert ran(world) == small.STAGES
    tars.shard(world.shards / "labelled-000.tar", 6, labels=[0, 1, 2, 0, 1, 2])
    os.utime(world.shards / "labelled-000.tar", (WHEN, WHEN))
    assert ran(world) == []


def test_other_validation_labels_leave_the_models(world: World) -> None:
    rewrite(world.shards / "val-000.tar", [2, 1, 0], start=100)
    # Selection drops copies of held-out images, so it looks again and finds the same.
    assert "gen0-teacher" not in ran(world)


def test_other_test_labels_redo_the_evaluation(world: World) -> None:
    rewrite(world.shards / "test-000.tar", [2, 1, 0], start=200)
    done = ran(world)
    assert {"index", "evaluate", "report"} <= set(done) and "gen0-teacher" not in done


def test_a_class_renamed_is_another_class_list(world: World) -> None:
    (world.shards / "classes.json").write_text(json.dumps(["cat", "dog", "eagle"]))
    assert ran(world) == small.STAGES


def test_classes_that_differ_in_case_alone_are_asked_about(world: World) -> None:
    (world.shards / "classes.json").write_text(json.dumps(["cat", "dog", "Cat"]))
    assert "the classes 'cat' and 'Cat' differ in case or Unicode form alone" in world.run().out


def test_plan_counts_steps_once_the_images_are_known(world: World) -> None:
    training = ["teacher.duration=6ep", "teacher.batch=4", "teacher.lr=0.64", "teacher.lr_images=256"]
    settings = [f"output={world.output}", f"data.root={world.shards}", *training, "finetune.resolution=64"]
    planned = " ".join(small.command("plan", world.job, *settings).out.split())
    assert "6ep = 9 steps (1.5 an epoch, 36 images), batch 4, learning rate 0.01, 1 worker" in planned
    assert "1.5ep = 0 steps (too few: lengthen it or lower batch), batch 256" in planned


def test_shards_without_an_image_are_named(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    tars.shard(world.shards / "test-000.tar", 0)
    ran = world.run()
    assert ran.status == 2 and "the test shards hold no image" in ran.err and "test-000.tar" in ran.err, ran


def test_index_rows_lead_to_the_images_and_labels(world: World) -> None:
    shard = world.shards / "labelled-000.tar"
    rows = pq.read_table(world.folder("index") / "labelled" / "labelled-000.parquet").to_pylist()
    assert [row["label"] for row in rows] == [0, 1, 2, 0, 1, 2]
    content = shard.read_bytes()
    for number, row in enumerate(rows):
        assert (row["index"], row["key"]) == (number, f"{number:03d}")
        assert content[row["offset"] :][: row["size"]] == tars.picture(number)
    counts = json.loads((world.folder("index") / "shards.json").read_text())
    assert counts == {
        "labelled": {"labelled-000.tar": 6},
        "validation": {"val-000.tar": 3},
        "test": {"test-000.tar": 3},
    }
