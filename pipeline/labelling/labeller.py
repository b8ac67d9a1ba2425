"""Labels shards: reads one tar, asks the teacher about every image, writes one label file.

`make_labeller(spec)` loads the teacher once and returns the `Labeller`, which labels a shard when it is called:
`Cluster.map` takes `functools.partial(make_labeller, spec)` as its `make_worker`. Several calls may run at once: while
the images of one shard go through the network, those of the next are read and decoded. A forward batch holds images of
one shard only and its size is fixed, so the rows of a shard depend on the shard, the teacher, the batch size and the
device, and on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import torch
from torch import nn

from pipeline import storage
from pipeline.data import images, label_files, shards
from pipeline.data.images import View
from pipeline.data.samples import RULE, Sample
from pipeline.data.shards import Shard
from pipeline.errors import ClusterError, DataError, WeightsError
from pipeline.labelling import reuse
from pipeline.labelling.read_ahead import Ahead
from pipeline.labelling.relabel import Before, Pass
from pipeline.labelling.teacher import Answer, Device, OutOfMemory, Teacher, on_device
from pipeline.storage.node_cache import Cache

Prepared = tuple[Sample, str, int | None, int | None, npt.NDArray[np.uint8] | None]
IN_FLIGHT = 2  # batches of a shard that are with the device; shards that a worker is given at once
PARTS = ("read", "decode", "wait", "device", "forward", "write")


@dataclass(frozen=True)
class LabelSpec:
    """What a labelling worker needs; picklable. `load` gives the teacher and its card (weights.load_model)."""

    load: Callable[[str], tuple[nn.Module, Any]]
    weights: str
    teacher: str  # sha256 of the weights' file
    classes: tuple[str, ...]
    out: str
    batch: int = 256  # halved where it does not fit
    threads: int = 2  # that decode
    device: str = "auto"
    temperature: float = 1.0  # divides the logits
    flip: bool = False  # the mean over the image and its mirror image
    compile: bool = False
    cache: Cache | None = None  # of the node, for remote shards
    max_image_bytes: int | None = None  # of memory that decoding one may take
    earlier: tuple[str, ...] = ()  # folders with label files of other corpora, taken over where they fit
    before: Before | None = None  # the generation before, where only what it kept is to be labelled


@dataclass
class ShardLabels:
    """The rows of a shard, as they come in."""

    samples: list[Sample] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    image_hash: list[int | None] = field(default_factory=list)
    crc32: list[int | None] = field(default_factory=list)
    good: list[int] = field(default_factory=list)  # rows that `found` speaks of
    found: list[label_files.Predictions] = field(default_factory=list)

    def answer(self, asked: list[int], probs: npt.NDArray[np.float32]) -> None:
        """What the teacher said of these rows; those without a finite answer become `not_finite`."""
        finite = np.flatnonzero(np.isfinite(probs).all(axis=1))
        rows = np.array(asked)
        self.good += rows[finite].tolist()
        for row in np.delete(rows, finite):
            self.status[row] = "not_finite"
        self.found.append(label_files.rows_from_probs(probs[finite]))

    def table(self, num_classes: int) -> pa.Table:
        columns: dict[str, list[Any]] = {
            "index": [sample.index for sample in self.samples],
            "key": [label_files.printable_key(sample.key) for sample in self.samples],
            "offset": [sample.offset for sample in self.samples],
            "size": [sample.size for sample in self.samples],
            "status": self.status,
            "image_hash": self.image_hash,
            "crc32": self.crc32,
        }
        nothing = label_files.rows_from_probs(np.zeros((0, num_classes), np.float32))
        parts = [nothing, *self.found]
        found = label_files.Predictions(
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.confidence for part in parts]),
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.probs for part in parts]),
        )
        return label_files.make_table(columns, np.array(self.good, np.int64), found)


def make_labeller(spec: LabelSpec) -> Labeller:
    """Load the teacher once. Raises WeightsError where its classes are not the job's."""
    module, card = spec.load(spec.weights)
    if list(card.classes) != list(spec.classes):
        raise WeightsError(
            f"the teacher {storage.redact(spec.weights)} knows {len(card.classes)} classes "
            f"({', '.join(card.classes[:3])} …), and this job has {len(spec.classes)} "
            f"({', '.join(spec.classes[:3])} …); give a teacher that was trained on the job's class list"
        )
    flip = spec.flip and "flip" not in card.test_views
    teacher = on_device(
        module, card.view(), spec.device, temperature=spec.temperature, flip=flip, compiled=spec.compile
    )
    return Labeller(spec, teacher)


