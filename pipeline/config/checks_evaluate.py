"""Checks what a job says of the test of its models: further sets, and corruptions by name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

from pipeline.config.settings import Job
from pipeline.errors import ConfigError


def spell_out_sets(raw: Mapping[str, Any]) -> None:
    """`v2-*.tar` in evaluate.sets becomes {shards: v2-*.tar}."""
    evaluate = raw.get("evaluate")
    if isinstance(evaluate, dict) and isinstance(sets := evaluate.get("sets"), dict):
        evaluate["sets"] = {n: entry if isinstance(entry, dict) else {"shards": entry} for n, entry in sets.items()}


def check_sets(job: Job, path: str) -> None:
    """Sets of `evaluate` become folders and names of metrics."""
    for name, entry in job.evaluate.sets.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "test":
            raise ConfigError(
                f"{path}: evaluate.sets names a set '{name}'; use letters, digits, - and _, and another name than "
                "test, which is data.test"
            )
        if not entry.shards:
            raise ConfigError(f"{path}: evaluate.sets.{name} is empty; it takes the pattern of labelled shards")
        said = [key for key in ("classes", "labels", "reference") if getattr(entry, key) is not None]
        if len(said) > 1:
            raise ConfigError(
                f"{path}: evaluate.sets.{name} has both {said[0]} and {said[1]}; an entry takes one of classes, labels "
                "and reference, and the same shards may stand in several entries"
            )
        classes = entry.classes
        several = classes if isinstance(classes, list) else [classes]
        words = all(isinstance(one, str | int) and not isinstance(one, bool) and one != "" for one in several)
        if classes is not None and not (several and words and not isinstance(classes, int)):
            raise ConfigError(
                f"{path}: evaluate.sets.{name}.classes is {classes!r}; it takes imagenet-a, imagenet-r, the path of a "
                "list, or a list of class names or indexes"
            )
        if entry.labels == "":
            raise ConfigError(f"{path}: evaluate.sets.{name}.labels is empty; it takes imagenet-real or a JSON file")


CORRUPTIONS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip


def check_robustness(job: Job, path: str) -> None:
    """Names of corruptions become a list, in the order of the paper."""
    settings = job.evaluate.robustness
    found, where = settings.corruptions, "evaluate.robustness"
    names = list(CORRUPTIONS) if found == "all" else found or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: {where}.corruptions is {found!r}; it takes all, or a list of names")
    for name in names:
        if name not in CORRUPTIONS:
            close = difflib.get_close_matches(name, CORRUPTIONS, 1, 0.5)
            hint = f"did you mean '{close[0]}'?" if close else f"they are {', '.join(CORRUPTIONS)}"
            raise ConfigError(f"{path}: {where}.corruptions names '{name}', which is no corruption; {hint}")
    severities = sorted(set(settings.severities))
    if names and not severities:
        raise ConfigError(f"{path}: {where}.severities is empty; it takes numbers from 1 to 5")
    if settings.reference == "alexnet" and len(severities) < 5:
        raise ConfigError(
            f"{path}: {where}.reference is alexnet, whose errors are known as means over the severities 1 to 5, but "
            f"severities is {settings.severities}; name all five, or the reference teacher"
        )
    settings.corruptions = [name for name in CORRUPTIONS if name in names] or None
    settings.severities = severities
