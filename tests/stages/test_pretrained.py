"""Training that starts from weights of other classes: fine-tuning, and a linear probe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from torch import nn

from pipeline import weights
from pipeline.config.load import load_job
from pipeline.data import images
from pipeline.errors import ConfigError
from pipeline.plan.stage import CARD, WEIGHTS
from pipeline.train import backbone, probe
from tests import small
from tests.data import tars

VIEW = {"resolution": 16, "crop": 0.8, "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.25]}
PROBE = {
    "freeze": True,
    "duration": "30st",
    "warmup": "0st",
    "batch": 4,
    "optimizer": "adamw",
    "lr": 0.01,
    "lr_images": 0,
}
MODEL = "timm/test_resnet"


def folder_with(path: Path, classes: int = 7, prefix: str = "", **changes: object) -> Path:
    """A stage's weights and card, of other classes."""
    torch.manual_seed(3)
    model = weights.build_model(MODEL, classes)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
    path.mkdir()
    weights.save_state(str(path / WEIGHTS), {f"{prefix}{name}": value for name, value in model.state_dict().items()})
    view = images.View(16, 0.8, "bilinear", (0.5, 0.4, 0.3), (0.2, 0.2, 0.25))
    weights.write_card(str(path), weights.card_of(MODEL, {"drop_rate": 0.1}, [f"c{n}" for n in range(classes)], view))
    return path


def job_of(folder: Path, teacher: dict[str, object]) -> small.World:
    world = small.make(folder, generations=[])
    job = yaml.safe_load(world.job.read_text())
    world.job.write_text(yaml.safe_dump(job | {"teacher": teacher}))
    return world


def test_model_and_view_come_from_the_card_unless_the_job_says_them(tmp_path: Path) -> None:
    source = folder_with(tmp_path / "before")
    job = load_job(str(job_of(tmp_path, {"pretrained": str(source)}).job))
    assert {name: getattr(job.teacher, name) for name in VIEW} == VIEW
    assert (job.teacher.model, job.teacher.overrides) == (MODEL, {})  # without the noise of that training
    job = load_job(str(tmp_path / "small.yaml"), ["teacher.resolution=24", "teacher.model=timm/resnet18"])
    assert (job.teacher.resolution, job.teacher.crop, job.teacher.model) == (24, 0.8, "timm/resnet18")


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "test_resnet", "inception_v3.tv_in1k"])
@pytest.mark.parametrize("pretrained", [True, "weights.safetensors"])
def test_the_view_of_published_weights_is_timms(tmp_path: Path, name: str, pretrained: object) -> None:
    world = job_of(tmp_path, {"model": f"timm/{name}", "pretrained": pretrained})
    teacher, known = load_job(str(world.job)).teacher, timm.get_pretrained_cfg(name)
    assert (teacher.mean, teacher.std) == (list(known.mean), list(known.std))
    assert (teacher.resolution, teacher.interpolation) == (known.input_size[-1], known.interpolation)
    assert teacher.crop == known.crop_pct
    plain = load_job(str(world.job), ["teacher.pretrained=false"]).teacher
    assert (plain.mean, plain.resolution) == ([0.485, 0.456, 0.406], 224)


def test_another_mean_than_that_of_the_weights_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = folder_with(tmp_path / "before")
    load_job(str(job_of(tmp_path, {"pretrained": str(source), "mean": [0.1, 0.1, 0.1]}).job))
    assert (
        "teacher.mean is [0.1, 0.1, 0.1], and its pretrained weights were trained with [0.5, 0.4, 0.3]" in caplog.text
    )


def test_a_fine_tune_takes_all_but_the_classifier(tmp_path: Path) -> None:
    source = folder_with(tmp_path / "before", prefix="module.")
    short = {"duration": "1st", "warmup": "0st", "batch": 4, "lr": 0.0, "weight_decay": 0.0, "ema": 0.0, "augment": ""}
    world = job_of(tmp_path, {"pretrained": str(source), **short})
    ran = world.run()
    assert ran.status == 0 and "before with a new classifier" in ran.out, ran
    found = weights.read_state(str(world.folder("gen0-teacher") / WEIGHTS))
    before, _ = weights.without_prefix(weights.read_state(str(source / WEIGHTS)))
    learnt = {name for name, _ in weights.build_model(MODEL, 3).named_parameters()}  # statistics of norms move
    assert {name for name in learnt if not torch.equal(found[name], before[name])} == {"fc.weight", "fc.bias"}

    # The file's content counts, not where it lies.
    source.rename(tmp_path / "moved")
    planned = world.call("plan", f"teacher.pretrained={tmp_path / 'moved'}")
    assert planned.status == 0 and "will run" not in planned.out, planned


