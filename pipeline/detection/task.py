"""Detects objects: a task of the training loop (pipeline.train.task)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from pipeline.cluster.world import World
from pipeline.detection import figures
from pipeline.detection.body_weights import load_body
from pipeline.detection.find import find_in
from pipeline.detection.loader import batches
from pipeline.detection.network import build_detector
from pipeline.detection.rows import load_rows
from pipeline.detection.spec import DetectorSpec
from pipeline.loading.sample_order import share
from pipeline.train.feeding import NICE, loading_processes
from pipeline.train.spec import TrainSpec
from pipeline.train.start import Trainee

NAMES = ("ap", "ap50", "ap75")


class Detection:
    def build(self, spec: TrainSpec, fresh: bool) -> nn.Module:
        detector = build_detector(_of(spec).card)
        if fresh and (body := _of(spec).body):
            load_body(detector.backbone.body, body, _of(spec).card.model)
        return detector

    def batches(self, spec: TrainSpec, world: World, start_step: int) -> Iterator[Mapping[str, Any]]:
        [source] = spec.sources
        own = _of(spec)
        return batches(
            source, classes=own.card.classes, jitter=own.jitter, fill=own.card.fill, seed=spec.seed,
            start_step=start_step, stop_step=spec.steps, rank=world.rank, world=world.size,
            workers=loading_processes(spec, world),
            pin_memory=world.device.type == "cuda", nice=NICE if world.device.type == "cpu" else 0,
        )  # fmt: skip

    def losses(
        self, trainee: Trainee, batch: Mapping[str, Any], seed: int, spec: TrainSpec, world: World
    ) -> Callable[[slice], Tensor]:
        images, targets = to_device(batch, world.device)
        images = [image.contiguous(memory_format=torch.contiguous_format) for image in images]

        def loss_of(rows: slice) -> Tensor:
            part = images[rows]
            with torch.autocast(world.device.type, trainee.precision, enabled=trainee.precision != torch.float32):
                losses = trainee.network(part, targets[rows])
            # torchvision's losses are means over the images that it is given.
            return torch.stack([loss.float() for loss in losses.values()]).sum() * len(part)

        return loss_of

    def validate(self, trainee: Trainee, spec: TrainSpec, world: World) -> tuple[dict[str, Any], dict[str, Any]]:
        card = _of(spec).card
        rows = [load_rows(shard) for shard in spec.validation]
        every = [(shard, number) for shard, of in enumerate(rows) for number in range(len(of.texts))]
        mine = every[share(len(every), world.rank, world.size)]
        at_once = max(1, spec.images_per_step // world.size // spec.settings.accumulate)
        found = find_in(
            trainee.average.module, card,
            [(spec.validation[shard], rows[shard], number) for shard, number in mine], at_once, world.device,
        )  # fmt: skip
        answers = [answer for part in world.gather(found) for answer in part]
        # The order of the images decides between equal scores: that of the shards, on any number of workers.
        scenes = [rows[shard].scene(number, card.classes) for shard, number in every]
        measured = figures.measure(scenes, answers, card.classes) if world.main else None
        values = torch.zeros(2 * len(NAMES), dtype=torch.float64, device=world.device)
        if measured:
            values += torch.tensor([measured[kind][name] or 0.0 for kind in figures.KINDS for name in NAMES])
        numbers = iter(world.sum(values).tolist())
        kept = {f"{kind}_{name}": next(numbers) for kind in figures.KINDS for name in NAMES}
        return kept, kept

    def better(self, found: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
        return best is None or (found["box_ap"], found["mask_ap"]) > (best["box_ap"], best["mask_ap"])


DETECTION = Detection()


def to_device(batch: Mapping[str, Any], device: torch.device) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images float32 [3, canvas, canvas] in 0..1, and torchvision's targets with the boxes of `crowds`."""
    moved = {
        name: batch[name].to(device, non_blocking=True) for name in ("images", "boxes", "labels", "masks", "crowds")
    }
    things, crowds = (batch["counts"][:, column].tolist() for column in (0, 1))
    parts = {name: moved[name].split(things) for name in ("boxes", "labels", "masks")}
    parts["crowds"] = moved["crowds"].split(crowds)
    targets = [{name: part[number] for name, part in parts.items()} for number in range(len(things))]
    return list(moved["images"].float() / 255), targets


def _of(spec: TrainSpec) -> DetectorSpec:
    return cast(DetectorSpec, spec)
