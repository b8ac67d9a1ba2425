"""Describes how training images are noised: the settings of a view, checked."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property

from timm.data import auto_augment

from pipeline.augment import randaugment
from pipeline.augment.randaugment import INTERPOLATIONS, Policy
from pipeline.config import settings_train
from pipeline.data.images import View
from pipeline.errors import ConfigError

# timm itself passes over sections that it does not know: a misspelt magnitude would train without noise.
POLICY = re.compile(r"rand(-(m\d+|n\d+|p\d*\.?\d+|mstd\d*\.?\d+|mmax\d+|inc[01]|tweights|t3aw?))+")


@dataclass(frozen=True)
class Affine:
    """Bounds of a random affine map about the centre of the cropped view: one resampling for all of it, where
    a chain of timm's operations would blur a small image once for each.

    degrees: rotation within ±; translate: shift within ± this fraction of the side; scale: range of the
    magnification; shear: horizontal shear within ± degrees.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0


@dataclass(frozen=True)
class Augment:
    """How training images are noised; every field is part of a stage's identity. Errors speak of a job's settings."""

    size: int
    """Side of the view in pixels."""
    policy: str = ""
    """timm's RandAugment string, e.g. `rand-m15-mmax15-n2-p1` (timm clips magnitudes at 10 and applies each
    operation half the time unless told by mmax and p); '' for none."""
    ops: tuple[str, ...] = ()
    """Only these of timm's operations (`ShearX`, `Rotate`, …); () for the policy's usual set."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Range of the crop's area, as a fraction of the image's."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height."""
    shift: float = 0.0
    """Above 0, in place of the random resized crop: the whole image, shifted by up to this fraction of the side each
    way, with its mirror image where it has nothing to show."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    alternate_flip: bool = False
    """Who asks for the view says whether it is mirrored, and `flip` is not looked at."""
    cutout: float = 0.0
    """Side of the square that is hidden, as a fraction of the view's."""
    affine: Affine | None = None
    interpolation: str = "bicubic"
    """`bilinear`, `bicubic`, or `random` of the two."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Colour (0 … 1) of what an operation brings in from outside the image."""
    on_device: bool = False
    """The policy's operations are not applied to the view but written down (`view_and_operations`), for the device that
    trains to carry them out on whole batches (pipeline.augment.on_device)."""
    view: View | None = None
    """In place of all this the view of validation, without noise: fine-tuning at another resolution."""

    def __post_init__(self) -> None:
        if self.interpolation not in INTERPOLATIONS:
            raise ConfigError(
                f"interpolation of training images is '{self.interpolation}'; allowed are {', '.join(INTERPOLATIONS)}"
            )
        if self.policy and not POLICY.fullmatch(self.policy):
            raise ConfigError(
                f"augment is '{self.policy}', which timm's RandAugment does not know; write e.g. "
                "rand-m9-n2-p1 with sections of m, n, p, mstd, mmax, inc, tweights, t3a, t3aw, or '' for none"
            )
        unknown = [name for name in self.ops if name not in auto_augment.NAME_TO_OP]
        if unknown or (self.ops and not self.policy):
            found = f"names '{unknown[0]}'" if unknown else "is set without a policy in `augment` to draw from"
            raise ConfigError(
                f"augment_ops {found}; allowed are, beside a policy, {', '.join(auto_augment.NAME_TO_OP)}"
            )
        for name, (low, high), most in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= most:
                raise ConfigError(
                    f"crop_{name} is ({low}, {high}); it must be a range (low, high) above 0"
                    + (" and at most 1" if most == 1 else "")
                )
        if not 0 <= self.flip <= 1:
            raise ConfigError(f"flip is {self.flip}; it is a probability between 0 and 1")
        if self.on_device and self.cutout:
            raise ConfigError(
                "cutout hides what the policy has made, but with augment_on: device the policy comes last; drop one"
            )
        if self.on_device:
            randaugment.check_can_be_written(self.operations)

    @cached_property
    def fill(self) -> tuple[int, ...]:
        """The colour, uint8, of what comes in from outside the image."""
        return tuple(round(255 * value) for value in self.mean)

    @cached_property
    def operations(self) -> Policy:
        """The policy, with all that decides what it draws."""
        return Policy(self.policy, self.ops, self.size, self.interpolation, self.fill)


def augment_of(settings: settings_train.Train) -> Augment:
    """The training view of a job's settings."""
    affine = settings.affine
    mean = (settings.mean[0], settings.mean[1], settings.mean[2])
    moved = Affine(affine.degrees, affine.translate, _pair(affine.scale), affine.shear)
    return Augment(
        size=settings.resolution,
        policy=settings.augment,
        ops=tuple(settings.augment_ops),
        scale=_pair(settings.crop_scale),
        ratio=_pair(settings.crop_ratio),
        shift=settings.shift,
        flip=settings.flip,
        alternate_flip=settings.alternate_flip,
        cutout=settings.cutout,
        affine=None if moved == Affine() else moved,
        interpolation="bicubic" if settings.interpolation == "lanczos" else settings.interpolation,
        mean=mean,
        on_device=settings.augment_on == "device" and bool(settings.augment),
    )


def _pair(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]
