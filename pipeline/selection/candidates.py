"""Reads the candidates of selection from label files, and counts them in each pass.

Two columns are read, three where held-out images are to be found; never the probabilities. After the first pass a
file's rows are sieved by the bounds of their class's cutoff before anything else is computed of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline import storage
from pipeline.data import label_files, parquet_files
from pipeline.errors import DataError
from pipeline.selection.radix import STEPS, Counts, Settings, State
from pipeline.selection.sort_keys import BITS, Distances, Hashes, Ints, distances, tie_hash, words

BUFFERED = 1 << 20  # rows that are counted at once: adding up all counters costs as much as counting that many
BEYOND = np.iinfo(np.uint32).max  # the distance of what no threshold lets through
SEEN = 1 << 20  # places of the table that rules out most hashes


class HeldOut:
    """Which image hashes are among some sorted ones."""

    def __init__(self, hashes: Hashes) -> None:
        self.hashes = hashes
        self.seen = np.zeros(SEEN, bool)
        self.seen[self._place(hashes)] = True

    @staticmethod
    def _place(hashes: Hashes) -> Ints:
        return (hashes & np.uint64(SEEN - 1)).astype(np.int64)

    def find(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        found = self.seen[self._place(hashes)]
        likely = np.flatnonzero(found)
        place = np.minimum(np.searchsorted(self.hashes, hashes[likely]), len(self.hashes) - 1)
        found[likely] = self.hashes[place] == hashes[likely]
        return found


@dataclass(frozen=True)
class Candidates:
    """Rows of one label file: row numbers, class, distance of the confidence from 1."""

    row: Ints
    label: npt.NDArray[np.int32]
    distance: Distances

    def take(self, chosen: Ints | npt.NDArray[np.bool_]) -> Candidates:
        return Candidates(self.row[chosen], self.label[chosen], self.distance[chosen])


class LabelFile:
    """One label file: `label` int32 [n], `confidence` float32 [n], both -1 where the status is not `ok`."""

    def __init__(self, path: str, settings: Settings, held_out: HeldOut | None) -> None:
        columns = ["label", "confidence", *(["image_hash"] if held_out else [])]
        table, metadata = parquet_files.read_with_metadata(path, columns)
        label_files.check_labels(metadata, settings.expected, path)
        self.path, self.settings, self.held_out = path, settings, held_out
        self.shard: str = metadata["shard"]
        self.bad = table["label"].null_count
        self.label, self.confidence = (_filled(table[name].combine_chunks()) for name in ("label", "confidence"))
        self.hashes = table["image_hash"].combine_chunks() if held_out else None
        self.distance = distances(self.confidence)
        if settings.left_out:
            self.distance[np.isin(self.label, settings.left_out)] = BEYOND

    def check(self) -> None:
        """DataError unless classes and confidences are in their ranges."""
        label, confidence = self.label, self.confidence
        lacking = [np.count_nonzero(label < 0), np.count_nonzero(~(confidence >= 0))]
        if len(label) and (
            lacking != [self.bad, self.bad] or label.max() >= self.settings.num_classes or confidence.max() > 1
        ):
            raise DataError(
                f"the label file {storage.redact(self.path)} holds classes {label.min()} to {label.max()} and "
                f"confidences from {confidence.min()} to {confidence.max()}; allowed are classes 0 to "
                f"{self.settings.num_classes - 1} and confidences from 0 to 1; delete it and run again"
            )

    def within(self, greatest: Distances, least: Distances | None = None) -> Candidates:
        """The rows whose distance lies within their class's bounds [classes], held-out images among them."""
        # A row without a class is beyond all bounds, so it does not matter whose bounds it is compared with.
        keep = self.distance <= greatest.take(self.label, mode="clip")
        if least is not None:
            keep &= self.distance >= least.take(self.label, mode="clip")
        row = np.flatnonzero(keep)
        return Candidates(row, self.label[row], self.distance[row])

    def without_held_out(self, found: Candidates) -> Candidates:
        if self.held_out is None or self.hashes is None:
            return found
        return found.take(~self.held_out.find(self.hashes.take(found.row).to_numpy()))


