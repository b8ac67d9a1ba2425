"""Adds the noise of cameras: Gaussian, shot and impulse noise.

A corruption takes a picture float32 [h, w, 3] in 0..1, its strength and a random generator, and gives such a picture;
what leaves 0..1 is cut off by whoever asked.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Picture = npt.NDArray[np.float32]


def gaussian_noise(x: Picture, scale: float, rng: np.random.Generator) -> Picture:
    """Of a standard deviation of `scale`, as in little light."""
    return x + rng.normal(scale=scale, size=x.shape).astype(np.float32)


def shot_noise(x: Picture, photons: float, rng: np.random.Generator) -> Picture:
    """Poisson: white is `photons` of them."""
    return (rng.poisson(x * photons) / photons).astype(np.float32)


def impulse_noise(x: Picture, amount: float, rng: np.random.Generator) -> Picture:
    """Salt and pepper: a share of the values becomes 0 or 1, either as often."""
    hit, white = rng.random(x.shape) < amount, rng.random(x.shape) < 0.5
    return np.where(hit, white.astype(np.float32), x)
