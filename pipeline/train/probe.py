"""Trains the classifier of a frozen network, on features that the network gives once: `run(spec)`, a linear probe.

Images are seen as validation sees them, without noise, so that each has one feature vector; the network runs over the
labelled images once, and every step after that is a small product. Features are standardised by their mean and
deviation over the labelled images, which makes the rate fit any network, and that map is folded into the classifier at
the end. One process does it; one that is killed begins anew.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.memory_format import channels_last
from pipeline.cluster.world import World, join
from pipeline.data import images
from pipeline.errors import ConfigError, TrainingError
from pipeline.loading.loader import batches
from pipeline.tracking.journal import Journal
from pipeline.train import checkpoint
from pipeline.train.backbone import classifier_of, load_backbone
from pipeline.train.ema import Average
from pipeline.train.evaluate import accuracy
from pipeline.train.feeding import loading_processes
from pipeline.train.loop import threads
from pipeline.train.optim import create_optimizer, learning_rate, set_learning_rate
from pipeline.train.precision import choose_precision
from pipeline.train.spec import TrainSpec
from pipeline.weights import build_model

AT_ONCE = 128  # images in a forward batch
LEAST_DEVIATION = 1e-6  # of a feature that hardly changes
LOG_EVERY = 50  # steps


def run(spec: TrainSpec, leaving: Callable[[], bool] | None = None) -> dict[str, Any]:
    """As `pipeline.train.loop.run`: leaves the weights, and returns `step` and the validation. `leaving` is not asked:
    there is nothing to save. ConfigError: several processes."""
    if ended := checkpoint.read_result(spec.folder):
        return ended
    with join() as world, threads(spec.threads), Journal(spec.folder) as journal:
        if world.size > 1:
            raise ConfigError("freeze trains in one process; start one, and set workers.train to 1")
        journal.truncate(-1)
        images_of = {f"{source.name}_per_step": source.per_step for source in spec.sources}
        epoch: dict[str, Any] = {
            "epoch_is": "one pass over the labelled images",
            "steps_per_epoch": spec.steps_per_epoch,
        }
        journal.log(0, spec.steps, kind="start", **images_of, **epoch)
        precision = choose_precision(spec, world)
        model, head = _network(spec, world)
        features, labels = features_of(model, head, spec, world, precision)
        weight, bias = _fit(head, features, labels, spec, journal)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        found = accuracy(model, spec.validation, spec.view, spec.validation_batch, world, precision=precision)
        names = {"top1": "top1", "top5": "top5", "ece": "ece", "validation_loss": "loss"}
        shown = {name: found[figure] for name, figure in names.items()} | {"bad": found["bad"]}
        journal.log(spec.steps, spec.steps, kind="validation", **shown)
        result = {"step": spec.steps, **found}
        checkpoint.write_final(spec.folder, model.state_dict(), result)
        return result


def _network(spec: TrainSpec, world: World) -> tuple[nn.Module, nn.Linear]:
    torch.manual_seed(spec.seed)
    pretrained = spec.settings.pretrained
    model = build_model(spec.settings.model, spec.classes, spec.overrides, pretrained is True)
    if isinstance(pretrained, str):
        load_backbone(model, pretrained)
    model = (channels_last(model) if spec.channels_last else model).eval().requires_grad_(False).to(world.device)
    return model, classifier_of(model, spec.settings.model)


@torch.inference_mode()
def features_of(
    model: nn.Module, head: nn.Linear, spec: TrainSpec, world: World, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """What goes into the classifier, float32 [n, features], and the class, int64 [n], of every labelled image once."""
    [labelled] = spec.sources
    total = sum(shard.count for shard in labelled.shards)
    # The first `total` positions of the order are its first epoch: every image once.
    source = dataclasses.replace(labelled, per_step=min(AT_ONCE, total))
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    features: list[Tensor] = []
    labels: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float().cpu()))
    try:
        for batch in batches(
            [source], augment=spec.augment, classes=spec.classes, soft=spec.soft, seed=spec.seed, start_step=0,
            stop_step=math.ceil(total / source.per_step), workers=loading_processes(spec, world),
        ):  # fmt: skip
            pixels = images.normalise(batch["images"].to(world.device), spec.view, precision)
            with torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
                model(pixels.contiguous(memory_format=layout))
            labels.append(batch["hard"])
    finally:
        hook.remove()
    return torch.cat(features)[:total], torch.cat(labels)[:total]


def _fit(head: nn.Linear, features: Tensor, labels: Tensor, spec: TrainSpec, journal: Journal) -> tuple[Tensor, Tensor]:
    """Weight and bias of the averaged classifier, for features as the network gives them."""
    settings, total = spec.settings, len(labels)
    mean, deviation = features.mean(0), features.std(0, correction=0).clamp(min=LEAST_DEVIATION)
    features = (features - mean) / deviation
    linear = nn.Linear(head.in_features, head.out_features)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    average = Average(linear, settings.ema)
    optimizer = create_optimizer(
        linear, settings.optimizer, weight_decay=settings.weight_decay, momentum=settings.momentum
    )
    batch, losses = spec.sources[0].per_step, []
    for step in range(spec.steps):
        rows = _rows(step, batch, total, spec.seed)
        rate = learning_rate(step, peak=spec.lr, steps=spec.steps, warmup=spec.warmup, schedule=spec.schedule)
        set_learning_rate(optimizer, rate)
        loss = F.cross_entropy(linear(features[rows]), labels[rows], label_smoothing=settings.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)
        losses.append(loss.detach())
        if (step + 1) % LOG_EVERY == 0 or step + 1 == spec.steps:
            found = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(found):
                raise TrainingError(f"the loss became {found} at step {step + 1}; lower `lr`")
            passed = {"lr": rate, "epoch": round((step + 1) / spec.steps_per_epoch, 4)}
            journal.log(step + 1, spec.steps, kind="train", loss=found, **passed)
    averaged = dict(average.module.named_parameters())
    weight = averaged["weight"] / deviation
    return weight, averaged["bias"] - weight @ mean


def _rows(step: int, batch: int, total: int, seed: int) -> Tensor:
    """The images of a step: consecutive positions of an order that every epoch draws anew."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // total
    orders = {int(e): np.random.default_rng((seed, int(e))).permutation(total) for e in np.unique(epochs)}
    return torch.tensor([orders[int(e)][position % total] for e, position in zip(epochs, positions, strict=True)])
