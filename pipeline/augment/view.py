"""The training view of an image: random resized crop, flip, affine jitter, RandAugment. Noise for students and teachers.

A view is a pure function of (image, Augment, 64-bit seed), so that no generator state is ever checkpointed.
RandAugment draws from the global generators of `random` and numpy (pipeline.augment.randaugment); `undisturbed()` gives the
caller's states back. Nothing here draws from torch.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from timm.data import auto_augment

from pipeline.augment.randaugment import INTERPOLATIONS, carry_out, check_can_be_written, fill_of, write_down
from pipeline.data.images import View, to_array
from pipeline.data.jpeg import Jpeg
from pipeline.errors import ConfigError

# timm itself passes over sections that it does not know: a misspelt magnitude would train without noise.
POLICY = re.compile(r"rand(-(m\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc[01]|tweights|t3aw?))+")


@dataclass(frozen=True)
class Affine:
    """Bounds of a random affine map about the centre of the cropped view: one resampling for all of it, where
    a chain of timm's operations would blur a small image once for each.

    degrees: rotation within ±; translate: shift within ± this fraction of the side; scale: range of the
    magnification; shear: horizontal shear within ± degrees.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0


@dataclass(frozen=True)
class Augment:
    """How training images are noised; every field is part of a stage's identity. Errors speak of a job's settings."""

    size: int
    """Side of the view in pixels."""
    policy: str = ""
    """timm's RandAugment string, e.g. `rand-m15-mmax15-n2-p1` (timm clips magnitudes at 10 and applies each
    operation half the time unless told by mmax and p); '' for none."""
    ops: tuple[str, ...] = ()
    """Only these of timm's operations (`ShearX`, `Rotate`, …); () for the policy's usual set."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    affine: Affine | None = None
    interpolation: str = "bicubic"
    """`bilinear`, `bicubic`, or `random` of the two."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Colour (0 … 1) of what an operation brings in from outside the image."""
    on_device: bool = False
    """The policy's operations are not applied to the view but written down (`view_and_operations`), for the device that
    trains to carry them out on whole batches (pipeline.augment.on_device)."""
    view: View | None = None
    """In place of all this the view of validation, without noise: fine-tuning at another resolution."""

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"interpolation of training images is '{self.interpolation}'; allowed are {', '.join(INTERPOLATIONS)}"
            )
        if self.policy and not POLICY.fullmatch(self.policy):
            raise ConfigError(
                f"augment is '{self.policy}', which timm's RandAugment does not know; write e.g. "
                "rand-m9-n2-p1 with sections of m, n, p, mstd, mmax, inc, tweights, t3a, t3aw, or '' for none"
            )
        unknown = [name for name in self.ops if name not in auto_augment.NAME_TO_OP]
        if unknown or (self.ops and not self.policy):
            found = f"names '{unknown[0]}'" if unknown else "is set without a policy in `augment` to draw from"
            raise ConfigError(
                f"augment_ops {found}; allowed are, beside a policy, {', '.join(auto_augment.NAME_TO_OP)}"
            )
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise ConfigError(
                    f"crop_{name} is ({low}, {high}); it must be a range (low, high) above 0"
                    + (" and at most 1" if most == 1 else "")
                )
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip is {self.flip}; it is a probability between 0 and 1")
        if self.on_device:
            check_can_be_written(self)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Give the global generators of `random` and numpy back as they were."""
    python, numpy_ = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)


def train_view(image: Image.Image | Jpeg, augment: Augment, seed: int) -> np.ndarray:
    """The view uint8 [3, size, size] of an RGB image that this seed stands for."""
    with undisturbed():
        return seeded_view(image, augment, seed)


def seeded_view(image: Image.Image | Jpeg, augment: Augment, seed: int) -> np.ndarray:
    """`train_view` that leaves the global generators changed: for many images inside one `undisturbed()`."""
    if augment.view:
        assert isinstance(image, Image.Image)  # short cuts are for noise
        return to_array(image, augment.view)
    view, rng = _placed(image, augment, seed)
    if augment.policy:
        view = carry_out(view, augment, rng)
    return np.asarray(view).transpose(2, 0, 1)


def view_and_operations(image: Image.Image | Jpeg, augment: Augment, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`seeded_view` before the policy's operations, and those written down, float32 [layers, policy.WIDTH]."""
    view, rng = _placed(image, augment, seed)
    return np.asarray(view).transpose(2, 0, 1), write_down(augment, rng)


def _placed(image: Image.Image | Jpeg, augment: Augment, seed: int) -> tuple[Image.Image, random.Random]:
    """The view before any policy, and the generator that goes on drawing for this seed."""
    rng = random.Random(int(seed))
    resample = rng.choice(INTERPOLATIONS[augment.interpolation])
    box = crop_box(image.size, augment, rng)
    size = (augment.size, augment.size)
    if augment.affine:
        view = image.resize(size, resample, box)
        view = view.transform(
            size,
            Image.Transform.AFFINE,
            matrix(augment.affine, augment.size, rng),
            resample,
            fillcolor=fill_of(augment),
        )
    else:
        view = image.resize(size, resample, box)
    if augment.flip and rng.random() < augment.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view, rng


def crop_box(size: tuple[int, int], augment: Augment, rng: random.Random) -> tuple[int, int, int, int]:
    """A random crop (left, top, right, bottom), drawn as torchvision's RandomResizedCrop draws it."""
    width, height = size
    log_ratio = [math.log(bound) for bound in augment.ratio]
    for _ in range(10):
        area = width * height * rng.uniform(*augment.scale)
        ratio = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.random() * (width - w + 1)), int(rng.random() * (height - h + 1))
            return left, top, left + w, top + h
    # No fit: the largest centred crop whose ratio is within bounds.
    low, high = augment.ratio
    w = min(width, max(1, round(height * high)))
    h = min(height, max(1, round(width / low)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def matrix(affine: Affine, side: int, rng: random.Random) -> tuple[float, ...]:
    """The six numbers that map a place of the view to its place in the crop, about the centre."""
    angle = math.radians(rng.uniform(-affine.degrees, affine.degrees))
    shear = math.tan(math.radians(rng.uniform(-affine.shear, affine.shear)))
    scale = rng.uniform(*affine.scale)
    reach = affine.translate * side
    dx, dy = rng.uniform(-reach, reach), rng.uniform(-reach, reach)
    a, b = math.cos(angle) / scale, math.sin(angle) / scale
    c, d = -b, a
    b, d = b + shear * a, d + shear * c
    middle = side / 2
    x, y = middle + dx, middle + dy
    return (a, b, middle - a * x - b * y, c, d, middle - c * x - d * y)
