"""Reads the samples of a shard with all their members, and writes such samples as a shard, byte for byte.

Which members are a sample is the rule of pipeline.data.samples; it goes by their order, so that is kept.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from pipeline import storage
from pipeline.data.samples import DOTS, MAX_IMAGE, START, Left, Run, split_name
from pipeline.data.tar import Damage, Member, Tar
from pipeline.errors import DataError
from pipeline.printable import counted

NUMBERED = re.compile(r"(\d{8}_)+")  # what `prepare` and `reshard` put before a name


@dataclass
class Whole:
    """A sample: the suffixes and bytes of its members, of which number `image` is the image."""

    index: int
    key: str
    suffixes: list[str]
    members: list[bytes]
    image: int


@dataclass
class Reader:
    """Iterate, then look at `bad`, pictures that are in no sample or not whole, and `skipped`, what is no picture:
    (what, reason)."""

    path: str
    shard: str
    bad: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Whole]:
        left, index = Left(), 0
        with storage.open_read(self.path) as file:
            for run, whole in self._runs(Tar(file)):
                if not run.is_sample:
                    left.add(run.left())
                    continue
                if isinstance(whole, str):
                    self.bad.append((f"{self.shard}: {run.key}", whole))
                else:
                    whole.index = index
                    yield whole
                index += 1
        for reason, count in left.images.items():
            why = "several share a name up to its first dot" if reason == DOTS else f"{reason} is not decoded here"
            self.bad.append((f"{self.shard}: {left.example[reason]}", f"skipped: {counted(count, 'image')}, {why}"))
        for reason, count in left.runs.items():
            text = f"skipped: {counted(count, 'sample')} without a picture ({reason})"
            self.skipped.append((f"{self.shard}: {left.example[reason]}", text))

    def _runs(self, tar: Tar) -> Iterator[tuple[Run, Whole | str]]:
        """Each run with its members, or why they are not whole."""
        run: Run | None = None
        found: Whole | str = ""
        while (member := self._next(tar)) is not None:
            name = split_name(member.name)
            if not member.regular or name is None:
                continue
            key, suffix = name
            if run is None or run.key != key:
                if run is not None:
                    yield run, found
                run, found = Run(key), Whole(0, key, [], [], 0)
            is_image = run.add(member, suffix, partial(tar.read, member, START))
            if isinstance(found, Whole):
                if reason := _not_whole(member):
                    found = f"{reason}: .{suffix}"
                else:
                    found.image = len(found.members) if is_image else found.image
                    found.suffixes.append(suffix)
                    found.members.append(tar.read(member))
        if run is not None:
            yield run, found

    def _next(self, tar: Tar) -> Member | None:
        try:
            return tar.next()
        except Damage as damage:
            if damage.at == 0:
                raise DataError(
                    f"shard {storage.redact(self.path)} is not an uncompressed tar: {damage}; leave it out, or copy it "
                    "again"
                ) from None
            self.bad.append((self.shard, f"damaged: {damage}; its samples up to there are taken"))
            return None


def _not_whole(member: Member) -> str:
    if member.present < member.size:
        return "truncated"
    if member.size > MAX_IMAGE:
        return "too_large"
    return "" if member.plain else "unreadable"


def write(path: str, samples: Iterable[tuple[str, list[str], list[bytes]]]) -> None:
    """A tar of (key, suffixes, members); equal samples give equal bytes."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, suffixes, members in samples:
            for suffix, data in zip(suffixes, members, strict=True):
                info = tarfile.TarInfo(f"{key}.{suffix}" if suffix else key)
                info.size, info.mode = len(data), 0o444
                tar.addfile(info, io.BytesIO(data))


def new_key(number: int, key: str) -> str:
    """A key that no other sample of the shard has: its number there, and the name that it had."""
    stem = NUMBERED.sub("", key.rpartition("/")[2], count=1)
    return f"{number:08d}_" + re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:60]
