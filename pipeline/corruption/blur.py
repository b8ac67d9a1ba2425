"""Blurs: out of focus, through frosted glass, in motion, and zooming."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from pipeline.corruption.noise import Picture

REFLECTED = "mirror"  # scipy's word for a border that repeats all but the outermost pixels


def defocus_blur(x: Picture, strength: tuple[float, float], rng: np.random.Generator) -> Picture:
    """By a disk of a radius, whose edge is smoothed."""
    kernel = disk(*strength)
    return np.stack([ndimage.correlate(x[..., c], kernel, mode=REFLECTED) for c in range(3)], axis=-1)


def disk(radius: float, smoothing: float) -> npt.NDArray[np.float32]:
    """A disk that sums to 1; its edge is smoothed by a Gaussian of that standard deviation, of 3 or 5 pixels."""
    half, reach = (8, 1) if radius <= 8 else (math.ceil(radius), 2)
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    found = (x**2 + y**2 <= radius**2).astype(np.float32)
    found /= found.sum()
    line = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * smoothing**2))
    line /= line.sum()
    for axis in (0, 1):
        found = ndimage.correlate1d(found, line, axis, mode=REFLECTED)
    used = np.flatnonzero(found.sum(axis=0) > 0)
    inside = slice(used[0], used[-1] + 1)
    cut: npt.NDArray[np.float32] = found[inside, inside]
    return cut


def glass_blur(x: Picture, strength: tuple[float, int, int], rng: np.random.Generator) -> Picture:
    """Pixels are overwritten by others at most `reach` away, between two blurs. (The paper's code means to swap them,
    but assigns views of an array, which copies one; the published sets are made so.)"""
    sigma, reach, times = strength
    x = np.floor(255 * np.clip(gaussian(x, sigma), 0, 1)).astype(np.float32) / np.float32(255)
    height, width = x.shape[:2]
    place = list(range(height * width))
    for _ in range(times):
        steps = rng.integers(-reach, reach, size=(height, width, 2)).tolist()
        for row in range(height - reach - 1, reach, -1):
            for column in range(width - reach - 1, reach, -1):
                right, down = steps[row][column]
                one, other = row * width + column, (row + down) * width + column + right
                place[one] = place[other]
    return gaussian(x.reshape(-1, 3)[place].reshape(x.shape), sigma)


def gaussian(x: Picture, sigma: float) -> Picture:
    """Blurred in both directions, and cut off at four standard deviations."""
    blurred: Picture = ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest")
    return blurred


def motion_blur(x: Picture, strength: tuple[float, float], rng: np.random.Generator) -> Picture:
    """Along a line at an angle of -45° to 45°."""
    return along(x, *strength, rng.uniform(-45, 45))


def along(x: Picture, radius: float, sigma: float, angle: float) -> Picture:
    """The mean over pixels on a line that starts at each and is 2·radius+1 long, weighted by half a Gaussian; what lies
    outside is as the edge. `angle` in degrees."""
    width = 2 * math.ceil(radius) + 1
    weights = np.exp(-(np.arange(width) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    across, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    rows, columns = np.arange(x.shape[0]), np.arange(x.shape[1])
    found = np.zeros_like(x)
    for number, weight in enumerate(weights):
        row = np.clip(rows + math.ceil(number * down - 0.5), 0, len(rows) - 1)
        column = np.clip(columns + math.ceil(number * across - 0.5), 0, len(columns) - 1)
        found += np.float32(weight) * x[row[:, None], column]
    return found


def zoom_blur(x: Picture, factors: Sequence[float], rng: np.random.Generator) -> Picture:
    """The mean of the picture and of it zoomed by each factor."""
    return (x + sum(zoomed(x, factor) for factor in factors)) / np.float32(len(factors) + 1)


def zoomed(x: Picture, factor: float) -> Picture:
    """The middle of the picture, enlarged to its size."""
    for axis in (0, 1):
        size = x.shape[axis]
        part = math.ceil(size / factor)
        large = round(part * factor)
        first = (large - size) // 2
        places = (np.arange(first, first + size) * ((part - 1) / max(large - 1, 1))).astype(np.float32)
        before = np.minimum(places.astype(np.int64), max(part - 2, 0))
        share = (places - before).reshape(-1, *[1] * (2 - axis))
        start = before + (size - part) // 2
        low, high = (np.take(x, some, axis) for some in (start, np.minimum(start + 1, size - 1)))
        x = low + share * (high - low)
    return x
