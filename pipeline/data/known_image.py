"""Reads an image that was indexed or labelled before, and checks that its bytes are those."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from pipeline import storage
from pipeline.data import shards
from pipeline.data.label_files import image_hash
from pipeline.errors import DataError
from pipeline.storage.node_cache import Cache, Ready


@dataclass(frozen=True)
class Known:
    """What was recorded of an image's bytes; the CRC-32 takes a sixth of the time, and 0.2.0 had none."""

    image_hash: int
    crc32: int | None

    def is_of(self, data: bytes) -> bool:
        return (image_hash(data) == self.image_hash) if self.crc32 is None else (zlib.crc32(data) == self.crc32)


def read(shard: str, offset: int, size: int, known: Known, name: str, cache: Cache | Ready | None = None) -> bytes:
    """`size` bytes from `offset` of a shard, of which is `known`; `name` is for people. OSError; DataError: they are
    others, or not there."""
    data = shards.read_at(shard, offset, size, cache)
    if not known.is_of(data) and cache and storage.is_url(shard):  # the copy may be what is damaged
        cache.discard(shard)
        data = shards.read_at(shard, offset, size)
    if not known.is_of(data):
        raise DataError(
            f"{name} of {storage.redact(shard)} has other bytes than when it was indexed or labelled, so its label may "
            "be another one; bring the old shard back, or take the new one in by --refreeze (if its time "
            "stamp is the old one too, by deleting the folder of the stage that indexed or labelled it)"
        )
    return data
