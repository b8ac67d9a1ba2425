"""Writes prepared shards: the same input gives the same bytes, and a shard is there as a whole or not at all.

labelled-000.tar …          the images, with their labels
manifest-labelled.parquet   where each comes from (pipeline.data.manifest)
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.data import images, manifest, parquet_files
from pipeline.errors import DataError, RemoteError
from pipeline.printable import printable

BAD_NAME = "bad_files.txt"
IN_PROCESS = 1000  # fewer files than this are done before processes have started
Progress = Callable[[int, int], None]  # (files done, files in all)


@dataclass(frozen=True)
class Item:
    """One sample to be: the image is in `data`, or else in the file `path`."""

    key: str
    suffix: str
    label: int | None
    path: str = ""
    data: bytes = b""
    name: str | None = None
    """The path as the manifest has it."""
    text: bytes = b""
    """Of a .json member beside the image."""


@dataclass
class Written:
    shards: int = 0
    images: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)  # (path, reason)
    rows: list[manifest.Row] = field(default_factory=list)


def split_shards(sizes: Sequence[int] | npt.NDArray[np.int64], max_bytes: int, max_samples: int) -> list[range]:
    """Consecutive samples per shard: at most `max_samples`, at most `max_bytes` of images (but at least one)."""
    ends = np.cumsum(np.asarray(sizes, np.int64))
    shards: list[range] = []
    start = 0
    while start < len(ends):
        before = ends[start - 1] if start else 0
        fits = int(np.searchsorted(ends, before + max_bytes, side="right"))
        stop = max(start + 1, min(fits, start + max_samples))
        shards.append(range(start, stop))
        start = stop
    return shards


def write_split(
    out: str,
    split: str,
    shards: list[list[Item]],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    skipped: Sequence[tuple[str, str]] = (),
) -> Written:
    """Write `<split>-000.tar` and so on, a process per shard, the bad files and those `skipped` to bad_files.txt, and
    the manifest.

    Shards that are there already must be equal to what would be written. Raises DataError, before anything is
    written where another shard of the split lies in `out`.
    """
    total = sum(map(len, shards))
    names = shard_names(split, len(shards))
    present = present_shards(out, split, names)
    storage.make_folder(out)
    # Shards that are there are compared first, so that a wrong folder is refused before it is written to.
    order = sorted(range(len(shards)), key=lambda number: names[number] not in present)
    units = [(shards[number], storage.join(out, names[number])) for number in order]
    written = Written(shards=len(shards))
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    count = min(len(shards), workers or os.cpu_count() or 1)
    results: dict[str, Written] = {}
    if count <= 1 or total < IN_PROCESS:
        for items, target in units:
            results[target] = write_shard(items, target, step)
    else:
        # Fresh processes: forking one that runs threads (Ray, torch, a progress bar) can hang.
        with ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool:
            compared = [unit for unit, number in zip(units, order, strict=True) if names[number] in present]
            for batch in (compared, units[len(compared) :]):
                futures = {pool.submit(write_shard, items, target): (items, target) for items, target in batch}
                for future in as_completed(futures):
                    items, target = futures[future]
                    results[target] = future.result()
                    step(len(items))
    for name in names:
        one = results[storage.join(out, name)]
        written.images += one.images
        written.bad += one.bad
    list_bad(out, split, [*written.bad, *skipped])
    if written.images == 0:
        for name in set(names) - present:
            storage.remove(storage.join(out, name))
        raise nothing_readable(out, written.bad)
    rows = pa.concat_tables(
        [manifest.rows_of(name, results[storage.join(out, name)].rows) for name in names]
    ).combine_chunks()
    parquet_files.write_table(storage.join(out, manifest.manifest_name(split)), rows)
    return written


def present_shards(out: str, split: str, names: Sequence[str]) -> set[str]:
    """The shards of a split that are there already; DataError where there are others than those called `names`."""
    present = set(fnmatch.filter(storage.listdir(out), f"{split}-*.tar"))
    if stale := sorted(present - set(names)):
        raise DataError(
            f"{storage.redact(out)} already holds other shards of '{split}', such as {stale[0]}; "
            "remove them or choose another folder"
        )
    return present


def nothing_readable(out: str, bad: list[tuple[str, str]]) -> DataError:
    return DataError(
        f"none of the {len(bad)} files is a readable image: {bad[0][0]} is {bad[0][1]}, for instance; see "
        f"{storage.redact(storage.join(out, BAD_NAME))}"
    )


def shard_names(split: str, count: int) -> list[str]:
    return [f"{split}-{number:03d}.tar" for number in range(count)]


def write_shard(items: list[Item], target: str, step: Callable[[int], None] | None = None) -> Written:
    """Write one shard, or compare it with the one that is there. Raises DataError where they differ."""
    with placing(target) as temporary:
        return _build(items, temporary, step)


@contextlib.contextmanager
def placing(target: str) -> Iterator[str]:
    """Yield a path for a shard to be, which is then put in its place, or compared with the one that is there.
    DataError: they differ."""
    if not storage.exists(target):
        with storage.writing(target) as temporary:
            yield temporary
        return
    with tempfile.TemporaryDirectory() as folder:
        temporary = storage.join(folder, "shard.tar")
        yield temporary
        with storage.open_read(temporary) as new, storage.open_read(target) as old:
            if not _equal(new, old):
                raise DataError(
                    f"{storage.redact(target)} already exists and holds something else than this input gives; "
                    "remove it or choose another folder"
                )


def _build(items: list[Item], path: str, step: Callable[[int], None] | None) -> Written:
    import webdataset

    written = Written(shards=1)
    settings = {"encoder": False, "compress": False, "mtime": 0, "user": "", "group": "", "format": "PAX_FORMAT"}
    with ExitStack() as stack:
        file = stack.enter_context(Path(path).open("wb"))
        # One ShardWriter per shard, because the shards were drawn up beforehand, one per process.
        writer = webdataset.ShardWriter(
            "%d", maxcount=len(items) + 1, maxsize=1 << 62, opener=lambda _: file, verbose=0, **settings
        )
        stack.callback(writer.close)
        for item in items:
            try:
                data = read_image(item.path, item.data)
            except images.BadImage as bad:
                written.bad.append((item.path, str(bad)))
            else:
                sample: dict[str, bytes | str] = {"__key__": item.key, item.suffix: data}
                if item.label is not None:
                    sample["cls"] = str(item.label).encode()
                if item.text:
                    sample["json"] = item.text
                writer.write(sample)
                written.images += 1
                written.rows.append((item.key, item.name, hashlib.sha256(data).hexdigest()))
            if step is not None:
                step(1)
    return written


def read_image(path: str, data: bytes = b"") -> bytes:
    """The bytes of an image, decoded once (at a small scale) to see that they are whole. BadImage."""
    try:
        data = data or storage.read_bytes(path)
    except RemoteError:  # a server that is down says nothing of the image
        raise
    except OSError as error:
        raise images.BadImage("unreadable", error.strerror or str(error)) from error
    images.decode(data, at_least=1)
    return data


def _equal(one: IO[bytes], other: IO[bytes]) -> bool:
    while True:
        ours, theirs = one.read(1 << 20), other.read(1 << 20)
        if ours != theirs:
            return False
        if not ours:
            return True


def list_bad(out: str, split: str, bad: list[tuple[str, str]]) -> None:
    """Lines "split, path, reason", tab-separated; those of other splits in the same folder stay."""
    path = storage.join(out, BAD_NAME)
    old = storage.read_bytes(path).decode().splitlines() if storage.exists(path) else []
    kept = [line for line in old if line.split("\t")[0] != split]
    new = [f"{split}\t{_one_line(name)}\t{_one_line(reason)}" for name, reason in bad]
    if old != kept + new:
        storage.write_bytes(path, "".join(f"{line}\n" for line in kept + new).encode())


def _one_line(text: str) -> str:
    return printable(text).replace("\n", "\\n")
