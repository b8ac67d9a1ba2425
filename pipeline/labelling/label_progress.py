"""Tells how far labelling is: what the label stage writes to its journal, for the screen, `status` and MLflow.

The values are flat: `images` so far and `images_total` (about, from bytes), `images_per_second` (over the last minute)
and `images_per_second_average`, `left` (seconds), `workers` that are alive, `failed` shards, `bad` images and
`bad_<why>`, `seconds_<part>` (where the time went, summed over workers), `worst` (the shards with the largest share of
bad images).
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.data.samples import SKIPPED
from pipeline.data.shards import Shard, bad_counts
from pipeline.tracking.journal import Journal

RECENT_SECONDS = 60.0
LOG_SECONDS = 5.0  # between two records
WORST = 3
COUNTED = ("images", "bad", "seconds_")  # goes on from where an earlier attempt ended


class Progress:
    def __init__(
        self, log: Journal, shards: Sequence[Shard], waiting: Iterable[Shard], before: Mapping[str, Any]
    ) -> None:
        """`before`: the last record of an earlier attempt in this folder, or {}."""
        self.log, self.total = log, len(shards)
        self.sizes = {shard.name: shard.size for shard in shards}
        self.bytes_left = {shard.name: shard.size for shard in waiting}
        self.done = self.total - len(self.bytes_left)
        self.started = self.logged = time.monotonic()
        self.counts = Counter({name: value for name, value in before.items() if name.startswith(COUNTED) and value})
        for derived in ("images_total", "images_per_second", "images_per_second_average"):
            del self.counts[derived]
        self.bytes_done = sum(self.sizes.values()) - sum(self.bytes_left.values()) if self.counts["images"] else 0
        self.labelled_images = self.labelled_bytes = self.workers = 0  # of this attempt
        self.recent: deque[tuple[float, int]] = deque([(self.started, 0)])
        self.worst: list[tuple[float, str]] = []
        self.failed = 0
        log.log(self.done, self.total)

    def add(self, name: str, metadata: Mapping[str, Any] | None, workers: int) -> None:
        """A shard has ended: with this metadata, or None where it failed."""
        self.done, self.workers = self.done + 1, workers
        size = self.bytes_left.pop(name)
        if metadata is None:
            self.failed += 1
        else:
            bad = bad_counts(metadata["counts"])
            asked = metadata["rows"] - metadata["counts"].get(SKIPPED, 0)
            self.counts.update({"images": asked, "bad": sum(bad.values())})
            self.counts.update({f"bad_{reason}": number for reason, number in bad.items()})
            self.bytes_done += size
            if bad:
                share = sum(bad.values()) / asked
                self.worst = sorted([*self.worst, (share, name)], key=lambda one: (-one[0], one[1]))[:WORST]
            if not metadata["skipped"]:
                self.counts.update({f"seconds_{part}": value for part, value in metadata["seconds"].items()})
                self.labelled_images += asked
                self.labelled_bytes += size
        now = time.monotonic()
        self.recent.append((now, self.labelled_images))
        while len(self.recent) > 2 and self.recent[1][0] < now - RECENT_SECONDS:
            self.recent.popleft()
        if now - self.logged >= LOG_SECONDS or self.done == self.total:
            self.logged = now
            self.log.log(self.done, self.total, **self.values(now))

    def values(self, now: float) -> dict[str, float | int | str]:
        taken = max(now - self.started, 1e-6)
        (first, images_then), left = self.recent[0], sum(self.bytes_left.values())
        values: dict[str, float | int | str] = {
            **{name: round(value, 3) for name, value in sorted(self.counts.items())},
            "images_per_second": round((self.labelled_images - images_then) / max(now - first, 1e-6), 1),
            "images_per_second_average": round(self.labelled_images / taken, 1),
            "workers": self.workers,
            "failed": self.failed,
        }
        if self.bytes_done:
            values["images_total"] = round(self.counts["images"] * (1 + left / self.bytes_done))
        if self.labelled_bytes:
            values["left"] = round(left * taken / self.labelled_bytes, 1)
        if self.worst:
            values["worst"] = ", ".join(f"{name} ({100 * share:.1f} % bad)" for share, name in self.worst)
        return values


def shares(seconds: Mapping[str, float]) -> str:
    """Where the time went, in words: the parts of what the shards took in all; decoding is that of all its threads."""
    total = seconds.get("total") or 1.0
    named = {"read": "reading", "decode": "decoding", "wait": "waiting for images", "device": "waiting for the device",
             "forward": "forward", "write": "writing"}  # fmt: skip
    return ", ".join(f"{text} {100 * seconds.get(part, 0.0) / total:.0f} %" for part, text in named.items())
