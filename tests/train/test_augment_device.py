"""The device's views against Pillow's: the same draws, the same pixels.

Run: pytest tests/train/test_augment_device.py
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from pipeline.augment.on_device import TABLES, augment
from pipeline.augment.randaugment import KINDS, MOVES
from pipeline.augment.view import Augment, seeded_view, undisturbed, view_and_operations
from pipeline.errors import ConfigError
from pipeline.train.loop import run
from tests.train.tiny import make_spec

SIDE, PAPER = 32, "rand-m15-mmax15-n2-p1"
MOVING = [name for name in auto_augment._RAND_TRANSFORMS if name.startswith(("Shear", "Translate", "Rotate"))]
IN_PLACE = sorted(
    {*auto_augment._RAND_TRANSFORMS, *auto_augment._RAND_INCREASING_TRANSFORMS, "PosterizeOriginal", "Desaturate"}
    - {*MOVING}
)


def pictures(count=24):
    """Smooth ones, flat ones, dark ones and noise."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    found = []
    for i in range(count):
        smooth = 127 + 80 * np.sin(np.stack([x * (i + 1), y * i, x + y], 2))
        noise = rng.integers(0, 256, (SIDE, SIDE, 3))
        flat = np.full((SIDE, SIDE, 3), 7 * i)
        found.append((smooth, noise, flat, noise // 5 + 20, smooth * (x > 0.5)[..., None])[i % 5])
    return [Image.fromarray(pixels.astype(np.uint8)) for pixels in found]


def both(settings, images):
    """(Pillow's views, the device's), uint8 [b, 3, s, s]."""
    there = dataclasses.replace(settings, on_device=True)
    with undisturbed():
        ours = np.stack([seeded_view(image, settings, seed) for seed, image in enumerate(images)])
        drawn = [view_and_operations(image, there, seed) for seed, image in enumerate(images)]
    views, operations = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    before = views.clone()
    found = augment(views, there, operations)
    assert torch.equal(views, before)
    assert found.dtype == torch.uint8
    return ours.astype(int), found.numpy().astype(int)


def plain(**changes):
    return Augment(**{"size": SIDE, "scale": (1, 1), "ratio": (1, 1), "flip": 0.0, **changes})


@pytest.mark.parametrize("name", IN_PLACE)
@pytest.mark.parametrize("magnitude", [3, 10, 15])
def test_what_leaves_pixels_in_place_is_pillows_to_the_bit(name, magnitude):
    settings = plain(policy=f"rand-m{magnitude}-mmax{magnitude}-n1-p1", ops=(name,))
    ours, theirs = both(settings, pictures())
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("name", [*MOVING, "TranslateX", "TranslateY"])
def test_what_moves_pixels_moves_them_to_the_same_place(name, interpolation):
    settings = plain(policy="rand-m10-n1-p1", ops=(name,), interpolation=interpolation)
    ours, theirs = both(settings, pictures())
    gap = np.abs(ours - theirs)
    fill = np.array([124, 116, 104])[:, None, None]
    assert ((ours == fill).all(1) == (theirs == fill).all(1)).mean() > 0.995  # the same border
    assert gap.mean() < (0.1 if interpolation == "bilinear" else 4)  # of 255, a third of the pictures being noise
    smooth = gap[[i for i in range(len(ours)) if i % 5 in (0, 2)]]
    assert smooth.mean() < 0.6


@pytest.mark.parametrize("policy", [PAPER, "rand-m9-n3-mstd0.5-inc1", "rand-m5-tweights", "rand-m9-n2"])
@pytest.mark.parametrize("interpolation", ["bilinear", "random"])
def test_a_whole_policy_draws_and_gives_the_same(policy, interpolation):
    settings = Augment(size=SIDE, policy=policy, interpolation=interpolation)
    ours, theirs = both(settings, pictures(120))
    gap = np.abs(ours - theirs).mean((1, 2, 3))
    assert np.median(gap) < 0.5
    assert (gap < 12).mean() > 0.9  # the rest: noise in another interpolation, then an operation that stretches it


def test_views_do_not_depend_on_their_batch():
    settings = Augment(size=SIDE, policy=PAPER, on_device=True)
    with undisturbed():
        drawn = [view_and_operations(image, settings, seed) for seed, image in enumerate(pictures())]
    views, operations = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    together = augment(views, settings, operations)
    alone = [augment(views[i : i + 1], settings, operations[i : i + 1]) for i in range(len(views))]
    assert torch.equal(together, torch.cat(alone))


def test_all_that_can_be_written_down_is_carried_out():
    assert {*KINDS} == {"", "Color", "Sharpness", *TABLES, *MOVES.values()}


@pytest.mark.parametrize("settings", [{"policy": "rand-m9-t3a"}, {"policy": "rand-m9", "ops": ("GaussianBlur",)}])
def test_what_no_device_carries_out_is_refused(settings):
    with pytest.raises(ConfigError, match=r"GaussianBlur.*augment_on: loader"):
        Augment(size=SIDE, on_device=True, **settings)


def test_a_run_trains_on_the_devices_views(tmp_path):
    """To the bit what it does on the loader's, where no operation moves pixels."""
    found = []
    for on_device in (False, True):
        noise = {"augment": PAPER, "augment_ops": ["Solarize", "Color", "Equalize"]}
        noise["augment_on"] = "device" if on_device else "loader"
        changes = {"steps": 3, "mixup": 0.2, "cutmix": 1.0, "workers": int(on_device)}
        found.append(run(make_spec(tmp_path / "data", tmp_path / str(on_device), **noise, **changes)))
    assert found[0] == found[1]
