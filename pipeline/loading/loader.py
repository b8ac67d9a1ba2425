"""Loads batches for one rank: the order's samples, read by (shard, offset, size), decoded, augmented, as uint8.

A batch is a pure function of (sources, augment, seed, step, rank, world): `TrainingData[step]`, a map-style data set
over global steps, without memory that matters. `batches` runs it ahead of training in worker processes. The process
that calls it keeps its random generators as they are, also with `workers=0`.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from pipeline import storage
from pipeline.augment import randaugment
from pipeline.augment.view import Augment, seeded_view, undisturbed, view_and_operations
from pipeline.data import images
from pipeline.data.jpeg import Jpeg, open_image
from pipeline.errors import DataError, RemoteError
from pipeline.loading import prefetch, sample_order
from pipeline.loading.ahead import ahead
from pipeline.loading.packed_batch import Kind, Packed, allocate
from pipeline.loading.targets import SoftTargets
from pipeline.loading.training_rows import TrainingRows, TrainingShard, load_rows
from pipeline.loading.upcoming_shards import segments_read

ROWS_BYTES = 256 << 20  # columns of shards kept in memory, per process, beyond those that are read at a time
KEPT_BYTES = 256 << 20  # decoded small images kept in memory, per process
KEPT_PIXELS = 128 * 128  # a larger image is not kept: few would fit
SOURCE_CODES = {"labelled": 0, "pseudo": 1}


@dataclass(frozen=True)
class TrainingSource:
    """`per_step` images of this source make up each global step; name: `labelled` or `pseudo`."""

    name: str
    shards: tuple[TrainingShard, ...]
    per_step: int
    segments: int = sample_order.SEGMENTS
    window: int = 8


class TrainingData(Dataset):
    """data[step] is this rank's part of a global step; see `batches` for what it holds."""

    def __init__(
        self,
        sources: Sequence[TrainingSource],
        *,
        augment: Augment,
        classes: int,
        soft: SoftTargets,
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.sources, self.augment, self.classes, self.soft = tuple(sources), augment, classes, soft
        self.seed, self.rank, self.world = seed, rank, world
        self.orders = [
            sample_order.Source(
                source.name,
                np.array([shard.count for shard in source.shards], np.int64),
                seed,
                source.segments,
                source.window,
            )
            for source in sources
        ]
        self._rows: OrderedDict[tuple[int, int], TrainingRows] = OrderedDict()
        self._rows_bytes = 0
        self._read_at_once = sum(
            min(len(source.shards), self._segments(source, ordered) * source.window)
            for source, ordered in zip(self.sources, self.orders, strict=True)
        )
        self._kept: dict[tuple[int, int, int], Image.Image] = {}
        self._kept_bytes = 0

    def _segments(self, source: TrainingSource, ordered: sample_order.Source) -> int:
        """How many segments this rank reads, whatever the step: the more ranks, the fewer."""
        part = sample_order.share(source.per_step, self.rank, self.world)
        return len(segments_read(ordered, 0, source.per_step, part))

    def samples(self, step: int) -> list[tuple[sample_order.Batch, np.ndarray]]:
        """Of every source, this rank's samples of a step and their augmentation seeds uint64 [b]."""
        found = []
        for source, ordered in zip(self.sources, self.orders, strict=True):
            part = sample_order.share(source.per_step, self.rank, self.world)
            batch = sample_order.batch(ordered, step, source.per_step, part)
            found.append((batch, sample_order.sample_seed(self.seed, source.name, batch.epoch, batch.position)))
        return found

    def __getitem__(self, step: int) -> dict[str, Any]:
        return unpacked(self.pack(step))

    def pack(self, step: int) -> Packed:
        """`data[step]` in one piece of memory."""
        samples = self.samples(step)
        packed = allocate(step, self._kinds(sum(len(batch.shard) for batch, _ in samples)))
        to = {name: tensor.numpy() for name, tensor in packed.tensors().items()}
        start = 0
        with undisturbed():
            for number, (batch, seeds) in enumerate(samples):
                rows = self._find(number, batch)
                here = slice(start, start + len(rows))
                start = here.stop
                source = self.sources[number].name
                to["source"][here] = SOURCE_CODES[source]
                to["targets"][here], to["hard"][here] = self.soft.make(source, rows, self.classes)
                mirrored = sample_order.mirrored(self.seed, source, batch).tolist()
                for place, shard, (of_shard, row), seed, turned in zip(
                    range(here.start, here.stop), batch.shard.tolist(), rows, seeds.tolist(), mirrored, strict=True
                ):
                    self._view(to, place, (number, shard, row), of_shard, seed, turned)
        return packed

    def _kinds(self, images: int) -> dict[str, Kind]:
        size = self.augment.size
        kinds: dict[str, Kind] = {
            "images": ((images, size, size, 3), torch.uint8),
            "targets": ((images, self.classes), torch.float32),
            "hard": ((images,), torch.int64),
            "source": ((images,), torch.uint8),
        }
        if self.augment.on_device:
            kinds["operations"] = (
                (images, randaugment.layers(self.augment.operations), randaugment.WIDTH),
                torch.float32,
            )
        return kinds

    def rows(self, number: int, shard: int) -> TrainingRows:
        """The rows of one shard of one source, from memory where they were used lately."""
        key = (number, shard)
        if key in self._rows:
            self._rows.move_to_end(key)
            return self._rows[key]
        rows = load_rows(self.sources[number].shards[shard], soft=self.soft.are_soft(self.sources[number].name))
        self._rows[key] = rows
        self._rows_bytes += rows.nbytes
        while self._rows_bytes > ROWS_BYTES and len(self._rows) > self._read_at_once:
            self._rows_bytes -= self._rows.popitem(last=False)[1].nbytes
        return rows

    def _find(self, number: int, batch: sample_order.Batch) -> list[tuple[TrainingRows, int]]:
        found = []
        for shard, slot in zip(batch.shard.tolist(), batch.slot.tolist(), strict=True):
            rows = self.rows(number, shard)
            found.append((rows, int(rows.row_of_slot[slot])))
        return found

    def _view(
        self,
        to: dict[str, np.ndarray],
        place: int,
        key: tuple[int, int, int],
        rows: TrainingRows,
        seed: int,
        mirrored: bool,
    ) -> None:
        """The training view of an image, at its place among the arrays of the batch; key: source, shard, row."""
        number, shard, row = key
        path = self.sources[number].shards[shard].path
        try:
            image = self._kept.get(key) or self._read(key, rows)
            if self.augment.on_device:
                view, to["operations"][place] = view_and_operations(image, self.augment, seed, mirrored)
            else:
                view = seeded_view(image, self.augment, seed, mirrored)
        except RemoteError:  # nobody's mistake, and says itself what failed
            raise
        except OSError as error:
            raise DataError(
                f"cannot read image {rows.index[row]} of {storage.redact(path)} ({type(error).__name__}: {error}); "
                "bring the shard back or make it readable on every worker, and run again"
            ) from error
        except images.BadImage as error:
            raise DataError(
                f"image {rows.index[row]} of {storage.redact(path)} was readable when it was indexed or labelled and "
                f"no longer is ({error}); restore that shard, or delete the stages that read it and run again"
            ) from error
        to["images"][place] = view.transpose(1, 2, 0)

    def _read(self, key: tuple[int, int, int], rows: TrainingRows) -> Image.Image | Jpeg:
        number, shard, row = key
        tar = self.sources[number].shards[shard]
        data = prefetch.read_image(tar, rows, row)
        view = self.augment.view
        image = images.decode(data, at_least=view.at_least) if view else open_image(data, KEPT_PIXELS)
        # Every epoch reads every image once: what is kept is never worth replacing by another.
        if isinstance(image, Image.Image):
            nbytes = 4 * image.width * image.height + 500
            if image.width * image.height <= KEPT_PIXELS and self._kept_bytes + nbytes <= KEPT_BYTES:
                self._kept[key] = image
                self._kept_bytes += nbytes
        return image


def batches(
    sources: Sequence[TrainingSource],
    *,
    augment: Augment,
    classes: int,
    soft: SoftTargets,
    seed: int,
    start_step: int,
    stop_step: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    nice: int = 0,
    start_method: str | None = None,
) -> Iterator[dict[str, Any]]:
    """This rank's part of the global steps start_step … stop_step-1, in order.

    Each is {'step': int, 'images': uint8 [b, 3, size, size], 'targets': float32 [b, classes],
    'hard': int64 [b] (-1 where soft), 'source': uint8 [b] (0 labelled, 1 pseudo)}; labelled images come first. Targets
    sum to 1, or to the image's weight where the selection gives it one. With `augment.on_device` also 'operations':
    float32 [b, layers, 7], what the device is to do to the images (pipeline.augment.on_device).
    `workers` processes read ahead (0: none), with their niceness raised by `nice`; `start_method`: fork, spawn or
    forkserver (None: the platform's).
    DataError for a source without images, and for an image or row that cannot be read when its step comes.
    """
    data = TrainingData(sources, augment=augment, classes=classes, soft=soft, seed=seed, rank=rank, world=world)
    feeds = [
        prefetch.Feed(ordered, source.shards, source.per_step, sample_order.share(source.per_step, rank, world))
        for ordered, source in zip(data.orders, sources, strict=True)
    ]
    packs = ahead(
        data.pack, prefetch.Fill(feeds, stop_step), start_step, stop_step,
        workers=workers, pin_memory=pin_memory, nice=nice, start_method=start_method,
    )  # fmt: skip
    return _unpacking(packs)


def _unpacking(packs: Iterator[Packed]) -> Iterator[dict[str, Any]]:
    with contextlib.closing(cast(Generator, packs)):
        for packed in packs:
            yield unpacked(packed)


def unpacked(packed: Packed) -> dict[str, Any]:
    """The batch as `batches` describes it; images are channels last in memory, as convolutions like them best."""
    tensors = packed.tensors()
    return {"step": packed.step, **tensors, "images": tensors["images"].permute(0, 3, 1, 2)}
