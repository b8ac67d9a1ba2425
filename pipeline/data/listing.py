"""Patterns of shards: braces, globs and folders, matched against one listing per folder.

`data/train-{000..146}.tar`, `data/*/part-?.tar`, `s3://bucket/corpus`, `https://host/x-{0..9}.tar`. Sizes and
modification stamps come with the listing; no request is spent on a single file, save over http(s), where
there may be nothing to list.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.errors import DataError

MAGIC = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_EXPANSION = 1_000_000


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

    @property
    def prefix(self) -> str:
        """The folder that no brace or wildcard changes."""
        fixed: list[str] = []
        for part in self.parts[:-1]:
            if MAGIC.search(part) or "{" in part:
                break
            fixed.append(part)
        return "/".join([self.base, *fixed])


def parse(text: str, root: str | None) -> Pattern:
    """Relative patterns start at `root`, else in the working directory; a folder stands for its `*.tar`."""
    query = ""
    if storage.is_url(text):
        scheme, rest = text.split("://", 1)
        if scheme in ("http", "https"):
            rest, _, query = rest.partition("?")
        host, _, inner = rest.partition("/")
        base = f"{scheme}://{host}"
        literal_file = inner.endswith(".tar")
    elif text.startswith("/"):
        base, inner = "", text
        literal_file = not Path(text).is_dir()
    elif root is not None and storage.is_url(root):
        base, inner = root.rstrip("/"), text
        literal_file = inner.endswith(".tar")
    else:
        base, inner = str(Path(root or ".").absolute()).rstrip("/"), text
        literal_file = not Path(base, inner).is_dir()
    parts = [part for part in inner.split("/") if part not in ("", ".")]
    if not parts or not (literal_file or MAGIC.search(parts[-1]) or BRACES.search(parts[-1])):
        parts.append("*.tar")
    return Pattern(text, base, tuple(parts), f"?{query}" if query else "")


def expand(pattern: str) -> list[str]:
    """`x-{08..10}-{a,b}` -> x-08-a, x-08-b, x-09-a, … Ranges keep leading zeros; braces may be nested."""
    found = [pattern]
    while any(BRACES.search(text) for text in found):
        wider: list[str] = []
        for text in found:
            match = BRACES.search(text)
            if match is None:
                wider.append(text)
                continue
            before, after = text[: match.start()], text[match.end() :]
            choices = _choices(match[1])
            if len(wider) + len(choices) > MAX_EXPANSION:
                raise DataError(
                    f"pattern {storage.redact(pattern)} stands for more than {MAX_EXPANSION} names; "
                    "write a wildcard instead of so wide a range"
                )
            wider += [f"{before}{choice}{after}" for choice in choices]
        found = wider
    return list(dict.fromkeys(found))


def _choices(inside: str) -> Sequence[object]:
    """What may stand in place of a brace: `a,b` or a range, up or down, with the width of its leading zeros."""
    match = RANGE.fullmatch(inside)
    if match is None:
        return inside.split(",")
    first, last = int(match[1]), int(match[2])
    numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
    if not match[1].startswith("0") or len(numbers) > MAX_EXPANSION:
        return numbers
    return [f"{number:0{len(match[1])}d}" for number in numbers]


class Listing:
    """Each folder is listed once, however many patterns look into it."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, Entry]] = {}

    def folder(self, path: str) -> dict[str, Entry]:
        """{name: entry} of a folder, {} where there is none."""
        if path not in self._folders:
            self._folders[path] = _list_url(path) if storage.is_url(path) else _list_local(path or "/")
        return self._folders[path]

    def match(self, pattern: Pattern) -> tuple[dict[str, Entry], list[str]]:
        """({path: entry} of what is there, the names written out in full that are not)."""
        found: dict[str, Entry] = {}
        missing: list[str] = []
        for text in expand("/".join(pattern.parts)):
            parts = text.split("/")
            if pattern.base.startswith(("http://", "https://")) and not MAGIC.search(text):
                path = f"{pattern.base}/{text}{pattern.query}"
                hits = _http_file(path)
            else:
                hits = dict(self._descend(pattern.base, parts))
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
    fs, inner = storage.filesystem(path)
    fs.invalidate_cache()
    try:
        found = fs.ls(inner, detail=True)
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


def _entry(info: dict[str, Any]) -> Entry:
    keys = ("ETag", "etag", "mtime", "LastModified", "updated", "created")  # every driver has its own
    stamp = next((info[key] for key in keys if info.get(key)), "")
    return Entry(int(info.get("size") or 0), str(stamp).strip('"'), info.get("type") == "directory")
