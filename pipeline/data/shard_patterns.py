"""Matches patterns of shards (braces, globs, folders, list files) against one listing per folder.

`data/train-{000..146}.tar`, `data/*/part-?.tar`, `s3://bucket/corpus`, `https://host/x-{0..9}.tar`, `shards.txt`.
Sizes and modification stamps come with the listing; no request is spent on a single file, save over http(s),
where there may be nothing to list.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.data.braces import expand
from pipeline.errors import DataError
from pipeline.storage.range_requests import stamp_of

MAGIC = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{[^{}]*\}")
LIST_SUFFIX = ".txt"
HTTP_THREADS = 32


@dataclass(frozen=True)
class Entry:
    size: int
    stamp: str  # mtime in ns, or ETag
    folder: bool


@dataclass(frozen=True)
class Pattern:
    """One pattern as written: `base` is taken literally, `parts` may hold braces and wildcards."""

    text: str
    base: str
    parts: tuple[str, ...]
    query: str = ""  # of an http(s) URL: signatures; part of the path to open, never of a name
    home: str | None = None  # the folder of the list file that it is a line of
    where: str = ""  # which line of which list file

    @property
    def prefix(self) -> str:
        """The folder that no brace or wildcard changes."""
        fixed: list[str] = []
        for part in self.parts[:-1]:
            if MAGIC.search(part) or "{" in part:
                break
            fixed.append(part)
        return "/".join([self.base, *fixed])

    @property
    def single(self) -> bool:
        """It names files behind http(s), where there is no listing."""
        return self.base.startswith(("http://", "https://")) and not any(MAGIC.search(part) for part in self.parts)

    def texts(self) -> list[str]:
        """What follows `base`, with braces written out; it may hold wildcards."""
        return expand("/".join(self.parts))

    def path(self, text: str) -> str:
        return f"{self.base}/{text}{self.query}"


def parse(text: str, root: str | None) -> list[Pattern]:
    """The pattern `text`, or one for each line of the list file that it names. Raises DataError.

    Relative patterns start at `root`, else in the working directory; the lines of a list file in its folder.
    """
    for given in (text, root or ""):
        if given.startswith("pipe:"):
            raise DataError(
                f"'pipe:' is refused, because it would run a command: {given[:60]!r}; "
                "give local paths or URLs such as s3:// or https://"
            )
    one = _parse(text, root)
    if not one.parts[-1].lower().endswith(LIST_SUFFIX):
        return [one]
    path = "/".join([one.base, *one.parts]) + one.query
    return [_line(number, line, path) for number, line in _lines(path)]


def _lines(path: str) -> list[tuple[int, str]]:
    shown = storage.redact(path)
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"the list file {shown} is no UTF-8 text; write one shard path or URL a line") from None
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise DataError(f"cannot read the list file {shown}: {reason}; correct its path or write it") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
    lines = [(number, line) for number, line in lines if line and not line.startswith("#")]
    if not lines:
        raise DataError(f"the list file {shown} names no shard; write one shard path or URL a line")
    return lines


def _line(number: int, line: str, path: str) -> Pattern:
    home = path.partition("?")[0].rpartition("/")[0]
    where = f"line {number} of the list file {storage.redact(path)}: "
    if "\0" in line or line.partition("?")[0].lower().endswith(LIST_SUFFIX):
        raise DataError(f"{where}{line[:60]!r} names no shards; write the path or URL of a .tar")
    try:
        [pattern] = parse(line, home or "/")
    except DataError as error:
        raise DataError(f"{where}{error}") from None
    return replace(pattern, home=home, where=where)


def _parse(text: str, root: str | None) -> Pattern:
    """A folder stands for its `*.tar`."""
    query, folder = "", False
    if storage.is_url(text):
        scheme, rest = text.split("://", 1)
        if scheme in ("http", "https"):
            rest, _, query = rest.partition("?")
        host, _, inner = rest.partition("/")
        base = f"{scheme}://{host}"
    elif text.startswith("/"):
        base, inner = "", text
    elif root is not None and storage.is_url(root):
        base, inner = root.rstrip("/"), text
    else:
        base, inner = str(Path(root or ".").absolute()).rstrip("/"), text
    parts = [part for part in inner.split("/") if part not in ("", ".")]
    while parts and parts[0] == ".." and base.count("/") > (2 if storage.is_url(base) else 0):
        base, parts = base.rpartition("/")[0], parts[1:]
    if parts and not inner.lower().endswith((".tar", LIST_SUFFIX)):
        folder = storage.is_url(base) or Path(base or "/", *parts).is_dir()
    if not parts or (folder and not (MAGIC.search(parts[-1]) or BRACES.search(parts[-1]))):
        parts.append("*.tar")
    return Pattern(text, base, tuple(parts), f"?{query}" if query else "")


class Listing:
    """Each folder is listed once, however many patterns look into it."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, Entry]] = {}
        self._asked: dict[str, dict[str, Entry]] = {}

    def ask(self, patterns: Sequence[Pattern]) -> None:
        """Ask for the files behind http(s), where there is no listing, many at a time; before `match`."""
        paths = [one.path(text) for one in patterns if one.single for text in one.texts()]
        with ThreadPoolExecutor(HTTP_THREADS) as pool:
            self._asked.update(zip(paths, pool.map(_http_file, paths), strict=True))

    def folder(self, path: str) -> dict[str, Entry]:
        """{name: entry} of a folder, {} where there is none."""
        if path not in self._folders:
            self._folders[path] = _list_url(path) if storage.is_url(path) else _list_local(path or "/")
        return self._folders[path]

    def match(self, pattern: Pattern) -> tuple[dict[str, Entry], list[str]]:
        """({path: entry} of what is there, the names written out in full that are not)."""
        found: dict[str, Entry] = {}
        missing: list[str] = []
        for text in pattern.texts():
            if pattern.single:
                hits = self._asked[pattern.path(text)]
            else:
                hits = dict(self._descend(pattern.base, text.split("/")))
            found.update(hits)
            if not hits and not MAGIC.search(text):
                missing.append(f"{pattern.base}/{text}")
        return found, missing

    def _descend(self, folder: str, parts: list[str]) -> Iterator[tuple[str, Entry]]:
        head, rest = parts[0], parts[1:]
        if head == "**":
            yield from self._descend(folder, rest or ["*.tar"])
            for name, entry in self.folder(folder).items():
                if entry.folder and not name.startswith("."):
                    yield from self._descend(f"{folder}/{name}", parts)
        elif not MAGIC.search(head):
            if rest:
                yield from self._descend(f"{folder}/{head}", rest)
            elif (file := self.folder(folder).get(head)) and not file.folder:
                yield f"{folder}/{head}", file
        else:
            matches = re.compile(fnmatch.translate(head)).match
            for name, entry in self.folder(folder).items():
                if name.startswith(".") or not matches(name):
                    continue
                if rest and entry.folder:
                    yield from self._descend(f"{folder}/{name}", rest)
                elif not rest and not entry.folder and name.lower().endswith(".tar"):
                    yield f"{folder}/{name}", entry


