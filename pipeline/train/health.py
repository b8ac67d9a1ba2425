"""Whether training can go on: finite losses, finite weights, no SIGTERM."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import TrainingError
from pipeline.train import checkpoint
from pipeline.train.dist import World


def checked_mean(losses: list[Tensor], step: int, rate: float, folder: str, world: World) -> float:
    """The mean over the steps up to `step` of what the workers' `losses` add up to; every worker calls it.

    TrainingError names the first step whose loss is not finite.
    """
    values = world.sum(torch.stack(losses)).tolist()
    for number, value in enumerate(values, step - len(values) + 1):
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss became {value} at step {number}, near learning rate {rate:.3g}; {_advice(folder)}"
            )
    return sum(values) / len(values)


def check_weights(model: nn.Module, step: int, rate: float, folder: str) -> None:
    """TrainingError where the update that followed a finite loss was not finite."""
    norms = torch._foreach_norm([p.detach() for p in model.parameters()])
    if not torch.isfinite(torch.stack(norms)).all():
        raise TrainingError(
            f"the weights are not finite after step {step}, at learning rate {rate:.3g}; {_advice(folder)}"
        )


def _advice(folder: str) -> str:
    path = checkpoint.newest_path(folder)
    good = f"the last good checkpoint is {storage.redact(path)}" if path else "there is no checkpoint yet"
    return f"lower `lr` or lengthen `warmup` ({good})"


@contextlib.contextmanager
def termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets (not under Ray Train: outside the main thread no handler can be set)."""
    stopping, owner = threading.Event(), os.getpid()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a forked loader process inherited this: end as if it had not
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        stopping.set()

    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield stopping
    finally:
        signal.signal(signal.SIGTERM, before)