def test_a_probe_learns_a_classifier_on_fixed_features(tmp_path: Path) -> None:
    source = folder_with(tmp_path / "before")
    world = job_of(tmp_path, {"pretrained": str(source), **PROBE})
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    folder = world.folder("gen0-teacher")
    found, before = (weights.read_state(str(place / WEIGHTS)) for place in (folder, source))
    changed = {name for name in before if not torch.equal(found[name], before[name])}
    assert changed == {"fc.weight", "fc.bias"}

    # By definition: each labelled image, as validation sees it, once through the network.
    model, card = weights.load_model(str(folder))
    view, labels = card.view(), [0, 1, 2, 0, 1, 2]
    pixels = torch.stack([torch.from_numpy(images.load(tars.picture(n), view)) for n in range(6)])
    with torch.no_grad():
        logits = model(images.normalise(pixels, view, torch.float32))
    assert logits.argmax(1).tolist() == labels  # six images that it has learnt
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["start", "train", "validation"]
    result = json.loads((folder / "result.json").read_text())
    assert result["top1"] == lines[-1]["top1"] and result["step"] == 30
    assert world.run().out.count("done before") == len(small.TEACHER_ONLY)


def test_an_epoch_of_a_probe_holds_every_image_once() -> None:
    rows = torch.cat([probe._rows(step, 4, 10, seed=1) for step in range(5)])
    assert sorted(rows[:10].tolist()) == sorted(rows[10:].tolist()) == list(range(10))
    assert rows[:10].tolist() != rows[10:].tolist()


@pytest.mark.parametrize(
    ("teacher", "said"),
    [
        ({"freeze": True, "model": MODEL}, "teacher.freeze is true, and teacher.pretrained names no weights to keep"),
        (
            {**PROBE, "flip": 0.1},
            "teacher.flip is 0.1, which has no effect: with freeze only the classifier is trained",
        ),
        ({"pretrained": 3, "model": MODEL}, "teacher.pretrained is 3; it takes true, false, a stage folder or a .saf"),
        ({"pretrained": "none", "model": MODEL}, "none/model.safetensors; name a stage folder"),
        ({"model": "timm/resnet18"}, "gen0-teacher: "),
        ({"pretrained": True, "model": "timm/test_byobnet.nonsense"}, "gen0-teacher: "),
    ],
)
def test_weights_that_cannot_be_taken_are_named_before_anything_is_trained(
    tmp_path: Path, teacher: dict[str, object], said: str
) -> None:
    source = folder_with(tmp_path / "before")
    named = {} if teacher.get("freeze") and "model" in teacher else {"pretrained": str(source)}
    world = job_of(tmp_path, named | teacher)
    for name in ("plan", "run"):
        ran = world.call(name)
        assert ran.status == 2 and said in ran.err and ran.err.count("\n") == 1, ran
    assert "gen0-teacher" not in world.done() if world.output.exists() else True


def test_without_network_it_is_said_where_the_file_goes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"download model\.safetensors of timm/test_resnet\.\S+ where"):
        weights.build_model(MODEL, 3, pretrained=True)


def test_a_classifier_that_differs_is_named(tmp_path: Path) -> None:
    source = folder_with(tmp_path / "before")
    (source / CARD).unlink()
    world = job_of(tmp_path, {"checkpoint": str(source / WEIGHTS), "model": MODEL, **VIEW})
    ran = world.run()
    assert ran.status == 2, ran
    assert "fc.weight (expected [3, " in ran.err and "found [7, " in ran.err
    assert "to train a new classifier on these weights, name them as teacher.pretrained" in ran.err


def test_a_classifier_of_several_layers_is_no_probe() -> None:
    model = weights.build_model("timm/deit_tiny_distilled_patch16_224", 3)
    with pytest.raises(ConfigError, match="the classifier of model 'x' is not one linear layer"):
        backbone.classifier_of(model, "x")
