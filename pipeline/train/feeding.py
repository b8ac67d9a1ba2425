"""Decides how many processes load images beside a training worker, and measures whether they keep up."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Generic, TypeVar

from pipeline.cluster.world import World
from pipeline.train.spec import TrainSpec

Batch = TypeVar("Batch")

NICE = 10
"""Of loading processes beside training on the CPU. Of two threads that compute, one spins while the other is pushed
aside, so that loading on equal terms costs twice its time; so it takes what they leave, and both cores while they wait
for a batch."""
MOST = 8
SHARED_MEMORY = "/dev/shm"
BATCHES = 3  # of a loading process that lie there: two are waited for, one is being made


class Waited(Generic[Batch]):
    """Batches as they come; `seconds`: how long the loop has waited for them."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            try:
                batch = next(self._batches)
            except StopIteration:
                return
            self.seconds += time.perf_counter() - start
            yield batch


def loading_processes(spec: TrainSpec, world: World) -> int:
    """As many as the spec says. If it does not, a GPU gets its share of the machine's cores but one, at most MOST and
    no more than shared memory has room for; on the CPU training needs all cores itself."""
    if spec.workers is not None:
        return spec.workers
    if world.device.type == "cpu":
        return 0
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) // beside
    images = -(-spec.images_per_step // world.size)
    batch = images * spec.image_bytes
    room = shutil.disk_usage(SHARED_MEMORY).free // beside // (BATCHES * batch)
    return min(max(cores - 1, 1), MOST, room)
