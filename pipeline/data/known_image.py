"""Reads an image that was indexed or labelled before, and checks that its bytes are those."""

from __future__ import annotations

from pipeline import storage
from pipeline.data import shards
from pipeline.data.label_files import image_hash
from pipeline.errors import DataError
from pipeline.storage.node_cache import Cache, Ready


def read(shard: str, offset: int, size: int, known: int, name: str, cache: Cache | Ready | None = None) -> bytes:
    """`size` bytes from `offset` of a shard, whose hash is `known`; `name` is for people. OSError; DataError: they are
    others, or not there."""
    data = shards.read_at(shard, offset, size, cache)
    if image_hash(data) != known and cache and storage.is_url(shard):  # the copy may be what is damaged
        cache.discard(shard)
        data = shards.read_at(shard, offset, size)
    if image_hash(data) != known:
        raise DataError(
            f"{name} of {storage.redact(shard)} has other bytes than when it was indexed or labelled, so its label may "
            "be another one; bring the old shard back, or take the new one in by --refreeze (if its time "
            "stamp is the old one too, by deleting the folder of the stage that indexed or labelled it)"
        )
    return data
