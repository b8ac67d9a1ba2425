"""Detectors in the one training loop: resumed to the same bits, and not dependent on how an update is divided."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from pipeline import weights
from pipeline.augment.jitter import Jitter
from pipeline.cluster.world import World
from pipeline.detection import task as detection
from pipeline.detection.loader import batches
from pipeline.detection.task import DETECTION
from pipeline.errors import WeightsError
from pipeline.train import checkpoint, loop
from tests.detection import world

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    world.write(folder)
    return folder


@pytest.fixture(scope="module")
def ran(data, tmp_path_factory):
    """Twenty steps at one go."""
    folder = tmp_path_factory.mktemp("ran")
    loop.run(world.spec(data, data / "index", folder), None, DETECTION)
    return folder


def dying(after):
    """The batches of the task, until the machine is lost."""
    given = detection.batches

    def found(*arguments, **settings):
        for number, batch in enumerate(given(*arguments, **settings)):
            if number == after:
                raise InterruptedError
            yield batch

    return found


def test_ten_and_ten_steps_are_twenty_bitwise(data, ran, tmp_path, monkeypatch):
    spec = world.spec(data, data / "index", tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(detection, "batches", dying(13))
        with pytest.raises(InterruptedError):
            loop.run(spec, None, DETECTION)
    result = loop.run(spec, None, DETECTION)
    assert result == checkpoint.read_result(str(ran))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path, ran))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_figures_are_those_of_the_journal_and_change_with_training(ran):
    records = [json.loads(line) for line in (ran / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 2 and losses[1] < losses[0]
    [validation] = [record for record in records if record["kind"] == "validation"]
    assert {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"} <= validation.keys()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_images_of_a_step(data, size):
    spec = world.spec(data, data / "index", "unused", batch=5)
    [source] = spec.sources
    given = {
        "classes": world.CLASSES, "jitter": spec.jitter, "fill": spec.card.fill, "seed": 0, "start_step": 3,
        "stop_step": 6,
    }  # fmt: skip
    whole = list(batches(source, **given))
    parts = [list(batches(source, **given, rank=rank, world=size)) for rank in range(size)]
    for step, batch in enumerate(whole):
        for name in ("images", "boxes", "labels", "masks", "counts", "crowds"):
            assert torch.equal(torch.cat([part[step][name] for part in parts]), batch[name]), name


def test_views_depend_on_the_seed_of_their_place_alone(data):
    spec = world.spec(data, data / "index", "unused", batch=4)
    [source] = spec.sources
    given = {"classes": world.CLASSES, "jitter": Jitter(32), "fill": (1, 2, 3), "seed": 0}
    all_at_once = list(batches(source, **given, start_step=0, stop_step=4))
    later = list(batches(source, **given, start_step=3, stop_step=4))
    assert torch.equal(all_at_once[3]["images"], later[0]["images"])
    assert torch.equal(all_at_once[3]["masks"], later[0]["masks"])
    epochs = [all_at_once[step]["images"] for step in (0, 2)]  # the same eight images, seen again
    assert not torch.equal(*epochs)


def test_targets_are_what_torchvision_takes(data):
    spec = world.spec(data, data / "index", "unused", batch=8)
    [batch] = batches(
        spec.sources[0], classes=world.CLASSES, jitter=spec.jitter, fill=(0, 0, 0), seed=0, start_step=0, stop_step=1
    )
    images, targets = detection.to_device(batch, ALONE.device)
    assert len(images) == len(targets) == 8
    assert sum(len(target["labels"]) for target in targets) == len(batch["labels"]) > 4
    assert sum(len(target["crowds"]) for target in targets) >= 1
    for target in targets:
        assert target["boxes"].shape == (len(target["labels"]), 4) and (target["labels"] >= 1).all()
        sides = target["boxes"][:, 2:] - target["boxes"][:, :2]
        assert (sides >= 1).all() and target["masks"].flatten(1).any(1).all()
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            edges = torch.tensor([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            assert (box - edges).abs().max() <= 1.0  # rounded to pixels


def test_a_step_in_parts_sees_every_image_once(data, tmp_path):
    """The regions that heads learn from are drawn for each part anew, so only the sum of all is near."""
    spec = world.spec(data, data / "index", tmp_path, batch=4, accumulate=2, duration="2st")
    assert loop.run(spec, None, DETECTION)["step"] == 2


def test_the_body_starts_from_a_classifiers_weights(data, tmp_path):
    torch.manual_seed(1)
    classifier = weights.build_model("lambda_resnet_50", 5, world.BODY)
    path = str(tmp_path / "classifier.safetensors")
    weights.save_state(path, classifier.state_dict())
    spec = world.spec(data, data / "index", tmp_path)
    made = DETECTION.build(dataclasses.replace(spec, body=path), True).backbone.body.state_dict()
    theirs = classifier.state_dict()
    assert made.keys() == {name for name in theirs if not name.startswith("classifier.")}
    assert all(torch.equal(made[name], theirs[name]) for name in made)
    weights.save_state(path, weights.build_model("lambda_resnet_50", 5, {**world.BODY, "widths": [8, 24]}).state_dict())
    with pytest.raises(WeightsError, match=r"is of another architecture than the body 'lambda_resnet_50'"):
        DETECTION.build(dataclasses.replace(spec, body=path), True)
