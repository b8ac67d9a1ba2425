"""Models as files: what model.yaml says, and how loading says what does not fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

from pipeline import weights
from pipeline.errors import ConfigError, WeightsError
from pipeline.plan.stage import CARD, WEIGHTS
from tests import small
from tests.small import command


@pytest.fixture
def trained(worlds: small.Store) -> Path:
    """The folder of a trained teacher."""
    return worlds.original(generations=[]).folder("gen0-teacher")


@pytest.fixture
def stage(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    for name in (WEIGHTS, CARD):
        (tmp_path / "stage").mkdir(exist_ok=True)
        shutil.copy(trained / name, tmp_path / "stage" / name)
    return tmp_path / "stage"


def test_the_card_says_how_to_feed_the_model(trained: Path) -> None:
    card = yaml.safe_load((trained / CARD).read_text())
    assert card == {
        "architecture": "lambda_resnet_tiny",
        "classes": small.CLASSES,
        "size": 8,
        "crop": 1.0,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "overrides": {"depths": [1, 1, 1], "widths": [8, 8, 16]},
    }


# ---- what cannot be loaded ---------------------------------------------------------------------------------


def edit_card(stage: Path, **changes: object) -> None:
    card = yaml.safe_load((stage / CARD).read_text())
    (stage / CARD).write_text(yaml.safe_dump(card | changes))


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(
        WeightsError, match=rf"^{tmp_path} has no model.yaml; name a folder that a training stage wrote$"
    ):
        weights.load_model(str(tmp_path))


def test_no_weights_there(stage: Path) -> None:
    (stage / WEIGHTS).unlink()
    with pytest.raises(WeightsError, match=f"^no weights at {stage}/model.safetensors; name a stage folder"):
        weights.load_model(str(stage))


def test_weights_cut_short(stage: Path) -> None:
    data = (stage / WEIGHTS).read_bytes()
    for size in (0, 5, 200, len(data) - 1):
        (stage / WEIGHTS).write_bytes(data[:size])
        with pytest.raises(WeightsError, match=f"^{stage}/model.safetensors is not a safetensors file: "):
            weights.load_model(str(stage))


@pytest.mark.parametrize("text", ["", "just text", "[1, 2]", "architecture: x\n", "a: [", "unknown: 1\n"])
def test_a_card_that_is_none(stage: Path, text: str) -> None:
    (stage / CARD).write_text(text)
    with pytest.raises(WeightsError, match=f"^{stage}/model.yaml is not a model card: "):
        weights.load_model(str(stage))


def test_weights_of_other_sizes_are_named_with_both_shapes(stage: Path) -> None:
    edit_card(stage, overrides={"depths": [1, 1, 1], "widths": [8, 8, 32]})
    with pytest.raises(WeightsError) as error:
        weights.load_model(str(stage))
    text = str(error.value)
    assert text.startswith(f"{stage}/model.safetensors: the weights do not fit LambdaResNet: of another shape: ")
    assert "(expected [" in text and ", found [" in text and " more; " in text
    assert text.endswith("name the architecture that the weights were trained with")


def test_weights_of_another_depth_are_missing_or_unknown(stage: Path) -> None:
    edit_card(stage, overrides={"depths": [1, 1, 2], "widths": [8, 8, 16]})
    with pytest.raises(WeightsError, match="missing: stages"):
        weights.load_model(str(stage))

    edit_card(stage, overrides={"depths": [1, 1, 1], "widths": [8, 8, 16]})
    path = str(stage / WEIGHTS)
    weights.save_state(path, weights.read_state(path) | {"more.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match=r"the weights do not fit LambdaResNet: unexpected: more\.weight; "):
        weights.load_model(str(stage))


def test_another_number_of_classes(stage: Path) -> None:
    edit_card(stage, classes=["a", "b"])
    with pytest.raises(WeightsError, match=r"expected \[2,.*found \[3,"):
        weights.load_model(str(stage))


def test_an_architecture_that_is_gone(stage: Path) -> None:
    edit_card(stage, architecture="lambda_resnet_tinny")
    with pytest.raises(ConfigError, match="'lambda_resnet_tinny'; the nearest are lambda_resnet_tiny"):
        weights.load_model(str(stage))
    ran = command("export", stage)
    assert ran.status == 2 and ran.err.count("\n") == 1
