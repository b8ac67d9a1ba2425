"""Finds shards, walks the samples in one, and reads pieces of one.

A shard is an uncompressed tar, known by its name and size. Which of its members make a sample is the rule of
pipeline.data.samples. Links, devices, folders and hidden files (`.DS_Store`, the `._name.jpg` of macOS; WebDataset
ignores them too) are skipped as if they were not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import IO, cast

from pipeline import storage
from pipeline.data.samples import DROPPED, SKIPPED, START, Left, Run, Sample, split_name
from pipeline.data.shard_patterns import Entry, Listing, Pattern, parse
from pipeline.data.tar import BLOCK, Damage, Member, Tar, check_head
from pipeline.errors import DataError
from pipeline.printable import counted
from pipeline.storage.hashed_file import Hashed
from pipeline.storage.node_cache import Cache, Ready

HEADS, READERS = 32, 16  # remote shards whose beginning is looked at before a run, threads that do it


@dataclass(frozen=True)
class Shard:
    name: str  # path relative to the fixed prefix of its source's pattern
    path: str  # local path or URL
    size: int
    stamp: str  # mtime in ns, or ETag
    source: str
    sha256: str | None = None  # of its bytes, where it is known from before


@dataclass
class Scan:
    samples: list[Sample]
    left: Left  # what is in no sample
    damage: str | None  # why the archive stops early, where it does


def find_shards(pattern: str | list[str], source: str, root: str | None = None, max_empty: int = 0) -> list[Shard]:
    """The shards of a pattern or a list of them, sorted by name. `root` is where relative patterns start.

    The names of a list file's shards are relative to its folder if all lie below it; those of several patterns
    to the deepest folder that all share. Up to `max_empty` files of 0 bytes are passed on, for their readers to
    refuse. Raises DataError.
    """
    texts = [pattern] if isinstance(pattern, str) else list(pattern)
    where = f"source '{source}'"
    if not texts:
        raise DataError(f"{where}: the list of shard patterns is empty; name at least one")
    listing = Listing()
    try:
        patterns = [one for text in texts for one in parse(text, root)]
        listing.ask(patterns)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    shards: dict[str, Shard] = {}
    empty: list[Shard] = []
    for one, prefix in zip(patterns, _prefixes(patterns), strict=True):
        try:
            found = _match(one, listing)
        except DataError as error:
            raise DataError(f"{where}: {one.where}{error}") from None
        for path, entry in found.items():
            shard = Shard(path.removesuffix(one.query)[len(prefix) + 1 :], path, entry.size, entry.stamp, source)
            if entry.size == 0:
                empty.append(shard)
            if ".." in shard.name.split("/"):
                raise DataError(
                    f"{where}: the pattern {storage.redact(one.text)} gives the shard name {shard.name}; names become "
                    "paths of label files, so write the pattern without '..'"
                )
            if shard.name in shards:
                raise DataError(
                    f"{where}: two shards are named {shard.name}: {storage.redact(shards[shard.name].path)} "
                    f"and {storage.redact(path)}; a shard is known by its name, so no two patterns may match the same"
                )
            shards[shard.name] = shard
    if len(empty) > max_empty:
        more = f", and {len(empty) - 1} more" if len(empty) > 1 else ""
        raise DataError(
            f"{where}: shard {storage.redact(empty[0].path)} is empty (0 bytes){more}; remove it or copy it again"
        )
    return [shards[name] for name in sorted(shards)]


def _match(pattern: Pattern, listing: Listing) -> dict[str, Entry]:
    found, missing = listing.match(pattern)
    if not found:
        raise DataError(_nothing_found(pattern, listing))
    if missing:
        raise DataError(
            f"{counted(len(missing), 'shard')} of the pattern {storage.redact(pattern.text)} "
            f"{'is' if len(missing) == 1 else 'are'} missing, "
            f"such as {storage.redact(missing[0])}; add them or narrow the pattern"
        )
    return found


def _prefixes(patterns: list[Pattern]) -> list[str]:
    """The folder that the names of each pattern are relative to: the one shared by all, if any is."""
    home = patterns[0].home
    if home is not None and all(one.home == home and f"{one.prefix}/".startswith(f"{home}/") for one in patterns):
        return [home] * len(patterns)
    folders = [pattern.prefix.split("/") for pattern in patterns]
    shared = 0
    while all(len(folder) > shared and folder[shared] == folders[0][shared] for folder in folders):
        shared += 1
    # Local paths always share "", the root; URLs share something only from the bucket or host on.
    if shared < (3 if storage.is_url(patterns[0].prefix) else 1):
        return [pattern.prefix for pattern in patterns]
    return ["/".join(folders[0][:shared])] * len(patterns)


def _nothing_found(pattern: Pattern, listing: Listing) -> str:
    folder, shown = pattern.prefix, storage.redact(pattern.prefix) or "/"
    names = sorted(listing.folder(folder)) if not folder.startswith("http") else []
    if names:
        holds = f"the folder {shown} holds {counted(len(names), 'entry', 'entries')} such as {', '.join(names[:4])}"
    elif not folder.startswith("http") and storage.exists(folder or "/"):
        holds = f"the folder {shown} is empty"
    else:
        holds = f"there is nothing at {shown}"
    return (
        f"no shard matches {storage.redact(pattern.text)}; {holds}; correct the pattern or the root it "
        "starts from (shards are uncompressed .tar files)"
    )


class Reader:
    """One sequential pass over a shard: iterate, then look at `left`, what is in no sample, at `apart`, keys whose text
    lies away from any image, at `damage` and, where images were read, at the `sha256` of the whole file.

    Yields (sample, image bytes); the bytes are empty where the status is not `ok`, or with `images=False`,
    which seeks over the data. Memory is bounded by one image. Raises DataError where the file is no tar.
    """

    def __init__(self, path: str, images: bool = True, cache: Cache | None = None) -> None:
        self.path = path
        self.images = images
        self.cache = cache
        self.left = Left()
        self.apart: set[str] = set()
        self.damage: str | None = None
        self.sha256 = ""

    def __iter__(self) -> Iterator[tuple[Sample, bytes]]:
        self.left, self.apart, self.damage = Left(), set(), None
        index = 0
        with _open(self.path, self.cache) as file:
            hashed = Hashed(file) if self.images else None
            for run, data in self._runs(Tar(cast(IO[bytes], hashed or file))):
                if run.is_sample:
                    yield run.sample(index), data
                    index += 1
                    continue
                self.left.add(run.left())
                if run.texts:
                    self.apart.add(run.key)
            if hashed:
                self.sha256 = hashed.sha256()

    def _runs(self, tar: Tar) -> Iterator[tuple[Run, bytes]]:
        run: Run | None = None
        data = b""
        while (member := self._next(tar)) is not None:
            name = split_name(member.name)
            if not member.regular or name is None:
                continue
            key, extension = name
            if run is None or run.key != key:
                if run is not None:
                    yield run, data
                run, data = Run(key), b""
            if run.add(member, extension, partial(tar.read, member, START)) and self.images:
                data = tar.read(member) if run.status == "ok" else b""
        if run is not None:
            yield run, data

    def _next(self, tar: Tar) -> Member | None:
        try:
            return tar.next()
        except Damage as damage:
            if damage.at == 0:
                raise _no_tar(self.path, damage) from None
            self.damage = str(damage)
            return None


def check_heads(shards: Sequence[Shard], allowed: int = 0) -> None:
    """DataError where more than `allowed` of these shards do not begin as a tar does, empty ones among them. Of remote
    shards HEADS are looked at, spread over all."""
    remote = [shard for shard in shards if storage.is_url(shard.path)]
    spread = remote[:: -(-len(remote) // HEADS) or 1]
    wrong: list[DataError] = []

    def look(shard: Shard) -> None:
        try:
            check_head(storage.read_range(shard.path, 0, BLOCK))
        except Damage as damage:
            wrong.append(_no_tar(shard.path, damage))

    with ThreadPoolExecutor(READERS) as readers:
        list(readers.map(look, [shard for shard in shards if not storage.is_url(shard.path)] + spread))
    if len(wrong) > allowed:
        more = f" ({len(wrong)} such shards; data.max_bad_shards allows {allowed})" if len(wrong) > 1 or allowed else ""
        raise DataError(f"{min(map(str, wrong))}{more}")


def _no_tar(path: str, damage: Damage) -> DataError:
    return DataError(
        f"shard {storage.redact(path)} is not an uncompressed tar: {damage}; "
        "shards are plain .tar files, without gzip or zstd around them"
    )


def _open(path: str, cache: Cache | None) -> IO[bytes]:
    return cache.open_read(path) if cache else storage.open_read(path)


def scan(path: str) -> Scan:
    """The samples of a shard from its headers alone, seeking over the data."""
    reader = Reader(path, images=False)
    samples = [sample for sample, _ in reader]
    return Scan(samples, reader.left, reader.damage)


def stream(path: str, cache: Cache | None = None) -> Reader:
    """The same samples as `scan`, each with its image bytes; through the node's cache where one is given."""
    return Reader(path, cache=cache)


def read_at(path: str, offset: int, size: int, cache: Cache | Ready | None = None) -> bytes:
    """`size` bytes from `offset`; DataError where the file does not hold them."""
    data = cache.read_range(path, offset, size) if cache else storage.read_range(path, offset, size)
    if len(data) < size:
        raise DataError(
            f"shard {storage.redact(path)} has no {size} bytes at {offset}: it changed since it was indexed; "
            "bring the indexed file back, or start a new output"
        )
    return data


def bad_counts(statuses: Mapping[str, int]) -> dict[str, int]:
    """Of samples counted by status those that are bad."""
    return {status: number for status, number in statuses.items() if status not in ("ok", SKIPPED, DROPPED)}


def read_texts(path: str, samples: list[Sample], suffix: str, cache: Cache | None = None) -> Iterator[bytes | None]:
    """The `.cls` or `.json` text of each sample, None where it has none; the shard is opened once."""
    with _open(path, cache) as file:
        for sample in samples:
            if suffix not in sample.texts:
                yield None
                continue
            offset, size = sample.texts[suffix]
            file.seek(offset)
            yield file.read(size)
