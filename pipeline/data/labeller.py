"""Label shards: read one tar, ask the teacher about every image, write one label file.

`make_labeller(spec)` loads the teacher once and returns the function that labels a shard: `Cluster.map`
takes `functools.partial(make_labeller, spec)` as its `make_worker`. Threads read and decode ahead of the
network. A forward batch holds images of one shard only and its size is fixed, so the rows of a shard depend
on the shard, the teacher, the batch size and the device, and on nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
import pyarrow as pa
import torch
from torch import nn

from pipeline import storage
from pipeline.data import images, labels, shards
from pipeline.data.ahead import run_ahead
from pipeline.data.images import View
from pipeline.data.shards import Sample, Shard
from pipeline.errors import DataError, WeightsError

Prepared = tuple[Sample, str, int | None, npt.NDArray[np.uint8] | None]


@dataclass(frozen=True)
class LabelSpec:
    """What a labelling worker needs; picklable. `load` gives the teacher and its card (weights.load_model)."""

    load: Callable[[str], tuple[nn.Module, Any]]
    weights: str
    teacher: str  # sha256 of the weights' file
    classes: tuple[str, ...]
    out: str
    batch: int = 256
    threads: int = 2  # that decode
    device: str = "auto"


@dataclass(frozen=True)
class Teacher:
    """The teacher on its device, never noised: eval mode, the deterministic view."""

    module: nn.Module
    view: View
    device: torch.device
    dtype: torch.dtype

    def probabilities(self, batch: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """float32 [b, classes] of images uint8 [b, 3, s, s]; softmax of the logits in float32."""
        with (
            torch.inference_mode(),
            torch.autocast(self.device.type, self.dtype, enabled=self.device.type == "cuda"),
        ):
            pixels = images.normalise(torch.from_numpy(batch).to(self.device), self.view)
            logits = self.module(pixels.contiguous(memory_format=torch.channels_last))
            probs: npt.NDArray[np.float32] = logits.float().softmax(1).clamp_(max=1).cpu().numpy()
        return probs


@dataclass
class Rows:
    """The rows of a shard, as they come in."""

    samples: list[Sample] = field(default_factory=list)
    status: list[str] = field(default_factory=list)
    image_hash: list[int | None] = field(default_factory=list)
    good: list[int] = field(default_factory=list)  # rows that `probs` speaks of
    found: list[labels.Predictions] = field(default_factory=list)

    def table(self, num_classes: int) -> pa.Table:
        columns: dict[str, list[Any]] = {
            "index": [sample.index for sample in self.samples],
            "key": [labels.printable_key(sample.key) for sample in self.samples],
            "offset": [sample.offset for sample in self.samples],
            "size": [sample.size for sample in self.samples],
            "status": self.status,
            "image_hash": self.image_hash,
        }
        nothing = labels.rows_from_probs(np.zeros((0, num_classes), np.float32))
        parts = [nothing, *self.found]
        found = labels.Predictions(
            np.concatenate([part.label for part in parts]),
            np.concatenate([part.confidence for part in parts]),
            np.concatenate([part.classes for part in parts]),
            np.concatenate([part.probs for part in parts]),
        )
        return labels.make_table(columns, np.array(self.good, np.int64), found)


def make_labeller(spec: LabelSpec) -> Callable[[Shard], dict[str, Any]]:
    """Load the teacher once; the function returned labels a shard (`label_shard`). Raises WeightsError."""
    module, card = spec.load(spec.weights)
    if list(card.classes) != list(spec.classes):
        raise WeightsError(
            f"the teacher {storage.redact(spec.weights)} knows {len(card.classes)} classes "
            f"({', '.join(card.classes[:3])} …), and this job has {len(spec.classes)} "
            f"({', '.join(spec.classes[:3])} …); give a teacher that was trained on the job's class list"
        )
    device = torch.device(spec.device if spec.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    module = module.eval().requires_grad_(False).to(device).to(memory_format=torch.channels_last)
    teacher = Teacher(module, card.view(), device, torch.bfloat16 if bf16 else torch.float32)
    return functools.partial(label_shard, spec, teacher)


def label_shard(spec: LabelSpec, teacher: Teacher, shard: Shard) -> dict[str, Any]:
    """Write `<out>/<shard>.parquet` unless a finished one is there, and return what its metadata says.

    {"shard", "rows", "counts" (by status), "without_image", "cut" (why the tar stops early, or None),
    "seconds" (by part), …} and "skipped": nothing had to be done. Images that give no picture have a row
    with their status. DataError where nothing at all could be read.
    """
    path = storage.join(spec.out, labels.file_name(shard.name))
    identity = {
        "shard": shard.name,
        "shard_size": shard.size,
        "teacher": spec.teacher,
        "class_list": labels.class_list_hash(spec.classes),
    }
    finished = _finished(path, identity)
    if finished is not None:
        return {**finished, "skipped": True}
    start = time.perf_counter()
    seconds = {"forward": 0.0}
    reader = shards.stream(shard.path)
    rows = _label(reader, spec, teacher, seconds)
    if not rows.samples and reader.cut is not None:
        raise DataError(
            f"shard {shard.name} is damaged before its first image ({reader.cut}), so nothing in it can be "
            "labelled; copy it again, or raise data.max_bad_shards"
        )
    table = rows.table(len(spec.classes))
    seconds["total"] = time.perf_counter() - start
    metadata = {
        **identity,
        "rows": len(rows.samples),
        "counts": dict(sorted(Counter(rows.status).items())),
        "without_image": reader.without_image,
        "cut": reader.cut,
        "transform": dataclasses.asdict(teacher.view),
        "dtype": str(teacher.dtype).removeprefix("torch."),
        "device": teacher.device.type,
        "batch": spec.batch,
        "versions": {"torch": torch.__version__, "pillow": PIL.__version__},
        "seconds": {part: round(value, 3) for part, value in sorted(seconds.items())},
    }
    labels.write_labels(path, table, metadata)
    return {**metadata, "skipped": False}


def _finished(path: str, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The metadata of a label file that is there and fits, else None."""
    if not storage.exists(path):
        return None
    try:
        metadata = labels.read_metadata(path)
        labels.check_labels(metadata, identity, path)
    except DataError:
        return None
    return metadata


