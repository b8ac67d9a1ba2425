"""Measures accuracy on labelled shards: every image exactly once, on any number of workers."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline import storage
from pipeline.cluster.world import World
from pipeline.data import images, known_image, parquet_files
from pipeline.errors import DataError
from pipeline.loading.loader import TrainingShard
from pipeline.loading.sample_order import share
from pipeline.storage.node_cache import Cache
from pipeline.train.scores import Scores

log = logging.getLogger(__name__)

AHEAD = 2  # batches being decoded while one is in the network
KEPT_BYTES = 512 << 20  # of decoded images, per worker, may stay in memory between validations

Decoded = tuple[torch.Tensor, torch.Tensor, int]  # uint8 [b,3,s,s], int64 [b], how many are bad


@dataclass(frozen=True)
class Labelled:
    """One image of an index file."""

    path: str
    key: str
    offset: int
    size: int
    label: int
    known: known_image.Known
    cache: Cache | None = None


@dataclass
class Memory:
    """The decoded batches of one evaluation set, kept between evaluations of it where they are few enough."""

    batches: list[Decoded] | None = None


@dataclass(frozen=True)
class Marks:
    """How answers are marked. `answers`: the classes that may be given, if not all; images of others are left out.
    `right`: the classes that are right for each image, in the order of the index; images with none are left out.
    None: all classes, and the label of the index alone."""

    answers: tuple[int, ...] | None = None
    right: Sequence[Sequence[int]] | None = None

    def samples(self, samples: list[Labelled]) -> list[Labelled]:
        """Those that take part, with what takes the place of their label: where it stands in `answers`, or the place of
        the image in `right`."""
        if self.answers is not None:
            place = {number: at for at, number in enumerate(self.answers)}
            return [replace(one, label=place[one.label]) for one in samples if one.label in place]
        if self.right is not None:
            pairs = enumerate(zip(samples, self.right, strict=True))
            return [replace(one, label=at) for at, (one, right) in pairs if right]
        return samples

    def table(self, places: torch.Tensor, classes: int) -> torch.Tensor:
        """Which classes are right, bool [b, classes], for the images at `places` [b] of `right`."""
        assert self.right is not None
        found = torch.zeros(len(places), classes, dtype=torch.bool)
        for row, place in enumerate(places.tolist()):
            found[row, list(self.right[place])] = True
        return found


BY_LABEL = Marks()


def accuracy(
    model: nn.Module,
    validation: Sequence[TrainingShard],
    view: images.View,
    batch: int,
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    memory: Memory | None = None,
    classes: int = 0,
) -> dict[str, Any]:
    """Measure `model`, on `world.device`, in eval mode: what `Scores.figures` says, by class too where the number of
    `classes` is given. Images that cannot be decoded are left out, counted and named in the log.

    Every worker calls it, reads its share of the images, and gets the same figures.
    """
    scores = score(model, validation, view, batch, world, precision=precision, memory=memory, classes=classes)
    world.sum(scores.sums)
    return scores.figures()


def score(
    model: nn.Module,
    validation: Sequence[TrainingShard],
    view: images.View,
    batch: int,
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    memory: Memory | None = None,
    classes: int = 0,
    marks: Marks = BY_LABEL,
) -> Scores:
    """What this worker counts of its share of the images; see `accuracy`. `marks` other than by label come without
    `memory` and `classes`."""
    scores = Scores(classes, world.device)
    modes = [(module, module.training) for module in model.modules()]  # a fine-tune has some of both
    model.eval()
    with torch.inference_mode():
        for pixels, labels, bad in _batches(validation, view, batch, world, memory or Memory(), marks):
            scores.add_bad(bad)
            if len(labels) == 0:
                continue
            inputs = images.normalise(pixels.to(world.device, non_blocking=True), view, precision)
            with torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
                logits = model(inputs.contiguous(memory_format=torch.channels_last)).float()
            if marks.answers is not None:
                logits = logits[:, list(marks.answers)]
            if marks.right is not None:
                labels = marks.table(labels, logits.shape[1])
            scores.add(logits, labels.to(world.device, non_blocking=True))
    for module, training in modes:
        module.training = training
    return scores


def read_index(validation: Sequence[TrainingShard]) -> list[Labelled]:
    """Every image of the shards, in order, from their index files."""
    found: list[Labelled] = []
    for shard in validation:
        columns = ["key", "offset", "size", "label", "image_hash"]
        rows = parquet_files.read_expected(shard.rows, columns, shard.expected, ["crc32"])
        for row in rows.to_pylist():
            known = known_image.Known(row.pop("image_hash"), row.pop("crc32", None))
            found.append(Labelled(path=shard.path, cache=shard.cache, known=known, **row))
    return found


def _batches(
    validation: Sequence[TrainingShard], view: images.View, batch: int, world: World, memory: Memory, marks: Marks
) -> Iterator[Decoded]:
    if memory.batches is not None:
        yield from memory.batches
        return
    samples = marks.samples(read_index(validation))
    samples = samples[share(len(samples), world.rank, world.size)]
    keep = len(samples) * 3 * view.size**2 <= KEPT_BYTES
    kept: list[Decoded] = []
    for decoded in _decode(samples, view, batch):
        if keep:
            kept.append(decoded)
        yield decoded
    if keep:
        memory.batches = kept


def _decode(samples: Sequence[Labelled], view: images.View, batch: int) -> Iterator[Decoded]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        waiting: deque[list[Future[tuple[np.ndarray, int] | None]]] = deque()
        for start in range(0, len(samples), batch):
            waiting.append([pool.submit(_read, sample, view) for sample in samples[start : start + batch]])
            if len(waiting) > AHEAD:
                yield _collate(waiting.popleft(), view)
        while waiting:
            yield _collate(waiting.popleft(), view)


def _read(sample: Labelled, view: images.View) -> tuple[np.ndarray, int] | None:
    try:
        data = known_image.read(
            sample.path, sample.offset, sample.size, sample.known, f"image '{sample.key}'", sample.cache
        )
        return images.load(data, view), sample.label
    except (FileNotFoundError, PermissionError) as error:
        raise DataError(
            f"cannot read {sample.key} of {storage.redact(sample.path)}, on which models are tested "
            f"({type(error).__name__}); bring the shard back or make it readable on every worker, and run again"
        ) from error
    except images.BadImage as error:
        log.warning("left out of the evaluation: %s of %s (%s)", sample.key, storage.redact(sample.path), error)
        return None


def _collate(futures: list[Future[tuple[np.ndarray, int] | None]], view: images.View) -> Decoded:
    pairs = [pair for future in futures if (pair := future.result()) is not None]
    if not pairs:
        return (
            torch.empty(0, 3, view.size, view.size, dtype=torch.uint8),
            torch.empty(0, dtype=torch.int64),
            len(futures),
        )
    pixels = torch.from_numpy(np.stack([array for array, _ in pairs]))
    return pixels, torch.tensor([label for _, label in pairs]), len(futures) - len(pairs)
