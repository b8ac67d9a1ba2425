"""Writes the shards that pipeline.prepare.tables writes, of tables of any size, on a cluster.

Three passes, each of units that are done once whatever dies: a survey of all files counts rows and finds the classes,
so that every row knows its place in the order; units spread the rows (pipeline.prepare.spread); a unit for each
shard gathers it and writes it. This process holds 24 bytes a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.cluster.contract import Cluster
from pipeline.config.load import resolve_output
from pipeline.data import manifest
from pipeline.data.shard_patterns import entry_at
from pipeline.errors import DataError
from pipeline.prepare import spread, table_files, table_patterns
from pipeline.prepare.class_list import holding_classes
from pipeline.prepare.picture_files import Skipped
from pipeline.prepare.shard_writer import (
    Item,
    list_bad,
    nothing_readable,
    present_shards,
    shard_names,
    split_shards,
    write_shard,
)
from pipeline.prepare.sources import Limits, check, check_bad, item, size_of
from pipeline.prepare.table_files import Survey, Wanted
from pipeline.prepare.tables import check_rows, failed_rows, numbered, wanted_of
from pipeline.prepare.units import Work, run_units, working, write_outputs

SURVEYED_FILES = 32  # that one unit looks at
UNIT_BYTES, UNIT_ROWS = 128 << 20, 100_000  # of images and of rows that a unit spreads, a row group more at most
MOST_CLASSES = 1_000_000


@dataclass(frozen=True)
class Run:
    """Row groups (None: all) of a file, with `rows` wanted rows, of which the first is number `first` of the file's."""

    path: str
    groups: tuple[int, ...] | None
    first: int
    rows: int


@dataclass(frozen=True)
class Unit:
    name: str
    runs: tuple[Run, ...]
    places: spread.Ints


@dataclass(frozen=True)
class Output:
    shard: str
    places: range
    pieces: spread.Pieces


def table(
    pattern: str,
    out: str,
    cluster: Cluster,
    *,
    split: str = "labelled",
    image: str = "path",
    label: str | None = "label",
    label_is: str = "name",
    where: Sequence[str] = (),
    **limits: Any,
) -> dict[str, Any]:
    """As `tables.table`, which gives the same shards, manifest and counts."""
    wanted, allowed = wanted_of(image, label, label_is, where), Limits(**limits)
    check(split, allowed)
    out = resolve_output(out)
    files = table_patterns.find(pattern)
    entries = _entries(files)
    units = [
        (f"survey {number:06d}", files[number : number + SURVEYED_FILES])
        for number in range(0, len(files), SURVEYED_FILES)
    ]
    found = run_units(cluster, functools.partial(make_surveyor, wanted), units, allowed.progress)
    surveys = [one for name, _ in units for one in found[name]]
    rows = sum(sum(one.rows) for one in surveys)
    check_rows(pattern, rows, wanted)
    numbers: dict[str, int] | None = None
    names: list[str] = []
    if label is not None:
        numbers, names = _numbered(out, surveys, pattern, label, label_is)
    decides = [entries, image, label, list(where), numbers, allowed.seed, allowed.shard_bytes, allowed.shard_samples]
    with working(out, split, decides) as work:
        with holding_classes(out, names if label is not None else None):
            spread_units = _units(files, surveys, rows, allowed.seed)
            there = work.there()
            run_units(
                cluster,
                functools.partial(make_spreader, work, wanted, numbers),
                [(unit.name, unit) for unit in spread_units],
                allowed.progress,
                lambda name: f"{name}.parquet" in there,
            )
            skipped = failed_rows(zip(files, (one.failed for one in surveys), strict=True))
            made = _write(cluster, work, [unit.name for unit in spread_units], rows, skipped, allowed)
        check_bad(out, made["bad"], made["images"], allowed)
    return made | {"skipped": sum(one.failed.total() for one in surveys), "classes": len(names)}


def _numbered(
    out: str, surveys: Sequence[Survey], pattern: str, label: str, label_is: str
) -> tuple[dict[str, int], list[str]]:
    texts = set().union(*(one.labels for one in surveys))
    if len(texts) > MOST_CLASSES:
        raise DataError(
            f"column '{label}' of {storage.redact(pattern)} has {len(texts):,} different values, too many for classes; "
            "name the column of classes by --label, or use --unlabelled"
        )
    return numbered(out, texts, pattern, label, label_is)


