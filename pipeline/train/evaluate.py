"""Accuracy on labelled shards: every image exactly once, on any number of workers."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import torch
from torch import nn

from pipeline import storage
from pipeline.data import images, shards
from pipeline.data.cache import Cache
from pipeline.data.loader import TrainingShard
from pipeline.data.order import share
from pipeline.train.dist import World
from pipeline.train.loss import cross_entropy

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
    cache: Cache | None = None


@dataclass
class Memory:
    """The decoded batches of one evaluation set, kept between evaluations of it where they are few enough."""

    batches: list[Decoded] | None = None


@torch.inference_mode()
def accuracy(
    model: nn.Module,
    validation: Sequence[TrainingShard],
    view: images.View,
    batch: int,
    world: World,
    *,
    precision: torch.dtype = torch.float32,
    memory: Memory | None = None,
) -> dict[str, float]:
    """Measure `model`, on `world.device`, in eval mode: fractions `top1` and `top5`, mean cross-entropy
    `loss`, and the `count` of images; `bad` more were left out because they cannot be decoded.

    Every worker calls it, reads its share of the images, and gets the same sums.
    """
    training = model.training
    model.eval()
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)  # count, top1, top5, loss, bad
    for pixels, labels, bad in _batches(validation, view, batch, world, memory or Memory()):
        sums[4] += bad
        if len(labels) == 0:
            continue
        labels = labels.to(world.device, non_blocking=True)
        inputs = images.normalise(pixels.to(world.device, non_blocking=True), view, precision)
        with torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
            logits = model(inputs.contiguous(memory_format=torch.channels_last)).float()
        targets = nn.functional.one_hot(labels, logits.shape[1]).float()
        hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        sums[0] += len(labels)
        sums[1] += hits[:, 0].sum()
        sums[2] += hits.any(dim=1).sum()
        sums[3] += cross_entropy(logits, targets).double().sum()
    model.train(training)
    count, top1, top5, loss, bad = world.sum(sums).tolist()
    seen = max(count, 1)
    return {
        "top1": top1 / seen,
        "top5": top5 / seen,
        "loss": loss / seen,
        "count": int(count),
        "bad": int(bad),
    }


def read_index(validation: Sequence[TrainingShard]) -> list[Labelled]:
    """Every image of the shards, in order, from their index files."""
    found: list[Labelled] = []
    for shard in validation:
        with storage.open_read(shard.rows) as file:
            rows = pq.read_table(file, columns=["key", "offset", "size", "label"]).to_pydict()
        found += [
            Labelled(shard.path, key, offset, size, label, shard.cache)
            for key, offset, size, label in zip(*rows.values(), strict=True)
        ]
    return found


def _batches(
    validation: Sequence[TrainingShard], view: images.View, batch: int, world: World, memory: Memory
) -> Iterator[Decoded]:
    if memory.batches is not None:
        yield from memory.batches
        return
    samples = read_index(validation)
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
        return images.load(shards.read_at(sample.path, sample.offset, sample.size, sample.cache), view), sample.label
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
