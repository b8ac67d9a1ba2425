"""Chooses the number format of training: by name, by what the device has, or by a measurement that is kept.

<stage folder>/precision.json   {"precision": "bfloat16", "seconds": {"float32": 0.41, "bfloat16": 0.29}}
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from models.measure import alternate
from models.memory_format import channels_last
from models.precision import has_bfloat16, is_bfloat16_fast
from pipeline import storage
from pipeline.cluster.world import World
from pipeline.errors import ConfigError
from pipeline.train.spec import TrainSpec
from pipeline.weights import build_model

RECORD = "precision.json"
NAMES = ("auto", "fastest", "float32", "bfloat16")
PIXELS = 8 * 224 * 224
"""Of the batch that is timed: enough to keep a device busy, seconds on a laptop."""
ROUNDS = 3

log = logging.getLogger(__name__)


def choose_precision(spec: TrainSpec, world: World) -> torch.dtype:
    """`auto`: bfloat16 where the GPU has it, else float32; `fastest`: what trained this network faster at the stage's
    first start; or one of them by name. Every worker calls it. ConfigError: there is no such name."""
    name = spec.settings.precision
    if name not in NAMES:
        raise ConfigError(f"precision is '{name}'; allowed are {', '.join(NAMES)}")
    if name == "fastest":
        return torch.bfloat16 if world.agree(int(world.main and _bfloat16_won(spec, world))) else torch.float32
    if name == "bfloat16" and not is_bfloat16_fast(world.device) and world.main:
        log.warning(
            "precision is bfloat16, which this %s only emulates, many times slower than float32; "
            "precision: fastest takes it only where it is fast",
            "GPU" if world.device.type == "cuda" else "CPU",
        )
    takes_bfloat16 = name == "bfloat16" or (name == "auto" and has_bfloat16(world.device))
    return torch.bfloat16 if takes_bfloat16 else torch.float32


def _bfloat16_won(spec: TrainSpec, world: World) -> bool:
    """By the record in the stage's folder, which a first start writes: a run that is resumed, on whatever machine, goes
    on in the numbers that it began with."""
    path = storage.join(spec.folder, RECORD)
    if not storage.exists(path):
        seconds = {name: time for name, time in measure(spec, world.device).items() if time != math.inf}
        winner = min(seconds, key=seconds.__getitem__, default="float32")
        storage.write_record(path, {"precision": winner, "seconds": seconds})
    found: bool = storage.read_record(path).get("precision") == "bfloat16"
    return found


def measure(spec: TrainSpec, device: torch.device) -> dict[str, float]:
    """Seconds that forward and backward of the same images take in each format, medians of alternating turns."""
    torch.manual_seed(spec.seed)
    size = spec.settings.resolution
    model = build_model(spec.settings.model, spec.classes, spec.overrides)
    model = (channels_last(model) if spec.channels_last else model).to(device).train()
    number = max(2, min(spec.images_per_step, PIXELS // size**2))
    layout = torch.channels_last if spec.channels_last else torch.contiguous_format
    images = torch.randn(number, 3, size, size, device=device).contiguous(memory_format=layout)
    labels = torch.arange(number, device=device) % spec.classes

    def step_in(dtype: torch.dtype) -> Callable[[], Any]:
        def step() -> None:
            model.zero_grad()
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                logits = model(images)
            F.cross_entropy(logits.float(), labels).backward()

        return step

    steps = {"float32": step_in(torch.float32), "bfloat16": step_in(torch.bfloat16)}
    return alternate(steps, rounds=ROUNDS, device=device)
