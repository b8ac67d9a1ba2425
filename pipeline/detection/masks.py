"""Reads and writes masks as COCO does: run-length encoded, in text. faster-coco-eval knows how.

A mask is the compressed text of its counts; the size belongs to its image. Pixel arrays are uint8 [height, width], 0 or
1.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from pipeline.errors import ConfigError

LEAST_NUMBERS = 6  # of a polygon: three points


class BadMask(Exception):
    """What stands for a mask and is none; the text is the reason by which it is counted."""


class OtherSize(Exception):
    """A mask of another size than its image's, (height, width)."""

    def __init__(self, size: Sequence[int]) -> None:
        super().__init__(str(size))
        self.size = size


def library() -> ModuleType:
    """faster_coco_eval's functions of masks. ConfigError: it is not installed."""
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ConfigError(
            "detection needs faster-coco-eval, which is not installed; run `pip install 'noisy-lambda[detect]'`"
        ) from error
    found: ModuleType = mask
    return found


def encode(pixels: np.ndarray) -> str:
    counts: bytes = library().encode(np.asfortranarray(pixels, np.uint8))["counts"]
    return counts.decode("ascii")


def decode(counts: str, height: int, width: int) -> np.ndarray:
    """uint8 [height, width]."""
    pixels: np.ndarray = library().decode({"size": [height, width], "counts": counts.encode()})
    return pixels


def read(segmentation: Any, height: int, width: int) -> str:
    """The mask that an annotation of an image of this size has: polygons, or a run-length code whose counts are text,
    bytes or numbers. BadMask, OtherSize."""
    if isinstance(segmentation, dict):
        return _of_runs(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        raise BadMask("no mask")
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    whole = [polygon for polygon in polygons if isinstance(polygon, list) and len(polygon) >= LEAST_NUMBERS]
    if not whole:
        raise BadMask("polygon of fewer than three points")
    try:
        numbers = [np.array(polygon, np.float64) for polygon in whole]
    except (TypeError, ValueError):
        raise BadMask("mask that cannot be read") from None
    if not all(polygon.ndim == 1 and len(polygon) % 2 == 0 for polygon in numbers):
        raise BadMask("mask that cannot be read")
    if not all(np.isfinite(polygon).all() for polygon in numbers):
        raise BadMask("mask of numbers that are not finite")
    code = library()
    # Far outside numbers would be drawn point by point.
    limits = np.array([width, height], np.float64)
    inside = [np.clip(polygon.reshape(-1, 2), -limits, 2 * limits).ravel().tolist() for polygon in numbers]
    return _checked(code.merge(code.frPyObjects(inside, height, width)), height, width)


def _of_runs(runs: dict[str, Any], height: int, width: int) -> str:
    size, counts = runs.get("size"), runs.get("counts")
    if not isinstance(size, list | tuple) or len(size) != 2:
        raise BadMask("mask that cannot be read")
    if [int(side) for side in size] != [height, width]:
        raise OtherSize([int(side) for side in size])
    try:
        if isinstance(counts, list):
            runs_of = [int(run) for run in counts]
            if sum(runs_of) != height * width or min(runs_of) < 0:
                raise BadMask("mask that cannot be read")
            # The library wants one object, not a list of them, in this form.
            return _checked(
                library().frPyObjects({"size": [height, width], "counts": runs_of}, height, width), height, width
            )
        text = counts.decode("ascii") if isinstance(counts, bytes) else counts
        if not isinstance(text, str):
            raise BadMask("mask that cannot be read")
        lengths = uncompressed(text)
    except (TypeError, ValueError, UnicodeDecodeError):
        raise BadMask("mask that cannot be read") from None
    if sum(lengths) != height * width or (lengths and min(lengths) < 0):  # the library would write out of bounds
        raise BadMask("mask that cannot be read")
    return _checked({"size": [height, width], "counts": text.encode()}, height, width)


def uncompressed(text: str) -> list[int]:
    """The run lengths that COCO's compressed text stands for: base 32 with a sign, from the third on as differences
    to the one two before. ValueError: it is no such text."""
    lengths: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"{character!r} is no character of a mask")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            lengths.append(value + (lengths[-2] if len(lengths) > 2 else 0))
            value = shift = 0
    if shift:
        raise ValueError("it ends inside a number")
    return lengths


def _checked(code: dict[str, Any], height: int, width: int) -> str:
    if not int(library().area(code)):
        raise BadMask("empty mask")
    counts = code["counts"]
    return counts.decode("ascii") if isinstance(counts, bytes) else str(counts)


def area(counts: str, height: int, width: int) -> int:
    """Pixels."""
    return int(library().area({"size": [height, width], "counts": counts.encode()}))


def box(counts: str, height: int, width: int) -> list[float]:
    """x, y, width, height of the pixels."""
    found: list[float] = np.asarray(library().toBbox({"size": [height, width], "counts": counts.encode()})).tolist()
    return found
