"""Where each class is cut: exact, deterministic, in memory that knows no rows.

Candidates are the samples at or above the confidence threshold. In each class exactly the `per_class` P
most confident are kept, equal confidences in the order of a hash of (shard name, index). A class with n < P
gives each sample P // n copies, one more to its P % n most confident. Both are one rule, used throughout: P
// n copies of everything, and one more of the P % n most confident.

The cut is found by radix selection. A sample's rank inside its class is the 96-bit number (distance of its
confidence from 1, tie hash), small is good. Each pass counts, for every class still undecided, one digit of
it over all files, and so knows that digit of the cut; when few candidates remain they are gathered and
sorted. A pass is map (`count_group`), merge (`merge`), `refine`; sums and a sort do not depend on order or
grouping.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import storage
from pipeline.data import labels
from pipeline.data.order import mix, name_key
from pipeline.errors import DataError

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
BINS = 1 << 20  # counters per pass, all undecided classes together: 8 MB
GATHERED = 1 << 20  # rows that the last pass may collect: 16 MB
STEPS = 100  # bars of the confidence histogram
ONE = np.float32(1).view(np.uint32)
ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


@dataclass(frozen=True)
class Settings:
    """What to keep. `per_class` None: no balancing, everything at or above the threshold once.

    `expected`: what every label file's metadata must say (labels.check_labels). `exclude`: sorted image
    hashes (labels.image_hash) of the validation and test images, copies of which are dropped.
    """

    num_classes: int
    threshold: float = 0.3
    per_class: int | None = None
    max_copies: int | None = None
    expected: Mapping[str, Any] = field(default_factory=dict)
    exclude: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))


@dataclass(frozen=True)
class State:
    """What the passes so far have found; arrays are [classes].

    `tie`: the confidence's digits are all known and this pass looks at the tie hash. `left`: bits of that
    word still unknown before this pass, which looks at `bits` of them, or gathers the candidates.
    """

    settings: Settings
    tie: bool
    left: int
    bits: int
    gather: bool
    undecided: npt.NDArray[np.bool_]
    need: Ints  # of the samples that share the known digits, this many are above the cut
    distance: npt.NDArray[np.uint32]  # known digits of the confidence's distance from 1
    hash: Hashes  # known digits of the tie hash


@dataclass(frozen=True)
class Cut:
    """The answer, arrays [classes]: a sample gets `base` copies, and one more if `take` and
    (distance, tie hash) <= (cut_distance, cut_hash)."""

    settings: Settings
    base: Ints
    take: npt.NDArray[np.bool_]
    cut_distance: npt.NDArray[np.uint32]
    cut_hash: Hashes


@dataclass
class Counts:
    """What one pass counted over some label files; `add` merges, in any order."""

    digits: Ints  # [undecided classes, 2**bits]
    rows: list[tuple[Ints, npt.NDArray[np.uint32], Hashes]] = field(default_factory=list)  # (class, distance, tie hash)
    samples: int = 0
    labelled: int = 0  # status ok
    confident: int = 0  # of those, at or above the threshold
    excluded: int = 0  # of those, exact copies of held-out images
    histogram: Ints = field(default_factory=lambda: np.zeros(STEPS, np.int64))  # confidences of all labelled

    def add(self, other: Counts) -> Counts:
        self.digits += other.digits
        self.rows += other.rows
        self.samples += other.samples
        self.labelled += other.labelled
        self.confident += other.confident
        self.excluded += other.excluded
        self.histogram += other.histogram
        return self


@dataclass(frozen=True)
class Candidates:
    """The samples of one file that may be selected: row numbers, class, distance of the confidence from 1."""

    shard: str
    row: Ints
    label: Ints
    distance: npt.NDArray[np.uint32]
    samples: int  # rows of the file
    confident: int  # of them, at or above the threshold, excluded ones too
    confidence: npt.NDArray[np.float32]
    everything: npt.NDArray[np.float32]  # confidences of all labelled samples


def tie_hash(shard: str, index: Ints) -> Hashes:
    """Order of equally confident samples, smallest first: splitmix64(blake2b-8(shard name) xor index)."""
    return mix(np.uint64(name_key(shard)) ^ index.astype(np.uint64))


def start(settings: Settings) -> State:
    """The state before the first pass: nothing known, every class undecided."""
    c = settings.num_classes
    left = int(ONE - np.float32(settings.threshold).view(np.uint32)).bit_length()
    nothing = np.zeros(c, np.int64)
    return State(
        settings,
        tie=False,
        left=left,
        bits=_digit(c, left),
        gather=False,
        undecided=np.ones(c, bool),
        need=nothing,
        distance=nothing.astype(np.uint32),
        hash=nothing.astype(np.uint64),
    )


def _digit(classes: int, left: int) -> int:
    """Bits of the next digit: as many as the counters allow, one at least."""
    return min(left, max(1, (BINS // max(1, classes)).bit_length() - 1))


def candidates(path: str, settings: Settings) -> Candidates:
    """Read what selection needs of one label file: two columns, three where images are excluded."""
    excluding = len(settings.exclude) > 0
    columns = ["label", "confidence", *(["image_hash"] if excluding else [])]
    table, metadata = labels.read_with_metadata(path, columns)
    labels.check_labels(metadata, settings.expected, path)
    label = table["label"].combine_chunks().fill_null(-1).to_numpy()
    confidence = table["confidence"].combine_chunks().fill_null(-1).to_numpy()
    known = confidence[confidence >= 0]
    row = np.flatnonzero(confidence >= np.float32(settings.threshold))
    confident = len(row)
    if excluding:
        hashes = table["image_hash"].combine_chunks().fill_null(0).to_numpy()[row]
        place = np.minimum(np.searchsorted(settings.exclude, hashes), len(settings.exclude) - 1)
        row = row[settings.exclude[place] != hashes]
    label, sure = label[row].astype(np.int64), confidence[row]
    if len(row) and not (label.min() >= 0 and label.max() < settings.num_classes and sure.max() <= 1):
        raise DataError(
            f"the label file {storage.redact(path)} holds classes {label.min()} to {label.max()} and "
            f"confidences up to {sure.max()}; allowed are classes 0 to {settings.num_classes - 1} and "
            "confidences up to 1; delete it and run again"
        )
    distance = ONE - sure.view(np.uint32)
    return Candidates(metadata["shard"], row, label, distance, len(confidence), confident, sure, known)


def count_group(paths: tuple[str, ...], state: State) -> Counts:
    """One pass over some label files."""
    counts = Counts(np.zeros((int(state.undecided.sum()), 1 << state.bits), np.int64))
    for path in paths:
        _count_file(path, state, counts)
    return counts


def _count_file(path: str, state: State, counts: Counts) -> None:
    found = candidates(path, state.settings)
    counts.samples += found.samples
    counts.labelled += len(found.everything)
    counts.confident += found.confident
    counts.excluded += found.confident - len(found.row)
    counts.histogram += histogram(found.everything)
    row, label, distance = found.row, found.label, found.distance
    keep = state.undecided[label]
    keep &= (distance if state.tie else distance >> state.left) == state.distance[label]
    row, label, distance = row[keep], label[keep], distance[keep]
    word = distance.astype(np.uint64)
    if state.tie or state.gather:
        hashes = tie_hash(found.shard, row)
        if state.tie:
            # Two shifts, because one by 64 is undefined.
            keep = hashes >> np.uint64(state.left - 1) >> np.uint64(1) == state.hash[label]
            label, distance, hashes = label[keep], distance[keep], hashes[keep]
            word = hashes
        if state.gather:
            counts.rows.append((label, distance, hashes))
            return
    digit = (word >> np.uint64(state.left - state.bits)).astype(np.int64) & ((1 << state.bits) - 1)
    slot = np.cumsum(state.undecided) - 1
    np.add.at(counts.digits.reshape(-1), (slot[label] << state.bits) + digit, 1)


def histogram(confidence: npt.NDArray[np.float32]) -> Ints:
    """Counts of confidences in `STEPS` equal steps from 0 to 1."""
    step = np.minimum((confidence * STEPS).astype(np.int64), STEPS - 1)
    return np.bincount(step, minlength=STEPS).astype(np.int64)


def merge(parts: Iterable[Counts]) -> Counts:
    """The sum of some counts, which it may change."""
    return functools.reduce(Counts.add, parts)


def finish_first_pass(state: State, counts: Counts) -> tuple[State, Cut]:
    """From the first pass's counts: copies for everybody, and how many of each class get one more."""
    settings, n = state.settings, counts.digits.sum(axis=1)
    if settings.per_class is None:
        base, need = np.ones_like(n), np.zeros_like(n)
    else:
        base, need = np.divmod(settings.per_class, np.maximum(n, 1))
        base[n == 0] = 0
    if settings.max_copies is not None:
        need[base >= settings.max_copies] = 0
        base = np.minimum(base, settings.max_copies)
    zero = np.zeros_like(n)
    cut = Cut(settings, base, need > 0, zero.astype(np.uint32), zero.astype(np.uint64))
    return replace(state, need=need), cut


