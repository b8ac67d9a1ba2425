"""Lets it snow, freeze and grow foggy, and changes the light.

The published frost is made of five photographs of frozen windows; here its texture is generated, which is the one
corruption that differs in kind.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.corruption.blur import along, zoomed
from pipeline.corruption.noise import Picture

Layer = npt.NDArray[np.float32]
GREY = np.array([0.299, 0.587, 0.114], np.float32)
ICE = np.array([0.86, 0.93, 1.0], np.float32)


def snow(
    x: Picture, strength: tuple[float, float, float, float, float, float, float], rng: np.random.Generator
) -> Picture:
    """Flakes that fall from above, before and behind a picture that is whiter than it was."""
    mean, scale, zoom, least, radius, sigma, kept = strength
    flakes = zoomed(rng.normal(mean, scale, (*x.shape[:2], 1)).astype(np.float32), zoom)
    flakes = np.floor(255 * np.clip(np.where(flakes < least, 0, flakes), 0, 1)) / np.float32(255)
    flakes = along(flakes, radius, sigma, rng.uniform(-135, -45))
    white = np.maximum(x, (x @ GREY)[..., None] * np.float32(1.5) + np.float32(0.5))
    turned = flakes[::-1, ::-1]
    return np.float32(kept) * x + np.float32(1 - kept) * white + flakes + turned


def frost(x: Picture, strength: tuple[float, float], rng: np.random.Generator) -> Picture:
    """Ice on a window pane: needles and clear places."""
    kept, added = map(np.float32, strength)
    return kept * x + added * ice(x.shape[0], x.shape[1], rng)


def ice(height: int, width: int, rng: np.random.Generator) -> Picture:
    """A texture [height, width, 3]: ridges of two fractal landscapes, more of them in some places than in others."""
    ridges, others, places = (plasma(height, width, decay, rng) for decay in (1.5, 1.7, 2.5))
    needles = np.maximum(1 - np.abs(2 * ridges - 1) * 3, 1 - np.abs(2 * others - 1) * 3)
    sheet = np.clip(0.4 + 0.8 * places, 0, 1) * np.clip(0.6 + 0.5 * needles, 0, 1)
    return (sheet[..., None] * ICE).astype(np.float32)


def fog(x: Picture, strength: tuple[float, float], rng: np.random.Generator) -> Picture:
    """Clouds of a fractal landscape."""
    thickness, decay = strength
    brightest = x.max()
    foggy = x + np.float32(thickness) * plasma(x.shape[0], x.shape[1], decay, rng)[..., None]
    return foggy * brightest / (brightest + np.float32(thickness))


def plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> Layer:
    """A landscape [height, width] in 0..1 by the diamond-square algorithm on a torus: what is added to the means of
    the neighbours shrinks by `decay` with each halving."""
    size = 2 ** max(1, (max(height, width) - 1).bit_length())
    found = np.zeros((size, size))
    step, wobble = size, 100.0

    def means(total: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return total / 4 + wobble * rng.uniform(-wobble, wobble, total.shape)

    while step >= 2:
        half = step // 2
        corners = found[::step, ::step]
        rows = corners + np.roll(corners, -1, 0)
        found[half::step, half::step] = means(rows + np.roll(rows, -1, 1))
        centres = found[half::step, half::step]
        found[::step, half::step] = means(centres + np.roll(centres, 1, 0) + corners + np.roll(corners, -1, 1))
        found[half::step, ::step] = means(centres + np.roll(centres, 1, 1) + corners + np.roll(corners, -1, 0))
        step, wobble = half, wobble / decay
    found -= found.min()
    return (found / found.max())[:height, :width].astype(np.float32)


def brightness(x: Picture, added: float, rng: np.random.Generator) -> Picture:
    """More value at the same hue and saturation."""
    value = x.max(axis=-1, keepdims=True)
    brighter = np.clip(value + np.float32(added), 0, 1)
    return np.where(value > 0, x * (brighter / np.maximum(value, np.float32(1e-12))), brighter)


def contrast(x: Picture, kept: float, rng: np.random.Generator) -> Picture:
    """Each channel nearer to its mean."""
    mean = x.mean(axis=(0, 1), keepdims=True)
    return (x - mean) * np.float32(kept) + mean
