"""Finds out that training has diverged: losses or weights that are not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.cluster.world import World
from pipeline.train import checkpoint
from pipeline.train.parallel import parts
from pipeline.train.spec import TrainSpec


class Diverged(Exception):
    """The loss or the weights are not finite: the text says which, when and at what rate. All workers raise it at
    once."""

    def __init__(self, text: str, step: int) -> None:
        super().__init__(text)
        self.step = step


def checked_mean(losses: Sequence[Tensor], step: int, rate: float, world: World) -> float:
    """The mean over the steps up to `step` of what the workers' `losses` add up to; every worker calls it.

    Diverged names the first step whose loss is not finite.
    """
    values = world.sum(torch.stack(list(losses))).tolist()
    for number, value in enumerate(values, step - len(values) + 1):
        if not math.isfinite(value):
            raise Diverged(f"the loss became {value} at step {number}, near learning rate {rate:.3g}", number)
    return sum(values) / len(values)


def check_weights(model: nn.Module, step: int, rate: float, world: World) -> None:
    """Diverged where the update that followed a finite loss was not finite; every worker calls it."""
    if world.any(not finite(parts(model))):
        raise Diverged(f"the weights are not finite after step {step}, at learning rate {rate:.3g}", step)


def finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of the floating-point tensors is infinite or NaN."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    return not floats or bool(torch.isfinite(torch.stack(torch._foreach_norm(floats, math.inf))).all())


def advice(spec: TrainSpec, step: float) -> str:
    """What to do about a rate that diverges, and what is left: the newest checkpoint up to `step`."""
    # A fine-tune has no such setting, and where it is set it was of no use.
    lowers = "" if spec.only or spec.settings.rollbacks else ", or let `rollbacks` lower it on the way"
    return f"lower `lr`, lengthen `warmup`{lowers} ({_last_good(spec, step)})"


def does_not_fit(spec: TrainSpec, step: int, world: World) -> str:
    """What to do about a device whose memory a step does not fit into."""
    at_once = -(-spec.images_per_step // (world.size * spec.settings.accumulate))
    again = "" if spec.settings.model.startswith("timm/") else ", set `overrides.checkpointing: true`"
    return (
        f"step {step + 1} does not fit into the memory of {world.device}, with {at_once} images at once; raise "
        f"`accumulate` (now {spec.settings.accumulate}){again}, or lower `batch` ({_last_good(spec, step)})"
    )


def _last_good(spec: TrainSpec, step: float) -> str:
    path = checkpoint.newest_path(spec.folder, step)
    return f"the last good checkpoint is {storage.redact(path)}" if path else "there is no checkpoint yet"
