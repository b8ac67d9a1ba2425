"""Distorts what a camera made: elastic deformation, pixels as blocks, JPEG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage

from pipeline.corruption.noise import Picture


def elastic_transform(x: Picture, strength: tuple[float, float, float], rng: np.random.Generator) -> Picture:
    """An affine map that moves three points a little, then a smooth random displacement."""
    reach, sigma, moved = strength
    height, width = x.shape[:2]
    x = _affine(x, moved, rng)
    down, right = (
        reach * ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width)), sigma, mode="reflect", truncate=3)
        for _ in range(2)
    )
    rows, columns = np.mgrid[:height, :width]
    places = [rows + down, columns + right]
    return np.stack([ndimage.map_coordinates(x[..., c], places, order=1, mode="reflect") for c in range(3)], axis=-1)


def _affine(x: Picture, moved: float, rng: np.random.Generator) -> Picture:
    height, width = x.shape[:2]
    centre, side = np.array([width // 2, height // 2]), min(height, width) // 3
    before = centre + side * np.array([[1, 1], [1, -1], [-1, -1]])  # x, y
    after = before + rng.uniform(-moved, moved, before.shape)
    # The map from where a pixel ends up to where it comes from, in rows and columns.
    back = np.linalg.solve(np.column_stack([after, np.ones(3)]), before)
    matrix, offset = back[:2].T[::-1, ::-1], back[2][::-1]
    channels = [ndimage.affine_transform(x[..., c], matrix, offset, order=1, mode="mirror") for c in range(3)]
    return np.stack(channels, axis=-1)


def pixelate(x: Picture, share: float, rng: np.random.Generator) -> Picture:
    """As of a camera of so many of the pixels a side."""
    image = _image(x)
    size = max(1, int(image.width * share)), max(1, int(image.height * share))
    small = image.resize(size, Image.Resampling.BOX)
    return _picture(small.resize(image.size, Image.Resampling.BOX))


def jpeg_compression(x: Picture, quality: int, rng: np.random.Generator) -> Picture:
    out = io.BytesIO()
    _image(x).save(out, "JPEG", quality=quality)
    return _picture(Image.open(out))


def _image(x: Picture) -> Image.Image:
    return Image.fromarray(np.rint(255 * x).astype(np.uint8))


def _picture(image: Image.Image) -> Picture:
    return np.asarray(image, np.float32) / np.float32(255)
