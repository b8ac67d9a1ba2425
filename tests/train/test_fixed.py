"""Fine-tuning head and last norm: the rest stays as it is, to the bit, and sees images as validation does."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from torch import nn

from models import create_model
from pipeline import weights
from pipeline.augment.view import Augment
from pipeline.data import images
from pipeline.data.images import View
from pipeline.errors import ConfigError
from pipeline.loading.loader import batches
from pipeline.loading.targets import SoftTargets
from pipeline.train import classification
from pipeline.train.freeze import ROLES, roles_of, train_only
from pipeline.train.loop import run
from pipeline.train.optim import NORMS
from pipeline.weights import Ensemble
from tests.train.tiny import VIT, change, die_at, difference, make_spec, without_noise

VIEW = View(16, crop=0.8)
MODEL = "timm/test_resnet"


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Weights to start from."""
    torch.manual_seed(1)
    path = str(tmp_path_factory.mktemp("before") / "model.safetensors")
    model = weights.build_model(MODEL, 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that have seen something
            module.running_mean.normal_(std=0.1)
    weights.save_state(path, model.state_dict())
    return path


@pytest.fixture(scope="module")
def tuned(data, before, tmp_path_factory):
    """Folder of an undisturbed fine-tune."""
    folder = tmp_path_factory.mktemp("tuned")
    run(spec_of(data, folder, before))
    return folder


def spec_of(data, folder, before, **changes):
    """Eight steps at twice the resolution, on the labelled images alone."""
    plain = make_spec(data, folder)
    changes = {
        "model": MODEL,
        "overrides": {},
        "init": before,
        "only": ROLES,
        "sources": plain.sources[:1],
        "resolution": 16,
        "crop": 0.8,
        "steps": 8,
        "checkpoint_every": 4,
        "lr": 0.1,
        "ema": 0.5,
        **changes,
    }
    return change(plain, **changes)


def final(folder):
    return weights.read_state(f"{folder}/model.safetensors")


def test_only_the_head_and_the_last_norm_change(before, tuned):
    old, new = weights.read_state(before), final(tuned)
    named = {name.rpartition(".")[0] for names in roles_of(weights.build_model(MODEL, 4)).values() for name in names}
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert {name.rpartition(".")[0] for name in changed} == named and len(named) == 2
    [norm] = [name for name in named if name + ".running_mean" in old]
    own = {f"{norm}.{part}" for part in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert changed == own | {f"{name}.{part}" for name in named - {norm} for part in ("weight", "bias")}


def test_a_fine_tune_goes_on_to_the_same_bits(data, before, tuned, tmp_path):
    die_at(6, "raise")
    spec = spec_of(data, tmp_path, before)
    with pytest.raises(InterruptedError):
        run(spec)
    classification.batches = batches
    run(spec)
    ours, theirs = final(tmp_path), final(tuned)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_neither_validation_nor_the_rates_of_its_noise_change_it(data, before, tuned, tmp_path):
    """Eval mode but for the last norm, before and after a validation."""
    noisy = {"drop_rate": 0.5, "drop_path_rate": 0.5}
    run(spec_of(data, tmp_path, before, evaluate_every=2, overrides=noisy))
    ours, theirs = final(tmp_path), final(tuned)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_training_sees_the_pixels_that_validation_sees(data):
    source = dataclasses.replace(make_spec(data, "unused").sources[0], per_step=48)
    [batch] = batches(
        [source], augment=Augment(16, view=VIEW), classes=4, soft=SoftTargets(), seed=3, start_step=0, stop_step=1
    )
    expected = []
    for shard in source.shards:
        with tarfile.open(shard.path) as tar:
            expected += [images.load(tar.extractfile(member).read(), VIEW).tobytes() for member in tar]
    assert sorted(image.contiguous().numpy().tobytes() for image in batch["images"]) == sorted(expected)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_workers_tune_as_one_does(data, tmp_path, parallel):
    """Head and layer norm of a transformer, the gradients of all other weights being none."""
    init = str(tmp_path / "init.safetensors")
    weights.save_state(init, weights.build_model("timm/vit_tiny_patch16_224", 4, VIT).state_dict())
    changes = without_noise(only=ROLES, init=init, steps=5, checkpoint_every=0, warmup=1, parallel=parallel)
    run(make_spec(data, tmp_path / "one", **changes))
    script = Path(__file__).with_name("run_tiny.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        str(data),
    ]
    env = {**os.environ, "PYTHONPATH": str(script.parents[2])}
    done = subprocess.run(
        [*command, str(tmp_path / "two"), json.dumps(changes)], env=env, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert difference(final(tmp_path / "one"), weights.read_state(init)) > 0
    assert difference(final(tmp_path / "one"), final(tmp_path / "two")) < 1e-5


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_the_last_norm_of_a_timm_model_is_the_last_one_that_is_computed(name):
    model = weights.build_model(f"timm/{name}", 4)
    found = roles_of(model)
    assert {key.rpartition(".")[0] for key in found["head"]} == {model.pretrained_cfg["classifier"]}
    computed = []
    for path, module in model.named_modules():
        if isinstance(module, NORMS):
            module.register_forward_hook(lambda *_, path=path: computed.append(path))
    size = model.pretrained_cfg["input_size"][-1]
    model.eval()(torch.zeros(1, 3, size, size))
    assert {key.rpartition(".")[0] for key in found["last_norm"]} == {computed[-1]}


def test_no_gradient_goes_further_back_than_the_last_norm():
    model = create_model("lambda_resnet_tiny", num_classes=4)
    train_only(model, ROLES)
    [norm, head] = [name.removesuffix(".weight") for name in ("stages.2.0.expand.1.weight", "classifier.weight")]
    assert {name for name, module in model.named_modules() if module.training} == {norm, head}
    features = []
    model.stages[2][0].expand[0].register_forward_hook(lambda module, given, made: features.append(made))
    model(torch.randn(2, 3, 24, 24)).sum().backward()
    assert not features[0].requires_grad
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {name for names in model.roles().values() for name in names}


def test_several_models_in_one_are_refused():
    both = Ensemble(create_model("lambda_resnet_tiny", num_classes=4) for _ in range(2))
    with pytest.raises(ConfigError, match="Ensemble has no single head and last norm"):
        roles_of(both)
