"""Shuffles all samples of a corpus over new shards: a sample goes to output hash(seed, shard, index) mod N.

Units spread the samples of some shards (pipeline.prepare.spread), then a unit for each output gathers it and writes it,
in the order of the hashes. Neither holds more than an output. Where a sample was is in the manifest, in `from_shard`
and `from_index`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.cluster.contract import Cluster
from pipeline.config.load import resolve_output
from pipeline.data import hashing, manifest
from pipeline.data.classes import CLASSES_NAME, read_classes
from pipeline.data.shard_patterns import entry_at
from pipeline.data.shards import Shard, find_shards, scan
from pipeline.errors import ConfigError, DataError
from pipeline.prepare import carried_labels, spread, whole_samples
from pipeline.prepare.carried_labels import Carried
from pipeline.prepare.class_list import holding_classes
from pipeline.prepare.shard_writer import Progress, list_bad, placing, present_shards, shard_names
from pipeline.prepare.sources import SPLIT
from pipeline.prepare.units import Work, run_units, working, write_outputs
from pipeline.storage.lock import lock

UNIT_BYTES = 128 << 20  # of shards that one unit spreads, a shard more at most
LOW = 32  # bits of a place that order an output; those above say which
MOST_SHARDS = 1 << 30
NAMED = re.compile(r"(?:.*/)?([A-Za-z0-9_]+)-\d+\.tar")


@dataclass(frozen=True)
class Output:
    shard: str
    pieces: spread.Pieces


def reshard(
    source: str,
    out: str,
    cluster: Cluster,
    *,
    shards: int,
    seed: int = 0,
    split: str | None = None,
    labels: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `<split>-000.tar` … , `shards` of them, of the samples of all shards that `source` matches.

    `split`: the first part of the names, by default that of `source`'s. `labels`: the output of a run whose label files
    of these shards are carried over. Returns counts: shards, images, bad, skipped. UserError.
    """
    if not 1 <= shards < MOST_SHARDS:
        raise ConfigError(f"--shards is {shards}; it is a number from 1 to {MOST_SHARDS - 1:,}")
    out, labels = resolve_output(out), resolve_output(labels) if labels else None
    found = find_shards(source, "SOURCE", str(Path.cwd()))
    split = _split(found, split)
    listed = [[shard.name, shard.path, shard.size, shard.stamp] for shard in found]
    identity = [listed, shards, seed, labels]
    carried = carried_labels.find(labels, found, hashlib.sha256(repr(identity).encode()).hexdigest()) if labels else []
    if _folder(out) in {_folder(shard.path.rpartition("/")[0]) for shard in found}:
        raise ConfigError(f"--out {storage.redact(out)} is the folder of the old shards; choose another")
    root = found[0].path.removesuffix(found[0].name)
    classes = read_classes(root) if storage.exists(storage.join(root, CLASSES_NAME)) else None
    with contextlib.ExitStack() as stack:
        if labels:
            stack.enter_context(lock(labels))
        work = stack.enter_context(working(out, split, identity))
        stack.enter_context(holding_classes(out, classes))
        names = shard_names(split, shards)
        present = present_shards(out, split, names)
        units = _units(found)
        there = work.there()
        worker = functools.partial(make_spreader, work, shards, seed, carried)
        run_units(cluster, worker, units, progress, lambda name: f"{name}.parquet" in there)
        pieces = spread.pieces(work.folder, [name for name, _ in units], np.arange(shards + 1, dtype=np.int64) << LOW)
        counts = [of_output.samples for of_output in pieces]
        if not all(counts):  # an empty shard is no shard
            raise ConfigError(
                f"--shards is {shards}, and {sum(counts):,} samples would leave {counts.count(0)} of them empty; ask "
                "for fewer"
            )
        outputs = [(name, Output(name, pieces[number])) for number, name in enumerate(names)]
        write_outputs(cluster, functools.partial(make_writer, work, carried), outputs, present, work, progress)
        facts = [spread.facts_of(work.folder, name) for name, _ in units]
        bad, skipped = ([(what, why) for one in facts for what, why in one[kind]] for kind in ("bad", "skipped"))
        list_bad(out, split, [*bad, *skipped])
        work.write_manifest(names)
    return {"shards": shards, "images": sum(counts), "bad": len(bad), "skipped": len(skipped)}


