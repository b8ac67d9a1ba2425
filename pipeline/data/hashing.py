"""Hashes numbers and names to 64 bits, the same in any language: all randomness of order and of ties.

    mix(x)        = the output of splitmix64 at state x:  z = x + 0x9E3779B97F4A7C15
                    z = (z ^ z>>30) · 0xBF58476D1CE4E5B9;  z = (z ^ z>>27) · 0x94D049BB133111EB;  z ^ z>>31  (mod 2⁶⁴)
    chain(k1,k2…) = h = 0; for each key: h = mix(h ^ key)
    name          = blake2b, 8 bytes, of the UTF-8 text, read as a little-endian integer

mix is a bijection, so different numbers have different hashes.
"""

from __future__ import annotations

import hashlib

import numpy as np

GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = (1 << 64) - 1


def mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's output function, elementwise on uint64."""
    z = x + np.uint64(GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    return z ^ (z >> np.uint64(31))


def chain(*keys: int) -> int:
    """One 64-bit hash of some integers, in their order."""
    h = 0
    for key in keys:
        z = ((h ^ (key & MASK)) + GOLDEN) & MASK
        z = (z ^ (z >> 30)) * FIRST & MASK
        z = (z ^ (z >> 27)) * SECOND & MASK
        h = z ^ (z >> 31)
    return h


def name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def permutation(length: int, *keys: int) -> np.ndarray:
    """0 … length-1 sorted by mix(chain(keys) ^ i); int64."""
    return np.argsort(mix(np.arange(length, dtype=np.uint64) ^ np.uint64(chain(*keys))), kind="stable")
