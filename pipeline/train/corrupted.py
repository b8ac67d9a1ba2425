"""Tests trained models on corrupted pictures: the workers of `robustness`."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn

from models.measure import if_it_fits
from models.memory_format import channels_last
from pipeline import storage, weights
from pipeline.cluster.world import join
from pipeline.corruption.corrupt import Canvas, canvas, corrupt
from pipeline.data import images, known_image
from pipeline.data.hashing import mix
from pipeline.errors import DataError
from pipeline.loading.training_rows import TrainingShard
from pipeline.train.evaluate import Labelled, read_index

log = logging.getLogger(__name__)
Unit = tuple[str | None, TrainingShard]
"""A corruption (None: none) and a shard."""


@dataclass(frozen=True)
class Counted:
    """Of some pictures: `wrong`, answers by severity and model, int64 [s, m]; `images`; `bad`, which no one decodes."""

    wrong: np.ndarray
    images: int
    bad: int


def draw(hashes: np.ndarray) -> np.ndarray:
    """Numbers uint64 by which images are drawn, from the hashes of their bytes: those with the lowest ones."""
    return mix(hashes.astype(np.uint64))


def corrupted_worker(
    batch: int, folders: Sequence[str], severities: Sequence[int], limit: int | None = None
) -> Callable[[Unit], Counted]:
    """The function that shows the pictures of a shard, corrupted in one way, to the models in some folders; `limit`:
    the greatest number of `draw` that takes part."""
    load = functools.lru_cache(maxsize=1)(_load)

    def count(unit: Unit) -> Counted:
        name, shard = unit
        with join() as world:
            models = load(tuple(folders), world.device)
            samples = read_index([shard])
            if limit is not None:
                numbers = draw(np.array([sample.known.image_hash for sample in samples], np.uint64))
                samples = [sample for sample, number in zip(samples, numbers.tolist(), strict=True) if number <= limit]
            strengths = severities if name else [0]
            wrong, bad = np.zeros((len(strengths), len(models)), np.int64), 0
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                for start in range(0, len(samples), batch):
                    some = samples[start : start + batch]
                    read = [(one, pixels) for one, pixels in zip(some, pool.map(_read, some), strict=True)]
                    good = [(one, pixels) for one, pixels in read if pixels is not None]
                    bad += len(read) - len(good)
                    for place, severity in enumerate(strengths if good else ()):
                        spoil = functools.partial(_spoil, name, severity)
                        wrong[place] += _wrong(models, list(pool.map(spoil, good)), [one for one, _ in good], pool)
        return Counted(wrong, len(samples) - bad, bad)

    return count


def _read(sample: Labelled) -> Canvas | None:
    try:
        data = known_image.read(
            sample.path, sample.offset, sample.size, sample.known, f"image '{sample.key}'", sample.cache
        )
        return canvas(images.decode(data))
    except images.BadImage as error:
        log.warning("left out of the test: %s of %s (%s)", sample.key, storage.redact(sample.path), error)
        return None


def _spoil(name: str | None, severity: int, image: tuple[Labelled, Canvas]) -> Image.Image:
    sample, pixels = image
    return Image.fromarray(corrupt(pixels, name, severity, sample.known.image_hash) if name else pixels)


Models = list[tuple[nn.Module, images.View, torch.device]]


def _wrong(
    models: Models, pictures: list[Image.Image], samples: Sequence[Labelled], pool: ThreadPoolExecutor
) -> np.ndarray:
    """How many of the pictures each model takes for another class, int64 [m]."""
    truth = torch.tensor([sample.label for sample in samples])
    seen: dict[images.View, torch.Tensor] = {}
    found = []
    for model, view, device in models:
        if view not in seen:
            arrays = list(pool.map(functools.partial(images.to_array, view=view), pictures))
            seen[view] = torch.from_numpy(np.stack(arrays))
        with torch.inference_mode():
            inputs = images.normalise(seen[view].to(device), view).contiguous(memory_format=torch.channels_last)
            answers = if_it_fits(functools.partial(model, inputs), None, device)
        if answers is None:
            raise DataError(f"evaluate.batch {len(pictures)} does not fit in memory; lower it")
        found.append(int((answers.argmax(dim=1).cpu() != truth).sum()))
    return np.array(found, np.int64)


def _load(folders: Sequence[str], device: torch.device) -> Models:
    found: Models = []
    for folder in folders:
        model, card = weights.load_model(folder)
        found.append((channels_last(model.to(device)).eval(), card.view(), device))
    return found
