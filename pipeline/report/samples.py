"""Collects from label and selection files what the report shows: bad samples, and images for contact sheets.

Files are read one by one (a few at a time) and only counts and a handful of places per class are kept, so a corpus
of any size is fine. Confidences are not counted here: the selection's summary has their histograms.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline import storage
from pipeline.data import images, label_files, parquet_files, shards
from pipeline.data.samples import DROPPED, SKIPPED
from pipeline.data.shards import Shard
from pipeline.labelling.corrected import label_path
from pipeline.plan.stage import FAILED
from pipeline.report.contact_sheet import SIDE, Row

SHOWN = 12  # classes on a contact sheet
EACH = 6  # images per class and side
BAD_SHOWN = 20  # bad samples that are named
THREADS = 8


class Place(NamedTuple):
    """One labelled image: the number of its shard in the corpus, and its row there."""

    confidence: float
    shard: int
    row: int


class BadSample(NamedTuple):
    """One image that could not be used: the number of its shard, its key, what is wrong, where its bytes lie."""

    shard: int
    key: str
    status: str
    offset: int
    size: int


@dataclass
class Extremes:
    """Per shown class: the most and the least confident places so far, best first, and how many there are in all."""

    most: dict[int, list[Place]] = field(default_factory=dict)
    least: dict[int, list[Place]] = field(default_factory=dict)
    count: Counter[int] = field(default_factory=Counter)

    def add(self, other: Extremes) -> None:
        self.count += other.count
        for mine, new, descending in ((self.most, other.most, True), (self.least, other.least, False)):
            for number, places in new.items():
                mine[number] = _best(mine.get(number, []) + places, descending)


@dataclass
class Found:
    """From some label files; `dropped` are labelled images that were not kept."""

    statuses: Counter[str] = field(default_factory=Counter)
    bad: list[BadSample] = field(default_factory=list)  # the first few
    damaged: list[tuple[str, str]] = field(default_factory=list)  # (shard, why it stops early)
    missing: list[tuple[str, str]] = field(default_factory=list)  # (shard without a label file, why)
    kept: Extremes = field(default_factory=Extremes)
    dropped: Extremes = field(default_factory=Extremes)

    def add(self, other: Found) -> None:
        """Take in the files that come next in the corpus."""
        self.statuses += other.statuses
        self.bad = (self.bad + other.bad)[:BAD_SHOWN]
        self.damaged += other.damaged
        self.kept.add(other.kept)
        self.dropped.add(other.dropped)


def shown_classes(kept_per_class: Sequence[int]) -> list[int]:
    """Every class where there are at most `SHOWN`; else so many of which something was kept, evenly spaced in index
    order."""
    some = np.arange(len(kept_per_class))
    if len(some) > SHOWN:
        some = np.flatnonzero(np.asarray(kept_per_class) > 0)
    if len(some) > SHOWN:
        some = some[np.linspace(0, len(some) - 1, SHOWN).round().astype(int)]
    return [int(number) for number in some]


def scan(
    label_folder: str,
    select_folder: str | None,
    corpus: Sequence[Shard],
    shown: Sequence[int],
    corrected: Collection[str],
    progress: Callable[[int], None],
) -> Found:
    """Read every label file of a corpus with its selection file (None: all is kept); `progress(number)` after each."""
    present = set(storage.walk(label_folder))
    labelled = [number for number, shard in enumerate(corpus) if label_files.file_name(shard.name) in present]
    found = Found(missing=[_failure(label_folder, corpus[n].name) for n in sorted({*range(len(corpus))} - {*labelled})])

    def read(number: int) -> Found:
        name = corpus[number].name
        labels, selected = storage.join(label_folder, label_files.file_name(name)), None
        if select_folder:
            labels = label_path(label_folder, select_folder, name, corrected)
            selected = storage.join(select_folder, label_files.file_name(name))
        return _scan_shard(labels, selected, name, number, shown)

    with ThreadPoolExecutor(THREADS) as pool:
        for number, part in enumerate(pool.map(read, labelled), 1):
            found.add(part)
            progress(number)
    return found


def contact_rows(
    found: Extremes, label_folder: str, corpus: Sequence[Shard], names: Sequence[str], shown: Sequence[int]
) -> list[Row]:
    """The pictures of a contact sheet, read from the shards, a row for each shown class; no picture stands on both
    sides."""
    chosen: dict[int, tuple[list[Place], list[Place]]] = {number: ([], []) for number in shown}
    for number in found.most:
        half = found.count[number] // 2
        least = found.least[number][: min(EACH, half)]
        chosen[number] = found.most[number][: found.count[number] - half], least
    places = [place for sides in chosen.values() for side in sides for place in side]
    paths = [storage.join(label_folder, label_files.file_name(shard.name)) for shard in corpus]
    pictures = read_pictures(places, paths, corpus)

    def show(places: Iterable[Place]) -> list[tuple[Image.Image, float]]:
        return [(pictures[place.shard, place.row], place.confidence) for place in places]

    return [Row(names[number], show(most), show(least)) for number, (most, least) in sorted(chosen.items())]


def read_pictures(
    places: Iterable[Place], paths: Sequence[str], corpus: Sequence[Shard]
) -> dict[tuple[int, int], Image.Image]:
    """{(shard, row): picture} of some places; `paths`: of the label file of each shard."""
    rows: dict[int, list[int]] = {}
    for shard, row in sorted({(place.shard, place.row) for place in places}):
        rows.setdefault(shard, []).append(row)

    def read(shard: int) -> list[tuple[tuple[int, int], Image.Image]]:
        table = parquet_files.read_table(paths[shard], ["offset", "size"]).take(rows[shard])
        offsets, sizes = table["offset"].to_pylist(), table["size"].to_pylist()
        return [
            ((shard, row), images.decode(shards.read_at(corpus[shard].path, offset, size), at_least=SIDE))
            for row, offset, size in zip(rows[shard], offsets, sizes, strict=True)
        ]

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pair for pairs in pool.map(read, rows) for pair in pairs)


def _failure(label_folder: str, shard: str) -> tuple[str, str]:
    record = storage.read_json(storage.join(label_folder, shard.removesuffix(".tar") + FAILED))
    return shard, str(record["error"])


def _scan_shard(label_path: str, select_path: str | None, shard: str, number: int, shown: Sequence[int]) -> Found:
    table, metadata = parquet_files.read_with_metadata(label_path, ["status", "label", "confidence"])
    status = table["status"].combine_chunks().cast(pa.string())
    found = Found(statuses=Counter({entry["values"]: entry["counts"] for entry in pc.value_counts(status).to_pylist()}))
    if metadata.get("cut"):
        found.damaged.append((shard, str(metadata["cut"])))
    bad = np.flatnonzero(pc.invert(pc.is_in(status, pa.array(["ok", SKIPPED, DROPPED]))))[:BAD_SHOWN]
    if len(bad):
        named = parquet_files.read_table(label_path, ["key", "status", "offset", "size"]).take(bad).to_pylist()
        found.bad = [BadSample(number, row["key"], row["status"], row["offset"], row["size"]) for row in named]
    label, sure = _column(table, "label"), _column(table, "confidence")
    kept = np.full(len(label), select_path is None)
    if select_path:
        kept[parquet_files.read_table(select_path, ["index"])["index"].to_numpy()] = True
    for extremes, side in ((found.kept, kept), (found.dropped, ~kept)):
        for wanted in shown:
            inside = np.flatnonzero(side & (label == wanted))
            if len(inside):
                order = inside[np.argsort(-sure[inside], kind="stable")]
                places = [Place(float(sure[i]), number, int(i)) for i in {*order[:EACH], *order[-EACH:]}]
                extremes.most[wanted], extremes.least[wanted] = _best(places, True), _best(places, False)
                extremes.count[wanted] = len(inside)
    return found


def _column(table: Any, name: str) -> Any:
    """A column as numpy, -1 where it is null."""
    return table[name].combine_chunks().fill_null(-1).to_numpy()


def _best(places: list[Place], descending: bool) -> list[Place]:
    return sorted(places, key=lambda place: (-place.confidence, place.shard, place.row), reverse=not descending)[:EACH]
