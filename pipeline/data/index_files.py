"""Indexes labelled shards: where each good image lies, its label, and what cannot be used.

    <folder>/<source>/<shard>.parquet   index int32, key string, offset int64, size int32, label int32,
                                        image_hash uint64, crc32 uint32

Every image is decoded, so that what cannot be used is counted and named here, once, and whatever follows can count on
the rest.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.data import images, label_files, parquet_files, shards
from pipeline.data.classes import plain
from pipeline.data.corrections import NONE, Corrections
from pipeline.data.samples import RULE, Left, Sample
from pipeline.data.shards import Shard
from pipeline.errors import DataError
from pipeline.storage.node_cache import Cache

NO_LABEL = -1


@dataclass(frozen=True)
class Indexed:
    """Of one shard: images per class int64 [classes], and what cannot be used as (key, reason)."""

    per_class: np.ndarray
    digest: str  # of the images and labels, in order
    bad: list[tuple[str, str]]
    left: Left
    uncorrected: str  # `digest` of what lies in the shard, whatever people say of it
    dropped: list[int]  # hashes of images that people took out


def rows_path(folder: str, source: str, shard: str) -> str:
    return storage.join(folder, source, label_files.file_name(shard))


def metadata_of(folder: str, source: str, shard: str) -> dict[str, str]:
    """What an index file says of itself, beside the number of the sample rule: no other one may lie in its place."""
    return {"stage": storage.name(folder), "source": source, "shard": shard}


def make_indexer(
    folder: str,
    names: Sequence[str],
    cache: Cache | None = None,
    max_bytes: int | None = None,
    corrections: Corrections = NONE,
    meanings: Mapping[str, Sequence[int]] | None = None,
) -> Callable[[tuple[str, Shard]], Indexed]:
    """Returns the function that indexes one (source, shard) with labels of the classes `names`; an image may take
    `max_bytes` of memory. What `corrections` say goes before what lies in the shard. `meanings`: of sources with a
    class list of their own, what its indexes are in `names`."""
    all_classes = Classes(names)
    of_source = {
        source: Classes([names[number] for number in meant], meant) for source, meant in (meanings or {}).items()
    }

    def index(unit: tuple[str, Shard]) -> Indexed:
        source, shard = unit
        classes = of_source.get(source, all_classes)
        reader = shards.stream(shard.path, cache)
        good: list[Sample] = []
        hashes: list[int] = []
        checksums: list[int] = []
        bad: list[tuple[str, str]] = []
        corrected = corrections.of(source, shard.name)
        samples = 0
        for sample, data in reader:
            samples += 1
            correction = corrected.get(sample.index)
            if correction:
                correction.check(data, _where(sample, shard))
            reason = _unusable(sample, data, max_bytes)
            if reason and correction and correction.label is None:
                continue
            if reason:
                bad.append((sample.key, reason))
            else:
                good.append(sample)
                hashes.append(label_files.image_hash(data))
                checksums.append(zlib.crc32(data))
        if reader.damage:
            raise DataError(
                f"the {source} shard {shard.name} is damaged ({reader.damage}); "
                "labelled shards must be whole: write it again"
            )
        for index, correction in corrected.items():
            if index >= samples:
                raise DataError(correction.missing(index, shard.name, samples))
        given = read_labels(shard, good, classes, cache, reader.apart, corrected)
        said = [
            corrected[s.index].label if s.index in corrected else label for s, label in zip(good, given, strict=True)
        ]
        table = pa.table({
            "index": pa.array([s.index for s in good], pa.int32()),
            "key": pa.array([s.key for s in good], pa.string()),
            "offset": pa.array([s.offset for s in good], pa.int64()),
            "size": pa.array([s.size for s in good], pa.int32()),
            "label": pa.array(said, pa.int32()),
            "image_hash": pa.array(hashes, pa.uint64()),
            "crc32": pa.array(checksums, pa.uint32()),
        })  # fmt: skip
        dropped = table.filter(table["label"].is_null())["image_hash"].to_pylist()
        table = table.filter(table["label"].is_valid()) if dropped else table
        metadata = {**metadata_of(folder, source, shard.name), "rule": RULE}
        parquet_files.write_table(rows_path(folder, source, shard.name), table, metadata)
        found = table["label"].to_numpy()
        digest = content_digest(table["image_hash"].to_numpy(), found)
        per_class = np.bincount(found.astype(np.int64), minlength=len(names))
        return Indexed(per_class, digest, bad, reader.left, content_digest(hashes, given), dropped)

    return index


def _where(sample: Sample, shard: Shard) -> str:
    return f"sample {sample.index} ('{sample.key}') of shard {shard.name}"


def _unusable(sample: Sample, data: bytes, max_bytes: int | None) -> str | None:
    if sample.status != "ok":
        return sample.status
    try:
        images.decode(data, max_bytes=max_bytes)
    except images.BadImage as error:
        return error.status
    return None


def content_digest(hashes: npt.ArrayLike, labels: npt.ArrayLike) -> str:
    """Identity of images and labels, in order."""
    return hashlib.sha256(np.asarray(hashes, "<u8").tobytes() + np.asarray(labels, "<i4").tobytes()).hexdigest()


class Classes:
    """What labels mean: an all-digit `.cls` or a JSON number is a class index, a JSON string or other text the name of
    a class."""

    def __init__(self, names: Sequence[str], meant: Sequence[int] | None = None) -> None:
        """`meant`: what `index_of` says of each, if not its place in `names`."""
        self.names = names
        self.meant = range(len(names)) if meant is None else meant
        self.number = {plain(name): number for number, name in enumerate(names)}

    def index_of(self, label: object, where: str) -> int:
        """The class index; DataError where the label is none."""
        count, shown = len(self.names), str(label)[:40]
        if isinstance(label, str):
            text = plain(label)
            named = self.number.get(text)
            digits = text.isascii() and text.isdigit()
            if digits and named is not None and not (len(text) < 20 and int(text) == named):
                raise DataError(
                    f"{where} has the label '{shown}', which is the name of class {named} and another class's index; "
                    "rename that class, or give the class index as a JSON number"
                )
            if named is not None:
                return self.meant[named]
            close = difflib.get_close_matches(text, self.number, 1, 0.6)
            hint = f", such as '{close[0]}'" if close else ""
            raise DataError(
                f"{where} has the label '{shown}'; it must be a class index from 0 to {count - 1}, or a class name of "
                f"classes.json{hint}"
            )
        if not isinstance(label, int) or isinstance(label, bool):
            raise DataError(f"{where} has the label '{shown}'; it must be a class index from 0 to {count - 1}")
        if not 0 <= label < count:
            raise DataError(
                f"{where} has the class index {shown}, but classes.json has {count} classes (0 to "
                f"{count - 1}); correct the label or the class list"
            )
        return self.meant[label]


def read_labels(
    shard: Shard,
    samples: list[Sample],
    classes: Classes,
    cache: Cache | None = None,
    apart: Collection[str] = (),
    corrected: Collection[int] = (),
) -> list[int]:
    """The class index of each sample: its .cls member, or "label" in its .json member. DataError names the first
    mistake; one in a `corrected` sample is NO_LABEL. `apart`: keys whose text lies away from any image."""
    texts = shards.read_texts(shard.path, samples, "cls", cache)
    others = shards.read_texts(shard.path, [s for s in samples if "cls" not in s.texts], "json", cache)
    found = []
    for sample, text in zip(samples, texts, strict=True):
        where = _where(sample, shard)
        other = next(others) if text is None else None
        try:
            label = _label_in_json(other, where, sample.key in apart) if text is None else _label_in_text(text)
            found.append(classes.index_of(label, where))
        except DataError:
            if sample.index not in corrected:
                raise
            found.append(NO_LABEL)
    return found


def _label_in_text(text: bytes) -> int | str:
    word = text.decode("utf-8-sig", "replace").strip()
    return int(word) if word.isascii() and word.isdigit() and len(word) < 20 else word


def _label_in_json(text: bytes | None, where: str, apart: bool) -> object:
    if text is None and apart:
        raise DataError(
            f"{where} has no label beside it: its .cls or .json member lies elsewhere in the tar; write the tar again "
            "with what belongs together adjacent, as when its members are sorted by name"
        )
    if text is None:
        raise DataError(f"{where} has no label; every labelled sample needs a .cls member with the class index")
    try:
        found: object = json.loads(text.decode("utf-8-sig"))["label"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f'{where} has a .json member without a "label"; write the class index there or in a .cls member'
        ) from error
    return found


def image_hashes(folder: str, shards: Iterable[tuple[str, str]]) -> np.ndarray:
    """Sorted hashes uint64 of all good images of some (source, shard name)s that are indexed in `folder`."""
    found = [
        parquet_files.read_table(rows_path(folder, source, name), ["image_hash"])["image_hash"].to_numpy()
        for source, name in shards
    ]
    return np.unique(np.concatenate(found).astype(np.uint64))
