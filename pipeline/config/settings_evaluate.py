"""Defines the settings of the test of a job's models: further sets, further sizes, corrupted images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.config.fields import REQUIRED, execution, identity


@dataclass
class EvaluationSet:
    shards: str = execution(REQUIRED, "pattern of its labelled shards, as in `data`; alone it may stand for the entry")
    classes: Any = identity(
        None,
        "the classes that may be answered, if not all: imagenet-a, imagenet-r, a list of names or class indexes, or a "
        "file of them below `data.root`; the accuracy on the test images of these classes is shown beside",
        neutral=None,
    )
    labels: str | None = identity(
        None,
        "several right classes for an image: imagenet-real, or a JSON file below `data.root`, {image: [classes]}; "
        "images with none are skipped",
        neutral=None,
    )
    reference: str | None = identity(
        None,
        "for shards in folders corruption/severity: whose errors count as 100 % in their corruption errors",
        choices=(None, "teacher", "alexnet"),
        neutral=None,
    )


@dataclass
class Robustness:
    corruptions: Any = identity(
        None,
        "ways to spoil the test images, on which every model is tested then: all, or a list of names; null: none",
    )
    severities: list[int] = identity([1, 2, 3, 4, 5], "how strongly", low=1, high=5)
    images: int | None = identity(None, "so many of the test images, drawn by their bytes; null: all", low=1)
    reference: str = identity("teacher", "whose errors count as 100 %", choices=("teacher", "alexnet"))


@dataclass
class Evaluate:
    batch: int = identity(256, "images in a forward batch, for accuracy and speed alike", low=1)
    sizes: list[int] = identity(
        [], "further image sizes, in pixels per side, at which every model is tested", low=4, high=4096, neutral=[]
    )
    sets: dict[str, EvaluationSet] = execution(
        {}, "further labelled sets by name, such as {v2: v2-*.tar}, on which every model is tested"
    )
    raw: bool = identity(
        False, "test the weights themselves too, beside their moving average, which is the model", neutral=False
    )
    # Of a stage of its own, so no part of `evaluate`'s identity.
    robustness: Robustness = execution(Robustness, "the test on corrupted images")
    speed_seconds: float = execution(
        1.0, "time spent on measuring the speed of each model, and as much on its latency", low=0.0
    )
