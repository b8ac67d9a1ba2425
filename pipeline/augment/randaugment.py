"""Draws timm's RandAugment from a seed: carried out on a picture, or written down for a device to carry out.

timm draws from the global generators of `random` and numpy: they are seeded for every image, inside the caller's
`undisturbed()`. Either way the same seed means the same operations.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
from PIL import Image
from timm.data import auto_augment

from pipeline.errors import ConfigError

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


@dataclass(frozen=True)
class Policy:
    """What is drawn for every image: timm's policy string ('' for none) and operations (() for its usual set), on views
    of `size` pixels a side, resampled by one of INTERPOLATIONS, with `fill`, uint8, coming in from outside."""

    text: str
    ops: tuple[str, ...]
    size: int
    interpolation: str
    fill: tuple[int, ...]


def carry_out(view: Image.Image, policy: Policy, rng: random.Random) -> Image.Image:
    """The view after the policy's operations."""
    _seed(rng)
    return _randaugment(policy)(view)


def write_down(policy: Policy, rng: random.Random) -> np.ndarray:
    """The operations that `carry_out` would apply, float32 [layers, WIDTH]; see KINDS."""
    _seed(rng)
    writing = _writing_randaugment(policy)
    written = np.zeros((writing.num_layers, WIDTH), np.float32)
    for row, operation in zip(written, writing([]), strict=False):  # fewer where p is below 1
        row[: len(operation)] = operation
    return written


def layers(policy: Policy) -> int:
    """Most operations on one image."""
    return _randaugment(policy).num_layers if policy.text else 0


def check_can_be_written(policy: Policy) -> None:
    """ConfigError where there is no policy, or it holds an operation that no device carries out."""
    if not policy.text:
        raise ConfigError("augment_on is device, but `augment` has no policy; name one, or write augment_on: loader")
    for op in _randaugment(policy).ops:
        if _kind(op.name) not in KINDS and op.name not in MATRICES:
            raise ConfigError(
                f"augment '{policy.text}' holds timm's {op.name}, which loading processes alone carry out; "
                "write augment_on: loader, or name other operations in augment_ops"
            )


def _seed(rng: random.Random) -> None:
    random.seed(rng.getrandbits(64))
    np.random.seed(rng.getrandbits(32))


@lru_cache(maxsize=16)
def _randaugment(policy: Policy) -> Any:
    return _make(policy)


@lru_cache(maxsize=16)
def _writing_randaugment(policy: Policy) -> Any:
    """One whose operations add themselves to the list that they get for an image."""
    made = _make(policy)
    for op in made.ops:
        op.aug_fn = partial(_write, op.name, policy.size)
    return made


def _make(policy: Policy) -> Any:
    """timm's RandAugment; its operations keep no state between images."""
    settings: dict[str, Any] = {"img_mean": policy.fill, "translate_const": TRANSLATE}
    if policy.interpolation != "random":
        settings["interpolation"] = INTERPOLATIONS[policy.interpolation][0]
    made = auto_augment.rand_augment_transform(policy.text, settings, list(policy.ops) or None)
    for op in made.ops:
        if op.name.startswith("Posterize"):
            op.level_fn = partial(_bits_to_keep, op.level_fn)
    return made


def _bits_to_keep(level_fn: Any, level: float, hparams: Any) -> tuple[int]:
    """At least one bit: timm asks for 0 and fewer at some magnitudes, which Pillow 13 refuses."""
    return (max(1, level_fn(level, hparams)[0]),)


# Of a square view: the six numbers that map a place of the result to its place in the view, as timm gives them to
# Pillow.
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