def _filled(column: pa.Array) -> np.ndarray:
    return (column.fill_null(-1) if column.null_count else column).to_numpy()


def reader(settings: Settings) -> Callable[[str], LabelFile]:
    """What reads a label file."""
    held_out = HeldOut(settings.exclude) if len(settings.exclude) else None
    return lambda path: LabelFile(path, settings, held_out)


def read_files(paths: tuple[str, ...], settings: Settings) -> Iterator[LabelFile]:
    """The label files in order, remote ones fetched ahead."""
    return storage.overlapped(reader(settings), paths)


def count_group(paths: tuple[str, ...], state: State) -> Counts:
    """One pass over some label files."""
    tally = Tally(int(state.undecided.sum()) << state.bits)
    counts = Counts(tally.counts.reshape(-1, 1 << state.bits))
    if state.left == BITS:
        limits = state.settings.limits()
        for file in read_files(paths, state.settings):
            _count_all(file, limits, state.bits, tally, counts)
    else:
        bounds = state.bounds()
        slot = np.cumsum(state.undecided) - 1
        for file in read_files(paths, state.settings):
            _count_undecided(file, state, bounds, slot, tally, counts)
    tally.flush()
    return counts.shrink()


def _count_all(file: LabelFile, limits: Distances, bits: int, tally: Tally, counts: Counts) -> None:
    file.check()
    confident = file.within(limits)
    found = file.without_held_out(confident)
    known = file.confidence[file.confidence >= 0] if file.bad else file.confidence
    counts.samples += len(file.confidence)
    counts.labelled += len(known)
    counts.confident += len(confident.row)
    counts.excluded += len(confident.row) - len(found.row)
    counts.histogram += histogram(known)
    # The first digit reaches into the tie hash only where the confidence is exactly 1.
    hashes = np.zeros(len(found.row), np.uint64)
    sure = np.flatnonzero(found.distance == 0)
    hashes[sure] = tie_hash(file.shard, found.row[sure])
    digit = words(found.distance, hashes) >> np.uint64(BITS - bits)
    tally.count((found.label << bits) | digit.astype(np.int32))


def _count_undecided(
    file: LabelFile,
    state: State,
    bounds: tuple[Distances, Distances],
    slot: Ints,
    tally: Tally,
    counts: Counts,
) -> None:
    least, greatest = bounds
    found = file.without_held_out(file.within(greatest, least))
    hashes = tie_hash(file.shard, found.row)
    word = words(found.distance, hashes)
    keep = word >> np.uint64(state.left) == state.prefix[found.label]
    found, hashes, word = found.take(keep), hashes[keep], word[keep]
    if state.gather:
        counts.rows.append((found.label, found.distance, hashes))
    else:
        digit = (word >> np.uint64(state.left - state.bits)) & np.uint64((1 << state.bits) - 1)
        tally.count((slot[found.label] << state.bits) | digit.astype(np.int64))


class Tally:
    """Counters, and numbers of counters that wait to be counted together."""

    def __init__(self, size: int) -> None:
        self.counts = np.zeros(size, np.int64)
        self.waiting: list[np.ndarray] = []
        self.rows = 0

    def count(self, numbers: np.ndarray) -> None:
        self.waiting.append(numbers.astype(np.int32, copy=False))
        self.rows += len(numbers)
        if self.rows >= BUFFERED:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            self.counts += np.bincount(np.concatenate(self.waiting), minlength=len(self.counts))
        self.waiting, self.rows = [], 0


def histogram(confidence: npt.NDArray[np.float32]) -> Ints:
    """Counts of confidences in `STEPS` equal steps from 0 to 1."""
    step = np.minimum((confidence * STEPS).astype(np.int64), STEPS - 1)
    return np.bincount(step, minlength=STEPS).astype(np.int64)
