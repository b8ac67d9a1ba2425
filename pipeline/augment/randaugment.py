"""timm's RandAugment, drawn from a seed: carried out on a picture, or written down for a device to carry out.

timm draws from the global generators of `random` and numpy: they are seeded for every image, inside the caller's
`undisturbed()`. Either way the same seed means the same operations.
"""

from __future__ import annotations

import math
import random
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from timm.data import auto_augment

from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.augment.view import Augment

INTERPOLATIONS = {
    "bilinear": (Image.Resampling.BILINEAR,),
    "bicubic": (Image.Resampling.BICUBIC,),
    "random": (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC),
}
MOVES = {Image.Resampling.BILINEAR: "MoveBilinear", Image.Resampling.BICUBIC: "MoveBicubic"}
KINDS = (
    "", *MOVES.values(), "AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "SolarizeAdd", "Brightness",
    "Contrast", "Color", "Sharpness",
)  # fmt: skip
"""What can be written down: nothing, an affine map, and those of timm's operations that leave pixels in place."""
TRANSLATE = 100  # pixels of TranslateX and TranslateY at magnitude 10, as in the paper's code; timm's sets use …Rel
WIDTH = 7
"""Numbers of a written operation: its place in KINDS, then its arguments (six of an affine map, or one, or none)."""


def fill_of(augment: Augment) -> tuple[int, ...]:
    """The colour, uint8, of what comes in from outside the image."""
    return tuple(round(255 * value) for value in augment.mean)


def carry_out(view: Image.Image, augment: Augment, rng: random.Random) -> Image.Image:
    """The view after the policy's operations."""
    _seed(rng)
    return _policy(augment)(view)


def write_down(augment: Augment, rng: random.Random) -> np.ndarray:
    """The operations that `carry_out` would apply, float32 [layers, WIDTH]; see KINDS."""
    _seed(rng)
    policy = _writing_policy(augment)
    written = np.zeros((policy.num_layers, WIDTH), np.float32)
    for row, operation in zip(written, policy([]), strict=False):  # fewer where p is below 1
        row[: len(operation)] = operation
    return written


def layers(augment: Augment) -> int:
    """Most operations on one image."""
    return _policy(augment).num_layers if augment.policy else 0


def check_can_be_written(augment: Augment) -> None:
    """ConfigError where there is no policy, or it holds an operation that no device carries out."""
    if not augment.policy:
        raise ConfigError("augment_on is device, but `augment` has no policy; name one, or write augment_on: loader")
    for op in _policy(augment).ops:
        if _kind(op.name) not in KINDS and op.name not in MATRICES:
            raise ConfigError(
                f"augment '{augment.policy}' holds timm's {op.name}, which loading processes alone carry out; "
                "write augment_on: loader, or name other operations in augment_ops"
            )


def _seed(rng: random.Random) -> None:
    random.seed(rng.getrandbits(64))
    np.random.seed(rng.getrandbits(32))


@lru_cache(maxsize=16)
def _policy(augment: Augment) -> Any:
    return _make_policy(augment)


@lru_cache(maxsize=16)
def _writing_policy(augment: Augment) -> Any:
    """The policy whose operations add themselves to the list that they get for an image."""
    policy = _make_policy(augment)
    for op in policy.ops:
        op.aug_fn = partial(_write, op.name, augment.size)
    return policy


def _make_policy(augment: Augment) -> Any:
    """timm's RandAugment; its operations keep no state between images."""
    settings: dict[str, Any] = {"img_mean": fill_of(augment), "translate_const": TRANSLATE}
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


# Of a square view: the six numbers that map a place of the result to its place in the view, as timm gives them to Pillow.
MATRICES = {
    "ShearX": lambda factor, side: (1, factor, 0, 0, 1, 0),
    "ShearY": lambda factor, side: (1, 0, 0, factor, 1, 0),
    "TranslateX": lambda pixels, side: (1, 0, pixels, 0, 1, 0),
    "TranslateY": lambda pixels, side: (1, 0, 0, 0, 1, pixels),
    "TranslateXRel": lambda part, side: (1, 0, part * side, 0, 1, 0),
    "TranslateYRel": lambda part, side: (1, 0, 0, 0, 1, part * side),
    "Rotate": lambda degrees, side: _turn(math.radians(degrees), side / 2),
}


def _turn(angle: float, middle: float) -> tuple[float, ...]:
    """About the centre, counter-clockwise, as Pillow's rotate."""
    c, s = math.cos(angle), math.sin(angle)
    return c, -s, middle - c * middle + s * middle, s, c, middle - s * middle - c * middle


def _kind(name: str) -> str:
    """PosterizeIncreasing and its like differ from Posterize in their arguments alone."""
    return name.removesuffix("Increasing").removesuffix("Original").replace("Desaturate", "Color")


def _write(name: str, side: int, written: list[tuple[float, ...]], *arguments: float, **how: Any) -> list[Any]:
    if name in MATRICES:
        resample = how["resample"]
        chosen = random.choice(resample) if isinstance(resample, tuple) else resample  # as timm draws it, at this place
        written.append((KINDS.index(MOVES[chosen]), *MATRICES[name](arguments[0], side)))
        return written
    if name == "Desaturate":
        arguments = (min(1.0, max(0.0, 1.0 - arguments[0])),)
    written.append((KINDS.index(_kind(name)), *arguments))
    return written
