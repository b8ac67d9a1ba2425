"""Updates the weights once: forward, loss, backward, optimizer, average."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.augment.on_device import augment
from pipeline.cluster.world import World
from pipeline.data import images
from pipeline.train.dist import noise_seed
from pipeline.train.loss import batch_loss, weigh
from pipeline.train.mixup import mix
from pipeline.train.optim import set_learning_rate
from pipeline.train.parallel import clip, no_sync
from pipeline.train.spec import TrainSpec
from pipeline.train.start import Trainee


def update(trainee: Trainee, batch: Mapping[str, Any], rate: float, spec: TrainSpec, world: World) -> Tensor:
    """One update from this worker's part of a global step, `batch` (see `pipeline.loading.loader.batches`).

    Returns this worker's part of the loss, on its device: those of all workers add up to the mean over the images.
    """
    set_learning_rate(trainee.optimizer, rate)
    seed = noise_seed(spec.seed, trainee.step, world.rank)
    torch.manual_seed(seed)
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
    loss = torch.zeros((), device=world.device)
    for part in range(spec.settings.accumulate):
        # Every n-th image, so that labelled and pseudo-labelled ones go through the network together.
        rows = slice(part, None, spec.settings.accumulate)
        last = part == spec.settings.accumulate - 1
        with contextlib.nullcontext() if last else no_sync(trainee.network):
            with torch.autocast(world.device.type, trainee.precision, enabled=trainee.precision != torch.float32):
                logits = trainee.network(inputs[rows].contiguous(memory_format=trainee.layout))
            share = batch_loss(logits, targets[rows]) / spec.images_per_step
            # The mean of the workers' gradients is taken; times their number it is the sum, and so, whatever the sizes
            # of the slices, the gradient of the global sum over the global number of images.
            (share * world.size).backward()
        loss += share.detach()
    if spec.settings.clip:
        clip(trainee.model, spec.settings.clip)
    trainee.optimizer.step()
    trainee.optimizer.zero_grad(set_to_none=True)
    trainee.average.update(trainee.step)
    trainee.step += 1
    return loss
