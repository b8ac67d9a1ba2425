"""Whitening in a training run: of the first images of the order, kept with the weights, only where these are new."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pipeline.cluster.world import World
from pipeline.loading.loader import batches
from pipeline.train import loop
from pipeline.train.classification import CLASSIFICATION
from pipeline.train.first_images import first_images
from pipeline.train.start import start
from pipeline.weights import read_state
from tests.train import tiny

ALONE = World(0, 1, torch.device("cpu"))
SMALL = {"model": "lambda_resnet_tiny", "overrides": {"widths": [8, 8, 8], "stem_width": 8}, "steps": 2}
FIRST = "stem.0.weight"


def test_the_images_are_all_that_there_are_without_noise(tmp_path: Path) -> None:
    spec = tiny.make_spec(tmp_path / "data", tmp_path / "run", **SMALL)
    found = first_images(spec)
    assert found.shape == (48, 3, 8, 8) and found.dtype == torch.float32
    assert len({image.numpy().tobytes() for image in found}) == 48
    assert torch.equal(found, first_images(spec))


def test_new_weights_are_whitening_and_a_run_keeps_them(tmp_path: Path) -> None:
    spec = tiny.make_spec(tmp_path / "data", tmp_path / "run", **SMALL, first_layer="whitening")
    plain = tiny.change(spec, first_layer="he")
    begun, usual = (dict(start(one, ALONE, CLASSIFICATION.build).model.state_dict()) for one in (spec, plain))
    assert torch.equal(begun[FIRST][:4], -begun[FIRST][4:]) and not torch.equal(begun[FIRST], usual[FIRST])
    assert all(torch.equal(begun[name], usual[name]) for name in usual if name != FIRST)
    loop.run(spec)
    made = str(tmp_path / "run" / "model.safetensors")
    torch.testing.assert_close(read_state(made)[FIRST], begun[FIRST], atol=0.2, rtol=0.2)
    student = tiny.change(spec, folder=str(tmp_path / "student"), init=made)
    assert torch.equal(start(student, ALONE, CLASSIFICATION.build).model.state_dict()[FIRST], read_state(made)[FIRST])


def test_alternating_flips_reach_the_batches(tmp_path: Path) -> None:
    """Every image is there in each epoch, as it is or mirrored, and the other way in the next."""
    spec = tiny.make_spec(tmp_path / "data", tmp_path / "run", **SMALL, flip=0.5, alternate_flip=True, augment="")
    spec = tiny.change(spec, crop_scale=[1.0, 1.0], crop_ratio=[1.0, 1.0])
    [source] = [tiny.dataclasses.replace(one, per_step=48) for one in spec.sources if one.name == "labelled"]
    drawn = batches([source], augment=spec.augment, classes=4, soft=spec.soft, seed=7, start_step=0, stop_step=3)
    epochs = [{image.numpy().tobytes() for image in batch["images"].contiguous()} for batch in drawn]
    turned = [{np.ascontiguousarray(image.numpy()[:, :, ::-1]).tobytes() for image in batch} for batch in [
        [torch.frombuffer(bytearray(image), dtype=torch.uint8).view(3, 8, 8) for image in epoch] for epoch in epochs
    ]]  # fmt: skip
    assert len(epochs[0]) == 48 and epochs[0] == epochs[2] == turned[1] and epochs[0] != epochs[1]
