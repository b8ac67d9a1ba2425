"""Finds the files of a table, and the columns that their folders give them: `lang` is one below `lang=en`."""

from __future__ import annotations

import glob
import posixpath
import re
import urllib.parse
from pathlib import Path

from pipeline import storage
from pipeline.data.braces import expand
from pipeline.errors import DataError
from pipeline.prepare.picture_files import suffix_of

SUFFIXES = ("parquet", "csv")
PARTITION = re.compile(r"(\w+)=(.*)")
NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def find(pattern: str) -> list[str]:
    """The files of a table, sorted: one file, a folder's .parquet files, or those of a glob. DataError."""
    if not storage.is_url(pattern):
        pattern = str(Path(pattern).absolute())  # workers start elsewhere
    literal = not (glob.has_magic(pattern) or "{" in pattern)
    if not _is_folder(pattern) and (literal or (not storage.is_url(pattern) and Path(pattern).is_file())):
        return _checked([pattern])
    shown = storage.redact(pattern)
    if _is_folder(pattern):
        pattern = f"{pattern.rstrip('/')}/**/*.parquet"
    found = {path for text in expand(pattern) for path in _glob(text)}
    # Spark's `_metadata`, and hidden files, are no tables.
    files = sorted(path for path in found if not posixpath.basename(path).startswith((".", "_")))
    if not files:
        raise DataError(f"no table matches {shown}; give a .parquet or .csv file, a folder of .parquet files or a glob")
    return _checked(files)


def _checked(files: list[str]) -> list[str]:
    if strange := next((path for path in files if suffix_of(path) not in SUFFIXES), None):
        raise DataError(
            f"{storage.redact(strange)} is neither .parquet nor .csv; those are the tables that can be prepared"
        )
    return files


def _is_folder(path: str) -> bool:
    if storage.is_url(path):
        return suffix_of(path) not in SUFFIXES and not glob.has_magic(path) and "{" not in path
    return Path(path).is_dir()


def _glob(text: str) -> list[str]:
    if not storage.is_url(text):
        return glob.glob(text, recursive=True)  # noqa: PTH207
    scheme = text.split("://", 1)[0]
    return [f"{scheme}://{inner}" for inner in storage.ask(text, lambda fs, inner: fs.glob(inner))]


def partitions_of(path: str) -> dict[str, str | None]:
    """The columns that a file's folders give all its rows: {"lang": "en"} of `data/lang=en/0.parquet`."""
    found: dict[str, str | None] = {}
    for part in path.split("/")[:-1]:
        if match := PARTITION.fullmatch(part):
            found[match[1]] = None if match[2] == NO_PARTITION else urllib.parse.unquote(match[2])
    return found
