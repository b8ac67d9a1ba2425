"""Indexes shards of scenes, and reads what training and tests need of them.

    <folder>/<source>/<shard>.parquet   index int32, key string, offset int64, size int32, image_hash uint64,
                                        crc32 uint32, label int32 (objects that are no crowd), scene string

Every image is decoded, so that what cannot be used is counted and named here, once.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.data import images, parquet_files, shards
from pipeline.data.index_files import metadata_of, rows_path
from pipeline.data.label_files import image_hash
from pipeline.data.samples import RULE, Left, Sample
from pipeline.data.shards import Shard
from pipeline.detection import scene as scenes
from pipeline.detection.scene import Scene
from pipeline.errors import DataError
from pipeline.loading import training_rows
from pipeline.loading.training_rows import TrainingRows, TrainingShard
from pipeline.storage.node_cache import Cache

Size = tuple[int, int]


@dataclass(frozen=True)
class SceneRows:
    """`places`: where the images lie; `texts`: their scenes."""

    places: TrainingRows
    texts: Sequence[str]
    path: str

    @property
    def nbytes(self) -> int:
        return self.places.nbytes + sum(map(len, self.texts))

    def scene(self, row: int, classes: Sequence[str]) -> Scene:
        return scenes.parse(self.texts[row], f"image {self.places.index[row]} of {self.path}", classes)


def load_rows(shard: TrainingShard) -> SceneRows:
    """The rows of an indexed shard. DataError: they are not what was written."""
    places = training_rows.load_rows(shard, soft=False)
    texts = parquet_files.read_expected(shard.rows, ["scene"], shard.expected)["scene"].to_pylist()
    return SceneRows(places, texts, shard.path)


@dataclass(frozen=True)
class Indexed:
    """Of one shard: images, objects per class int64 [classes], crowds, images without an object, and what was dropped
    when it was prepared, by reason; `bad` images as (key, reason)."""

    images: int
    per_class: np.ndarray
    crowds: int
    empty: int
    dropped: Counter[str]
    bad: list[tuple[str, str]]
    left: Left
    digest: str


def make_indexer(
    folder: str, classes: Sequence[str], cache: Cache | None = None, max_bytes: int | None = None
) -> Callable[[tuple[str, Shard]], Indexed]:
    """The function that indexes one (source, shard) of scenes with these classes; an image may take `max_bytes` of
    memory. DataError: a sample without a scene, or one that is damaged."""
    number = {name: place for place, name in enumerate(classes)}

    def index(unit: tuple[str, Shard]) -> Indexed:
        source, shard = unit
        reader = shards.stream(shard.path, cache)
        good: list[tuple[Sample, int, int, tuple[Size, Size]]] = []
        bad: list[tuple[str, str]] = []
        for sample, data in reader:
            try:
                good.append((sample, image_hash(data), zlib.crc32(data), _sizes(sample, data, max_bytes)))
            except images.BadImage as error:
                bad.append((sample.key, error.status))
        texts = shards.read_texts(shard.path, [sample for sample, *_ in good], "json", cache)
        kept: list[tuple[Sample, int, int]] = []
        found: list[Scene] = []
        lines: list[str] = []
        for (sample, hash_, checksum, sizes), text in zip(good, texts, strict=True):
            where = f"sample {sample.index} ('{sample.key}') of shard {shard.name}"
            if text is None:
                raise DataError(f"{where} has no .json member; write the shard by `noisy-lambda prepare coco`")
            scene = scenes.parse(text, where, number)
            if (scene.width, scene.height) != sizes[0 if scene.upright else 1]:
                bad.append((sample.key, "other_size"))
                continue
            kept.append((sample, hash_, checksum))
            found.append(scene)
            lines.append(text.decode())
        _write(rows_path(folder, source, shard.name), metadata_of(folder, source, shard.name), kept, found, lines)
        per_class = np.zeros(len(classes), np.int64)
        dropped: Counter[str] = Counter()
        for scene in found:
            dropped.update(scene.dropped)
            for thing in scene.single:
                per_class[number[thing.name]] += 1
        return Indexed(
            images=len(kept),
            per_class=per_class,
            crowds=sum(thing.crowd for scene in found for thing in scene.things),
            empty=sum(not scene.single for scene in found),
            dropped=dropped,
            bad=bad,
            left=reader.left,
            digest=hashlib.sha256(
                "\n".join(f"{hash_} {line}" for (_, hash_, _), line in zip(kept, lines, strict=True)).encode()
            ).hexdigest(),
        )

    return index


def _sizes(sample: Sample, data: bytes, max_bytes: int | None) -> tuple[Size, Size]:
    """Width and height as EXIF turns the image, and as it lies in the file. BadImage: it cannot be decoded."""
    if sample.status != "ok":
        raise images.BadImage(sample.status, "")
    upright = images.decode(data, max_bytes=max_bytes).size
    with images.telling(data):
        return upright, images.read_header(data).size


def _write(
    path: str,
    metadata: Mapping[str, str],
    kept: Sequence[tuple[Sample, int, int]],
    found: Sequence[Scene],
    lines: Sequence[str],
) -> None:
    samples = [sample for sample, *_ in kept]
    table = pa.table({
        "index": pa.array([sample.index for sample in samples], pa.int32()),
        "key": pa.array([sample.key for sample in samples], pa.string()),
        "offset": pa.array([sample.offset for sample in samples], pa.int64()),
        "size": pa.array([sample.size for sample in samples], pa.int32()),
        "image_hash": pa.array([hash_ for _, hash_, _ in kept], pa.uint64()),
        "crc32": pa.array([checksum for *_, checksum in kept], pa.uint32()),
        "label": pa.array([len(scene.single) for scene in found], pa.int32()),
        "scene": pa.array(lines, pa.string()),
    })  # fmt: skip
    parquet_files.write_table(path, table, {**metadata, "rule": RULE})
