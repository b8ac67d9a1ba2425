"""Tries trained models on shards whose labels are known, and measures their speed: the workers of `evaluate`."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.measure import Step, device_name, if_it_fits, turns, wait
from models.memory_format import channels_last
from models.over_views import network_of
from models.precision import has_bfloat16
from pipeline import weights
from pipeline.cluster.world import World, join
from pipeline.errors import DataError
from pipeline.loading.training_rows import TrainingShard
from pipeline.train import machine_load
from pipeline.train.evaluate import Marks, score
from pipeline.train.input_size import check_further_sizes

ROUNDS = 5
Figures = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One model at one image size on the shards of one source. `raw`: the weights to test in place of the model's;
    `answers`: the classes that may be given, those of the entry `restricted` of `evaluate.sets`."""

    stage: str
    folder: str
    size: int
    source: str = "test"
    raw: str | None = None
    answers: tuple[int, ...] | None = None
    restricted: str = ""

    @property
    def by_class(self) -> bool:
        """Whether its answers are counted by class too."""
        return self.source == "test" and self.answers is None

    def __str__(self) -> str:
        on = "" if self.source == "test" else f" on {self.source}"
        on += f", of the classes of {self.restricted} alone" if self.source == "test" and self.restricted else ""
        return f"{self.stage}{', raw weights,' if self.raw else ''} at {self.size} pixels{on}"


Unit = tuple[Trial, TrainingShard, Sequence[Sequence[int]] | None]
"""What to show to a model, and the classes that are right for each image where they are several."""


def counting_worker(batch: int) -> Callable[[Unit], list[float]]:
    """The function that shows a shard to a model, and gives `Scores.sums`."""
    load = functools.lru_cache(maxsize=1)(_load)

    def count(unit: Unit) -> list[float]:
        trial, shard, right = unit
        with join() as world:
            alone = World(0, 1, world.device)
            model, card = load(trial, alone.device)
            view = dataclasses.replace(card.view(), size=trial.size)
            images = max(1, int(batch * min(1.0, (card.size / trial.size) ** 2)))  # a larger size in no more memory
            classes, marks = len(card.classes) if trial.by_class else 0, Marks(trial.answers, right)
            test = functools.partial(score, model, [shard], view, images, alone, classes=classes, marks=marks)
            scores = if_it_fits(test, None, alone.device)
        if scores is None:
            raise DataError(f"evaluate.batch {batch} does not fit in memory; lower it")
        sums: list[float] = scores.sums.tolist()
        return sums

    return count


def _load(trial: Trial, device: torch.device) -> tuple[nn.Module, weights.Card]:
    model, card = weights.load_model(trial.folder)
    if trial.raw:
        weights.load_state(network_of(model), weights.read_state(trial.raw), trial.raw)
    model = channels_last(model.to(device))
    if trial.size != card.size:
        check_further_sizes(network_of(model), card.architecture, [trial.size])
    return model, card


def speed_worker(batch: int, seconds: float) -> Callable[[Sequence[str]], tuple[list[Figures], Figures]]:
    """The function that measures the models in some folders."""

    def measure(folders: Sequence[str]) -> tuple[list[Figures], Figures]:
        """Inference images/s of each model at its own size, medians over alternating rounds, with the slowest and the
        fastest of them, and milliseconds from call to result for one image; and how busy others kept the machine
        meanwhile (`machine_load.since`; `threads`: cores that the measuring asked for)."""
        with join() as world:
            device = world.device
            dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
            models = {folder: weights.load_model(folder) for folder in folders}
            steps = {folder: _step(*models[folder], batch, device, dtype) for folder in folders}
            before = machine_load.now()
            found = turns(steps, rounds=ROUNDS, seconds=seconds / ROUNDS, device=device)
            single = {folder: _waiting(_step(*models[folder], 1, device, dtype), device) for folder in folders}
            latency = turns(single, rounds=ROUNDS, seconds=seconds / ROUNDS, device=device)
            load = machine_load.since(before)
        for folder, times in found.items():
            if math.inf in times:
                raise DataError(f"evaluate.batch {batch} does not fit in memory with {folder}; lower it")
        facts = {"batch": batch, "device": device_name(device), "dtype": str(dtype).removeprefix("torch.")}
        measured = [
            {
                "parameters": weights.parameter_count(models[folder][0]),
                "images_per_second": _rounded(batch / statistics.median(found[folder])),
                "slowest_round": _rounded(batch / max(found[folder])),
                "fastest_round": _rounded(batch / min(found[folder])),
                "latency_ms": _rounded(1000 * statistics.median(latency[folder])),
                **facts,
            }
            for folder in folders
        ]
        return measured, load | {"threads": torch.get_num_threads() if device.type == "cpu" else 1}

    return measure


def _rounded(measured: float) -> float:
    """As many digits as a time can have."""
    return float(f"{measured:.6g}")


def _step(model: nn.Module, card: weights.Card, batch: int, device: torch.device, dtype: torch.dtype) -> Step:
    """Inference of one batch."""
    model = channels_last(model.to(device))
    images = torch.randn(batch, 3, card.size, card.size, device=device).contiguous(memory_format=torch.channels_last)

    def step() -> object:
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(images)

    return step


def _waiting(step: Step, device: torch.device) -> Step:
    """A step that ends when its result is there."""

    def one() -> None:
        step()
        wait(device)

    return one