def _list_local(path: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    try:
        with os.scandir(path) as found:
            for item in found:
                try:
                    stat = item.stat()
                except FileNotFoundError:  # a dangling link, or gone since
                    continue
                entries[item.name] = Entry(stat.st_size, str(stat.st_mtime_ns), item.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise DataError(f"cannot list the folder {path}: {error.strerror}") from error
    return entries


def _list_url(path: str) -> dict[str, Entry]:
    try:
        found = storage.ask(path, lambda fs, inner: fs.ls(inner, detail=True))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # every driver has exceptions of its own for credentials, names and networks
        raise DataError(f"cannot list {storage.redact(path)}: {type(error).__name__}: {error}") from error
    return {info["name"].rstrip("/").rsplit("/", 1)[-1]: _entry(info) for info in found}


def _http_file(path: str) -> dict[str, Entry]:
    fs, inner = storage.filesystem(path)
    try:
        info = fs.info(inner)
    except FileNotFoundError:
        return {}
    except Exception as error:
        raise DataError(f"cannot reach {storage.redact(path)}: {type(error).__name__}") from error
    if info.get("size") is None:
        raise DataError(
            f"the server of {storage.redact(path)} does not tell the file's size, and a shard is known by name "
            "and size; use a server that sends Content-Length, or copy the shards"
        )
    return {path: _entry(info)}


def entry_at(path: str) -> Entry:
    """A file as a listing would show it now. FileNotFoundError where there is none."""
    if not storage.is_url(path):
        stat = Path(path).stat()
        return Entry(stat.st_size, str(stat.st_mtime_ns), False)
    return _entry(storage.ask(path, lambda fs, inner: fs.info(inner)))


def _entry(info: dict[str, Any]) -> Entry:
    return Entry(int(info.get("size") or 0), stamp_of(info), info.get("type") == "directory")
