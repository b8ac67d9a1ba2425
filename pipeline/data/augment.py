"""The training view of an image: random resized crop, flip, affine jitter, RandAugment. Noise for students and teachers.

A view is a pure function of (image, Augment, 64-bit seed), so that no generator state is ever checkpointed.
timm's RandAugment draws from the global generators of `random` and numpy: they are seeded for every image,
inside `undisturbed()`, which gives the caller's states back. Nothing here draws from torch.
"""

from __future__ import annotations

import contextlib
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment

from pipeline.errors import ConfigError

INTERPOLATIONS = {
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}
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
    """How training images are noised; every field is part of a stage's identity."""

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

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"augment.interpolation is '{self.interpolation}'; allowed are {', '.join(INTERPOLATIONS)}"
            )
        if self.policy and not POLICY.fullmatch(self.policy):
            raise ConfigError(
                f"augment.policy is '{self.policy}', which timm's RandAugment does not know; write e.g. "
                "rand-m9-n2-p1 with sections of m, n, p, mstd, mmax, inc, tweights, t3a, t3aw, or '' for none"
            )
        unknown = [name for name in self.ops if name not in auto_augment.NAME_TO_OP]
        if unknown or (self.ops and not self.policy):
            found = f"names '{unknown[0]}'" if unknown else "is set without an augment.policy to draw from it"
            raise ConfigError(
                f"augment.ops {found}; allowed are, beside a policy, {', '.join(auto_augment.NAME_TO_OP)}"
            )
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise ConfigError(
                    f"augment.{name} is ({low}, {high}); it must be a range (low, high) above 0"
                    + (" and at most 1" if most == 1 else "")
                )
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"augment.flip is {self.flip}; it is a probability between 0 and 1")


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Give the global generators of `random` and numpy back as they were."""
    python, numpy_ = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)


def train_view(image: Image.Image, augment: Augment, seed: int) -> np.ndarray:
    """The view uint8 [3, size, size] of an RGB image that this seed stands for."""
    with undisturbed():
        return seeded_view(image, augment, seed)


def seeded_view(image: Image.Image, augment: Augment, seed: int) -> np.ndarray:
    """`train_view` that leaves the global generators changed: for many images inside one `undisturbed()`."""
    rng = random.Random(int(seed))
    resample = rng.choice(INTERPOLATIONS[augment.interpolation])
    box = crop_box(image.size, augment, rng)
    size = (augment.size, augment.size)
    if augment.affine:
        view = image.resize(size, resample, box) if box != (0, 0, *size) else image
        view = view.transform(
            size, Image.Transform.AFFINE, matrix(augment.affine, augment.size, rng), resample, fillcolor=_fill(augment)
        )
    else:
        view = image.resize(size, resample, box)
    if augment.flip and rng.random() < augment.flip:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if augment.policy:
        random.seed(rng.getrandbits(64))
        np.random.seed(rng.getrandbits(32))
        view = _policy(augment)(view)
    return np.asarray(view).transpose(2, 0, 1)


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


def _fill(augment: Augment) -> tuple[int, ...]:
    return tuple(round(255 * value) for value in augment.mean)


@lru_cache(maxsize=16)
def _policy(augment: Augment) -> Any:
    """timm's RandAugment; its operations keep no state between images."""
    settings: dict[str, Any] = {"img_mean": _fill(augment)}
    if augment.interpolation != "random":
        settings["interpolation"] = INTERPOLATIONS[augment.interpolation][0]
    policy = auto_augment.rand_augment_transform(augment.policy, settings, list(augment.ops) or None)
    for op in policy.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_bits_to_keep, op.level_fn)
    return policy


def _bits_to_keep(level_fn: Any, level: float, hparams: Any) -> tuple[int]:
    """At least one bit: timm asks for 0 and fewer at some magnitudes, which Pillow 13 refuses."""
    return (max(1, level_fn(level, hparams)[0]),)