def _label(reader: shards.Reader, spec: LabelSpec, teacher: Teacher, seconds: dict[str, float]) -> Rows:
    rows = Rows()
    size = teacher.view.size
    batch = np.empty((spec.batch, 3, size, size), np.uint8)
    filled = 0
    work = functools.partial(_prepare, teacher.view)
    with contextlib.closing(run_ahead(reader, work, spec.threads, 2 * spec.batch, seconds)) as prepared:
        for sample, status, digest, picture in prepared:
            rows.samples.append(sample)
            rows.status.append(status)
            rows.image_hash.append(digest)
            if picture is None:
                continue
            batch[filled] = picture
            rows.good.append(sample.index)
            filled += 1
            if filled == spec.batch:
                _forward(batch, teacher, rows, seconds)
                filled = 0
    if filled:
        _forward(batch[:filled], teacher, rows, seconds)
    return rows


def _prepare(view: View, item: tuple[Sample, bytes]) -> Prepared:
    """(sample, status, hash of the image bytes if they were read, uint8 [3, s, s] if the status is ok)."""
    sample, data = item
    if sample.status != "ok":
        return sample, sample.status, None, None
    digest = labels.image_hash(data)
    try:
        return sample, "ok", digest, images.load(data, view)
    except images.BadImage as bad:
        return sample, bad.status, digest, None


def _forward(batch: npt.NDArray[np.uint8], teacher: Teacher, rows: Rows, seconds: dict[str, float]) -> None:
    """Ask about the last len(batch) good rows; those without a finite answer become `not_finite`."""
    start = time.perf_counter()
    probs = teacher.probabilities(batch)
    finite = np.flatnonzero(np.isfinite(probs).all(axis=1))
    if len(finite) < len(batch):
        asked = np.array(rows.good[-len(batch) :])
        for row in np.delete(asked, finite):
            rows.status[row] = "not_finite"
        rows.good[-len(batch) :] = asked[finite].tolist()
        probs = probs[finite]
    rows.found.append(labels.rows_from_probs(probs))
    seconds["forward"] += time.perf_counter() - start
