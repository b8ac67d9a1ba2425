"""Starts or resumes a training run: network, weights, optimizer and average, new or from the newest checkpoint."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from models.first_layer import whiten
from models.memory_format import channels_last
from pipeline.cluster.world import World
from pipeline.train import checkpoint
from pipeline.train.backbone import load_backbone
from pipeline.train.ema import Average
from pipeline.train.first_images import first_images
from pipeline.train.freeze import train_only
from pipeline.train.optim import as_here, create_optimizer, lay_out
from pipeline.train.parallel import load_state_of, split, wrap
from pipeline.train.precision import choose_precision
from pipeline.train.spec import TrainSpec
from pipeline.weights import build_model, load_state, read_state

log = logging.getLogger(__name__)

# images that a worker takes through the network at once: below this, batch norm on GPUs sees those of all workers
SYNC_BELOW = 32


@dataclass
class Trainee:
    """All that an update changes."""

    model: nn.Module
    """The network itself, whose weights are kept."""
    network: nn.Module
    """What images go through in training: the model, in what several workers wrap it in, compiled where that is asked
    for."""
    optimizer: torch.optim.Optimizer
    average: Average
    precision: torch.dtype
    layout: torch.memory_format
    step: int
    """Updates made so far."""
    state: dict[str, Any]
    """What checkpoints know besides: `sync_batch_norm`, how often it went back (`rollbacks`), the last `validation`,
    and the
    `best`: its `step` and `validation`."""
    saved: bool = False
    """Whether it has saved a checkpoint since it was started."""


def start(spec: TrainSpec, world: World, before: float = math.inf) -> Trainee:
    """The run as it stands: where the newest checkpoint in its folder (of a step `before` this one) left it, or at its
    beginning.

    Every worker calls it. WeightsError: weights or a checkpoint of another network.
    """
    precision = choose_precision(spec, world)
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    on_gpu = world.device.type == "cuda"

    # Where the weights come from; the order is important:
    # 1. the newest whole checkpoint in the folder: an interrupted run goes on
    # 2. spec.init: a student of its teacher, a fine-tune
    # 3. spec.settings.pretrained: timm's published weights, or a file's; or new ones drawn from the seed
    resumed = _find_checkpoint(spec, world, before)
    torch.manual_seed(spec.seed)
    fresh = not (resumed or spec.init)
    model = build_model(spec.settings.model, spec.classes, spec.overrides, spec.settings.pretrained is True and fresh)
    if fresh and isinstance(spec.settings.pretrained, str):
        load_backbone(model, spec.settings.pretrained)
    elif fresh and not spec.settings.pretrained and spec.settings.first_layer == "whitening":
        whiten(model, first_images(spec))
    if resumed:
        load_state(model, resumed.model, resumed.path)  # which says what does not fit; below it is split up already
    elif spec.init:
        load_state(model, read_state(spec.init), spec.init)
    state: dict[str, Any] = resumed.state if resumed else {"sync_batch_norm": _sync_batch_norm(spec, model, world)}
    if "best" in state and not world.agree(int(checkpoint.is_there(spec.folder, state["best"]["step"]))):
        # It made room for a better one, before the run went back to where this one was the best.
        log.warning(
            "the best weights so far, of step %d, are gone; the best is that of the steps to come",
            state["best"]["step"],
        )
        del state["best"]
    if state["sync_batch_norm"] and on_gpu:
        model = _synchronised(model)
    model = (channels_last(model) if spec.channels_last else model).train()
    if spec.settings.parallel != "fsdp" or world.size == 1:
        model = model.to(world.device)  # else part by part while it is split up: the whole may not fit
    if spec.only:
        train_only(model, spec.only)

    # The order is what splitting up asks for: a copy to average, then the model, then what lists its parameters.
    average = Average(model, spec.settings.ema)
    split(average.module, world, spec.settings.parallel)
    network = wrap(model, world, spec.settings.parallel, static_graph=spec.settings.static_graph)
    average.follow(model)
    optimizer = create_optimizer(
        model,
        spec.settings.optimizer,
        weight_decay=spec.settings.weight_decay,
        momentum=spec.settings.momentum,
        clip=spec.settings.clip,
    )
    if resumed:
        load_state_of(average.module, None, resumed.ema, {})
        load_state_of(model, optimizer, resumed.model, as_here(optimizer, resumed.optimizer))
        lay_out(optimizer)
    if spec.settings.compile:
        network = cast(nn.Module, torch.compile(network))
    return Trainee(model, network, optimizer, average, precision, layout, resumed.step if resumed else 0, state)


def _find_checkpoint(spec: TrainSpec, world: World, before: float) -> checkpoint.Checkpoint | None:
    """The checkpoint to go on from: chosen by rank 0, the same on every worker."""
    found = checkpoint.latest(spec.folder, before) if world.main else None
    step = world.agree(found.step if found else -1)
    if step < 0:
        return None
    found = found or checkpoint.load(spec.folder, step)
    checkpoint.check_architecture(found, spec.architecture)
    return found


def _sync_batch_norm(spec: TrainSpec, model: nn.Module, world: World) -> bool:
    """Whether batch norm sees the images of all workers; decided once, and kept in the checkpoints."""
    if world.size == 1 or not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        return False
    share = spec.images_per_step // world.size // spec.settings.accumulate
    if world.device.type != "cuda" and world.main:
        log.warning(
            "on CPUs batch norm sees only %d images, one worker's at a time: torch cannot synchronise it there",
            share,
        )
    return share < SYNC_BELOW and world.device.type == "cuda"


def _synchronised(model: nn.Module) -> nn.Module:
    """With SyncBatchNorm; timm's conversion keeps the activation that its own batch norms hold, torch's drops it."""
    from timm.layers import convert_sync_batchnorm

    converted: nn.Module = convert_sync_batchnorm(model)
    return converted
