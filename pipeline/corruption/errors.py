"""Sums up the errors of a model on corrupted pictures: corruption error, mCE and relative mCE.

Hendrycks and Dietterich (ICLR 2019), section 4.2: with top-1 error E of a model at severity s of corruption c,
CE_c = Σ_s E_{s,c} ÷ Σ_s E_{s,c} of a reference, mCE = 100 times their mean, and relative CE the same of E - E_clean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.corruption.strengths import SEVERITIES

ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640, "defocus_blur": 0.819880,
    "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572,
    "fog": 0.819324, "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip
"""AlexNet's mean top-1 error over the severities of each published corruption (the authors' repository, issue 10)."""
ALEXNET_CLEAN = 1 - 0.56522
"""Its top-1 error on ImageNet's validation images, as torchvision (AlexNet_Weights.IMAGENET1K_V1) states it."""


@dataclass(frozen=True)
class Errors:
    """Top-1 errors of a model, shares: on clean pictures (None: not known), and by corruption one a severity."""

    clean: float | None
    corrupted: Mapping[str, Sequence[float]]

    @property
    def mean(self) -> float | None:
        """Over corruptions and severities, in percent; None where there are none."""
        if not self.corrupted:
            return None
        return 100 * sum(sum(some) / len(some) for some in self.corrupted.values()) / len(self.corrupted)


def alexnet(names: Sequence[str]) -> Errors:
    """AlexNet's, on the published set, which other pictures than ImageNet's are compared with at one's own risk."""
    return Errors(ALEXNET_CLEAN, {name: [ALEXNET[name]] * SEVERITIES for name in names})


def summary(model: Errors, reference: Errors) -> dict[str, Any]:
    """All of it in percent, as tables and MLflow have it."""
    found, relative = ce(model, reference), relative_ce(model, reference)
    return {
        "clean_error": None if model.clean is None else 100 * model.clean,
        "errors": {name: [100 * error for error in some] for name, some in model.corrupted.items()},
        "mean_error": model.mean,
        "ce": found,
        "mce": mean(found),
        "relative_ce": relative,
        "relative_mce": mean(relative),
    }


def ce(model: Errors, reference: Errors) -> dict[str, float | None]:
    """Corruption errors in percent by name; None where the reference makes no mistake."""
    return {name: _ratio(sum(errors), sum(reference.corrupted[name])) for name, errors in model.corrupted.items()}


def relative_ce(model: Errors, reference: Errors) -> dict[str, float | None]:
    """What corruption adds to the clean error, against what it adds to the reference's; None where it adds nothing."""
    if model.clean is None or reference.clean is None:
        return dict.fromkeys(model.corrupted)
    return {
        name: _ratio(
            sum(error - model.clean for error in errors),
            sum(error - reference.clean for error in reference.corrupted[name]),
        )
        for name, errors in model.corrupted.items()
    }


def mean(values: Mapping[str, float | None]) -> float | None:
    """Of all corruptions; None where one is not known."""
    known = [value for value in values.values() if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _ratio(part: float, whole: float) -> float | None:
    return 100 * part / whole if whole > 0 else None
