"""Reads the images that a network's first layer is fitted to: the first ones of the order, without noise."""

from __future__ import annotations

import dataclasses
import itertools

import torch

from pipeline.augment.noise import Augment
from pipeline.data import images
from pipeline.loading.loader import batches
from pipeline.train.spec import TrainSpec

IMAGES = 1024  # at most


def first_images(spec: TrainSpec) -> torch.Tensor:
    """Labelled training images as validation would see them, normalised, float32 [n, 3, s, s]: a function of the seed
    and the data, the same on every worker."""
    source = next(source for source in spec.sources if source.name == "labelled")
    count = min(IMAGES, sum(shard.count for shard in source.shards))
    alone = dataclasses.replace(source, per_step=1)
    found = batches(
        [alone], augment=Augment(spec.settings.resolution, view=spec.view), classes=spec.classes, soft=spec.soft,
        seed=spec.seed, start_step=0, stop_step=count,
    )  # fmt: skip
    return torch.cat([images.normalise(batch["images"], spec.view) for batch in itertools.islice(found, count)])