class Labeller:
    """Labels shards, several at once if called from several threads; `close` makes calls that run end soon."""

    def __init__(self, spec: LabelSpec, teacher: Teacher) -> None:
        self.spec, self.teacher = spec, teacher
        self.batch = spec.batch  # what is known to fit, for this shard and those that follow
        self._device = Device(teacher)
        self._ahead = Ahead(spec.threads, 2 * spec.batch)
        self._closed = threading.Event()
        self._lock = threading.Lock()

    def close(self) -> None:
        self._closed.set()

    def __call__(self, shard: Shard) -> dict[str, Any]:
        """Write `<out>/<shard>.parquet` unless a finished one is there, and return what its metadata says.

        {"shard", "rows", "counts" (by status), "left" (what is in no sample: samples.Left), "cut" (why the tar stops
        early, or None), "seconds" (by part), …} and "skipped": nothing had to be done. Images that give no picture
        have a row with their status. DataError where nothing at all could be read, or the shard is not what was listed.
        """
        path = storage.join(self.spec.out, label_files.file_name(shard.name))
        identity = self.identity(shard)
        found = reuse.find(path, self.spec.earlier, shard, identity)
        if found is not None:
            return {**found, "skipped": True}
        while not self._closed.is_set():
            batch = self.batch
            try:
                return self._label(shard, path, identity, batch)
            except OutOfMemory:  # anew, so that a file has one batch size
                self._halve(batch)
        raise InterruptedError("labelling was stopped")

    def identity(self, shard: Shard) -> dict[str, Any]:
        """What makes a label file this one and no other; all of it is in the file's metadata."""
        view = self.teacher.view
        views = getattr(self.teacher.module, "views", ())  # models.over_views
        return {
            "shard": shard.name,
            "shard_size": shard.size,
            "teacher": self.spec.teacher,
            "class_list": label_files.class_list_hash(self.spec.classes),
            "transform": {  # as JSON has it
                **dataclasses.asdict(view),
                **({"test_views": list(views)} if views else {}),
                "mean": list(view.mean),
                "std": list(view.std),
            },
            "temperature": self.spec.temperature,
            "flip": self.spec.flip,
            "batch_asked": self.spec.batch,
            "selection": self.spec.before.selection if self.spec.before else None,
            "rule": RULE,
            "max_image_bytes": self.spec.max_image_bytes,
        }

    def _halve(self, batch: int) -> None:
        with self._lock:
            if batch == 1:
                raise ClusterError(
                    "the teacher does not fit into the memory of its device with a batch of one image; "
                    "give each labelling worker more memory, or take a smaller teacher"
                )
            self.batch = min(self.batch, batch // 2)

    def _label(self, shard: Shard, path: str, identity: dict[str, Any], batch: int) -> dict[str, Any]:
        start = time.perf_counter()
        seconds = dict.fromkeys(PARTS, 0.0)
        before = self.spec.before
        reader: Pass = before.walk(shard, self.spec.cache) if before else shards.stream(shard.path, self.spec.cache)
        reuse.check_size(shard)
        rows = self._rows(reader, batch, seconds)
        reuse.check_unchanged(shard, reader.sha256)
        if not rows.samples and reader.damage is not None:
            raise DataError(
                f"shard {shard.name} is damaged before its first image ({reader.damage}), so nothing in it can be "
                "labelled; copy it again, or raise data.max_bad_shards"
            )
        begin_write = time.perf_counter()
        table = rows.table(len(self.spec.classes))
        if (
            other := reuse.fitting_metadata(path, identity)
        ) is not None:  # a second worker had this shard too, and was faster
            return {**other, "skipped": True}

        def metadata() -> dict[str, Any]:
            now = time.perf_counter()
            taken = {**seconds, "write": now - begin_write, "total": now - start}
            return {
                **identity,
                "shard_sha256": reader.sha256,
                "shard_stamp": shard.stamp,
                "rows": len(rows.samples),
                "counts": dict(sorted(Counter(rows.status).items())),
                "without_image": reader.left.number,
                "left": dataclasses.asdict(reader.left),
                "cut": reader.damage,
                "corpus": "selected" if before else "all",
                "dtype": str(self.teacher.dtype).removeprefix("torch."),
                "device": self.teacher.device.type,
                "compiled": self.teacher.compiled,
                "batch": batch,
                "versions": {"torch": torch.__version__, "pillow": PIL.__version__},
                "seconds": {part: round(value, 3) for part, value in taken.items()},
            }

        label_files.write_labels(path, table, metadata)
        return {**metadata(), "skipped": False}

    def _rows(self, reader: Pass, batch: int, seconds: dict[str, float]) -> ShardLabels:
        rows = ShardLabels()
        asked: deque[tuple[list[int], Future[Answer]]] = deque()
        pictures: list[npt.NDArray[np.uint8]] = []
        indices: list[int] = []

        def ask() -> None:
            if batch > self.batch:
                raise OutOfMemory("another shard found that this batch does not fit")
            asked.append((indices.copy(), self._device.ask(pictures, batch)))
            pictures.clear()
            indices.clear()

        def take() -> None:
            mine, future = asked.popleft()
            start = time.perf_counter()
            probs, forward = future.result()()
            seconds["device"] += time.perf_counter() - start
            seconds["forward"] += forward
            rows.answer(mine, probs[: len(mine)])

        work = functools.partial(_prepare, self.teacher.view, self.spec.max_image_bytes)
        with contextlib.closing(self._ahead.run(reader, work, seconds)) as prepared:
            for sample, status, digest, crc32, picture in self._until_closed(prepared):
                rows.samples.append(sample)
                rows.status.append(status)
                rows.image_hash.append(digest)
                rows.crc32.append(crc32)
                if picture is None:
                    continue
                pictures.append(picture)
                indices.append(sample.index)
                if len(pictures) == batch:
                    ask()
                    if len(asked) == IN_FLIGHT:
                        take()
        if pictures:
            ask()
        while asked:
            take()
        return rows

    def _until_closed(self, prepared: Iterator[Prepared]) -> Iterator[Prepared]:
        for one in prepared:
            if self._closed.is_set():
                raise InterruptedError("labelling was stopped")
            yield one


def _prepare(view: View, max_bytes: int | None, item: tuple[Sample, bytes]) -> Prepared:
    """(sample, status, hash and CRC-32 of the image bytes if they were read, uint8 [s, s, 3] if the status is ok)."""
    sample, data = item
    if sample.status != "ok":
        return sample, sample.status, None, None, None
    digest, crc32 = label_files.image_hash(data), zlib.crc32(data)
    try:
        picture = images.load(data, view, max_bytes=max_bytes)
        return sample, "ok", digest, crc32, np.ascontiguousarray(picture.transpose(1, 2, 0))
    except images.BadImage as bad:
        return sample, bad.status, digest, crc32, None
