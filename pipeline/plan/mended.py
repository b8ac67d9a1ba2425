"""Finds the unlabelled shards that somebody replaced since they were labelled, and that are to be labelled again.

A shard in which something was bad is looked at as soon as its time stamp is another one, by `--refreeze` whatever its
stamp is; one in which all was good only by `--refreeze`: that its bytes changed is an error otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.data.corpus import Corpus
from pipeline.data.shards import Shard, bad_counts
from pipeline.errors import DataError
from pipeline.plan.stage import DONE, FAILED

LABEL_FOLDER = re.compile(r"gen\d+-label-[0-9a-f]{8}")


@dataclass(frozen=True)
class Labelled:
    """What a label folder says of a shard: its checksum (None: it could not be read), and whether something was bad."""

    sha256: str | None
    bad: bool


def find(output: str, corpus: Corpus, *, refreeze: bool = False) -> dict[str, str]:
    """{shard name: the sha256 of what lies there now} of the shards to be labelled again."""
    looked_at = [shard for shard in corpus.shards if refreeze or shard.name in corpus.touched]
    folders = _folders(output) if looked_at else []
    found: dict[str, str] = {}
    for shard in looked_at if folders else ():
        labelled = _labelled(folders, shard, corpus)
        if labelled and (labelled.bad or (refreeze and shard.name in corpus.touched)):
            now = storage.sha256(shard.path)
            if now != labelled.sha256:
                found[shard.name] = now
    return found


def _folders(output: str) -> list[tuple[str, frozenset[str]]]:
    """The label folders of an output, with the names in each."""
    names = [name for name in storage.listdir(output) if LABEL_FOLDER.fullmatch(name)]
    return [(path, frozenset(storage.walk(path))) for path in (storage.join(output, name) for name in names)]


def _labelled(folders: Sequence[tuple[str, frozenset[str]]], shard: Shard, corpus: Corpus) -> Labelled | None:
    """How the shard as it is listed was labelled: with the stamp of the frozen list, and what was taken in before with
    the checksum that it had then."""
    from pipeline.data import label_files, parquet_files

    stamp, taken_in = corpus.touched.get(shard.name, shard.stamp), corpus.mended.get(shard.name)
    name = label_files.file_name(shard.name)
    failed = shard.name.removesuffix(".tar") + FAILED
    unread = None
    for folder, names in folders:
        if name in names:
            try:
                metadata = parquet_files.read_metadata(storage.join(folder, name))
            except DataError:  # damaged: labelled again anyway
                continue
            sha256 = metadata.get("shard_sha256")
            same = metadata.get("shard_size") == shard.size and metadata.get("shard_stamp") == stamp
            if same and taken_in in (None, sha256):
                left = metadata.get("left") or {"images": {}}
                bad = bool(bad_counts(metadata["counts"]) or metadata.get("cut") or left["images"])
                return Labelled(sha256, bad)
        elif failed in names and DONE in names:  # in a stage that has not ended it is tried again anyway
            unread = Labelled(taken_in, bad=True)
    return unread
