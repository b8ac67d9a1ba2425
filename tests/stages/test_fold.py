"""Folds as stages: what one trains on, what it says of the others, and how it goes on after it was killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import weights
from pipeline.data import parquet_files
from tests import small
from tests.data import tars
from tests.small import World
from tests.stages.test_pretrained import PROBE, folder_with, job_of


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two labelled shards, of which the second repeats an image of the first; the class owl has one image."""
    made = small.make(tmp_path, generations=[])
    tars.shard(made.shards / "labelled-000.tar", 4, labels=[0, 1, 2, 0])
    tars.shard(made.shards / "labelled-001.tar", 3, labels=[0, 1, 1], start=3)
    return made


def held_out(world: World, stage: str) -> set[tuple[int, int]]:
    """(hash, label) of the images of a fold."""
    found = set()
    for path in (world.folder(stage) / "held_out").glob("*.parquet"):
        table = parquet_files.read_table(str(path))
        found |= set(zip(table["image_hash"].to_pylist(), table["label"].to_pylist(), strict=True))
    return found


def test_copies_lie_in_one_fold_and_a_class_of_one_image_is_named(world: World) -> None:
    ran = world.call("review", "--folds", "2")
    assert (ran.status, ran.err) == (0, ""), ran
    first, second = held_out(world, "fold1of2"), held_out(world, "fold2of2")
    assert not first & second and len(first | second) == 6  # of seven, two are one
    alone = [line for line in ran.out.splitlines() if "every labelled image of owl lies in this fold" in line]
    owl = "fold1of2" if any(label == 2 for _, label in first) else "fold2of2"
    assert len(alone) == 1 and alone[0].startswith(f"! {owl}: ")


def test_a_fold_that_was_killed_while_it_labelled_does_not_train_again(world: World) -> None:
    assert world.call("review", "--folds", "2").status == 0
    folder = world.folder("fold1of2")
    weights, answers = folder / "model.safetensors", sorted((folder / "answers").glob("*.parquet"))
    before, said = weights.stat().st_mtime_ns, [parquet_files.read_table(str(path)) for path in answers]
    (folder / "done.json").unlink()
    for path in answers:
        path.unlink()
    ran = world.call("review", "--folds", "2")
    assert "✓ fold1of2  finished" in ran.out and "· fold2of2  done before" in ran.out
    assert weights.stat().st_mtime_ns == before
    assert [parquet_files.read_table(str(path)) for path in answers] == said


def test_a_fold_of_a_probe_is_a_probe(tmp_path: Path) -> None:
    """It trains the classifier alone, as the teacher does."""
    source = folder_with(tmp_path / "before")
    world = job_of(tmp_path, {"pretrained": str(source), **PROBE})
    ran = world.call("review", "--folds", "2")
    assert (ran.status, ran.err) == (0, ""), ran
    given = weights.read_state(str(source / "model.safetensors"))
    found = weights.read_state(str(world.folder("fold1of2") / "model.safetensors"))
    same = {name for name, value in found.items() if value.shape == given[name].shape and value.equal(given[name])}
    assert set(found) - same == {"fc.weight", "fc.bias"}
