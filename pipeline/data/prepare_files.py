"""Turns images into labelled or unlabelled shards: those of a folder, or of a table of paths or of image bytes.

Image files are copied byte for byte. Every other file ends in bad_files.txt: what cannot be read or decoded as bad,
what is no picture, or of a kind that is not decoded here, as skipped.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from pipeline import storage
from pipeline.data import split_off as splits
from pipeline.data.classes import alike, plain
from pipeline.data.picture_files import Skipped, images_below, suffix_of
from pipeline.data.prepare_digits import digits as digits
from pipeline.data.prepare_digits import shifted
from pipeline.data.samples import IMAGE_SUFFIXES
from pipeline.data.shard_writer import (
    Item,
    Progress,
    Written,
    agree_on_classes,
    holding_classes,
    split_shards,
    write_split,
)
from pipeline.errors import ConfigError, DataError

SHARD_BYTES = 256 << 20
SHARD_SAMPLES = 10_000
MAX_BAD = 0.1
SPLIT = re.compile(r"[A-Za-z0-9_]+")
MEANT = {"validation": "val", "valid": "val", "train": "labelled", "training": "labelled", "unlabeled": "unlabelled"}

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """How shards are written. `max_bad`: the share of the pictures that may be bad or of a kind not decoded here."""

    shard_bytes: int = SHARD_BYTES
    shard_samples: int = SHARD_SAMPLES
    seed: int = 0
    workers: int | None = None
    max_bad: float = MAX_BAD
    progress: Progress | None = None


def folder(
    directory: str,
    out: str,
    *,
    split: str = "labelled",
    labelled: bool = True,
    split_off: Mapping[str, float] | None = None,
    leave_out: Sequence[str] = (),
    **limits: Any,
) -> dict[str, Any]:
    """Shards `<split>-000.tar` … of all images below `directory`, in an order drawn by `seed`; `limits`: see Limits.

    `labelled`: the sub-folder directly in `directory` is the class. Where `out` has a classes.json already (another
    split was prepared there), its list is used. `split_off`: shares of each class for shards of their own, such as
    {"validation": 0.15, "test": 0.15} (pipeline.data.split_off); `leave_out`: folders that are passed over. Returns
    counts: shards, images, bad, skipped, classes, and images by split where some were split off.
    """
    shares = splits.shares_of(split_off or {}, split)
    if shares and not labelled:
        raise ConfigError("only labelled images can be split off: drop --split-off, or --unlabelled")
    skipped: Skipped = []
    paths = images_below(directory, skipped, leave_out)
    if not paths:
        raise DataError(
            f"{directory} holds no image files"
            + (f", but {len(skipped)} others such as {skipped[0][0]} ({skipped[0][1]})" if skipped else "")
            + f"; known suffixes are {', '.join(IMAGE_SUFFIXES)}"
        )
    inside = [Path(path).relative_to(directory).parts for path in paths]
    sources = [_Source(path, name="/".join(parts)) for path, parts in zip(paths, inside, strict=True)]
    if not labelled:
        return _write(out, {split: (sources, None)}, [], skipped, Limits(**limits))
    if loose := [path for path, parts in zip(paths, inside, strict=True) if len(parts) == 1]:
        raise DataError(
            f"{loose[0]} lies in no class sub-folder of {directory}; move it "
            "into one, or prepare the folder as unlabelled"
        )
    labels, names = _by_name(out, [parts[0] for parts in inside])
    goes_to: list[str | None] = [None] * len(paths)
    if shares:
        goes_to = splits.divide(splits.content_hashes(paths), labels, shares, names, Limits(**limits).seed)
    parts = {
        name: (
            [source for source, to in zip(sources, goes_to, strict=True) if (to or split) == name],
            [label for label, to in zip(labels, goes_to, strict=True) if (to or split) == name],
        )
        for name in (split, *shares)
    }
    return _write(out, parts, names, skipped, Limits(**limits))


def table(
    path: str,
    out: str,
    *,
    split: str = "labelled",
    image: str = "path",
    label: str | None = "label",
    label_is: str = "name",
    **limits: Any,
) -> dict[str, Any]:
    """Shards of the images that a Parquet or CSV file names, or holds, in its column `image`, as `folder` writes them.

    Relative paths start at the table's folder; a column of bytes, or of {bytes, path} as Hugging Face writes it, holds
    the images themselves. `label` is the column of class names, as text whatever they look like, or with
    `label_is="index"` of class indexes; None for unlabelled shards.
    """
    if label_is not in ("name", "index"):
        raise ConfigError(f"labels are '{label_is}'; allowed are name and index")
    frame = _read_table(path)
    for column in (image, label):
        if column is not None and column not in frame:
            raise DataError(f"{path} has no column '{column}'; its columns are {', '.join(map(str, frame.columns))}")
        if column is not None and (empty := [row for row, value in enumerate(frame[column]) if _is_nothing(value)]):
            raise DataError(f"{path}: row {empty[0]} has nothing in column '{column}'; fill it or remove the row")
    if frame.empty:
        raise DataError(f"{path} has no rows; give a table with a row per image")
    base = Path(path).absolute().parent
    sources = [_source(value, number, base, path) for number, value in enumerate(frame[image])]
    if label is None:
        return _write(out, {split: (sources, None)}, [], [], Limits(**limits))
    texts = [str(value) for value in frame[label]]
    labels, names = _by_name(out, texts) if label_is == "name" else _by_index(path, out, texts, label)
    return _write(out, {split: (sources, labels)}, names, [], Limits(**limits))


@dataclass(frozen=True)
class _Source:
    """Where an image comes from: a file, or `data`, of which `path` is a name for people. `name`: the manifest's path,
    None for an image that was no file."""

    path: str
    data: bytes = b""
    name: str | None = None


def _source(value: Any, number: int, base: Path, table: str) -> _Source:
    if isinstance(value, dict):
        if value.get("bytes"):
            shown = f"{value.get('path') or f'row {number}'} of {Path(table).name}"
            return _Source(shown, bytes(value["bytes"]), value.get("path"))
        value = value.get("path") or ""
    if isinstance(value, bytes | bytearray | memoryview):
        return _Source(f"row {number} of {Path(table).name}", bytes(value))
    text = str(value)
    return _Source(text if storage.is_url(text) else str(base / text), name=storage.redact(text))


def _is_nothing(value: Any) -> bool:
    if isinstance(value, dict):
        return not (value.get("bytes") or value.get("path"))
    return value is None or value is pandas.NaT or value is pandas.NA or value != value or value in ("", b"")


def _read_table(path: str) -> pandas.DataFrame:
    """All that a CSV file holds as text: nothing is guessed of `NA`, `001` or `true`."""
    suffix = suffix_of(path)
    if suffix not in ("parquet", "csv"):
        raise DataError(f"{path} is neither .parquet nor .csv; those are the tables that can be prepared")
    try:
        if suffix == "parquet":
            return pandas.read_parquet(path, dtype_backend="pyarrow").astype(object)
        return pandas.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no table {path}; give a .parquet or .csv file of image paths") from None
    except ValueError as error:  # pyarrow's and pandas' parsers both raise kinds of it
        raise DataError(f"{path} cannot be read as a {suffix} table: {error}") from error


def _by_name(out: str, texts: list[str]) -> tuple[list[int], list[str]]:
    """Class index of each label, and all class names; new ones are sorted as text."""
    names = agree_on_classes(out, sorted({plain(text) for text in texts}))
    for one, other in alike(names)[:3]:
        log.warning("the classes '%s' and '%s' differ in case or Unicode form alone", one, other)
    index = {plain(name): number for number, name in enumerate(names)}
    return [index[plain(text)] for text in texts], names


def _by_index(path: str, out: str, texts: list[str], column: str) -> tuple[list[int], list[str]]:
    wrong = next((text for text in texts if not (text.isascii() and text.strip().isdigit() and len(text) < 20)), None)
    if wrong is not None:
        raise DataError(f"{path}: column '{column}' holds '{wrong[:40]}'; class indexes are whole numbers from 0")
    numbers = [int(text) for text in texts]
    names = agree_on_classes(out, [])
    if names and max(numbers) >= len(names):
        raise DataError(
            f"{path}: column '{column}' holds class {max(numbers)}, but {storage.redact(out)}/classes.json has "
            f"{len(names)} classes; correct the labels or choose another folder"
        )
    return numbers, names or [str(number) for number in range(max(numbers) + 1)]


def _write(
    out: str,
    parts: Mapping[str, tuple[list[_Source], list[int] | None]],
    names: list[str],
    skipped: Skipped,
    limits: Limits,
) -> dict[str, Any]:
    """`parts`: by split its images and their class indexes, None for unlabelled ones; `skipped` belong to the first."""
    for split in parts:
        if not SPLIT.fullmatch(split):
            raise ConfigError(f"'{split}' cannot name a split; use letters, digits and underscores")
        if split in MEANT:
            log.warning("a job looks for %s-*.tar unless data says otherwise, not for %s-*.tar", MEANT[split], split)
    if limits.shard_bytes < 1 or limits.shard_samples < 1:
        raise ConfigError(
            f"a shard of {limits.shard_bytes} bytes and {limits.shard_samples} samples is impossible; give at least 1"
        )
    first = next(iter(parts))
    shards = {split: _shards(sources, labels, limits) for split, (sources, labels) in parts.items()}
    before, total = 0, sum(len(sources) for sources, _ in parts.values())
    results: dict[str, Written] = {}
    with holding_classes(out, names if parts[first][1] is not None else None):
        # Those that are there already first: what differs is refused before anything is written.
        for split in sorted(parts, key=lambda split: not fnmatch.filter(storage.listdir(out), f"{split}-*.tar")):
            results[split] = write_split(
                out,
                split,
                shards[split],
                workers=limits.workers,
                progress=shifted(limits.progress, before, total),
                skipped=skipped if split == first else [],
            )
            before += len(parts[split][0])
    written, bad = (sum(count) for count in zip(*((r.images, len(r.bad)) for r in results.values()), strict=True))
    lost = bad + sum(reason.endswith("is not decoded here") for _, reason in skipped)
    if lost > limits.max_bad * (lost + written):
        raise DataError(
            f"{lost} of {lost + written} pictures are bad or not decoded here, more than --max-bad "
            f"{limits.max_bad:g} allows; {storage.redact(storage.join(out, 'bad_files.txt'))} lists them: mend "
            "or remove them, or go on with the rest, which is written, by `noisy-lambda prepare` and a higher --max-bad"
        )
    of_split = {split: results[split].images for split in parts} if len(parts) > 1 else {}
    return {
        "shards": sum(len(of_part) for of_part in shards.values()),
        "images": written,
        **of_split,
        "bad": bad,
        "skipped": len(skipped),
        "classes": len(names),
    }


def _shards(sources: list[_Source], labels: list[int] | None, limits: Limits) -> list[list[Item]]:
    # Classes must not lie together in a shard: training shuffles only so far. RandomState never changes its stream.
    order = np.random.RandomState(limits.seed).permutation(len(sources))
    items = [_item(number, sources[i], None if labels is None else labels[i]) for number, i in enumerate(order)]
    sizes = [len(item.data) or _size(item.path) for item in items]
    return [items[part.start : part.stop] for part in split_shards(sizes, limits.shard_bytes, limits.shard_samples)]


def _item(number: int, source: _Source, label: int | None) -> Item:
    return Item(_key(number, source.path), _image_suffix(source.path), label, source.path, source.data, source.name)


def _key(number: int, path: str) -> str:
    """The running number, which makes it unique, and the file's name without the dots that would end a key."""
    stem = Path(path).stem
    return f"{number:08d}_" + re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]


def _image_suffix(path: str) -> str:
    return suffix_of(path) if suffix_of(path) in IMAGE_SUFFIXES else "jpg"


def _size(path: str) -> int:
    """Bytes of a local file; a missing one is found bad when its turn comes."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
