"""Indexes labelled shards: where each good image lies, its label, and what cannot be used.

    <folder>/<source>/<shard>.parquet   index int32, key string, offset int64, size int32, label int32,
                                        image_hash uint64

Every image is decoded, so that what cannot be used is counted and named here, once, and whatever follows can count on
the rest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data import images, label_files, parquet_files, shards
from pipeline.data.shards import Sample, Shard
from pipeline.errors import DataError
from pipeline.storage.node_cache import Cache


@dataclass(frozen=True)
class Indexed:
    """Of one shard: images per class int64 [classes], and what cannot be used as (key, reason)."""

    per_class: np.ndarray
    digest: str  # of the images and labels, in order
    bad: list[tuple[str, str]]


def rows_path(folder: str, source: str, shard: str) -> str:
    return storage.join(folder, source, label_files.file_name(shard))


def metadata_of(folder: str, source: str, shard: str) -> dict[str, str]:
    """What an index file says of itself: no other one may lie in its place."""
    return {"stage": storage.name(folder), "source": source, "shard": shard}


def make_indexer(folder: str, classes: int, cache: Cache | None = None) -> Callable[[tuple[str, Shard]], Indexed]:
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
        if reader.damage:
            raise DataError(
                f"the {source} shard {shard.name} is damaged ({reader.damage}); "
                "labelled shards must be whole: write it again"
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
        parquet_files.write_table(rows_path(folder, source, shard.name), table, metadata_of(folder, source, shard.name))
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
    """The class index of each sample: its .cls member, or "label" in its .json member. DataError names the first
    mistake."""
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
                f"{where} has the class index {int(word)}, but classes.json has {classes} classes (0 to "
                f"{classes - 1}); correct the label or the class list"
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


def image_hashes(folder: str, shards: Iterable[tuple[str, str]]) -> np.ndarray:
    """Sorted hashes uint64 of all good images of some (source, shard name)s that are indexed in `folder`."""
    found = [
        parquet_files.read_table(rows_path(folder, source, name), ["image_hash"])["image_hash"].to_numpy()
        for source, name in shards
    ]
    return np.unique(np.concatenate(found).astype(np.uint64))
