"""Finds the pictures below a folder, and says of every other file why it is none."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.data.samples import FOREIGN_SUFFIXES, IMAGE_SUFFIXES, START, looks_like_picture
from pipeline.errors import DataError

Skipped = list[tuple[str, str]]
"""(path, reason)"""


def images_below(directory: str, skipped: Skipped, leave_out: Sequence[str] = ()) -> list[str]:
    """Paths of all pictures in a folder, but for those in the folders `leave_out`, sorted; `skipped` gets the other
    files. DataError: there is no such folder."""
    if not Path(directory).is_dir():
        raise DataError(f"there is no folder {directory} to prepare; give the folder that holds the images")
    return sorted(_images(directory, skipped, leave_out))


def _images(directory: str, skipped: Skipped, leave_out: Sequence[str]) -> Iterator[str]:
    """The files that are pictures, each once however many links lead to it; the others are added to `skipped`."""
    seen: set[tuple[int, int]] = set()
    for apart in map(Path, leave_out):
        if apart.is_dir():
            seen.add((apart.stat().st_dev, apart.stat().st_ino))
    for parent, folders, names in os.walk(directory, followlinks=True):
        here = Path(parent).stat()
        if (here.st_dev, here.st_ino) in seen:  # a link that leads back, or another to the same place
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            if not name.startswith("."):
                path = str(Path(parent, name))
                reason = _no_picture(path)
                if reason is None:
                    yield path
                else:
                    skipped.append((path, reason))


def _no_picture(path: str) -> str | None:
    """Why a file is none."""
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            return "skipped: no regular file"
    except OSError:  # a broken link: bad when its turn comes, if it was to be a picture
        return None if suffix_of(path) in IMAGE_SUFFIXES else "skipped: a link that leads nowhere"
    suffix = suffix_of(path)
    if suffix in IMAGE_SUFFIXES:
        return None
    if suffix in FOREIGN_SUFFIXES:
        return f"skipped: .{suffix} is not decoded here"
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return None if looks_like_picture(file.read(START)) else "skipped: no picture"
    except OSError as error:
        return f"skipped: {error.strerror}"


def suffix_of(path: str) -> str:
    name = path.split("?")[0].rpartition("/")[2]
    return name.rpartition(".")[2].lower() if "." in name else ""
