"""Test the teacher and every student: accuracy on the test shards, and inference speed side by side.

    evaluate-1a2b3c4d/evaluate.json   {"images", "models": [{"stage", "dir", "model", "top1", "top5", "loss", "count", "bad",
                                       "parameters", "size", "images_per_second", "batch", "device", "dtype"}, …]}

The test shards are read here and nowhere else.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import storage, weights
from pipeline.data.loader import TrainingShard
from pipeline.errors import DataError
from pipeline.screen import percent
from pipeline.stages.context import Context, Result
from pipeline.stages.train import indexed_shards
from pipeline.train.dist import join
from pipeline.train.evaluate import accuracy

EVALUATION = "evaluate.json"
ROUNDS = 5  # models take turns, so that a busy moment of the machine does not fall on one of them


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
        with join() as world, torch.inference_mode():
            device = world.device
            dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
            loaded = []
            for folder in folders:
                model, card = weights.load_model(folder)
                images = torch.randn(test.batch, 3, card.size, card.size, device=device)
                loaded.append(
                    (
                        model.to(device).to(memory_format=torch.channels_last),
                        images.contiguous(memory_format=torch.channels_last),
                    )
                )
            rates: list[list[float]] = [[] for _ in loaded]
            for turn in range(ROUNDS + 1):
                for number, (model, images) in enumerate(loaded):
                    rate = _rate(model, images, dtype, test.seconds / ROUNDS)
                    if turn:  # the first round warms up
                        rates[number].append(rate)
            facts = {"batch": test.batch, "device": _device_name(device), "dtype": str(dtype).removeprefix("torch.")}
            return [{"images_per_second": statistics.median(found), **facts} for found in rates]

    return measure


def _rate(model: torch.nn.Module, images: torch.Tensor, dtype: torch.dtype, seconds: float) -> float:
    done, start = 0, time.perf_counter()
    while not done or time.perf_counter() - start < seconds:
        with torch.autocast(images.device.type, dtype, enabled=dtype != torch.float32):
            model(images)
        if images.is_cuda:
            torch.cuda.synchronize()
        done += len(images)
    return done / (time.perf_counter() - start)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
