"""Defines the settings of detection: its data, and the detectors that are trained side by side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pipeline.config.fields import REQUIRED, execution, identity

OF_JOB = re.compile(r"gen\d+-(teacher|student|finetune)")
"""What `init` means a stage of this job by."""


@dataclass
class DetectionData:
    dataset: str | None = identity(
        None, "data to write as shards first: scenes of scikit-learn's digits", choices=(None, "digits")
    )
    root: str | None = execution(
        None, "folder or URL before the patterns, with classes.json; the data that the job wrote where it is not given"
    )
    train: str = execution("train-*.tar", "pattern of the shards that detectors are trained on")
    validation: str = execution("val-*.tar", "pattern of the shards that all tuning looks at")
    test: str | None = execution(
        None, "pattern of the shards that only detect-evaluate reads; null: its figures are validation's"
    )


@dataclass
class Detector:
    name: str = execution(REQUIRED, "of the detector; its stage is detector-NAME")
    model: str = identity(REQUIRED, "the body: a name of `python -m models` or timm/<name>")
    overrides: dict[str, Any] = identity({}, "arguments of the body's architecture")
    init: str | None = identity(
        None,
        "first weights of the body: the stage of this job that leaves them, such as gen2-student, or a stage folder or "
        ".safetensors file of a classifier; null: new ones",
    )
    canvas: int = identity(
        1024,
        "pixels per side of the square in which every image lies; a multiple of the last stride",
        low=16,
        high=4096,
    )
    mean: list[float] = identity([0.485, 0.456, 0.406], "mean per channel, in 0..1")
    std: list[float] = identity([0.229, 0.224, 0.225], "standard deviation per channel, in 0..1")
    fpn: int = identity(256, "channels of the feature pyramid and of the mask head", low=8, high=4096)
    head: int = identity(1024, "features of the box head", low=8, high=16384)
    anchor: float = identity(8.0, "side of an anchor, in strides of its map", low=0.5, high=64.0)
    proposals: int = identity(1000, "regions an image that are looked at; twice as many in training", low=1, high=10000)
    regions: int = identity(512, "regions an image that box and mask heads learn from", low=1, high=4096)
    jitter: list[float] = identity([0.1, 2.0], "least and greatest size of an image in training, in canvases", low=0.01)
    flip: float = identity(0.5, "probability of a horizontal flip", low=0.0, high=1.0)
    duration: str = identity("130000st", "epochs of the training images (30ep) or steps (2000st)")
    warmup: str = identity("500st", "linear rise of the learning rate: 5ep or 100st")
    schedule: str = identity(
        "cosine",
        "the learning rate after that: a half cosine to 0, or divided by 10 at 90, 95 and 97.5 % of the steps (drops)",
        choices=("cosine", "drops"),
    )
    batch: int = identity(64, "images in a global step", low=1)
    optimizer: str = identity(
        "sgd", "sgd is Nesterov; adamw and lamb take a far lower `lr`", choices=("sgd", "adamw", "lamb")
    )
    lr: float = identity(0.08, "peak learning rate per `lr_images` images of the step", low=0.0)
    lr_images: int = identity(64, "images that `lr` refers to; 0: `lr` is absolute", low=0)
    momentum: float = identity(0.9, "sgd's momentum", low=0.0, high=0.9999)
    weight_decay: float = identity(4e-5, "on everything but batch norm", low=0.0)
    clip: float | None = identity(None, "largest norm of the gradient; null: none", low=1e-6)
    accumulate: int = identity(1, "parts in which a training worker takes its images of a step: less memory", low=1)
    rollbacks: int = identity(
        0,
        "times that a run whose loss is not finite goes back to its last checkpoint with half the rate",
        low=0,
        high=20,
    )
    ema: float = identity(0.9999, "decay of the averaged weights, min(ema, (1+t)/(10+t))", low=0.0, high=0.999999)
    weights: str = identity(
        "last",
        "which averaged weights the stage hands on: its last, or the best by validation box AP",
        choices=("last", "best"),
    )
    precision: str = identity(
        "auto",
        "numbers of training: float32, bfloat16 by autocast, or auto: bfloat16 on GPUs that have it",
        choices=("auto", "float32", "bfloat16"),
    )
    segments: int = identity(64, "parallel read positions in the order of the images", low=1, high=1024)
    window: int = identity(8, "shards mixed at a time inside a segment", low=1)
    evaluate_every: str = execution("0st", "validation during training: 5ep, 200st, or 0st for the end only")
    checkpoint_every: str = execution("500st", "how often a checkpoint is written: 1ep or 500st")
    keep: int = execution(2, "last checkpoints kept, beside the best", low=1)


@dataclass
class Detection:
    data: DetectionData = identity(DetectionData, "where the shards of scenes are")
    detectors: list[Detector] = identity([], "trained and tested side by side; none: no detection")
    batch: int = execution(8, "images that detect-evaluate shows to a detector at once", low=1)
