"""Makes the training view of an image: random resized crop or shift, flip, affine jitter, RandAugment, cutout.

A view is a pure function of (image, Augment, 64-bit seed), so that no generator state is ever checkpointed.
RandAugment draws from the global generators of `random` and numpy (pipeline.augment.randaugment); `undisturbed()` gives
the caller's states back. Nothing here draws from torch.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator

import numpy as np
from PIL import Image

from pipeline.augment.noise import Affine, Augment
from pipeline.augment.randaugment import INTERPOLATIONS, carry_out, write_down
from pipeline.data.images import to_array
from pipeline.data.jpeg import Jpeg


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Give the global generators of `random` and numpy back as they were."""
    python, numpy_ = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_)


def train_view(image: Image.Image | Jpeg, augment: Augment, seed: int, mirrored: bool = False) -> np.ndarray:
    """The view uint8 [3, size, size] of an RGB image that this seed stands for; `mirrored` is for `alternate_flip`."""
    with undisturbed():
        return seeded_view(image, augment, seed, mirrored)


def seeded_view(image: Image.Image | Jpeg, augment: Augment, seed: int, mirrored: bool = False) -> np.ndarray:
    """`train_view` that leaves the global generators changed: for many images inside one `undisturbed()`."""
    if augment.view:
        assert isinstance(image, Image.Image)  # short cuts are for noise
        return to_array(image, augment.view)
    view, rng = _placed(image, augment, seed, mirrored)
    if augment.policy:
        view = carry_out(view, augment.operations, rng)
    pixels = np.asarray(view).transpose(2, 0, 1)
    return _hidden(pixels, augment, rng) if augment.cutout else pixels


def view_and_operations(
    image: Image.Image | Jpeg, augment: Augment, seed: int, mirrored: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """`seeded_view` before the policy's operations, and those written down, float32 [layers, policy.WIDTH]."""
    view, rng = _placed(image, augment, seed, mirrored)
    return np.asarray(view).transpose(2, 0, 1), write_down(augment.operations, rng)


def _placed(
    image: Image.Image | Jpeg, augment: Augment, seed: int, mirrored: bool
) -> tuple[Image.Image, random.Random]:
    """The view before any policy, and the generator that goes on drawing for this seed."""
    rng = random.Random(int(seed))
    resample = rng.choice(INTERPOLATIONS[augment.interpolation])
    box = square_box(image.size, rng) if augment.shift else crop_box(image.size, augment, rng)
    size = (augment.size, augment.size)
    if augment.affine:
        view = image.resize(size, resample, box)
        view = view.transform(
            size,
            Image.Transform.AFFINE,
            matrix(augment.affine, augment.size, rng),
            resample,
            fillcolor=augment.fill,
        )
    else:
        view = image.resize(size, resample, box)
    if augment.shift:
        view = _shifted(view, round(augment.shift * augment.size), rng)
    flips = mirrored if augment.alternate_flip else augment.flip and rng.random() < augment.flip
    if flips:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return view, rng


def square_box(size: tuple[int, int], rng: random.Random) -> tuple[int, int, int, int]:
    """The largest square (left, top, right, bottom) of an image, somewhere along its longer side."""
    width, height = size
    side = min(size)
    left, top = (int(rng.random() * (length - side + 1)) for length in (width, height))
    return left, top, left + side, top + side


def _shifted(view: Image.Image, reach: int, rng: random.Random) -> Image.Image:
    """The view moved by up to `reach` whole pixels each way; beyond its edges it is mirrored, without the edge."""
    dx, dy = (rng.randint(0, 2 * reach) for _ in range(2))
    pixels = np.pad(np.asarray(view), ((reach, reach), (reach, reach), (0, 0)), "reflect")
    return Image.fromarray(np.ascontiguousarray(pixels[dy : dy + view.height, dx : dx + view.width]))


def _hidden(pixels: np.ndarray, augment: Augment, rng: random.Random) -> np.ndarray:
    """A copy [3, s, s] with a square of the mean colour, as much of it as lies inside: its centre may be any pixel."""
    side = max(1, round(augment.cutout * augment.size))
    left, top = (rng.randrange(augment.size) - side // 2 for _ in range(2))
    pixels = pixels.copy()
    rows, columns = (slice(max(0, start), start + side) for start in (top, left))
    pixels[:, rows, columns] = np.array(augment.fill, np.uint8)[:, None, None]
    return pixels


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
