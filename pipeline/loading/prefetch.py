"""Brings remote shards to the node's cache before training reads them: the order says which come next.

Of every segment that a rank reads, the shards of the block being read and of the one after it are wanted, the most
urgent first. The processes that load images share them out, each with a thread of its own that fetches; where a
selection keeps little of a shard, only those parts of it (pipeline.storage.byte_ranges). Nobody waits for a download:
an image whose shard is not there yet, or for which there is no room, is asked for alone (`read_image`). So this changes
when bytes arrive, and never which.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from torch.utils.data import get_worker_info

from pipeline import storage
from pipeline.data import known_image, shards
from pipeline.errors import UserError
from pipeline.loading import sample_order
from pipeline.loading.training_rows import TrainingRows, TrainingShard, load_rows
from pipeline.loading.upcoming_shards import upcoming
from pipeline.storage.byte_ranges import Parts
from pipeline.storage.node_cache import SPARED, Cache, Ready

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Feed:
    """A source as a rank reads it: `part` (order.share) of the `per_step` images that each step takes of `shards`."""

    order: sample_order.Source
    shards: Sequence[TrainingShard]
    per_step: int
    part: slice


def read_image(shard: TrainingShard, rows: TrainingRows, row: int) -> bytes:
    """The bytes of an image, from wherever they are at hand. OSError, DataError (known_image.read)."""
    offset, size = int(rows.offset[row]), int(rows.size[row])
    ready = Ready(shard.cache, rows.parts) if shard.cache else None
    if rows.checked[row]:
        return shards.read_at(shard.path, offset, size, ready)
    known = known_image.Known(int(rows.image_hash[row]), None if rows.crc32 is None else int(rows.crc32[row]))
    data = known_image.read(shard.path, offset, size, known, f"image {rows.index[row]}", ready)
    rows.checked[row] = True
    return data


class Fill:
    """Follows training until `stop_step`; does nothing where no shard is both remote and to be kept in a cache.

    It is made before loader processes start and works in each of them once `at` is called there.
    """

    def __init__(self, feeds: Sequence[Feed], stop_step: int) -> None:
        remote = [f for f in feeds if f.part.start < f.part.stop and any(_kept(shard) for shard in f.shards)]
        # An order of its own: its segments would forget the loader's permutations.
        self.feeds = [dataclasses.replace(feed, order=dataclasses.replace(feed.order)) for feed in remote]
        self.stop_step = stop_step
        self._thread: _Thread | None = None

    def at(self, step: int) -> None:
        """Images of `step` are read now, in this process. Raises what made filling impossible, a UserError."""
        if not self.feeds:
            return
        if self._thread is None:
            self._thread = _Thread(self)
            self._thread.start()
        self._thread.follow(step)

    def close(self) -> None:
        """End the downloads of this process soon."""
        if self._thread is not None:
            self._thread.close()

    def wanted(self, step: int) -> tuple[list[tuple[int, int, TrainingShard]], int]:
        """The shards to have at hand at `step` as (first step that reads it, its number, shard), the most urgent first;
        and the first step at which they are others."""
        begins: dict[tuple[int, int], int] = {}
        until = self.stop_step
        for number, feed in enumerate(self.feeds):
            blocks, changes = upcoming(feed.order, step, feed.per_step, feed.part)
            until = min(until, changes)
            for block in blocks:
                for shard in block.shards if block.begins < self.stop_step else ():
                    if _kept(feed.shards[shard]):
                        begins[number, shard] = min(block.begins, begins.get((number, shard), block.begins))
        found = sorted((first, shard, number) for (number, shard), first in begins.items())
        return [(first, shard, self.feeds[number].shards[shard]) for first, shard, number in found], until


class _Thread(threading.Thread):
    """Fetches the share of one loader process of `workers`: the shards whose number is its own modulo `workers`."""

    def __init__(self, fill: Fill) -> None:
        super().__init__(name="fill", daemon=True)
        info = get_worker_info()
        self.fill, self.worker, self.workers = fill, info.id if info else 0, info.num_workers if info else 1
        self.step = self.until = -1
        self.moved, self.closed = threading.Event(), threading.Event()
        self.failure: UserError | None = None
        self.warned = False
        self.parts: dict[str | None, Parts | None] = {}  # by selection file, of the shards that are wanted

    def follow(self, step: int) -> None:
        if self.failure is not None:
            raise self.failure
        if step >= self.until:
            self.step = step
            self.moved.set()

    def close(self) -> None:
        self.closed.set()
        self.moved.set()

    def run(self) -> None:
        complete = True
        while not self.closed.is_set():
            # Room is there, and a server may answer again, once time has passed.
            self.moved.wait(None if complete else SPARED)
            self.moved.clear()
            try:
                complete = self._bring()
            except UserError as error:
                self.failure = error
                return

    def _bring(self) -> bool:
        """Fetch what is wanted, until training moves on; False where something is to be tried again later."""
        wanted, self.until = self.fill.wanted(self.step)
        kept = {shard.selection for _, _, shard in wanted}
        self.parts = {selection: parts for selection, parts in self.parts.items() if selection in kept}
        complete = True
        for first, number, shard in wanted:
            if self.moved.is_set():
                break
            if number % self.workers != self.worker:
                continue
            assert shard.cache is not None  # or it would not be wanted
            try:
                if not self._fetch(shard, shard.cache):
                    self._warn(first, f"data.cache_gb {shard.cache.limit / 1e9:g}", "raise it")
                    return False
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    self._warn(first, f"the disk of data.cache {shard.cache.folder} is full and", "free some")
                    return False
                # Its images are asked for one by one, and who does that says what is wrong.
                log.warning("cannot copy %s to the cache yet: %s", storage.redact(shard.path), error)
                complete = False
        return complete

    def _fetch(self, shard: TrainingShard, cache: Cache) -> bool:
        if shard.selection and shard.selection not in self.parts:
            self.parts[shard.selection] = load_rows(shard, soft=False).parts
        parts = self.parts[shard.selection] if shard.selection else None
        return cache.fetch(shard.path, parts, self.closed)

    def _warn(self, first: int, what: str, remedy: str) -> None:
        """Once, of a shard that step `first` reads."""
        if first <= self.step and not self.warned and not self.closed.is_set():
            self.warned = True
            log.warning(
                "%s has no room for all shards that training reads from at a time: images of the others are fetched "
                "one by one; %s, or lower `window`", what, remedy,
            )  # fmt: skip


def _kept(shard: TrainingShard) -> bool:
    return shard.cache is not None and storage.is_url(shard.path)
