"""Two gloo workers do what one does; any number resumes what any number began."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import weights
from pipeline.cluster.world import World
from pipeline.errors import ConfigError
from pipeline.loading.loader import TrainingSource
from pipeline.tracking import journal
from pipeline.train import checkpoint
from pipeline.train.loop import run
from pipeline.train.start import _sync_batch_norm, _synchronised
from tests.train.tiny import die_at, difference, make_spec, without_noise

SHORT = without_noise(steps=5, checkpoint_every=0, warmup=1)
DIVERGING = {**SHORT, "weight_decay": 1e4, "warmup": 0, "rollbacks": 1, "rollback_factor": 1e-3}
NOISY = {"steps": 12, "checkpoint_every": 6}
BATCH_NORM = {"model": "timm/test_resnet", "overrides": {}, "steps": 3, "checkpoint_every": 2}


def final(folder):
    return weights.read_state(f"{folder}/model.safetensors")


def worker(rank: int, data: Path, folder: Path) -> dict[str, Any]:
    """All that the tests below need from two workers. Ray Train's way: the group is there."""
    found: dict[str, Any] = {
        "five": run(make_spec(data, folder / "five", **SHORT)),
        "parts": run(make_spec(data, folder / "parts", accumulate=2, **SHORT)),
        "back": run(make_spec(data, folder / "back", **DIVERGING)),
        "noisy": run(make_spec(data, folder / "noisy", **NOISY)),
    }
    die_at(8, "raise")
    try:
        run(make_spec(data, folder / "cut", **NOISY))
    except InterruptedError:
        die_at(-1)
    found["cut"] = run(make_spec(data, folder / "cut", **NOISY))
    found["again"] = run(make_spec(data, folder / "cut", **NOISY))
    found["batch_norm"] = run(make_spec(data, folder / "batch_norm", **BATCH_NORM))
    one = TrainingSource("labelled", make_spec(data, folder).sources[0].shards, per_step=1)
    try:
        run(make_spec(data, folder / "few", sources=(one,)))
    except ConfigError as error:
        found["few"] = {"error": str(error)}
    return found


@pytest.fixture(scope="module")
def two(data, gloo_pair, tmp_path_factory):
    """(folder of the runs of two workers, what each of the workers returned)"""
    folder = tmp_path_factory.mktemp("two")
    return folder, gloo_pair.call(worker, data, folder)


def test_two_workers_are_one(data, two, tmp_path):
    """Batches of 5 + 8 images: the slices of the two workers differ."""
    result = run(make_spec(data, tmp_path, **SHORT))
    folder, (found, other) = two
    assert difference(final(tmp_path), final(folder / "five")) < 1e-5
    assert found == other
    assert found["five"]["count"] == result["count"] == 30
    assert found["five"]["top1"] == result["top1"]
    assert found["five"]["loss"] == pytest.approx(result["loss"], abs=1e-5)
    losses = [[r["loss"] for r in journal.read(str(f))[0] if r["kind"] == "train"] for f in (tmp_path, folder / "five")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_two_workers_take_a_step_in_parts(two):
    folder, (found, other) = two
    assert found["parts"] == other["parts"]
    assert 0 < difference(final(folder / "parts"), final(folder / "five")) < 1e-5


def test_two_workers_go_back_together(two):
    folder, (found, other) = two
    assert found["back"] == other["back"]
    assert found["back"]["rollbacks"] == 1
    assert all(torch.isfinite(value).all() for value in final(folder / "back").values())


def test_two_workers_resume_as_if_nothing_had_happened(two):
    folder, (found, _) = two
    assert difference(final(folder / "noisy"), final(folder / "cut")) < 1e-6
    assert found["noisy"] == found["cut"] == found["again"]
    journals = [journal.read(str(folder / name))[0] for name in ("noisy", "cut")]
    assert [r["step"] for r in journals[0]] == [r["step"] for r in journals[1]]


def test_batch_norm_statistics_are_those_of_all_workers(two):
    """Each worker's own are averaged; what both validate with and what is kept is therefore one model."""
    folder, (found, other) = two
    assert found["batch_norm"] == other["batch_norm"]
    saved = checkpoint.load(str(folder / "batch_norm"), 2)
    assert saved.state["sync_batch_norm"] is False
    assert saved.state["world_size"] == 2


def test_fewer_images_than_workers_is_refused(two):
    _, (found, _) = two
    assert found["few"]["error"].startswith("2 training workers share 1 images a step")


@pytest.mark.parametrize(
    ("images", "accumulate", "kind", "expected"),
    [
        (124, 1, "cuda", True),
        (128, 1, "cuda", False),
        (252, 2, "cuda", True),
        (256, 2, "cuda", False),
        (124, 1, "cpu", False),
    ],
)
def test_batch_norm_is_synchronised_on_gpus_where_a_share_is_small(data, tmp_path, images, accumulate, kind, expected):
    """Of 4 workers, below 32 images that go through the network at once."""
    labelled = dataclasses.replace(make_spec(data, tmp_path).sources[0], per_step=images)
    spec = make_spec(data, tmp_path, sources=(labelled,), accumulate=accumulate)
    world, norm = World(0, 4, torch.device(kind)), torch.nn.BatchNorm2d(3)
    assert _sync_batch_norm(spec, norm, world) is expected
    assert not _sync_batch_norm(spec, torch.nn.LayerNorm(3), world)
    assert not _sync_batch_norm(spec, norm, World(0, 1, world.device))


@pytest.mark.parametrize("name", ["timm/efficientnet_b0", "lambda_resnet_tiny"])
def test_synchronised_batch_norm_leaves_the_function_as_it_was(name: str) -> None:
    model, image = weights.build_model(name, 10, {}).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        before = model(image)
        converted = _synchronised(model).eval()
        assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in converted.modules())
        assert torch.equal(converted(image), before)  # timm's norms hold an activation, which torch's conversion drops
