"""Test the teacher and every student: accuracy on the test shards, and inference speed side by side.

    evaluate-1a2b3c4d/evaluate.json   {"images", "models": [{"stage", "dir", "model", "size", "top1", "top5", "loss", "ece",
                                       "count", "bad", "per_class": {"images", "right"}, "sizes": [{"size", "top1", …}, …],
                                       "raw": {"top1", …}, "parameters", "images_per_second", "batch", "device", "dtype"}, …]}

`sizes` are the further ones of `evaluate.sizes`; `raw`, with `evaluate.raw`, is what the weights of the same step reach
themselves, where the model is their moving average. A shard is tested by one worker, which adds up what it counts: every image counts once
however many workers there are. The test shards are read here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.measure import alternate, device_name, if_it_fits
from models.memory_format import channels_last
from models.precision import has_bfloat16
from pipeline import storage, weights
from pipeline.errors import DataError
from pipeline.loading.loader import TrainingShard
from pipeline.plan.context import Context, Result
from pipeline.plan.graph import EVALUATION
from pipeline.progress import percent
from pipeline.stages.audit import SMALL_BYTES
from pipeline.stages.sizes import check_further_sizes
from pipeline.stages.train import indexed_shards
from pipeline.train import checkpoint
from pipeline.train.dist import World, join
from pipeline.train.evaluate import score
from pipeline.train.scores import Scores

ROUNDS = 5
SHOWN = ("top1", "top5", "loss", "ece")  # of a further size, and of raw weights
Figures = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One model at one image size. `raw`: the weights to test in place of the model's."""

    stage: str
    folder: str
    size: int
    raw: str | None = None

    def __str__(self) -> str:
        return f"{self.stage}{', raw weights,' if self.raw else ''} at {self.size} pixels"


def run(context: Context) -> Result:
    settings = context.job.evaluate
    trained = {name: done.folder for name, done in context.needs.items() if name != "index"}
    trials = {name: _trials(context, name, folder) for name, folder in trained.items()}
    with context.journal() as log:
        figures = _test(context, [trial for several in trials.values() for trial in several], log.log)
        # All in one worker and one after another: figures of speed are worth something only side by side.
        measure = functools.partial(_speed_worker, settings.batch, settings.speed_seconds)
        [speed] = context.map(measure, [("speed", list(trained.values()))], workers=1)
        if speed.value is None:
            raise DataError(f"cannot measure the models' speed: {speed.error}")
    models = [
        {"stage": name, "dir": folder, **_row(trials[name], figures), **measured}
        for (name, folder), measured in zip(trained.items(), speed.value, strict=True)
    ]
    bad, count = models[0]["bad"], models[0]["count"] + models[0]["bad"]
    if bad > context.job.data.max_bad_fraction * count:
        raise DataError(
            f"{bad} of {count} test images cannot be decoded, more than data.max_bad_fraction "
            f"{context.job.data.max_bad_fraction} allows; restore the test shards"
        )
    storage.write_json(storage.join(context.folder, EVALUATION), {"images": count, "models": models})
    line = ", ".join(f"{model['stage']} {percent(model['top1'])}" for model in models)
    return Result({"line": f"test top-1: {line}"}, metrics=_metrics(models), artifacts=[EVALUATION])


def _trials(context: Context, stage: str, folder: str) -> list[Trial]:
    """A model at its own size, its raw weights, and the further sizes."""
    settings, own = context.job.evaluate, weights.read_card(folder).size
    trials = [Trial(stage, folder, own)]
    result = checkpoint.read_result(folder) if settings.raw else None  # weights from elsewhere come without one
    if result:
        step = result.get("best_step", result["step"])
        trials.append(Trial(stage, folder, own, checkpoint.raw_weights(folder, step)))
    return trials + [Trial(stage, folder, size) for size in sorted({*settings.sizes} - {own})]


