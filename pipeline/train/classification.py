"""Classifies whole images: the first task of the training loop, of teachers, students and fine-tunes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from models.first_layer import whiten
from pipeline.augment.on_device import augment
from pipeline.cluster.world import World
from pipeline.data import images
from pipeline.loading.loader import batches
from pipeline.train import validate
from pipeline.train.backbone import load_backbone
from pipeline.train.feeding import NICE, loading_processes
from pipeline.train.first_images import first_images
from pipeline.train.loss import batch_loss, weigh
from pipeline.train.mixup import mix
from pipeline.train.spec import TrainSpec
from pipeline.train.start import Trainee
from pipeline.weights import build_model


class Classification:
    """See pipeline.train.task.Task."""

    def build(self, spec: TrainSpec, fresh: bool) -> nn.Module:
        pretrained = spec.settings.pretrained
        model = build_model(spec.settings.model, spec.classes, spec.overrides, pretrained is True and fresh)
        if fresh and isinstance(pretrained, str):
            load_backbone(model, pretrained)
        elif fresh and not pretrained and spec.settings.first_layer == "whitening":
            whiten(model, first_images(spec))
        return model

    def batches(self, spec: TrainSpec, world: World, start_step: int) -> Iterator[Mapping[str, Any]]:
        return batches(
            spec.sources, augment=spec.augment, classes=spec.classes, soft=spec.soft, seed=spec.seed,
            start_step=start_step, stop_step=spec.steps, rank=world.rank, world=world.size,
            workers=loading_processes(spec, world),
            pin_memory=world.device.type == "cuda", nice=NICE if world.device.type == "cpu" else 0,
        )  # fmt: skip

    def losses(
        self, trainee: Trainee, batch: Mapping[str, Any], seed: int, spec: TrainSpec, world: World
    ) -> Callable[[slice], Tensor]:
        pixels, targets, source = (
            batch[name].to(world.device, non_blocking=True) for name in ("images", "targets", "source")
        )
        targets = weigh(targets, source, spec.settings.pseudo_weight)
        if spec.augment.on_device:
            pixels = augment(pixels, spec.augment, batch["operations"])
        inputs, targets = mix(
            images.normalise(pixels, spec.view, trainee.precision),
            targets,
            mixup=spec.settings.mixup,
            cutmix=spec.settings.cutmix,
            seed=seed,
        )

        def loss_of(rows: slice) -> Tensor:
            with torch.autocast(world.device.type, trainee.precision, enabled=trainee.precision != torch.float32):
                logits = trainee.network(inputs[rows].contiguous(memory_format=trainee.layout))
            return batch_loss(logits, targets[rows])

        return loss_of

    def validate(self, trainee: Trainee, spec: TrainSpec, world: World) -> tuple[dict[str, Any], dict[str, Any]]:
        return validate.validate(trainee, spec, world, trainee.memory)

    def better(self, found: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        return validate.better(found, best)


CLASSIFICATION = Classification()
