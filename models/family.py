"""Lists the architectures of the family as data, and builds networks from them."""

from __future__ import annotations

import difflib
from dataclasses import fields, replace
from typing import Any, Literal, overload

from models.architecture import Architecture, LambdaBlocks
from models.lambda_resnet import FeaturePyramid, LambdaResNet


def every(step: int, last: int) -> tuple[int, ...]:
    return tuple(range(step, last + 1, step))


DEPTHS: dict[int, tuple[int, ...]] = {
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
    270: (4, 29, 53, 4),
    350: (4, 36, 72, 4),
    420: (4, 44, 87, 4),
}
"""Blocks in c2 to c5 (ResNet-RS)."""

LAMBDAS_IN_C4: dict[int, tuple[int, ...]] = {
    50: (3,),
    101: every(6, 18),
    152: every(5, 30),
    200: every(5, 30),
    270: every(8, 48),
    350: every(10, 60),
    420: every(10, 80),
}
"""LambdaNetworks, table 18. We count blocks from 1; the table does not say where it starts."""

TRAINED_AT: dict[int, tuple[int, ...]] = {
    50: (128, 160),
    101: (160, 192),
    152: (192, 224, 256, 288),
    270: (256,),
    350: (256, 288, 320),
    420: (320,),
}
"""Pixels per side at which the paper trains lambda_resnet_<depth> (LambdaNetworks, table 19)."""

HYBRIDS = ("cccc", "lccc", "llcc", "lllc", "llll", "clll", "ccll", "cccl")
"""Convolution or lambda in each of c2 to c5: the 90-epoch study on the vanilla ResNet-50."""

PLAIN: dict[str, Any] = {
    "depths": (1, 2, 2), "widths": (64, 128, 256), "stem": "pair", "block": "plain", "expansion": 1, "k": 16,
}  # fmt: skip

SMALL: dict[str, dict[str, Any]] = {
    "lambda_resnet_tiny": {"depths": (1, 1, 1), "widths": (16, 32, 64)},
    "lambda_resnet_small": {"depths": (1, 2, 2), "widths": (16, 32, 64)},
    "lambda_resnet_medium": {"depths": (1, 2, 2), "widths": (24, 48, 96)},
    "lambda_resnet_cifar_14": {"depths": (1, 1, 2), "widths": (64, 128, 256), "expansion": 1, "k": 16},
    "lambda_resnet_cifar_26": {"depths": (2, 2, 4), "widths": (64, 128, 256), "expansion": 1, "k": 16},
    "lambda_resnet_cifar_plain": {**PLAIN, "lambdas": {3: "rest", 4: "rest"}},
    "resnet_cifar_plain": {**PLAIN, "lambdas": {}},
}
"""Three stages, for images of 8 to 64 pixels, which the stem halves.

A lambda layer runs before its stride, so the first block of c3 would see the map of c2 and stays a convolution; the
other blocks of c3 and all of c4 are lambda. The `cifar` members are wide rather than deep and do not expand: a CPU
computes a given number of products fastest in a few large convolutions of small maps. The plain ones are nothing but
3×3 convolutions, and lambda layers where maps are a quarter (8×8 of 32) or an eighth as wide as the image;
the last is their convolutional twin.
"""


def _architectures() -> dict[str, Architecture]:
    found = {}
    for depth, depths in DEPTHS.items():
        last: dict[int, LambdaBlocks] = {5: "all"}
        found[f"lambda_resnet_{depth}"] = Architecture(
            depths=depths, lambdas={4: LAMBDAS_IN_C4[depth], **last}, se=(2, 3)
        )
        found[f"lambda_resnet_{depth}_c4"] = Architecture(depths=depths, lambdas={4: "all", **last}, se=(2, 3))
        found[f"resnet_{depth}"] = Architecture(depths=depths)
        found[f"resnet_{depth}_se"] = Architecture(depths=depths, se=(2, 3, 4, 5))
    for letters in HYBRIDS:
        lambdas: dict[int, LambdaBlocks] = {s: "all" for s, letter in enumerate(letters, 2) if letter == "l"}
        found[f"hybrid_resnet_50_{letters}"] = Architecture(
            depths=DEPTHS[50], lambdas=lambdas, stem="vanilla", shortcut="conv"
        )
    small: dict[str, Any] = {
        "stem": "half",
        "lambdas": {3: "rest", 4: "all"},
        "expansion": 2,
        "k": 8,
        "r": 15,
    }
    for name, sizes in SMALL.items():
        found[name] = Architecture(**{**small, "stem_width": sizes["widths"][0], **sizes})
    return found


ARCHITECTURES = _architectures()


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(ARCHITECTURES)


def resolution(name: str) -> int:
    """Pixels per side of the images that a member is meant for.

    This is the largest size that the paper trains it at, 224 if its tables do not list it, and 32 for the small ones.
    """
    if name in SMALL:
        return 32
    sizes = {f"lambda_resnet_{depth}": max(sizes) for depth, sizes in TRAINED_AT.items()}
    return sizes.get(name, 224)


@overload
def create_model(
    name: str, num_classes: int = 1000, *, features_only: Literal[False] = False, **overrides: Any
) -> LambdaResNet: ...
@overload
def create_model(
    name: str, num_classes: int = 1000, *, features_only: Literal[True], **overrides: Any
) -> FeaturePyramid: ...
def create_model(
    name: str, num_classes: int = 1000, *, features_only: bool = False, **overrides: Any
) -> LambdaResNet | FeaturePyramid:
    """Builds a freshly initialised network; `overrides` replace fields of its Architecture: u=4, dropout=0.2, ….

    With `features_only` it has no classifier and returns the feature maps of its stages, see FeaturePyramid. Raises
    ValueError for an unknown name, with the nearest names, and for overrides that do not exist or do not fit.
    """
    if name not in ARCHITECTURES:
        near = difflib.get_close_matches(name, ARCHITECTURES, n=3, cutoff=0)
        raise ValueError(f"there is no model {name!r}; the nearest are {', '.join(near)}")
    if num_classes < 1:
        raise ValueError(f"num_classes is at least 1, not {num_classes}")
    base = ARCHITECTURES[name]
    architecture = replace(base, **{key: _checked(base, key, value) for key, value in overrides.items()})
    return FeaturePyramid(architecture) if features_only else LambdaResNet(architecture, num_classes)


def _checked(base: Architecture, key: str, value: Any) -> Any:
    """Checks `value` for the field `key` and returns it; lists, which YAML gives, become tuples."""
    known = [f.name for f in fields(base)]
    if key not in known:
        raise ValueError(f"there is no model setting {key!r}; the settings are {', '.join(known)}")
    default = 1 if key == "r" else getattr(base, key)
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or not all(type(each) is int for each in value):
            raise ValueError(f"{key} is a list of whole numbers, not {value!r}")
        return tuple(value)
    if isinstance(default, dict):
        if not isinstance(value, dict):
            raise ValueError(f"{key} is a mapping from stages to their lambda blocks, not {value!r}")
        return {
            int(stage) if str(stage).isdecimal() else stage: blocks if isinstance(blocks, str) else tuple(blocks)
            for stage, blocks in value.items()  # whose keys are text in a job file
        }
    if isinstance(default, float):
        if type(value) not in (int, float):
            raise ValueError(f"{key} is a number, not {value!r}")
        return float(value)
    if type(value) is not type(default) and not (key == "r" and value is None):
        wanted = {bool: "true or false", int: "a whole number"}.get(type(default), "a name")
        raise ValueError(f"{key} is {wanted}, not {value!r}")
    return value
