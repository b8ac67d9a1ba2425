"""Checks the settings of detection that must fit together."""

from __future__ import annotations

import re

from pipeline.config.settings import Job
from pipeline.config.settings_detection import OF_JOB, Detector
from pipeline.config.settings_train import Train
from pipeline.errors import ConfigError

NAME = re.compile(r"[a-z0-9_]+")
NOISE = ("dropout", "stochastic_depth")  # of a classifier's training; its weights do not depend on them


def check(job: Job, path: str) -> None:
    found = job.detection
    if not found.detectors:
        return
    if job.measure.models or job.labels_only:
        raise ConfigError(
            f"{path}: detection.detectors are set in a job that only {'measures' if job.measure.models else 'labels'}; "
            "give them a job of their own"
        )
    if not found.data.root and not found.data.dataset:
        raise ConfigError(
            f"{path}: detection.data.root is not set and there is no detection.data.dataset; set the first to the "
            "folder or URL of shards that `noisy-lambda prepare coco` wrote, or the second to digits"
        )
    if found.data.root and found.data.dataset:
        raise ConfigError(f"{path}: detection.data.root and detection.data.dataset are both set; drop one of them")
    names = [detector.name for detector in found.detectors]
    for number, detector in enumerate(found.detectors):
        where = f"detection.detectors[{number}]"
        if not NAME.fullmatch(detector.name):
            raise ConfigError(f"{path}: {where}.name is '{detector.name}'; use small letters, digits and underscores")
        if detector.name in names[:number]:
            raise ConfigError(
                f"{path}: {where}.name is '{detector.name}', as another one's; give each a name of its own"
            )
        _check_numbers(detector, where, path)
        _check_init(job, detector, where, path)


def _check_numbers(detector: Detector, where: str, path: str) -> None:
    low, high = detector.jitter if len(detector.jitter) == 2 else (1.0, 0.0)
    if low > high:
        raise ConfigError(
            f"{path}: {where}.jitter is {detector.jitter}; it takes two numbers, the least and the greatest"
        )
    for name, least in (("mean", 0.0), ("std", 1e-6)):
        values = getattr(detector, name)
        if len(values) != 3 or not all(least <= value <= 1 for value in values):
            raise ConfigError(
                f"{path}: {where}.{name} is {values}; it takes three numbers in 0..1, one for each channel"
            )


def _check_init(job: Job, detector: Detector, where: str, path: str) -> None:
    """A stage of this job is there, and of the body's architecture."""
    match = OF_JOB.fullmatch(detector.init or "")
    if not match:
        return
    generation = int(detector.init.partition("-")[0].removeprefix("gen"))  # type: ignore[union-attr]
    kinds = {0: "teacher"} | dict.fromkeys(range(1, len(job.generations) + 1), "student")
    tuned = match[1] == "finetune" and job.finetune.resolution and generation == len(job.generations)
    if job.detects_only or not (kinds.get(generation) == match[1] or tuned):
        known = [] if job.detects_only else [f"gen{number}-{kind}" for number, kind in kinds.items()]
        raise ConfigError(
            f"{path}: {where}.init is '{detector.init}', which is no stage of this job; "
            + (f"name one of {', '.join(known)}" if known else "name a stage folder or a .safetensors file")
        )
    if generation == 0 and job.teacher.checkpoint:  # its own card says what it is; loading will see
        return
    trained: Train = job.generations[generation - 1].student if generation else job.teacher
    theirs = {name: value for name, value in trained.overrides.items() if name not in NOISE}
    ours = {name: value for name, value in detector.overrides.items() if name not in NOISE}
    if (trained.model, theirs) != (detector.model, ours):
        raise ConfigError(
            f"{path}: {where}.init is '{detector.init}', which is of another architecture: {trained.model} with "
            f"{theirs or 'no overrides'}, and the body is {detector.model} with {ours or 'no overrides'}; give it the "
            "same"
        )
