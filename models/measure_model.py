"""Measures image classifiers side by side: inference, training and latency, in rounds where all take turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from models.measure import Step, alternate, best_batch, if_it_fits, most_that_fits, peak_bytes, rate_at, wait
from models.memory_format import channels_last

CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to measure. Memory is always channels-last; a `dtype` other than float32 uses autocast."""

    device: torch.device
    dtype: torch.dtype = torch.float32
    compile: str | None = None
    """None for eager, or a mode of torch.compile; "reduce-overhead" adds CUDA graphs."""
    batch: int | None = None
    """Images in a batch; with None, `best_batch` finds one for each model and use."""
    most: int = 256
    """The largest batch to try."""
    rounds: int = 7
    seconds: float = 0.5
    """Length of a turn, which takes at least one step."""
    memory: int | None = None
    """Bytes that a step may take, see `most_that_fits`; None sets no limit."""


@dataclass(frozen=True)
class Use:
    """The speed and memory of inference or training at a batch.

    `images_per_second` and `peak_bytes` (in eager mode, beyond weights and optimiser state) are None if `batch` images
    do not fit.
    """

    batch: int
    images_per_second: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Figures:
    """The figures of a model; `latency` is the seconds from call to result for one image, None if it does not fit."""

    inference: Use
    training: Use
    latency: float | None


def measure_models(
    models: Mapping[str, tuple[nn.Module, int]],
    setup: Setup,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Figures]:
    """Measures every (classifier of 1,000 classes, image size).

    A training step is forward, cross-entropy, backward and SGD with momentum. Its learning rate is 0, so that numbers
    stay finite however long it runs. Batches are found in eager mode. All models stay on the device throughout.
    """
    steps, done = 2 * len(models) + 3, 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(done, steps)

    if setup.compile:
        # Models of one class share a cache of compiled code, and each model is compiled for three steps.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(models))
    subjects = {name: _Subject(model, size, setup) for name, (model, size) in models.items()}
    inference = _measure_use(subjects, setup, False, tick)
    singles = {name: subjects[name].one_image() for name, use in inference.items() if use.peak_bytes is not None}
    latencies = alternate(singles, rounds=setup.rounds, seconds=setup.seconds, device=setup.device)
    tick()
    training = _measure_use(subjects, setup, True, tick)
    return {name: Figures(inference[name], training[name], _finite(latencies.get(name))) for name in models}


def _measure_use(
    subjects: Mapping[str, _Subject], setup: Setup, training: bool, tick: Callable[[], None]
) -> dict[str, Use]:
    """Measures one use of all models: first the batch and memory of each, then all take turns."""
    uses, steps = {}, {}
    for name, subject in subjects.items():
        use = uses[name] = subject.trial(training)
        if use.peak_bytes is not None:
            steps[name] = subject.step(use.batch, training, subject.compiled)
        tick()
    times = alternate(steps, rounds=setup.rounds, seconds=setup.seconds, device=setup.device)
    tick()
    return {
        name: replace(use, images_per_second=use.batch / seconds) if (seconds := _finite(times.get(name))) else use
        for name, use in uses.items()
    }


class _Subject:
    """A model on the device, with its steps."""

    def __init__(self, model: nn.Module, size: int, setup: Setup) -> None:
        self.setup, self.size = setup, size
        self.model = channels_last(model.to(setup.device))
        self.compiled = torch.compile(self.model, mode=setup.compile, dynamic=False) if setup.compile else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0, momentum=0.9)

    def trial(self, training: bool) -> Use:
        """Finds the batch and the peak memory at that batch."""
        setup, device = self.setup, self.setup.device

        def make(batch: int) -> Step:
            return self.step(batch, training, self.model)

        def rate(batch: int) -> float:
            return rate_at(make, batch, seconds=setup.seconds, device=device)

        def peak() -> int:
            step = make(batch)
            step()  # the first step makes the optimiser's state
            return peak_bytes(step, device)

        first = 2 if training else 1  # batch norm cannot train on one value
        room = math.inf if setup.memory is None else most_that_fits(make, setup.memory, first=first, device=device)
        most = min(setup.most, room)
        batch = setup.batch or best_batch(rate, first=first, most=most)
        if not 0 < batch <= room:
            return Use(max(batch, first))
        return Use(batch, None, if_it_fits(peak, None, device))

    def step(self, batch: int, training: bool, model: Callable[..., torch.Tensor]) -> Step:
        """Returns a step of `model`, eager or compiled, on `batch` random images, and sets the mode that it needs."""
        setup, optimizer = self.setup, self.optimizer
        self.model.train(training)
        images = torch.randn(batch, 3, self.size, self.size, device=setup.device)
        images = images.contiguous(memory_format=torch.channels_last)
        labels = torch.randint(CLASSES, (batch,), device=setup.device)
        autocast = torch.autocast(setup.device.type, setup.dtype, enabled=setup.dtype != torch.float32)

        def infer() -> object:
            with torch.inference_mode(), autocast:
                return model(images)

        def train() -> None:
            with autocast:
                loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()  # so that a model holds no gradients while it waits for its turn

        return train if training else infer

    def one_image(self) -> Step:
        """Returns a step that infers one image and waits for the result."""
        step, device = self.step(1, False, self.compiled), self.setup.device

        def infer_and_wait() -> None:
            step()
            wait(device)

        return infer_and_wait


def _finite(seconds: float | None) -> float | None:
    return None if seconds is None or seconds == math.inf else seconds
