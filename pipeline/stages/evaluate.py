"""Test the teacher and every student: accuracy on the test shards, and inference speed side by side.

    evaluate-1a2b3c4d/evaluate.json   {"images", "models": [{"stage", "dir", "model", "top1", "top5", "loss", "count", "bad",
                                       "parameters", "size", "images_per_second", "batch", "device", "dtype"}, …]}

The test shards are read here and nowhere else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from models.measure import alternate, device_name
from pipeline import storage, weights
from pipeline.data.loader import TrainingShard
from pipeline.errors import DataError
from pipeline.plan import EVALUATION
from pipeline.screen import percent
from pipeline.stages.context import Context, Result
from pipeline.stages.train import indexed_shards
from pipeline.train.dist import join
from pipeline.train.evaluate import accuracy

ROUNDS = 5


@dataclass(frozen=True)
class Test:
    """What one evaluation worker needs."""

    shards: tuple[TrainingShard, ...]
    batch: int
    seconds: float


def run(context: Context) -> Result:
    settings = context.job.evaluate
    trained = [name for name in context.needs if name != "index"]
    test = Test(tuple(indexed_shards(context, "test")), settings.batch, settings.speed_seconds)
    units: list[tuple[str, Any]] = [(name, context.needs[name].folder) for name in trained]
    measured: dict[str, dict[str, Any]] = {}
    with context.journal() as log:
        for outcome in context.map(functools.partial(_accuracy_worker, test), units):
            if outcome.value is None:
                raise DataError(f"cannot evaluate {outcome.name}: {outcome.error}")
            measured[outcome.name] = outcome.value
            log.log(len(measured), len(units) + 1, stage=outcome.name, top1=outcome.value["top1"])
        # All in one worker and one after another: figures of speed are worth something only side by side.
        [speed] = context.map(
            functools.partial(_speed_worker, test), [("speed", [folder for _, folder in units])], workers=1
        )
        if speed.value is None:
            raise DataError(f"cannot measure the models' speed: {speed.error}")
        log.log(len(units) + 1, len(units) + 1)
    models = [
        {"stage": name, "dir": context.needs[name].folder, **measured[name], **speed.value[number]}
        for number, name in enumerate(trained)
    ]
    bad, count = models[0]["bad"], models[0]["count"] + models[0]["bad"]
    if bad > context.job.data.max_bad_fraction * count:
        raise DataError(
            f"{bad} of {count} test images cannot be decoded, more than data.max_bad_fraction "
            f"{context.job.data.max_bad_fraction} allows; restore the test shards"
        )
    storage.write_json(storage.join(context.folder, EVALUATION), {"images": count, "models": models})
    line = ", ".join(f"{model['stage']} {percent(model['top1'])}" for model in models)
    metrics = {
        f"{model['stage']}/{key}": float(model[key])
        for model in models
        for key in ("top1", "top5", "images_per_second", "parameters")
    }
    return Result({"line": f"test top-1: {line}"}, metrics=metrics, artifacts=[EVALUATION])


def _accuracy_worker(test: Test) -> Callable[[str], dict[str, Any]]:
    def evaluate(folder: str) -> dict[str, Any]:
        with join() as world:
            model, card = weights.load_model(folder)
            model = model.to(world.device).to(memory_format=torch.channels_last)
            found = accuracy(model, test.shards, card.view(), test.batch, world)
        return {"model": card.architecture, **found, "parameters": weights.parameter_count(model), "size": card.size}

    return evaluate


def _speed_worker(test: Test) -> Callable[[Sequence[str]], list[dict[str, Any]]]:
    def measure(folders: Sequence[str]) -> list[dict[str, Any]]:
        """Inference images/s of each model at its own size: medians over alternating rounds."""
        with join() as world:
            device = world.device
            dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
            steps = {folder: _step(folder, test.batch, device, dtype) for folder in folders}
            seconds = alternate(steps, rounds=ROUNDS, seconds=test.seconds / ROUNDS, device=device)
        for folder, found in seconds.items():
            if found == math.inf:
                raise DataError(f"evaluate.batch {test.batch} does not fit in memory with {folder}; lower it")
        facts = {"batch": test.batch, "device": device_name(device), "dtype": str(dtype).removeprefix("torch.")}
        return [{"images_per_second": test.batch / seconds[folder], **facts} for folder in folders]

    return measure


def _step(folder: str, batch: int, device: torch.device, dtype: torch.dtype) -> Callable[[], object]:
    """Inference of one batch with the model of a stage folder."""
    model, card = weights.load_model(folder)
    model = model.to(device).to(memory_format=torch.channels_last)
    images = torch.randn(batch, 3, card.size, card.size, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> object:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(images)

    return step
