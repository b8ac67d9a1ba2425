"""Training by timm: its dataset, transform, loader, optimizer, EMA and the loop of its train.py, as it is run on one
device.

What train.py does besides is left out, to its advantage: validation, the scheduler's arithmetic, checkpoints, the log.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.models import create_model
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor

from models.measure import wait
from models.memory_format import channels_last
from pipeline.augment.view import Augment

BEFORE = 10  # steps that do not count: clocks rise, kernels are chosen, graphs compiled


def timm_loop(
    name: str,
    files: Path,
    augment: Augment,
    batch: int,
    classes: int,
    device: torch.device,
    *,
    workers: int,
    steps: int,
    compiled: bool,
) -> Callable[[], float]:
    """A call trains timm's model for `steps` steps and gives images/s; `files`: images in class folders."""
    on_gpu = device.type == "cuda"
    model = channels_last(create_model(name, num_classes=classes, drop_rate=0.2)).to(device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, momentum=0.9, weight_decay=4e-5)
    average = ModelEmaV3(model, decay=0.9999)
    network = torch.compile(model) if compiled else model
    loss_fn = LabelSmoothingCrossEntropy(0.1)
    loader = create_loader(
        create_dataset("", str(files), is_training=True), (3, augment.size, augment.size), batch, is_training=True,
        use_prefetcher=on_gpu, device=device, num_workers=workers, pin_memory=on_gpu, use_multi_epochs_loader=True,
        auto_augment=augment.policy, scale=augment.scale, ratio=augment.ratio, hflip=augment.flip,
        interpolation=augment.interpolation,
    )  # fmt: skip

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    def step(number: int, found: tuple[Tensor, Tensor]) -> Any:
        pixels, target = (tensor.to(device) for tensor in found)  # the prefetcher has brought them there
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            loss = loss_fn(network(pixels), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update(model, step=number)

    def turn() -> float:
        model.train()
        given = endless()
        for number in range(BEFORE):
            step(number, next(given))
        wait(device)
        start = time.perf_counter()
        for number in range(steps):
            step(number, next(given))
        wait(device)
        return steps * batch / (time.perf_counter() - start)

    return turn
