"""Corrupts a picture: one of fifteen ways at one of five severities, the same for the same picture and seed.

All models see the same pixels: the corruption acts on the picture before any model's own view of it, at its own size up
to 64 pixels a side and else on the middle 224 x 224 of it, resized to 256 first, as in the published sets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.corruption import blur, digital, noise, weather
from pipeline.corruption.strengths import CANVAS, PHOTOS, SMALL, SMALL_PICTURES
from pipeline.data.hashing import chain, name_key
from pipeline.data.images import View, to_array

Canvas = npt.NDArray[np.uint8]
"""uint8 [h, w, 3]"""
Corruption = Callable[[noise.Picture, Any, np.random.Generator], noise.Picture]
CORRUPTIONS: dict[str, Corruption] = {
    function.__name__: function  # type: ignore[attr-defined]
    for function in (
        noise.gaussian_noise, noise.shot_noise, noise.impulse_noise,
        blur.defocus_blur, blur.glass_blur, blur.motion_blur, blur.zoom_blur,
        weather.snow, weather.frost, weather.fog, weather.brightness,
        weather.contrast, digital.elastic_transform, digital.pixelate, digital.jpeg_compression,
    )
}  # fmt: skip
WHOLE = View(CANVAS, crop=CANVAS / 256, interpolation="bilinear")


def canvas(image: Image.Image) -> Canvas:
    """The pixels of an upright RGB picture that are corrupted."""
    if max(image.size) <= SMALL:
        return np.asarray(image)
    return np.ascontiguousarray(to_array(image, WHOLE).transpose(1, 2, 0))


def corrupt(pixels: Canvas, name: str, severity: int, key: int) -> Canvas:
    """The picture at a severity from 1 to 5; `key`: what else decides the randomness, such as a hash of its bytes."""
    table = SMALL_PICTURES if max(pixels.shape[:2]) <= SMALL else PHOTOS
    rng = np.random.default_rng(chain(name_key(name), severity, key))
    found = CORRUPTIONS[name](pixels.astype(np.float32) / np.float32(255), table[name][severity - 1], rng)
    # Cut off, not rounded, as in the published sets.
    return (255 * np.clip(found, 0, 1)).astype(np.uint8)
