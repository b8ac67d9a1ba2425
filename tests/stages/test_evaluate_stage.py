"""The test of a job's models: at which sizes, with which weights, on which images, and what a model cannot do."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from models import cost
from pipeline import weights
from pipeline.loading.loader import TrainingShard
from pipeline.plan.stage import WEIGHTS
from pipeline.report import costs_on_paper
from pipeline.stages import evaluate
from pipeline.train import checkpoint
from pipeline.train.dist import World as Workers
from pipeline.train.evaluate import accuracy
from tests import small
from tests.data import tars
from tests.small import World

FURTHER = ("evaluate.sizes=[12,8,16]", "evaluate.raw=true")
VIT = (
    "teacher.model=timm/vit_tiny_patch16_224",
    "teacher.overrides={img_size: 8, patch_size: 4, embed_dim: 16, depth: 1, num_heads: 2}",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A trained teacher, tested as ever: on seven images in two shards, none of them of the last class."""
    world = small.make(tmp_path_factory.mktemp("evaluate"), generations=[])
    tars.shard(world.shards / "test-000.tar", 3, labels=[0, 1, 1], start=200)
    tars.shard(world.shards / "test-001.tar", 4, labels=[1, 0, 0, 1], start=500)
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    return world


def evaluated(world: World) -> dict[str, Any]:
    """The one model of the newest evaluation."""
    newest = max(world.output.glob("evaluate-*/evaluate.json"), key=lambda path: path.stat().st_mtime_ns)
    found = json.loads(newest.read_text())
    assert found["images"] == 7
    [model] = found["models"]
    return model


def measured(world: World, size: int = 8, raw: bool = False) -> dict[str, Any]:
    """The same figures by one pass over all test images."""
    folder = str(world.folder("gen0-teacher"))
    model, card = weights.load_model(folder)
    if raw:
        saved = checkpoint.latest(folder)
        assert saved is not None and saved.step == 2
        weights.load_state(model, saved.model, saved.path)
    rows = sorted(world.folder("index").rglob("test*.parquet"))
    shards = [
        TrainingShard(str(world.shards / f"test-{number:03d}.tar"), str(path), None, pq.read_metadata(path).num_rows)
        for number, path in enumerate(rows)
    ]
    view = dataclasses.replace(card.view(), size=size)
    return accuracy(model, shards, view, 5, Workers(0, 1, torch.device("cpu")), classes=len(card.classes))


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(found[name] == pytest.approx(expected[name], rel=1e-5) for name in evaluate.SHOWN)


def test_a_model_is_tested_at_its_own_size(world: World) -> None:
    found, expected = evaluated(world), measured(world)
    assert same(found, expected)
    assert (found["count"], found["bad"], found["size"]) == (7, 0, 8)
    assert found["per_class"] == expected["per_class"] and found["per_class"]["images"] == [3, 4, 0]
    assert found["sizes"] == [] and "raw" not in found
    assert found["parameters"] > 0 and found["latency_ms"] > 0
    assert 0 < found["slowest_round"] <= found["images_per_second"] <= found["fastest_round"]
    model, card = weights.load_model(str(world.folder("gen0-teacher")))
    assert found["flops"] == costs_on_paper.flops(model, card.size) == cost.flops(model, 8)


def test_further_sizes_and_raw_weights(world: World) -> None:
    """Only the test and the report are done again, and the network is what it was: a local scope fits every size."""
    before = (world.folder("gen0-teacher") / WEIGHTS).read_bytes()
    own = evaluated(world)
    ran = world.run(*FURTHER)
    assert (ran.status, ran.err) == (0, ""), ran
    assert ran.out.count("done before") == 2, ran.out
    found = evaluated(world)
    assert {name: found[name] for name in ("top1", "loss", "per_class")} == {
        name: own[name] for name in ("top1", "loss", "per_class")
    }
    assert [other["size"] for other in found["sizes"]] == [12, 16]
    for other in found["sizes"]:
        assert same(other, measured(world, other["size"]))
    assert same(found["raw"], measured(world, raw=True))
    assert len({found["raw"]["loss"], found["loss"], *(other["loss"] for other in found["sizes"])}) == 4
    assert (world.folder("gen0-teacher") / WEIGHTS).read_bytes() == before
    newest = max(world.output.glob("evaluate-*/done.json"), key=lambda path: path.stat().st_mtime_ns)
    metrics = json.loads(newest.read_text())["metrics"]
    assert metrics["gen0-teacher/top1_at_12"] == found["sizes"][0]["top1"]
    assert metrics["gen0-teacher/raw_top1"] == found["raw"]["top1"]
    assert "done before" in world.run().out.split("evaluate")[1].split("\n")[0]  # without them it is the old test


def test_workers_that_share_the_shards_find_the_same(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "SMALL_BYTES", -1)  # or so few images are tested where the job runs
    ran = world.run("evaluate.sizes=[12]", "evaluate.batch=2")
    assert (ran.status, ran.err) == (0, ""), ran
    found, expected = evaluated(world), measured(world)
    assert same(found, expected) and found["per_class"] == expected["per_class"] and found["count"] == 7
    assert same(found["sizes"][0], measured(world, 12))


def test_a_teacher_that_was_there_already_has_no_raw_weights(world: World, tmp_path: Path) -> None:
    adopted = small.make(tmp_path, generations=[])
    ran = adopted.run(f"teacher.checkpoint={world.folder('gen0-teacher')}", f"data.root={world.shards}", *FURTHER)
    assert (ran.status, ran.err) == (0, ""), ran
    found = evaluated(adopted)
    assert "raw" not in found and [other["size"] for other in found["sizes"]] == [12, 16]


def test_a_size_that_a_model_does_not_take_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    ran = world.run(*VIT, "evaluate.sizes=[12]")
    assert ran.status == 2
    assert "evaluate.sizes holds 12, and model 'timm/vit_tiny_patch16_224' does not take images of 12 pixels" in ran.err
    assert "drop that size" in ran.err and len(ran.err.strip().splitlines()) == 1
    assert world.done() == ["index"]


def test_a_size_that_a_trained_model_does_not_take_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = small.make(tmp_path, generations=[])
    assert world.run(*VIT).status == 0
    monkeypatch.setattr(evaluate, "SMALL_BYTES", -1)
    ran = world.run(*VIT, "evaluate.sizes=[12]")
    assert ran.status == 2
    assert "cannot evaluate gen0-teacher at 12 pixels, test-000.tar: evaluate.sizes holds 12, and model" in ran.err
    ran = world.run(*VIT, "evaluate.sizes=[2]")
    assert ran.status == 2 and "evaluate.sizes is [2]; it must be between 4 and 4096" in ran.err
