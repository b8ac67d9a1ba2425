"""Finds each class's cutoff by radix selection: exact, deterministic, in memory that knows no rows.

Candidates are the samples at or above the confidence threshold that are no copies of held-out images. Of n
candidates of a class

    per_class P       exactly the P most confident are kept; with n < P each gets P // n copies, and the P % n
                      most confident one more. Both are one rule: P // n copies of all, one more of the P % n best
    top_fraction f    the ceil(f · n) most confident are kept, once
    neither           all are kept, once

The cutoff is found by radix selection over ranks (pipeline.selection.sort_keys). Each pass counts, for every class
still undecided, one digit of the words of all files, and so knows that digit of the cutoff; when few candidates remain
they are gathered and sorted, usually in the second pass. A pass is map (selection.count_group), merge, `refine`; sums
and a sort depend neither on order nor on grouping.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.selection.sort_keys import BITS, Distances, Hashes, Ints, distances, last_ranks

BINS = 1 << 20  # counters per pass, all undecided classes together: 8 MB
GATHERED = 1 << 21  # rows that the last pass may collect: 32 MB
STEPS = 100  # bars of the confidence histogram


@dataclass(frozen=True)
class Settings:
    """What to keep; see above. At most one of `per_class` and `top_fraction`.

    `thresholds`: {class: threshold} where it is another one; `left_out`: classes of which nothing is kept; `by_noise`:
    select.max_noise decided both. `by_confidence`: nothing is copied, and what is kept
    carries its confidence as a weight. `expected`: what every label file's metadata must say (labels.check_labels).
    `exclude`: sorted image hashes (labels.image_hash) of the validation and test images, copies of which are dropped.
    """

    num_classes: int
    threshold: float = 0.3
    per_class: int | None = None
    max_copies: int | None = None
    top_fraction: float | None = None
    thresholds: Mapping[int, float] = field(default_factory=dict)
    left_out: tuple[int, ...] = ()
    by_noise: bool = False
    by_confidence: bool = False
    expected: Mapping[str, Any] = field(default_factory=dict)
    exclude: Hashes = field(default_factory=lambda: np.zeros(0, np.uint64))

    def limits(self) -> Distances:
        """Of each class, the greatest distance of a candidate."""
        lowest = np.full(self.num_classes, self.threshold, np.float32)
        lowest[list(self.thresholds)] = list(self.thresholds.values())
        return distances(lowest)


@dataclass(frozen=True)
class State:
    """What the passes so far have found; arrays are [classes].

    `prefix`: the known leading digits of the cutoff's word, `left`: bits of it still unknown before this pass, which
    looks at `bits` of them, or gathers the candidates.
    """

    settings: Settings
    left: int
    bits: int
    gather: bool
    undecided: npt.NDArray[np.bool_]
    need: Ints  # of the samples that share the prefix, this many are above the cutoff
    prefix: Hashes

    def bounds(self) -> tuple[Distances, Distances]:
        """Of each class, the least and the greatest distance that this pass need look at; least > greatest: none."""
        shift = np.uint64(self.left)
        least, _ = last_ranks(self.prefix << shift)
        greatest, _ = last_ranks(self.prefix << shift | np.uint64((1 << self.left) - 1))
        greatest = np.minimum(greatest, self.settings.limits())
        least[~self.undecided], greatest[~self.undecided] = 1, 0
        return least, greatest


@dataclass(frozen=True)
class Cutoff:
    """The answer, arrays [classes]: a candidate gets `base` copies, and one more if `take` and
    (distance, tie hash) <= (cut_distance, cut_hash)."""

    settings: Settings
    base: Ints
    take: npt.NDArray[np.bool_]
    cut_distance: Distances
    cut_hash: Hashes


@dataclass
class Counts:
    """What one pass counted over some label files; `add` merges, in any order."""

    digits: npt.NDArray[Any]  # integers [undecided classes, 2**bits]
    rows: list[tuple[npt.NDArray[np.int32], Distances, Hashes]] = field(default_factory=list)  # (class, distance, hash)
    samples: int = 0
    labelled: int = 0  # status ok
    confident: int = 0  # of those, at or above the threshold
    excluded: int = 0  # of those, exact copies of held-out images
    histogram: Ints = field(default_factory=lambda: np.zeros(STEPS, np.int64))  # confidences of all labelled

    def shrink(self) -> Counts:
        """As small as it can travel."""
        self.digits = self.digits.astype(np.min_scalar_type(self.digits.max(initial=0)))
        return self

    def add(self, other: Counts) -> Counts:
        self.digits = self.digits.astype(np.int64, copy=False)
        self.digits += other.digits
        self.rows += other.rows
        self.samples += other.samples
        self.labelled += other.labelled
        self.confident += other.confident
        self.excluded += other.excluded
        self.histogram += other.histogram
        return self


def start(settings: Settings) -> State:
    """The state before the first pass, which counts every class and decides none beforehand."""
    c = settings.num_classes
    nothing = np.zeros(c, np.int64)
    return State(settings, BITS, _digit(c, BITS), False, np.ones(c, bool), nothing, nothing.astype(np.uint64))


def _digit(classes: int, left: int) -> int:
    """Bits of the next digit: as many as the counters allow, one at least."""
    return min(left, max(1, (BINS // max(1, classes)).bit_length() - 1))


def merge(parts: Iterable[Counts]) -> Counts:
    """The sum of some counts, which it may change."""
    total = functools.reduce(Counts.add, parts)
    total.digits = total.digits.astype(np.int64, copy=False)
    return total


def finish_first_pass(state: State, counts: Counts) -> tuple[State, Cutoff]:
    """From the first pass's counts: copies for everybody, and how many of each class get one more."""
    settings, n = state.settings, counts.digits.sum(axis=1)
    if settings.top_fraction is not None:
        share = Fraction(str(settings.top_fraction))  # as it was written: 0.07 of 100 is 7, not a little more
        need = np.array([-(-share.numerator * int(some) // share.denominator) for some in n], np.int64)
        base, need = (need == n).astype(np.int64), np.where(need == n, 0, need)
    elif settings.per_class is not None:
        base, need = np.divmod(settings.per_class, np.maximum(n, 1))
    else:
        base, need = np.ones_like(n), np.zeros_like(n)
    base[n == 0] = need[n == 0] = 0
    most = 1 if settings.by_confidence else settings.max_copies
    if most is not None:
        need[base >= most] = 0
        base = np.minimum(base, most)
    zero = np.zeros_like(n)
    cutoff = Cutoff(settings, base, need > 0, zero.astype(np.uint32), zero.astype(np.uint64))
    return replace(state, need=need), cutoff


def refine(state: State, counts: Counts, cutoff: Cutoff) -> tuple[State | None, Cutoff]:
    """Take in one pass: the next pass's state, or None when every class is decided, and the cutoff so far."""
    if state.gather:
        return None, _sort_gathered(state, counts, cutoff)
    where = np.flatnonzero(state.undecided)
    wanted = state.need[where] > 0
    classes, digits, need = where[wanted], counts.digits[wanted], state.need[where[wanted]]
    above = np.cumsum(digits, axis=1)
    digit = (above < need[:, None]).sum(axis=1)
    inside = np.take_along_axis(digits, digit[:, None], axis=1)[:, 0]
    need = need - (np.take_along_axis(above, digit[:, None], axis=1)[:, 0] - inside)
    rest = state.left - state.bits
    prefix, cut_distance, cut_hash = state.prefix.copy(), cutoff.cut_distance.copy(), cutoff.cut_hash.copy()
    prefix[classes] = prefix[classes] << np.uint64(state.bits) | digit.astype(np.uint64)
    last = prefix[classes] << np.uint64(rest) | np.uint64((1 << rest) - 1)
    cut_distance[classes], cut_hash[classes] = last_ranks(last)
    cutoff = replace(cutoff, cut_distance=cut_distance, cut_hash=cut_hash)
    open_ = need < inside  # else the whole bin is above the cutoff
    if not open_.any():
        return None, cutoff
    undecided, needs = np.zeros_like(state.undecided), np.zeros_like(state.need)
    undecided[classes[open_]], needs[classes[open_]] = True, need[open_]
    gather = rest == 0 or int(inside[open_].sum()) <= GATHERED
    bits = 0 if gather else _digit(int(open_.sum()), rest)
    return State(state.settings, rest, bits, gather, undecided, needs, prefix), cutoff


def _sort_gathered(state: State, counts: Counts, cutoff: Cutoff) -> Cutoff:
    label, distance, hashes = (np.concatenate(part) for part in zip(*counts.rows, strict=True))
    order = np.lexsort((hashes, distance, label))
    label, distance, hashes = label[order], distance[order], hashes[order]
    classes = np.flatnonzero(state.undecided)
    last = np.searchsorted(label, classes) + state.need[classes] - 1
    cut_distance, cut_hash = cutoff.cut_distance.copy(), cutoff.cut_hash.copy()
    cut_distance[classes], cut_hash[classes] = distance[last], hashes[last]
    return replace(cutoff, cut_distance=cut_distance, cut_hash=cut_hash)
