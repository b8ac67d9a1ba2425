"""Validates a run's weights, and says when they are the best so far."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from models.over_views import answering
from pipeline.cluster.world import World
from pipeline.train.evaluate import Memory, accuracy
from pipeline.train.parallel import whole
from pipeline.train.spec import TrainSpec
from pipeline.train.start import Trainee


def validate(trainee: Trainee, spec: TrainSpec, world: World, decoded: Memory) -> tuple[dict[str, Any], dict[str, Any]]:
    """(figures of the averaged weights, see `accuracy`; what the journal shows of them, and of the weights themselves
    where `spec.settings.evaluate_raw` asks for it). Every worker calls it."""

    at_once = -(-spec.images_per_step // world.size // spec.settings.accumulate)
    # A GPU has memory for training on so many, and without gradients for twice as many at least.
    batch = min(spec.validation_batch, 2 * at_once) if world.device.type == "cuda" else spec.validation_batch

    def measure(model: nn.Module) -> dict[str, Any]:
        with whole(model):
            return accuracy(
                answering(model, spec.test_views), spec.validation, spec.view, batch, world,
                precision=trainee.precision, memory=decoded,
            )  # fmt: skip

    # A tracker knows names, not kinds: `loss` is that of training.
    names = {"top1": "top1", "top5": "top5", "ece": "ece", "validation_loss": "loss"}
    found = measure(trainee.average.module)
    shown = {name: found[figure] for name, figure in names.items()} | {"bad": found["bad"]}
    if spec.settings.evaluate_raw:
        raw = measure(trainee.model)
        shown |= {f"raw_{name}": raw[figure] for name, figure in names.items()}
    return found, shown


def better(found: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether a validation beats the best before it: by top-1, of equal ones by the loss."""
    return best is None or (found["top1"], -found["loss"]) > (best["top1"], -best["loss"])
