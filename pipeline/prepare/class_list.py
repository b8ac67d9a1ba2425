"""Keeps the class list of a folder of shards one and the same while labels are numbered by it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from pipeline import storage
from pipeline.data.classes import CLASSES_NAME, read_classes, write_classes
from pipeline.errors import DataError


def agree_on_classes(out: str, names: list[str]) -> list[str]:
    """The class list of `out`: the one it has, if it covers `names`, else `names`. Raises DataError."""
    if not storage.exists(storage.join(out, CLASSES_NAME)):
        return names
    known = read_classes(out)
    if strange := sorted(set(names) - set(known)):
        raise DataError(
            f"{storage.redact(out)}/{CLASSES_NAME} has no class {strange[0]!r}, which this input holds; prepare the "
            "split with all classes first, or choose another folder"
        )
    return known


@contextlib.contextmanager
def holding_classes(out: str, names: list[str] | None) -> Iterator[None]:
    """Write the class list of `out` before its shards, if it has none, and see afterwards that it still is this one:
    another `prepare` may have been at work there. Nothing for None. DataError."""
    path = storage.join(out, CLASSES_NAME)
    made = names is not None and _create(path, names)
    if names is not None and read_classes(out) != names:
        raise DataError(_other_classes(path))
    try:
        yield
    except BaseException:
        if made:
            storage.remove(path)
        raise
    if names is not None and read_classes(out) != names:
        raise DataError(_other_classes(path))


def _create(path: str, names: list[str]) -> bool:
    """Whether the file was not there; on a local disk no two processes are told so."""
    if storage.exists(path):
        return False
    if storage.is_url(path):
        write_classes(path.removesuffix(f"/{CLASSES_NAME}"), names)
        return True
    storage.make_folder(path.removesuffix(f"/{CLASSES_NAME}"))
    with storage.writing(f"{path}.{os.getpid()}") as temporary:
        Path(temporary).write_text(json.dumps(names, indent=1) + "\n")
    try:
        os.link(f"{path}.{os.getpid()}", path)
    except OSError:  # it is there by now, or the file system has no links
        if Path(path).exists():
            return False
        Path(f"{path}.{os.getpid()}").rename(path)
    finally:
        storage.remove(f"{path}.{os.getpid()}")
    return True


def _other_classes(path: str) -> str:
    return (
        f"{storage.redact(path)} has another class list than these labels are numbered by: another `prepare` wrote it "
        "meanwhile; prepare the splits of a folder one after the other, the one with all classes first"
    )
