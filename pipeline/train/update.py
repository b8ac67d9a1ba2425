"""Updates the weights once: forward, loss, backward, optimizer, average."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pipeline.cluster.world import World
from pipeline.train.classification import CLASSIFICATION
from pipeline.train.dist import noise_seed
from pipeline.train.optim import set_learning_rate
from pipeline.train.parallel import clip, no_sync
from pipeline.train.spec import TrainSpec
from pipeline.train.start import Trainee
from pipeline.train.task import Task


def update(
    trainee: Trainee, batch: Mapping[str, Any], rate: float, spec: TrainSpec, world: World, task: Task = CLASSIFICATION
) -> Tensor:
    """One update from this worker's part of a global step, `batch` (see `Task.batches`).

    Returns this worker's part of the loss, on its device: those of all workers add up to the mean over the images.
    """
    set_learning_rate(trainee.optimizer, rate)
    seed = noise_seed(spec.seed, trainee.step, world.rank)
    torch.manual_seed(seed)
    loss_of = task.losses(trainee, batch, seed, spec, world)
    loss = torch.zeros((), device=world.device)
    for part in range(spec.settings.accumulate):
        # Every n-th image, so that labelled and pseudo-labelled ones go through the network together.
        rows = slice(part, None, spec.settings.accumulate)
        last = part == spec.settings.accumulate - 1
        with contextlib.nullcontext() if last else no_sync(trainee.network):
            share = loss_of(rows) / spec.images_per_step
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
