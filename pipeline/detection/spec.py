"""Says what a detector's training run is, as plain data: a TrainSpec with what the task of detection adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.augment.jitter import Jitter
from pipeline.config.durations import steps
from pipeline.config.settings_detection import Detector
from pipeline.config.settings_train import Train, peak_rate
from pipeline.detection.card import DetectorCard
from pipeline.loading.loader import TrainingShard, TrainingSource
from pipeline.loading.sample_order import segments_for
from pipeline.train.spec import SEEDS_PER_JOB, TrainSpec, steps_of

SHARED = (
    "model", "overrides", "mean", "std", "flip", "duration", "warmup", "batch", "optimizer", "lr", "lr_images",
    "momentum", "weight_decay", "clip", "accumulate", "rollbacks", "ema", "weights", "precision", "segments", "window",
    "evaluate_every", "checkpoint_every", "keep",
)  # fmt: skip
"""Settings that mean the same for a detector as for a classifier: what the loop reads."""

MASKS = 10  # objects of an image, about: each brings a mask of the canvas


@dataclass(frozen=True, kw_only=True)
class DetectorSpec(TrainSpec):
    card: DetectorCard
    jitter: Jitter
    body: str | None = None
    """A classifier's .safetensors file, of which the body's first weights are taken; None: new ones."""

    @property
    def architecture(self) -> dict[str, Any]:
        card = self.card
        return {
            "model": card.model, "classes": card.classes, "overrides": card.overrides,
            "canvas": card.canvas, "fpn": card.fpn, "head": card.head, "anchor": card.anchor,
        }  # fmt: skip

    @property
    def image_bytes(self) -> int:
        return (3 + MASKS) * self.card.canvas**2


def card_of(settings: Detector, classes: Sequence[str]) -> DetectorCard:
    """What detector.yaml will say of it."""
    return DetectorCard(
        settings.model, list(classes), settings.canvas, settings.fpn, settings.head, settings.anchor,
        settings.proposals, settings.regions, list(settings.mean), list(settings.std), dict(settings.overrides),
    )  # fmt: skip


def make_spec(
    settings: Detector,
    *,
    stage: str,
    folder: str,
    classes: Sequence[str],
    train: Sequence[TrainingShard],
    validation: Sequence[TrainingShard],
    seed: int,
    body: str | None = None,
    workers: int | None = 0,
    threads: int | None = None,
) -> DetectorSpec:
    """Epochs become steps, the rate that of a whole step. ConfigError: `stage` would have no step."""
    training = Train(**{name: getattr(settings, name) for name in SHARED}, resolution=settings.canvas)
    images = sum(shard.count for shard in train)
    total, per_epoch = steps_of(stage, settings.duration, settings.batch, images)
    segments = segments_for(len(train), settings.segments)
    source = TrainingSource("scenes", tuple(train), settings.batch, segments, settings.window)
    low, high = settings.jitter
    return DetectorSpec(
        settings=training,
        folder=folder,
        classes=len(classes),
        sources=(source,),
        validation=tuple(validation),
        seed=seed * SEEDS_PER_JOB,
        steps=total,
        steps_per_epoch=per_epoch,
        lr=peak_rate(training, settings.batch),
        warmup=min(steps(settings.warmup, per_epoch), total // 2),
        evaluate_every=steps(settings.evaluate_every, per_epoch),
        checkpoint_every=max(1, steps(settings.checkpoint_every, per_epoch)),
        workers=workers,
        threads=threads,
        schedule=settings.schedule,
        card=card_of(settings, classes),
        jitter=Jitter(settings.canvas, low, high, settings.flip),
        body=body,
    )