def _folder(path: str) -> str:
    return path.rstrip("/") if storage.is_url(path) else str(Path(path).resolve())


def _split(shards: Sequence[Shard], split: str | None) -> str:
    if split is not None:
        if not SPLIT.fullmatch(split):
            raise ConfigError(f"'{split}' cannot name a split; use letters, digits and underscores")
        return split
    names = {match[1] if (match := NAMED.fullmatch(shard.name)) else "" for shard in shards}
    if len(names) > 1 or "" in names:
        raise ConfigError(
            f"shards are called {shards[0].name} …, not NAME-000.tar with one NAME; say by --split what the new ones "
            "shall be called, such as unlabelled"
        )
    return names.pop()


def _units(shards: Sequence[Shard]) -> list[tuple[str, tuple[str, list[Shard]]]]:
    units: list[list[Shard]] = [[]]
    held = 0
    for shard in shards:
        if held >= UNIT_BYTES:
            units, held = [*units, []], 0
        units[-1].append(shard)
        held += shard.size
    names = [spread.unit_name(number) for number in range(len(units))]
    return [(name, (name, unit)) for name, unit in zip(names, units, strict=True)]


def place_of(shard_key: int, index: int, shards: int) -> int:
    """Where a sample goes: the output in the upper bits, the order there in the lower."""
    found = hashing.chain(shard_key ^ index)
    return (found % shards) << LOW | found >> (64 - LOW)


def make_spreader(
    work: Work, shards: int, seed: int, carried: Sequence[Carried]
) -> Callable[[tuple[str, list[Shard]]], None]:
    work.check()

    def spread_unit(unit: tuple[str, list[Shard]]) -> None:
        name, mine = unit
        writer = spread.Writer(work.folder, name)
        bad: list[tuple[str, str]] = []
        skipped: list[tuple[str, str]] = []
        for shard in mine:
            shard_key = hashing.chain(seed, hashing.name_key(shard.name))
            known = [one.labels(shard) for one in carried]
            reader = whole_samples.Reader(shard.path, shard.name)
            for sample in reader:
                image, index = sample.members[sample.image], sample.index
                labels = [_label(of_shard, index, image, shard) for of_shard in known]
                head = {
                    "shard": shard.name,
                    "index": index,
                    "key": sample.key,
                    "suffixes": sample.suffixes,
                    "image": sample.image,
                    "labels": labels,
                }
                writer.add(place_of(shard_key, index, shards), head, sample.members, len(image))
            if entry_at(shard.path).size != shard.size:
                raise DataError(f"shard {shard.name} changed while it was read; run again")
            bad += reader.bad
            skipped += reader.skipped
        writer.close({"bad": bad, "skipped": skipped})

    return spread_unit


def _label(of_shard: list[carried_labels.Label], index: int, image: bytes, shard: Shard) -> carried_labels.Label:
    where = f"sample {index} of shard {shard.name}"
    if index >= len(of_shard):
        raise DataError(f"{where} has no row in its label file; bring the labelled shard back, or leave out --labels")
    carried_labels.check(of_shard[index], image, where)
    return of_shard[index]


def make_writer(work: Work, carried: Sequence[Carried]) -> Callable[[Output], None]:
    work.check()

    def write(output: Output) -> None:
        rows = sorted(spread.gather(output.pieces), key=lambda row: (row.place, row.head["shard"], row.head["index"]))
        heads = [row.head for row in rows]
        keys = [whole_samples.new_key(number, head["key"]) for number, head in enumerate(heads)]
        path = storage.join(work.out, output.shard)
        members = zip(keys, (head["suffixes"] for head in heads), (row.blobs for row in rows), strict=True)
        with placing(path) as temporary:
            whole_samples.write(temporary, members)
        images = [row.blobs[row.head["image"]] for row in rows]
        if carried:
            samples = scan(path).samples
            for number, one in enumerate(carried):
                one.write(output.shard, path, samples, [head["labels"][number] for head in heads])
        sums = [hashlib.sha256(image).hexdigest() for image in images]
        table = manifest.rows_of(output.shard, [(key, None, found) for key, found in zip(keys, sums, strict=True)])
        table = table.append_column("from_shard", pa.array([head["shard"] for head in heads], pa.string()))
        table = table.append_column("from_index", pa.array([head["index"] for head in heads], pa.int64()))
        work.leave(output.shard, table, {"images": len(rows), "bad": []})

    return write
