"""Read the shards whose labels are known once: where each good image lies, and its label.

    index-1a2b3c4d/<source>/<shard>.parquet   index int32, key string, offset int64, size int32, label int32, image_hash uint64
    index-1a2b3c4d/shards.json                {source: {shard name: rows}}
    index-1a2b3c4d/classes.parquet            images per labelled shard and class (pipeline.stages.shuffle)

Every image is decoded, so that what cannot be used is counted and named here, once, and whatever follows can count on the
rest; mistakes in the labels surface before anything is trained.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data import images, label_files, shards
from pipeline.data.classes import by_number
from pipeline.data.shards import Sample, Shard
from pipeline.errors import DataError
from pipeline.plan.context import Context, Result
from pipeline.plan.graph import indexed_of
from pipeline.stages import shuffle
from pipeline.storage.node_cache import Cache

SHARDS = "shards.json"
SMALL_BYTES = 32 << 20  # of shards that one process reads in the time in which a worker starts


@dataclass(frozen=True)
class Indexed:
    """Of one shard: images per class int64 [classes], and what cannot be used as (key, reason)."""

    per_class: np.ndarray
    digest: str  # of the images and labels, in order
    bad: list[tuple[str, str]]


def run(context: Context) -> Result:
    if context.job.generations:
        context.sources["unlabelled"]  # a mistake in its pattern shall not wait until the teacher is trained
    for number, generation in enumerate(context.job.generations):
        by_number(generation.select.thresholds, context.sources.classes, f"generations[{number}].select.thresholds")
    sources = indexed_of(context.job)
    units = [
        (f"{source}/{shard.name}", (source, shard)) for source in sources for shard in context.sources[source].shards
    ]
    names = context.sources.classes
    rows: dict[str, dict[str, int]] = {source: {} for source in sources}
    per_class = {source: np.zeros(len(names), np.int64) for source in sources}
    classes_of: dict[str, dict[int, int]] = {}  # of the labelled shards: {class: images}
    digests: dict[str, dict[str, str]] = {source: {} for source in sources}
    bad: Counter[str] = Counter()
    with context.journal() as log:
        worker = functools.partial(make_worker, context.folder, len(names), context.cache)
        small = sum(shard.size for _, (_, shard) in units) <= SMALL_BYTES
        for number, outcome in enumerate(context.map(worker, units, context.job.workers.label, small=small), 1):
            if outcome.value is None:
                raise DataError(f"cannot index the shard {outcome.name}: {outcome.error}")
            source, _, name = outcome.name.partition("/")
            rows[source][name] = int(outcome.value.per_class.sum())
            digests[source][name] = outcome.value.digest
            per_class[source] += outcome.value.per_class
            if source == "labelled":
                held = np.flatnonzero(outcome.value.per_class)
                classes_of[name] = dict(zip(held.tolist(), outcome.value.per_class[held].tolist(), strict=True))
            for key, reason in outcome.value.bad:
                context.warn(f"image '{key}' of shard {outcome.name} is left out: {reason}")
                bad[f"{source}: {reason}"] += 1
            log.log(number, len(units), shard=outcome.name, images=rows[source][name], bad=bad.total())
    _check(context, per_class, bad)
    ordered = {
        source: {shard.name: rows[source][shard.name] for shard in context.sources[source].shards} for source in sources
    }
    storage.write_json(storage.join(context.folder, SHARDS), ordered)
    shuffle.write_classes(context.folder, [classes_of[name] for name in ordered["labelled"]])
    counts = {source: int(found.sum()) for source, found in per_class.items()}
    line = ", ".join(f"{number:,} {source}" for source, number in counts.items()) + (
        f", {bad.total():,} bad" if bad else ""
    )
    lists = {source: found.tolist() for source, found in per_class.items()}
    # What a source holds, whatever its shards' time stamps: the identity that training, selection and evaluation depend on.
    content = {source: _digest(sorted(found.items())) for source, found in digests.items()}
    info = {"counts": counts, "content": content, "per_class": lists, "bad": dict(bad), "line": line}
    return Result(info, output=_digest([content, sorted(bad.items())]))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _check(context: Context, per_class: dict[str, np.ndarray], bad: Counter[str]) -> None:
    for source, found in per_class.items():
        lost = sum(number for reason, number in bad.items() if reason.startswith(f"{source}:"))
        total = lost + int(found.sum())
        if not total:
            raise DataError(
                f"the {source} shards hold no image (data.{source}: "
                f"{', '.join(shard.name for shard in context.sources[source].shards[:3])}); name shards with images and labels"
            )
        if lost == total or lost > context.job.data.max_bad_fraction * total:
            raise DataError(
                f"{lost} of {total} {source} images cannot be used, more than data.max_bad_fraction "
                f"{context.job.data.max_bad_fraction} allows; mend the shards or raise data.max_bad_fraction"
            )
    missing = [context.sources.classes[number] for number in np.flatnonzero(per_class["labelled"] == 0)]
    if missing:
        context.warn(
            f"no labelled image of {len(missing)} classes ({', '.join(missing[:3])} …): the teacher cannot learn them"
        )


def rows_path(folder: str, source: str, shard: str) -> str:
    return storage.join(folder, source, label_files.file_name(shard))


def make_worker(folder: str, classes: int, cache: Cache | None = None) -> Callable[[tuple[str, Shard]], Indexed]:
    """Returns the function that indexes one (source, shard)."""

    def index(unit: tuple[str, Shard]) -> Indexed:
        source, shard = unit
        reader = shards.stream(shard.path, cache)
        good: list[Sample] = []
        hashes: list[int] = []
        bad: list[tuple[str, str]] = []
        for sample, data in reader:
            reason = _unusable(sample, data)
            if reason:
                bad.append((sample.key, reason))
            else:
                good.append(sample)
                hashes.append(label_files.image_hash(data))
        if reader.cut:
            raise DataError(
                f"the {source} shard {shard.name} is damaged ({reader.cut}); labelled shards must be whole: write it again"
            )
        found = read_labels(shard, good, classes, cache)
        table = pa.table({
            "index": pa.array([s.index for s in good], pa.int32()),
            "key": pa.array([s.key for s in good], pa.string()),
            "offset": pa.array([s.offset for s in good], pa.int64()),
            "size": pa.array([s.size for s in good], pa.int32()),
            "label": pa.array(found, pa.int32()),
            "image_hash": pa.array(hashes, pa.uint64()),
        })  # fmt: skip
        with storage.writing(rows_path(folder, source, shard.name)) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        digest = hashlib.sha256(np.asarray(hashes, "<u8").tobytes() + np.asarray(found, "<i4").tobytes()).hexdigest()
        return Indexed(np.bincount(np.asarray(found, np.int64), minlength=classes), digest, bad)

    return index


def _unusable(sample: Sample, data: bytes) -> str | None:
    if sample.status != "ok":
        return sample.status
    try:
        images.decode(data)
    except images.BadImage as error:
        return error.status
    return None


def read_labels(shard: Shard, samples: list[Sample], classes: int, cache: Cache | None = None) -> list[int]:
    """The class index of each sample: its .cls member, or "label" in its .json member. DataError names the first mistake."""
    texts = shards.read_texts(shard.path, samples, "cls", cache)
    found = []
    for sample, text in zip(samples, texts, strict=True):
        where = f"sample {sample.index} ('{sample.key}') of shard {shard.name}"
        word = (
            text.decode("utf-8", "replace").strip() if text is not None else _label_in_json(shard, sample, where, cache)
        )
        if not word.isascii() or not word.isdigit():
            raise DataError(f"{where} has the label '{word[:40]}'; it must be a class index from 0 to {classes - 1}")
        if int(word) >= classes:
            raise DataError(
                f"{where} has the class index {int(word)}, but classes.json has {classes} classes (0 to {classes - 1}); "
                "correct the label or the class list"
            )
        found.append(int(word))
    return found


def _label_in_json(shard: Shard, sample: Sample, where: str, cache: Cache | None) -> str:
    [text] = shards.read_texts(shard.path, [sample], "json", cache)
    if text is None:
        raise DataError(f"{where} has no label; every labelled sample needs a .cls member with the class index")
    try:
        return str(json.loads(text)["label"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f'{where} has a .json member without a "label"; write the class index there or in a .cls member'
        ) from error
