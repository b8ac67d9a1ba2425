"""Mixes images of a batch by mixup and CutMix: each becomes a blend of two, and so does its target.

What is blended is drawn on the host, from the seed alone, so that a CPU and a GPU mix alike.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def mix(pixels: Tensor, targets: Tensor, *, mixup: float, cutmix: float, seed: int) -> tuple[Tensor, Tensor]:
    """New (pixels, targets), each image blended with another one of the batch; as they were where both are 0.

    pixels [b, 3, h, w], uint8 (rounded) or floating; targets [b, classes], in which weights of images (also that of
    pseudo-labelled ones) must already be: an image takes its partner's weight along with the partner's class.
    mixup: λ·x + (1-λ)·x', λ ~ Beta(mixup, mixup) (Zhang et al., arXiv 1710.09412, equation 2). cutmix: a box of x' in
    x, its sides √(1-λ) of the image's, cut off at the border, λ ~ Beta(cutmix, cutmix) (Yun et al., arXiv 1905.04899,
    §3.1); the targets are blended by the areas that remain. Each image is drawn for itself; with both, one of them at
    random.
    """
    if not (mixup or cutmix) or len(pixels) < 2:
        return pixels, targets
    b, _, height, width = pixels.shape
    partner, rows, columns = _draw(b, height, width, mixup, cutmix, np.random.default_rng(seed))
    theirs = rows.mean(axis=1) * columns.mean(axis=1)
    other = torch.from_numpy(partner).to(pixels.device, non_blocking=True)
    working = pixels.dtype if pixels.is_floating_point() else torch.float32
    y, x = (torch.from_numpy(part).to(pixels.device, working, non_blocking=True) for part in (rows, columns))
    share = torch.from_numpy(theirs).to(targets.device, targets.dtype, non_blocking=True)[:, None]
    mine = pixels.to(working)
    # lerp gives either image bit for bit where the weight is 0 or 1, as outside and inside a box.
    mixed = torch.lerp(mine, mine[other], y[:, None, :, None] * x[:, None, None, :])
    if not pixels.is_floating_point():
        mixed = mixed.round().to(pixels.dtype)
    return mixed, torch.lerp(targets, targets[other], share)


def _draw(
    b: int, height: int, width: int, mixup: float, cutmix: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(partner int64 [b], rows float64 [b, height], columns float64 [b, width]).

    The partner's weight at pixel (y, x) is rows[y] · columns[x]: for a box 1 inside and 0 outside, for a blend 1-λ.
    """
    chain = rng.permutation(b)
    partner = np.empty_like(chain)
    partner[chain] = np.roll(chain, 1)  # one cycle through all: nobody is his own partner
    boxes = rng.random(b) < 0.5 if mixup and cutmix else np.full(b, bool(cutmix))
    theirs = np.where(boxes, *(rng.beta(alpha or 1.0, alpha or 1.0, b) for alpha in (cutmix, mixup)))
    parts = []
    for side, blend in ((height, theirs), (width, np.ones(b))):
        length = (side * np.sqrt(theirs)).astype(np.int64)
        start = rng.integers(0, side, b) - length // 2
        place = np.arange(side)
        inside = (place >= start[:, None]) & (place < (start + length)[:, None])
        parts.append(np.where(boxes[:, None], inside, blend[:, None]))
    return partner, parts[0], parts[1]
