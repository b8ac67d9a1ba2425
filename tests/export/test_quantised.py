"""ONNX of 8-bit integers: made from validation images, and refused where it loses too much."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import noisy_lambda
from pipeline import weights
from pipeline.data import shards
from pipeline.data.images import View
from pipeline.errors import WeightsError
from pipeline.export import onnx_file, quantised
from pipeline.predict.inputs import Wanted
from pipeline.predict.predictor import Model
from tests import small
from tests.small import command

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def test_int8_of_a_run_predicts_as_it_was_measured(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.original(generations=[])
    ran = command("export", world.output, "--out", tmp_path, "--int8", "--max-drop", 100)
    assert ran.status == 0 and ran.err.count("\n") == 1, ran
    files, measured = ran.out.splitlines()
    assert "model.onnx, model.int8.onnx, README.md" in files
    path = tmp_path / "model.int8.onnx"
    model = noisy_lambda.load(path)
    found = [one.label for one in model.predict(data for _, data in shards.stream(str(world.shards / "val-000.tar")))]
    right = sum(label == name for label, name in zip(found, small.CLASSES, strict=True))
    assert measured.startswith(f"model.int8.onnx has {100 * right / 3:.2f} % of 3 validation images right, the model ")
    assert model.card.temperature == noisy_lambda.load(tmp_path).card.temperature
    assert path.read_bytes() != (tmp_path / "model.onnx").read_bytes() and b"QuantizeLinear" in path.read_bytes()


class Told(nn.Module):
    """Has every image right: its class is how bright it is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -(x.mean((1, 2, 3))[:, None] - torch.tensor([-0.5, 0.0, 0.5])).abs()


def test_a_loss_beyond_what_is_allowed_names_the_worst_classes(tmp_path: Path) -> None:
    """The file is another network's, which says one class of all images."""
    card = weights.card_of("told", {}, small.CLASSES, View(8, 1.0, "bicubic", (0.5,) * 3, (0.5,) * 3))
    one_class = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    with torch.no_grad():
        one_class[2].weight.zero_()
        one_class[2].bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    path, to = str(tmp_path / "model.onnx"), str(tmp_path / "model.int8.onnx")
    onnx_file.write(one_class.eval(), card, path)

    def images() -> Iterator[Wanted]:
        for number in range(12):
            pixels = np.full((8, 8, 3), (64, 128, 191)[number % 3], np.uint8)
            yield Wanted({"path": str(number)}, pixels, number % 3)

    model = Model("", Told(), card, 1.0, "")
    with pytest.raises(WeightsError) as caught:
        quantised.write(model, path, to, images, 66.0)
    assert str(caught.value).startswith(
        "int8 has 33.33 % of 12 validation images right, 66.67 points less than the 100.00 % before, and --max-drop "
        "allows 66; the worst classes: dog (0 of 4 right instead of 4), owl (0 of 4 right instead of 4); nothing was"
    )
    assert quantised.write(model, path, to, images, 67.0).top1 == pytest.approx((100, 100 / 3))


def test_int8_needs_the_validation_images(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.original(generations=[])
    teacher = noisy_lambda.load(world.folder("gen0-teacher"))
    weights.save_state(str(tmp_path / "model.safetensors"), teacher.module.state_dict())
    weights.write_card(str(tmp_path), teacher.card)
    for options, words in (
        (("--int8",), "--int8 needs the validation images"),
        (("--int8", "--max-drop", "-1"), "--max-drop is -1; it takes 0 to 100"),
        (("--max-drop", "1"), "goes with --int8"),
    ):
        ran = command("export", tmp_path, *options)
        assert ran.status == 2 and ran.err.count("\n") == 1 and words in ran.err, ran
    assert not (tmp_path / "export").exists()
