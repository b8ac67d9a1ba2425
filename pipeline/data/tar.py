"""Walks the members of an uncompressed tar, whatever wrote it and however it is damaged.

Standard `tarfile` reads extended headers of any declared size into memory, recurses over chains of them and
takes garbage between members for the end of the archive. Here a header never costs more than MAX_HEADER
bytes, and every way an archive can stop is told apart. `tarfile` parses the 512-byte headers themselves.
"""

from __future__ import annotations

import re
import tarfile
from dataclasses import dataclass
from typing import IO

BLOCK = tarfile.BLOCKSIZE
MAX_HEADER = 1 << 20  # long names and PAX records: 1 MiB is far above what any writer produces
MAX_PADDING = 1 << 20  # GNU tar and bsdtar pad to 10 KiB, writers to tape to 512 KiB at most
ZEROS = bytes(BLOCK)
PAX_RECORD = re.compile(rb"(\d{1,9}) ([^=\n]+)=")


class Damage(Exception):
    """The archive cannot be read on from byte `at`; the text says why."""

    def __init__(self, at: int, reason: str) -> None:
        super().__init__(reason)
        self.at = at


@dataclass(frozen=True)
class Member:
    """`size` is what the header declares, `present` how many bytes of it the file holds from `offset` on.

    `plain`: a regular member whose bytes lie in the file as they are (not a sparse one).
    """

    name: str
    offset: int
    size: int
    present: int
    regular: bool
    plain: bool


def check_head(block: bytes) -> None:
    """Damage unless a file may be a tar whose first bytes, 512 where it has so many, are these."""
    if block != ZEROS:
        try:
            tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
        except tarfile.HeaderError as error:
            raise Damage(0, f"there is no tar header at byte 0 ({error})") from None


class Tar:
    """Walk a seekable file: `next()` until it returns None, `read(member)` for the data of the latest one."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._total = file.seek(0, 2)
        self._position = 0
        self._truncated: Member | None = None

    def next(self) -> Member | None:
        """The next member, or None at the end-of-archive marker. Raises Damage."""
        if self._truncated is not None:
            raise Damage(
                self._total,
                f"the file ends at byte {self._total} inside member {self._truncated.name!r}, "
                f"which declares {self._truncated.size} bytes",
            )
        long_name: bytes | None = None
        pax: dict[bytes, bytes] = {}
        while True:
            at = self._position
            block = self._read_header(at)
            if block == ZEROS:
                self._check_end(at)
                return None
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
            except tarfile.HeaderError as error:
                raise Damage(at, f"there is no tar header at byte {at} ({error})") from None
            if info.size < 0:
                raise Damage(at, f"the header at byte {at} declares a negative size")
            if info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
                pax = _parse_pax(at, self._read_extension(at, info.size))
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = self._read_extension(at, info.size).split(b"\0", 1)[0]
            elif info.type in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
                self._position += _padded(info.size)
            else:
                return self._member(at, block, info, long_name, pax)

    def read(self, member: Member, most: int | None = None) -> bytes:
        """The data of the member that `next` returned last, as far as the file holds it; the first `most` bytes."""
        return self._read(member.offset, member.present if most is None else min(most, member.present))

    def _member(
        self, at: int, block: bytes, info: tarfile.TarInfo, long_name: bytes | None, pax: dict[bytes, bytes]
    ) -> Member:
        sparse = any(key.startswith(b"GNU.sparse.") for key in pax)
        if info.type == tarfile.GNUTYPE_SPARSE:
            sparse = True
            extended = block[482]
            while extended:  # more of the sparse map, in blocks that no header announces
                extended = self._read_header(self._position)[504]
        size = _pax_size(at, pax, info.size)
        raw = pax.get(b"GNU.sparse.name") or pax.get(b"path") or long_name
        name = raw.decode("utf-8", "backslashreplace") if raw else info.name
        # Links, devices and folders may declare a size but no data follows; after unknown types it does.
        stored = size if info.isreg() or info.type not in tarfile.SUPPORTED_TYPES else 0
        offset = self._position
        member = Member(
            name=re.sub(r"^(?:\./+)+", "", name),
            offset=offset,
            size=stored,
            present=max(0, min(stored, self._total - offset)),
            regular=info.isreg(),
            plain=info.isreg() and not sparse,
        )
        if member.present < stored:
            self._truncated = member
        self._position = offset + _padded(stored)
        return member

    def _read_header(self, at: int) -> bytes:
        if at >= self._total:
            raise Damage(at, f"the file ends at byte {self._total} without an end-of-archive marker")
        if at + BLOCK > self._total:
            raise Damage(at, f"the file ends inside the header at byte {at}")
        self._position = at + BLOCK
        return self._read(at, BLOCK)

    def _read_extension(self, at: int, size: int) -> bytes:
        if size > MAX_HEADER:
            raise Damage(at, f"the extended header at byte {at} declares {size} bytes, more than {MAX_HEADER}")
        start = self._position
        if start + size > self._total:
            raise Damage(at, f"the file ends inside the extended header at byte {at}")
        self._position = start + _padded(size)
        return self._read(start, size)

    def _read(self, offset: int, size: int) -> bytes:
        self._file.seek(offset)
        data = self._file.read(size)
        while len(data) < size:  # remote files may answer with less
            more = self._file.read(size - len(data))
            if not more:
                raise Damage(offset, f"the file became shorter while it was read, at byte {offset + len(data)}")
            data += more
        return data

    def _check_end(self, at: int) -> None:
        """After the marker only zeros may follow, as many as writers pad with; else members are lost: two tars in
        one file, a hole, a file that was given its size and never written to its end."""
        rest = self._total - at
        if rest > MAX_PADDING:
            raise Damage(at, f"{rest} bytes follow the end-of-archive marker at byte {at}, more than any padding")
        if any(self._read(at, rest)):
            raise Damage(at, f"data follows the end-of-archive marker at byte {at}")


def _padded(size: int) -> int:
    return size + -size % BLOCK


def _parse_pax(at: int, data: bytes) -> dict[bytes, bytes]:
    """The records about name and size, each "LENGTH KEY=VALUE\\n"; LENGTH counts all of it."""
    records: dict[bytes, bytes] = {}
    position = 0
    while match := PAX_RECORD.match(data, position):
        end = match.start() + int(match[1])
        if not match.end() < end <= len(data):
            raise Damage(at, f"the extended header at byte {at} is damaged")
        if match[2] in (b"path", b"size") or match[2].startswith(b"GNU.sparse."):
            records[match[2]] = data[match.end() : end - 1]
        position = end
    return records


def _pax_size(at: int, pax: dict[bytes, bytes], size: int) -> int:
    if b"size" not in pax:
        return size
    if not re.fullmatch(rb"\d{1,20}", pax[b"size"]):
        raise Damage(at, f"the extended header at byte {at} gives a size that is no number")
    return int(pax[b"size"])
