"""Makes sort keys of samples: numbers that say which of a class goes first; small is good.

A sample's rank is the pair (distance, tie hash). The distance of a confidence from 1 counts float32 numbers: 0 for
exactly 1, 1 for the next one below, 0x3F800000 for 0. The tie hash orders what is equally confident.

A word is the beginning of that pair in 64 bits, so that words never contradict ranks, and its leading bits tell apart
what crowds in practice: confidences of exactly 1, and others close to it.

    0  hash, upper 63 bits                  confidence exactly 1
    1  depth, 34 bits  hash, upper 29 bits  else; depth: the distance as a float with 5 bits of exponent, 29 of mantissa
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pipeline.data.hashing import mix, name_key

Ints = npt.NDArray[np.int64]
Distances = npt.NDArray[np.uint32]
Hashes = npt.NDArray[np.uint64]
BITS = 64  # of a word
ONE = np.float32(1).view(np.uint32)
NOT_ONE = np.uint64(1 << 63)
HASH_BITS = np.uint64(29)
LOST_BITS = np.uint64(64) - HASH_BITS  # of the hash
SHORTER = np.uint64(23)  # of a float64's 52 bits of mantissa, 29 are kept: distances are below 2**30
LEAST = np.uint64(1023 << 29)  # the depth of distance 1 before it is taken off: a float64's exponent of 0


def tie_hash(shard: str, index: Ints) -> Hashes:
    """Order of equally confident samples, smallest first: splitmix64(blake2b-8(shard name) xor index)."""
    return mix(np.uint64(name_key(shard)) ^ index.astype(np.uint64))


def distances(confidence: npt.NDArray[np.float32]) -> Distances:
    """Of confidences from 0 to 1; what is negative gets a distance beyond all of them."""
    return ONE - confidence.view(np.uint32)


def words(distance: Distances, hashes: Hashes) -> Hashes:
    """The words of ranks."""
    depth = (distance.astype(np.float64).view(np.uint64) >> SHORTER) - LEAST
    word = NOT_ONE | depth << HASH_BITS | hashes >> LOST_BITS
    sure = np.flatnonzero(distance == 0)
    word[sure] = hashes[sure] >> np.uint64(1)
    return word


def last_ranks(word: Hashes) -> tuple[Distances, Hashes]:
    """The greatest distance that words up to `word` can have, and the greatest hash that they can have there."""
    depth = (word & ~NOT_ONE) >> HASH_BITS
    distance = ((depth + LEAST) << SHORTER).view(np.float64).astype(np.uint32)
    hashes = word << LOST_BITS | ((np.uint64(1) << LOST_BITS) - np.uint64(1))
    sure = word < NOT_ONE
    distance[sure] = 0
    hashes[sure] = word[sure] << np.uint64(1) | np.uint64(1)
    return distance, hashes