def refine(state: State, counts: Counts, cut: Cut) -> tuple[State | None, Cut]:
    """Take in one pass: the next pass's state, or None when every class is decided, and the cut so far."""
    if state.gather:
        return None, _sort_gathered(state, counts, cut)
    where = np.flatnonzero(state.undecided)
    wanted = state.need[where] > 0
    classes, digits, need = where[wanted], counts.digits[wanted], state.need[where[wanted]]
    above = np.cumsum(digits, axis=1)
    digit = (above < need[:, None]).sum(axis=1)
    inside = np.take_along_axis(digits, digit[:, None], axis=1)[:, 0]
    need = need - (np.take_along_axis(above, digit[:, None], axis=1)[:, 0] - inside)
    rest = state.left - state.bits
    distance, hashes = state.distance.copy(), state.hash.copy()
    cut_distance, cut_hash = cut.cut_distance.copy(), cut.cut_hash.copy()
    unknown = np.uint64((1 << rest) - 1)
    if state.tie:
        hashes[classes] = hashes[classes] << np.uint64(state.bits) | digit.astype(np.uint64)
        cut_distance[classes] = distance[classes]
        cut_hash[classes] = hashes[classes] << np.uint64(rest) | unknown
    else:
        distance[classes] = distance[classes] << np.uint32(state.bits) | digit.astype(np.uint32)
        cut_distance[classes] = distance[classes] << np.uint32(rest) | unknown.astype(np.uint32)
        cut_hash[classes] = ALL
    cut = replace(cut, cut_distance=cut_distance, cut_hash=cut_hash)
    open_ = need < inside  # else the whole bin is above the cut
    undecided, needs = np.zeros_like(state.undecided), np.zeros_like(state.need)
    undecided[classes[open_]], needs[classes[open_]] = True, need[open_]
    if not open_.any() or (state.tie and rest == 0):
        return None, cut
    tie, left = (True, 64) if rest == 0 else (state.tie, rest)
    gather = int(inside[open_].sum()) <= GATHERED
    return State(
        state.settings,
        tie=tie,
        left=left,
        bits=0 if gather else _digit(int(open_.sum()), left),
        gather=gather,
        undecided=undecided,
        need=needs,
        distance=distance,
        hash=hashes,
    ), cut


def _sort_gathered(state: State, counts: Counts, cut: Cut) -> Cut:
    label, distance, hashes = (np.concatenate(part) for part in zip(*counts.rows, strict=True))
    order = np.lexsort((hashes, distance, label))
    label, distance, hashes = label[order], distance[order], hashes[order]
    classes = np.flatnonzero(state.undecided)
    last = np.searchsorted(label, classes) + state.need[classes] - 1
    cut_distance, cut_hash = cut.cut_distance.copy(), cut.cut_hash.copy()
    cut_distance[classes], cut_hash[classes] = distance[last], hashes[last]
    return replace(cut, cut_distance=cut_distance, cut_hash=cut_hash)
