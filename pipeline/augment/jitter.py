"""Places training images on a canvas at random: large-scale jitter, a flip, and what of it the canvas shows.

A placement is a pure function of (size of the image, Jitter, 64-bit seed). The image is scaled so that it would fit a
canvas of `low` to `high` times the side; of a larger one a random part is taken, a smaller one is padded at the right
and at the bottom (Ghiasi et al. 2021, "Simple Copy-Paste", large-scale jittering).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Jitter:
    canvas: int
    """Pixels per side."""
    low: float = 0.1
    high: float = 2.0
    flip: float = 0.5
    """Probability of a horizontal flip."""


@dataclass(frozen=True)
class Placement:
    """The scaled image is `width` x `height`; the canvas shows it from (`left`, `top`) on. Flipped before all that."""

    canvas: int
    width: int
    height: int
    left: int
    top: int
    flip: bool

    @property
    def shown(self) -> tuple[int, int]:
        """Width and height of the image's part on the canvas, in its upper left corner."""
        return min(self.canvas, self.width - self.left), min(self.canvas, self.height - self.top)


def place(width: int, height: int, jitter: Jitter, seed: int) -> Placement:
    """Where the seed puts an image of this size."""
    rng = random.Random(int(seed))
    scale = rng.uniform(jitter.low, jitter.high) * jitter.canvas / max(width, height)
    wide, high = (max(1, round(side * scale)) for side in (width, height))
    left, top = (rng.randint(0, max(0, side - jitter.canvas)) for side in (wide, high))
    return Placement(jitter.canvas, wide, high, left, top, rng.random() < jitter.flip)


def place_pixels(image: Image.Image, placement: Placement, fill: tuple[int, ...], smooth: bool = True) -> np.ndarray:
    """uint8 [canvas, canvas, …] of an image or, not `smooth`, of a mask; `fill` is around it."""
    if placement.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    wide, high = placement.shown
    x, y = image.width / placement.width, image.height / placement.height
    box = (
        placement.left * x, placement.top * y,
        min((placement.left + wide) * x, image.width), min((placement.top + high) * y, image.height),
    )  # fmt: skip
    # Resizing just the part that stays: twice a large canvas never becomes a picture.
    part = image.resize((wide, high), Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST, box=box)
    array = np.asarray(part)
    canvas = np.empty((placement.canvas, placement.canvas, *array.shape[2:]), np.uint8)
    canvas[...] = fill if array.ndim == 3 else fill[0]
    canvas[:high, :wide] = array
    return canvas


def place_boxes(boxes: np.ndarray, width: int, height: int, placement: Placement) -> np.ndarray:
    """Boxes float32 [n, 4] (left, top, right, bottom) of an image of this size, on the canvas, cut off at what it
    shows."""
    found = boxes.copy()
    if placement.flip:
        found[:, [0, 2]] = width - boxes[:, [2, 0]]
    found[:, [0, 2]] = found[:, [0, 2]] * (placement.width / width) - placement.left
    found[:, [1, 3]] = found[:, [1, 3]] * (placement.height / height) - placement.top
    wide, high = placement.shown
    found[:, [0, 2]] = found[:, [0, 2]].clip(0, wide)
    found[:, [1, 3]] = found[:, [1, 3]].clip(0, high)
    return found
