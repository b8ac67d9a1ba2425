"""Reuses finished label files, and detects shards that changed.

A label file is taken over from the folder of another corpus (`--refreeze` makes one) where all that decides its rows is
the same: teacher, classes, options, the shard's name and size, and its stamp or else its checksum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.data import label_files, parquet_files
from pipeline.data.shard_patterns import entry_at
from pipeline.data.shards import Shard
from pipeline.errors import DataError


def find(path: str, earlier: Sequence[str], shard: Shard, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metadata of the label file at `path`, or of a fitting one in the `earlier` folders, put there; else None."""
    found = fitting_metadata(path, identity)
    if found is not None:
        if shard.sha256 is not None and shard.stamp != found.get("shard_stamp"):
            check_unchanged(shard, storage.sha256(shard.path))
        return found
    for folder in earlier:
        source = storage.join(folder, label_files.file_name(shard.name))
        found = fitting_metadata(source, identity)
        if found is not None and _same_bytes(shard, found):
            storage.copy(source, path)
            return found
    return None


def fitting_metadata(path: str, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metadata of a label file that is there and fits, else None."""
    try:
        metadata = parquet_files.read_metadata(path)
        label_files.check_labels(metadata, identity, path)
    except DataError:
        return None
    return metadata


def check_size(shard: Shard) -> str:
    """The stamp of the file at hand; DataError where it has another size than the listed one."""
    try:
        now = entry_at(shard.path)
    except FileNotFoundError:
        raise DataError(
            f"shard {shard.name} is gone since it was listed; bring it back, or go on without it by --refreeze"
        ) from None
    if now.size != shard.size:
        raise DataError(
            f"shard {shard.name} changed under the run: it has {now.size} bytes, and {shard.size} were listed; "
            "bring the listed file back, or take the new one in by --refreeze"
        )
    return now.stamp


def check_unchanged(shard: Shard, sha256: str) -> None:
    """DataError where the bytes just read, or those that lie there now, are not the listed shard's."""
    stamp = check_size(shard)
    known = shard.sha256 or (sha256 if stamp == shard.stamp or not shard.stamp else storage.sha256(shard.path))
    if sha256 != known:
        raise DataError(
            f"shard {shard.name} changed under the run: it has the listed size, and other content (sha256 "
            f"{sha256[:12]}… instead of {known[:12]}…); bring the listed file back, or start a new `output`"
        )


def _same_bytes(shard: Shard, found: Mapping[str, Any]) -> bool:
    if shard.sha256 not in (None, found.get("shard_sha256")):
        return False
    if shard.stamp and shard.stamp == found.get("shard_stamp"):
        return True
    return bool(storage.sha256(shard.path) == found.get("shard_sha256"))
