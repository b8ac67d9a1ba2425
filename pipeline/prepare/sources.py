"""Says what images of files or of memory become in shards, and writes the shards of splits from them."""

from __future__ import annotations

import fnmatch
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.classes import alike, plain
from pipeline.data.samples import IMAGE_SUFFIXES
from pipeline.errors import ConfigError, DataError
from pipeline.prepare.class_list import agree_on_classes, holding_classes
from pipeline.prepare.digits import shifted
from pipeline.prepare.picture_files import Skipped, suffix_of
from pipeline.prepare.shard_writer import (
    Item,
    Progress,
    Written,
    split_shards,
    write_split,
)

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


@dataclass(frozen=True)
class Source:
    """Where an image comes from: a file, or `data`, of which `path` is a name for people. `name`: the manifest's path,
    None for an image that was no file."""

    path: str
    data: bytes = b""
    name: str | None = None


def check(split: str, limits: Limits) -> None:
    """ConfigError: no shards can be written so."""
    if not SPLIT.fullmatch(split):
        raise ConfigError(f"'{split}' cannot name a split; use letters, digits and underscores")
    if split in MEANT:
        log.warning("a job looks for %s-*.tar unless data says otherwise, not for %s-*.tar", MEANT[split], split)
    if limits.shard_bytes < 1 or limits.shard_samples < 1:
        raise ConfigError(
            f"a shard of {limits.shard_bytes} bytes and {limits.shard_samples} samples is impossible; give at least 1"
        )


def check_bad(out: str, lost: int, written: int, limits: Limits) -> None:
    """DataError where more pictures are `lost` than the limit allows."""
    if lost > limits.max_bad * (lost + written):
        raise DataError(
            f"{lost} of {lost + written} pictures are bad or not decoded here, more than --max-bad "
            f"{limits.max_bad:g} allows; {storage.redact(storage.join(out, 'bad_files.txt'))} lists them: mend "
            "or remove them, or go on with the rest, which is written, by `noisy-lambda prepare` and a higher --max-bad"
        )


def by_name(out: str, texts: Iterable[str]) -> tuple[dict[str, int], list[str]]:
    """{label: class index}, and all class names; new ones are sorted as text."""
    found = set(texts)
    names = agree_on_classes(out, sorted({plain(text) for text in found}))
    for one, other in alike(names)[:3]:
        log.warning("the classes '%s' and '%s' differ in case or Unicode form alone", one, other)
    index = {plain(name): number for number, name in enumerate(names)}
    return {text: index[plain(text)] for text in found}, names


def by_index(out: str, texts: Iterable[str], where: str) -> tuple[dict[str, int], list[str]]:
    """The same of labels that are class indexes; `where` they stand. DataError: one is none."""
    found = sorted(set(texts))
    wrong = next((text for text in found if not (text.isascii() and text.strip().isdigit() and len(text) < 20)), None)
    if wrong is not None:
        raise DataError(f"{where} holds '{wrong[:40]}'; class indexes are whole numbers from 0")
    numbers = {text: int(text) for text in found}
    names, most = agree_on_classes(out, []), max(numbers.values())
    if names and most >= len(names):
        raise DataError(
            f"{where} holds class {most}, but {storage.redact(out)}/classes.json has {len(names)} classes; correct the "
            "labels or choose another folder"
        )
    return numbers, names or [str(number) for number in range(most + 1)]


def write(
    out: str,
    parts: Mapping[str, tuple[list[Source], list[int] | None]],
    names: list[str],
    skipped: Skipped,
    limits: Limits,
) -> dict[str, Any]:
    """`parts`: by split its images and their class indexes, None for unlabelled ones; `skipped` belong to the first."""
    for split in parts:
        check(split, limits)
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
    check_bad(out, bad + sum(reason.endswith("is not decoded here") for _, reason in skipped), written, limits)
    of_split = {split: results[split].images for split in parts} if len(parts) > 1 else {}
    return {
        "shards": sum(len(of_part) for of_part in shards.values()),
        "images": written,
        **of_split,
        "bad": bad,
        "skipped": len(skipped),
        "classes": len(names),
    }


def _shards(sources: list[Source], labels: list[int] | None, limits: Limits) -> list[list[Item]]:
    # Classes must not lie together in a shard: training shuffles only so far. RandomState never changes its stream.
    order = np.random.RandomState(limits.seed).permutation(len(sources))
    items = [item(number, sources[i], None if labels is None else labels[i]) for number, i in enumerate(order)]
    sizes = [size_of(item) for item in items]
    return [items[part.start : part.stop] for part in split_shards(sizes, limits.shard_bytes, limits.shard_samples)]


def item(number: int, source: Source, label: int | None) -> Item:
    return Item(_key(number, source.path), _image_suffix(source.path), label, source.path, source.data, source.name)


def _key(number: int, path: str) -> str:
    """The running number, which makes it unique, and the file's name without the dots that would end a key."""
    stem = Path(path).stem
    return f"{number:08d}_" + re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]


def _image_suffix(path: str) -> str:
    return suffix_of(path) if suffix_of(path) in IMAGE_SUFFIXES else "jpg"


def size_of(item: Item) -> int:
    """Bytes of the image; a local file that is missing is found bad when its turn comes."""
    try:
        return len(item.data) or Path(item.path).stat().st_size
    except OSError:
        return 0