def _test(context: Context, trials: Sequence[Trial], progress: Callable[[int, int], None]) -> dict[Trial, Figures]:
    """What `Scores.figures` says of each trial on all test shards."""
    shards = list(zip(context.sources["test"].shards, indexed_shards(context, "test"), strict=True))
    units = [(f"{trial}, {shard.name}", (trial, rows)) for trial in trials for shard, rows in shards]
    small = not context.job.workers.gpus and len(trials) * sum(shard.size for shard, _ in shards) <= SMALL_BYTES
    count = functools.partial(_counting_worker, context.job.evaluate.batch)
    counted: dict[str, list[float]] = {}
    for outcome in context.map(count, units, small=small):
        if outcome.value is None:
            raise DataError(f"cannot evaluate {outcome.name}: {outcome.error}")
        counted[outcome.name] = outcome.value
        progress(len(counted), len(units))
    found = {trial: Scores(len(context.sources.classes)) for trial in trials}
    for name, (trial, _) in units:  # in one order, for the last digits depend on it
        found[trial].sums += torch.tensor(counted[name], dtype=torch.float64)
    return {trial: scores.figures() for trial, scores in found.items()}


def _row(trials: Sequence[Trial], figures: Mapping[Trial, Figures]) -> Figures:
    """What is said of one model, whose own trial comes first."""
    own, *others = trials
    card = weights.read_card(own.folder)
    row = {"model": card.architecture, "size": own.size, **figures[own], "sizes": []}
    for trial in others:
        some = {name: figures[trial][name] for name in SHOWN}
        if trial.raw:
            row["raw"] = some
        else:
            row["sizes"].append({"size": trial.size, **some})
    return row


def _metrics(models: Sequence[Figures]) -> dict[str, float]:
    found: dict[str, float] = {}
    for model in models:
        stage = model["stage"]
        numbers = ("top1", "top5", "ece", "images_per_second", "parameters")
        found |= {f"{stage}/{key}": float(model[key]) for key in numbers}
        found |= {f"{stage}/top1_at_{other['size']}": other["top1"] for other in model["sizes"]}
        if "raw" in model:
            found[f"{stage}/raw_top1"] = model["raw"]["top1"]
    return found


def _counting_worker(batch: int) -> Callable[[tuple[Trial, TrainingShard]], list[float]]:
    """The function that shows a shard to a model, and gives `Scores.sums`."""
    load = functools.lru_cache(maxsize=1)(_load)

    def count(unit: tuple[Trial, TrainingShard]) -> list[float]:
        trial, shard = unit
        with join() as world:
            alone = World(0, 1, world.device)
            model, card = load(trial, alone.device)
            view = dataclasses.replace(card.view(), size=trial.size)
            images = max(1, int(batch * min(1.0, (card.size / trial.size) ** 2)))  # a larger size in no more memory
            test = functools.partial(score, model, [shard], view, images, alone, classes=len(card.classes))
            scores = if_it_fits(test, None, alone.device)
        if scores is None:
            raise DataError(f"evaluate.batch {batch} does not fit in memory; lower it")
        sums: list[float] = scores.sums.tolist()
        return sums

    return count


def _load(trial: Trial, device: torch.device) -> tuple[nn.Module, weights.Card]:
    model, card = weights.load_model(trial.folder)
    if trial.raw:
        weights.load_state(model, weights.read_state(trial.raw), trial.raw)
    model = channels_last(model.to(device))
    if trial.size != card.size:
        check_further_sizes(model, card.architecture, [trial.size])
    return model, card


def _speed_worker(batch: int, seconds: float) -> Callable[[Sequence[str]], list[dict[str, Any]]]:
    def measure(folders: Sequence[str]) -> list[dict[str, Any]]:
        """Inference images/s of each model at its own size: medians over alternating rounds."""
        with join() as world:
            device = world.device
            dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
            models = {folder: weights.load_model(folder) for folder in folders}
            steps = {folder: _step(*models[folder], batch, device, dtype) for folder in folders}
            found = alternate(steps, rounds=ROUNDS, seconds=seconds / ROUNDS, device=device)
        for folder, time in found.items():
            if time == math.inf:
                raise DataError(f"evaluate.batch {batch} does not fit in memory with {folder}; lower it")
        facts = {"batch": batch, "device": device_name(device), "dtype": str(dtype).removeprefix("torch.")}
        return [
            {
                "parameters": weights.parameter_count(models[folder][0]),
                "images_per_second": batch / found[folder],
                **facts,
            }
            for folder in folders
        ]

    return measure


def _step(
    model: nn.Module, card: weights.Card, batch: int, device: torch.device, dtype: torch.dtype
) -> Callable[[], object]:
    """Inference of one batch."""
    model = channels_last(model.to(device))
    images = torch.randn(batch, 3, card.size, card.size, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> object:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(images)

    return step
