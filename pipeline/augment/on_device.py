"""Carries out RandAugment on whole batches, on the training device: what the loader drew and wrote down.

The draws are those of the loader's own views, so that `augment_on` moves work and nothing else: what leaves pixels in
place comes out bit for bit as Pillow has it, what moves them within the rounding of another interpolation (torch's
bicubic has a = -0.75, Pillow's -1). torchvision's v2 functions take one magnitude and sign for a whole batch; here
every image has its own, and yet a layer takes only a few dozen kernels, since eight operations are tables of 256
values.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from pipeline.augment.noise import Augment
from pipeline.augment.randaugment import KINDS

LEVELS = 256


def augment(pixels: Tensor, settings: Augment, operations: Tensor) -> Tensor:
    """New views uint8 [b, 3, s, s], on the device of `pixels`, which are of that kind too.

    operations: float32 [b, layers, policy.WIDTH], on the host, as `augment.view_and_operations` gives them.
    """
    views = pixels.clone()
    arguments = operations.to(pixels.device, non_blocking=True)
    fill = torch.tensor(settings.fill, dtype=torch.uint8).to(pixels.device, non_blocking=True)[:, None, None]
    kinds = operations.numpy()[:, :, 0].astype(np.int64)
    for layer in range(operations.shape[1]):
        for members, change in (
            (tuple(TABLES), _by_tables),
            (("Color",), _colour),
            (("Sharpness",), _sharpness),
            (("MoveBilinear",), lambda x, names, given: _move(x, given, fill, "bilinear")),
            (("MoveBicubic",), lambda x, names, given: _move(x, given, fill, "bicubic")),
        ):
            chosen = np.flatnonzero(np.isin(kinds[:, layer], [KINDS.index(name) for name in members]))
            if len(chosen):
                rows = torch.from_numpy(chosen).to(pixels.device, non_blocking=True)
                views[rows] = change(views[rows], kinds[chosen, layer], arguments[rows, layer, 1:])
    return views


def _by_tables(x: Tensor, kinds: np.ndarray, arguments: Tensor) -> Tensor:
    """Operations that map every value of a channel to another: [g, 3, s, s] through tables [g, 3, 256]."""
    levels = torch.arange(LEVELS, dtype=torch.float32, device=x.device)
    tables = levels.repeat(len(x), 3, 1)
    for name, make in TABLES.items():
        chosen = np.flatnonzero(kinds == KINDS.index(name))
        if len(chosen):
            rows = torch.from_numpy(chosen).to(x.device, non_blocking=True)
            tables[rows] = make(x[rows], levels, arguments[rows, 0, None, None])
    return _values(tables).gather(2, x.flatten(2).long()).view_as(x)


def _auto_contrast(x: Tensor, levels: Tensor, _: Tensor) -> Tensor:
    """The darkest value becomes 0 and the brightest 255, per channel."""
    low, high = (bound.double()[..., None] for bound in torch.aminmax(x.flatten(2), dim=2))
    # In fp64 to the end, as Pillow has it: what is truncated there must not be rounded up here. (A number over a tensor
    # would be its reciprocal times the number.)
    scale = torch.full_like(low, 255) / (high - low)
    return torch.where(high > low, (levels.double() * scale - low * scale).floor(), levels.double()).float()


def _equalize(x: Tensor, levels: Tensor, _: Tensor) -> Tensor:
    """A flat histogram, per channel, by Pillow's integers."""
    flat = x.flatten(2).long()
    counts = torch.zeros(*flat.shape[:2], LEVELS, dtype=torch.long, device=x.device)
    counts.scatter_add_(2, flat, torch.ones_like(flat))
    brightest = counts.gather(2, flat.amax(2, keepdim=True))
    step = (flat.shape[2] - brightest) // 255
    below = counts.cumsum(2) - counts
    return torch.where(step > 0, (step // 2 + below) // step.clamp(min=1), levels.long()).float()


def _contrast(x: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    grey = _grey(x).flatten(1)
    mean = (grey.sum(1).double() / grey.shape[1] + 0.5).floor().float()[:, None, None]
    return _blend(mean, levels, factor)


def _posterize(x: Tensor, levels: Tensor, bits: Tensor) -> Tensor:
    dropped = (8 - bits).clamp(min=0)  # more than 8 keep all
    return levels - levels % torch.exp2(dropped).round()  # a GPU's powers may be an ulp off


TABLES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "AutoContrast": _auto_contrast,
    "Equalize": _equalize,
    "Invert": lambda x, levels, _: 255 - levels,
    "Posterize": _posterize,
    "Solarize": lambda x, levels, threshold: torch.where(levels < threshold, levels, 255 - levels),
    "SolarizeAdd": lambda x, levels, add: torch.where(levels < 128, levels + add, levels),
    "Brightness": lambda x, levels, factor: _blend(torch.zeros_like(levels), levels, factor),
    "Contrast": _contrast,
}
"""Of images uint8 [g, 3, s, s], the values 0 … 255 and arguments [g, 1, 1]: tables that broadcast to [g, 3, 256]."""


def _colour(x: Tensor, _: np.ndarray, arguments: Tensor) -> Tensor:
    return _values(_blend(_grey(x)[:, None].float(), x.float(), arguments[:, 0, None, None, None]))


def _sharpness(x: Tensor, _: np.ndarray, arguments: Tensor) -> Tensor:
    """Away from the mean of 3 × 3 pixels, the middle one weighing 5; the border stays."""
    whole = x.float()
    across = whole[..., :-2] + whole[..., 1:-1] + whole[..., 2:]
    inner = whole[..., 1:-1, 1:-1]
    smooth = ((across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + 4 * inner) / 13 + 0.5).floor()
    changed = x.clone()
    changed[..., 1:-1, 1:-1] = _values(_blend(smooth, inner, arguments[:, 0, None, None, None]))
    return changed


def _move(x: Tensor, arguments: Tensor, fill: Tensor, mode: str) -> Tensor:
    """An affine map about places, not pixels: the centre of the first pixel is at 0.5. `fill` comes in from outside."""
    side = x.shape[-1]
    centre = torch.arange(side, device=x.device) + 0.5
    a, b, c, d, e, f = (number[:, None, None] for number in arguments.unbind(1))
    across = a * centre + b * centre[:, None] + c
    down = d * centre + e * centre[:, None] + f
    grid = torch.stack([across, down], 3) * (2 / side) - 1
    moved = grid_sample(x.float(), grid, mode, padding_mode="border", align_corners=False)
    inside = (across >= 0) & (across < side) & (down >= 0) & (down < side)
    return torch.where(inside[:, None], _values(moved), fill)


def _grey(x: Tensor) -> Tensor:
    """Luma [g, s, s] of [g, 3, s, s], in Pillow's integers."""
    r, g, b = x.int().unbind(1)
    return (19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16


def _blend(without: Tensor, image: Tensor, factor: Tensor) -> Tensor:
    """Pillow's: 0 is all without, 1 the image, and beyond 1 away from what it is without."""
    return without + factor * (image - without)


def _values(x: Tensor) -> Tensor:
    """uint8, clipped as Pillow clips."""
    return x.clamp(0, 255).to(torch.uint8)
