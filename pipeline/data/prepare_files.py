"""Turns images into labelled or unlabelled shards: those of a folder, or of a table of paths.

Image files are copied byte for byte; what cannot be read or decoded is listed in bad_files.txt and left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas

from pipeline import storage
from pipeline.data.prepare_digits import digits as digits
from pipeline.data.samples import IMAGE_SUFFIXES
from pipeline.data.shard_writer import Item, Progress, agree_on_classes, save_classes, split_shards, write_split
from pipeline.errors import ConfigError, DataError

SHARD_BYTES = 256 << 20
SHARD_SAMPLES = 10_000
SPLIT = re.compile(r"[A-Za-z0-9_]+")


def folder(
    directory: str,
    out: str,
    *,
    split: str = "labelled",
    labelled: bool = True,
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int = SHARD_SAMPLES,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Shards `<split>-000.tar` … of all images below `directory`, in an order drawn by `seed`.

    `labelled`: the sub-folder directly in `directory` is the class. Where `out` has a classes.json already (another
    split was prepared there), its list is used. Returns counts: shards, images, bad, classes.
    """
    if not Path(directory).is_dir():
        raise DataError(f"there is no folder {directory} to prepare; give the folder that holds the images")
    paths = sorted(_images(directory))
    if not paths:
        raise DataError(f"{directory} holds no image files; known suffixes are {', '.join(IMAGE_SUFFIXES)}")
    if not labelled:
        return _write(out, split, paths, None, [], shard_bytes, shard_samples, seed, workers, progress)
    inside = [Path(path).relative_to(directory).parts for path in paths]
    if loose := [path for path, parts in zip(paths, inside, strict=True) if len(parts) == 1]:
        raise DataError(
            f"{loose[0]} lies in no class sub-folder of {directory}; move it "
            "into one, or prepare the folder as unlabelled"
        )
    names = agree_on_classes(out, sorted({parts[0] for parts in inside}))
    index = {name: number for number, name in enumerate(names)}
    labels = [index[parts[0]] for parts in inside]
    return _write(out, split, paths, labels, names, shard_bytes, shard_samples, seed, workers, progress)


def table(
    path: str,
    out: str,
    *,
    split: str = "labelled",
    image: str = "path",
    label: str | None = "label",
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int = SHARD_SAMPLES,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Shards of the images that a Parquet or CSV file names in its column `image`, as `folder` writes them.

    Relative paths start at the table's folder. `label` is the column of class names (or of class indexes, if all are
    whole numbers); None for unlabelled shards.
    """
    frame = _read_table(path)
    for column in (image, label):
        if column is not None and column not in frame:
            raise DataError(f"{path} has no column '{column}'; its columns are {', '.join(map(str, frame.columns))}")
        if column is not None and frame[column].isna().any():
            row = int(np.flatnonzero(frame[column].isna())[0])
            raise DataError(f"{path}: row {row} has nothing in column '{column}'; fill it or remove the row")
    if frame.empty:
        raise DataError(f"{path} has no rows; give a table with a row per image")
    base = Path(path).absolute().parent
    paths = [name if storage.is_url(name) else str(base / name) for name in frame[image].astype(str)]
    if label is None:
        return _write(out, split, paths, None, [], shard_bytes, shard_samples, seed, workers, progress)
    labels, names = _labels(path, out, frame[label], label)
    return _write(out, split, paths, labels, names, shard_bytes, shard_samples, seed, workers, progress)


def _images(directory: str) -> Iterator[str]:
    for parent, folders, names in os.walk(directory, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith(".") and _suffix(name) in IMAGE_SUFFIXES:
                yield str(Path(parent, name))


def _suffix(path: str) -> str:
    return path.split("?")[0].rpartition(".")[2].lower()


def _read_table(path: str) -> pandas.DataFrame:
    readers = {"parquet": pandas.read_parquet, "csv": pandas.read_csv}
    if _suffix(path) not in readers:
        raise DataError(f"{path} is neither .parquet nor .csv; those are the tables that can be prepared")
    try:
        return readers[_suffix(path)](path)
    except FileNotFoundError:
        raise DataError(f"there is no table {path}; give a .parquet or .csv file of image paths") from None
    except ValueError as error:  # pyarrow's and pandas' parsers both raise kinds of it
        raise DataError(f"{path} cannot be read as a {_suffix(path)} table: {error}") from error


def _labels(path: str, out: str, column: pandas.Series, name: str) -> tuple[list[int], list[str]]:
    if pandas.api.types.is_integer_dtype(column):
        numbers = [int(value) for value in column]
        if min(numbers) < 0:
            raise DataError(f"{path}: column '{name}' holds {min(numbers)}; class indexes start at 0")
        names = agree_on_classes(out, [])
        if names and max(numbers) >= len(names):
            raise DataError(
                f"{path}: column '{name}' holds class {max(numbers)}, but {storage.redact(out)}/classes.json has "
                f"{len(names)} classes; correct the labels or choose another folder"
            )
        return numbers, names or [str(number) for number in range(max(numbers) + 1)]
    texts = [str(value) for value in column]
    names = agree_on_classes(out, sorted(set(texts)))
    index = {text: number for number, text in enumerate(names)}
    return [index[text] for text in texts], names


def _write(
    out: str,
    split: str,
    paths: list[str],
    labels: list[int] | None,
    names: list[str],
    shard_bytes: int,
    shard_samples: int,
    seed: int,
    workers: int | None,
    progress: Progress | None,
) -> dict[str, Any]:
    if not SPLIT.fullmatch(split):
        raise ConfigError(f"'{split}' cannot name a split; use letters, digits and underscores")
    if shard_bytes < 1 or shard_samples < 1:
        raise ConfigError(f"a shard of {shard_bytes} bytes and {shard_samples} samples is impossible; give at least 1")
    # Classes must not lie together in a shard: training shuffles only so far. RandomState never changes its stream.
    order = np.random.RandomState(seed).permutation(len(paths))
    items = [
        Item(_key(number, paths[i]), _image_suffix(paths[i]), None if labels is None else labels[i], paths[i])
        for number, i in enumerate(order)
    ]
    ranges = split_shards([_size(item.path) for item in items], shard_bytes, shard_samples)
    shards = [items[part.start : part.stop] for part in ranges]
    written = write_split(out, split, shards, workers=workers, progress=progress)
    if labels is not None:
        save_classes(out, names)
    return {
        "shards": written.shards,
        "images": written.images,
        "bad": len(written.bad),
        "classes": len(names),
    }


def _key(number: int, path: str) -> str:
    """The running number, which makes it unique, and the file's name without the dots that would end a key."""
    stem = Path(path).stem
    return f"{number:08d}_" + re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]


def _image_suffix(path: str) -> str:
    return _suffix(path) if _suffix(path) in IMAGE_SUFFIXES else "jpg"


def _size(path: str) -> int:
    """Bytes of a local file; a missing one is found bad when its turn comes."""
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0