def _write(
    cluster: Cluster, work: Work, units: Sequence[str], rows: int, skipped: Skipped, allowed: Limits
) -> dict[str, Any]:
    """Gather and write all shards; counts."""
    sizes = np.zeros(rows, np.int64)
    for unit in units:
        place, size = spread.places_and_sizes(work.folder, unit)
        sizes[place] = size
    parts = split_shards(sizes, allowed.shard_bytes, allowed.shard_samples)
    del sizes
    names = shard_names(work.split, len(parts))
    present = present_shards(work.out, work.split, names)
    pieces = spread.pieces(work.folder, units, np.array([0, *(part.stop for part in parts)]))
    outputs = [(name, Output(name, parts[number], pieces[number])) for number, name in enumerate(names)]
    write_outputs(cluster, functools.partial(make_writer, work), outputs, present, work, allowed.progress)
    notes = [work.left(name) for name in names]
    images = sum(note["images"] for note in notes)
    bad = [(str(path), str(reason)) for note in notes for path, reason in note["bad"]]
    list_bad(work.out, work.split, [*bad, *skipped])
    if not images:
        for name in set(names) - present:
            storage.remove(storage.join(work.out, name))
        raise nothing_readable(work.out, bad)
    work.write_manifest(names)
    return {"shards": len(parts), "images": images, "bad": len(bad)}


def make_surveyor(wanted: Wanted) -> Callable[[list[str]], list[Survey]]:
    return lambda files: [table_files.survey(path, wanted) for path in files]


def make_spreader(work: Work, wanted: Wanted, numbers: dict[str, int] | None) -> Callable[[Unit], None]:
    work.check()

    def spread_unit(unit: Unit) -> None:
        writer, places = spread.Writer(work.folder, unit.name), iter(unit.places.tolist())
        for run in unit.runs:
            number = run.first
            for number, row in enumerate(table_files.read(run.path, wanted, run.groups, run.first), run.first + 1):
                place = next(places, None)
                if place is None or (numbers is not None and row.label not in numbers):
                    raise _changed(run.path)
                source = table_files.source_of(row, number - 1, run.path)
                one = item(place, source, None if numbers is None else numbers[str(row.label)])
                head = {"key": one.key, "suffix": one.suffix, "label": one.label, "path": one.path, "name": one.name}
                writer.add(place, head, [one.data], size_of(one))
            if number != run.first + run.rows:
                raise _changed(run.path)
        writer.close({})

    return spread_unit


def make_writer(work: Work) -> Callable[[Output], None]:
    work.check()

    def write(output: Output) -> None:
        rows = spread.gather(output.pieces)
        if [row.place for row in rows] != list(output.places):
            raise DataError(f"{output.shard} lacks samples in {storage.redact(work.folder)}; delete it and run again")
        items = [Item(data=row.blobs[0], **row.head) for row in rows]
        written = write_shard(items, storage.join(work.out, output.shard))
        facts = {"images": written.images, "bad": written.bad}
        work.leave(output.shard, manifest.rows_of(output.shard, written.rows), facts)

    return write


def _entries(files: Sequence[str]) -> list[tuple[str, int, str]]:
    """(path, size, stamp) of each file; DataError: there is none."""
    found = []
    for path in files:
        try:
            entry = entry_at(path)
        except FileNotFoundError:
            raise table_files.no_table(path) from None
        found.append((path, entry.size, entry.stamp))
    return found


def _units(files: Sequence[str], surveys: Sequence[Survey], rows: int, seed: int) -> list[Unit]:
    """All rows in runs of row groups, with the places that `sources.write` gives them."""
    order = np.random.RandomState(seed).permutation(rows)
    places = np.empty(rows, np.int64)
    places[order] = np.arange(rows)
    del order
    units: list[Unit] = []
    runs: list[Run] = []
    begin = at = held = 0
    for path, survey in zip(files, surveys, strict=True):
        first = 0
        for group, (count, size) in enumerate(zip(survey.rows, survey.bytes, strict=True)):
            if count:
                runs.append(Run(path, survey.groups(group), first, count))
                at, held, first = at + count, held + size, first + count
            if held >= UNIT_BYTES or at - begin >= UNIT_ROWS:
                units.append(Unit(spread.unit_name(len(units)), tuple(runs), places[begin:at]))
                runs, begin, held = [], at, 0
    return [*units, Unit(spread.unit_name(len(units)), tuple(runs), places[begin:at])] if runs else units


def _changed(path: str) -> DataError:
    return DataError(f"{storage.redact(path)} changed while it was prepared; run again")
