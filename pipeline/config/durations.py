"""Reads durations: `30ep`, epochs of the labelled images, and `2000st`, steps."""

from __future__ import annotations

import re

from pipeline.errors import ConfigError


def parse(text: str, where: str) -> tuple[float, str]:
    """'30ep' -> (30.0, 'ep'), '2000st' -> (2000.0, 'st')."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ep|st)", text)
    if not match:
        none = ", or 0st for the end only" if where.endswith("_every") else ""
        raise ConfigError(f"{where} is '{text}'; write epochs of the labelled images as 30ep or steps as 2000st{none}")
    return float(match[1]), match[2]


def steps(text: str, steps_per_epoch: float) -> int:
    """A duration in steps."""
    number, unit = parse(text, "duration")
    return round(number * steps_per_epoch) if unit == "ep" else round(number)
