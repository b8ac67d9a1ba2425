"""Loads batches of scenes for one rank: placed on the canvas at random, as uint8, with boxes, classes and masks.

Order, seeds, reading ahead and the node's cache are those of pipeline.loading; a batch is a pure function of (shards,
jitter, seed, step, rank, world).
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Generator, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from pipeline import storage
from pipeline.augment.jitter import Jitter, place, place_boxes, place_pixels
from pipeline.data import images
from pipeline.detection import masks
from pipeline.detection.rows import SceneRows, load_rows
from pipeline.detection.scene import Scene, boxes_of, picture
from pipeline.errors import DataError, RemoteError
from pipeline.loading import prefetch, sample_order
from pipeline.loading.ahead import ahead
from pipeline.loading.loader import TrainingSource
from pipeline.loading.packed_batch import Packed, allocate

ROWS_BYTES = 256 << 20  # rows of shards kept in memory, per process, beyond those that are read at a time
LEAST_SIDE = 1.0  # of a box on the canvas, in pixels; what is smaller there is not taught


class SceneData:
    """pack(step) is this rank's part of a global step; see `batches`."""

    def __init__(
        self,
        source: TrainingSource,
        *,
        classes: Sequence[str],
        jitter: Jitter,
        fill: tuple[int, int, int],
        seed: int,
        rank: int,
        world: int,
    ) -> None:
        self.source, self.classes, self.jitter, self.fill = source, list(classes), jitter, fill
        self.number = {name: number for number, name in enumerate(classes, 1)}  # 0 is background
        self.seed = seed
        counts = np.array([shard.count for shard in source.shards], np.int64)
        self.order = sample_order.Source(source.name, counts, seed, source.segments, source.window)
        self.part = sample_order.share(source.per_step, rank, world)
        self._rows: OrderedDict[int, SceneRows] = OrderedDict()
        self._at_once = min(len(source.shards), source.segments * source.window)

    def pack(self, step: int) -> Packed:
        batch = sample_order.batch(self.order, step, self.source.per_step, self.part)
        seeds = sample_order.sample_seed(self.seed, self.source.name, batch.epoch, batch.position)
        views = [
            self._view(shard, row, seed)
            for shard, row, seed in zip(batch.shard.tolist(), batch.slot.tolist(), seeds.tolist(), strict=True)
        ]
        canvas = self.jitter.canvas
        things, crowds = (sum(len(view[name]) for view in views) for name in ("labels", "crowds"))
        packed = allocate(
            step,
            {
                "images": ((len(views), canvas, canvas, 3), torch.uint8),
                "masks": ((things, canvas, canvas), torch.uint8),
                "labels": ((things,), torch.int64),
                "boxes": ((things, 4), torch.float32),
                "crowds": ((crowds, 4), torch.float32),
                "counts": ((len(views), 2), torch.int64),
            },
        )
        to = {name: tensor.numpy() for name, tensor in packed.tensors().items()}
        for number, view in enumerate(views):
            to["images"][number] = view["image"]
            to["counts"][number] = len(view["labels"]), len(view["crowds"])
        for name in ("masks", "labels", "boxes", "crowds"):
            np.concatenate([view[name] for view in views], out=to[name])
        return packed

    def rows(self, shard: int) -> SceneRows:
        """Of one shard, from memory where they were used lately."""
        if shard not in self._rows:
            self._rows[shard] = load_rows(self.source.shards[shard])
        self._rows.move_to_end(shard)
        while len(self._rows) > self._at_once and sum(rows.nbytes for rows in self._rows.values()) > ROWS_BYTES:
            self._rows.popitem(last=False)
        return self._rows[shard]

    def _view(self, shard: int, row: int, seed: int) -> dict[str, Any]:
        tar, rows = self.source.shards[shard], self.rows(shard)
        where = f"image {rows.places.index[row]} of {storage.redact(tar.path)}"
        scene = rows.scene(row, self.classes)
        try:
            image = picture(prefetch.read_image(tar, rows.places, row), scene)
        except RemoteError:  # nobody's mistake, and says itself what failed
            raise
        except OSError as error:
            raise DataError(
                f"cannot read {where} ({type(error).__name__}: {error}); bring the shard back or make it readable on "
                "every worker, and run again"
            ) from error
        except images.BadImage as error:
            raise DataError(
                f"{where} was readable when it was indexed and no longer is ({error}); restore that shard, or delete "
                "the stages that read it and run again"
            ) from error
        return self._placed(image, scene, seed)

    def _placed(self, image: Image.Image, scene: Scene, seed: int) -> dict[str, Any]:
        """Image uint8 [canvas, canvas, 3], and of what is left of each thing masks, labels, boxes; boxes of crowds."""
        placement = place(scene.width, scene.height, self.jitter, seed)
        canvas = self.jitter.canvas
        boxes = place_boxes(boxes_of(scene.single), scene.width, scene.height, placement)
        kept_masks, kept = [], []
        for number, thing in enumerate(scene.single):
            if min(boxes[number, 2:] - boxes[number, :2]) < LEAST_SIDE:
                continue
            pixels = Image.fromarray(masks.decode(thing.mask, scene.height, scene.width))
            mask = place_pixels(pixels, placement, (0,), smooth=False)
            if mask.any():
                kept_masks.append(mask)
                kept.append(number)
        crowds = [thing for thing in scene.things if thing.crowd]
        shown = place_boxes(boxes_of(crowds), scene.width, scene.height, placement)
        return {
            "image": place_pixels(image, placement, self.fill),
            "masks": np.stack(kept_masks) if kept else np.zeros((0, canvas, canvas), np.uint8),
            "labels": np.array([self.number[scene.single[number].name] for number in kept], np.int64),
            "boxes": boxes[kept].reshape(-1, 4),
            "crowds": shown[(shown[:, 2:] > shown[:, :2]).all(1)],
        }


def batches(
    source: TrainingSource,
    *,
    classes: Sequence[str],
    jitter: Jitter,
    fill: tuple[int, int, int],
    seed: int,
    start_step: int,
    stop_step: int,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
    nice: int = 0,
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of the global steps start_step … stop_step-1, in order.

    Each is {'images': uint8 [b, 3, canvas, canvas], 'counts': int64 [b, 2], things and crowds of each image, and of all
    things one after the other 'labels': int64 [n] from 1, 'boxes': float32 [n, 4] and 'masks': uint8 [n, canvas,
    canvas]; 'crowds': float32 [m, 4]}. An image may have none. `fill` is the colour around it. DataError for an image
    that cannot be read when its step comes.
    """
    data = SceneData(source, classes=classes, jitter=jitter, fill=fill, seed=seed, rank=rank, world=world)
    feed = prefetch.Feed(data.order, source.shards, source.per_step, data.part)
    packs = ahead(
        data.pack, prefetch.Fill([feed], stop_step), start_step, stop_step,
        workers=workers, pin_memory=pin_memory, nice=nice,
    )  # fmt: skip
    return _unpacking(packs)


def _unpacking(packs: Iterator[Packed]) -> Iterator[dict[str, torch.Tensor]]:
    with contextlib.closing(cast(Generator, packs)):
        for packed in packs:
            tensors = packed.tensors()
            yield {**tensors, "images": tensors["images"].permute(0, 3, 1, 2)}
