"""Writes the images that a table names, or holds, as labelled or unlabelled shards, on this machine.

A table may be many files. All its rows are in memory at once; pipeline.prepare.cluster_tables writes the same shards of
tables of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.prepare import table_files, table_patterns
from pipeline.prepare.conditions import conditions_in
from pipeline.prepare.picture_files import Skipped
from pipeline.prepare.sources import Limits, by_index, by_name, write
from pipeline.prepare.table_files import Wanted


def table(
    pattern: str,
    out: str,
    *,
    split: str = "labelled",
    image: str = "path",
    label: str | None = "label",
    label_is: str = "name",
    where: Sequence[str] = (),
    **limits: Any,
) -> dict[str, Any]:
    """Shards of the images that Parquet or CSV files name, or hold, in their column `image`, as `folders.folder` writes
    them.

    `pattern`: a file, a folder of .parquet files or a glob. Relative paths start at their table's folder; a column of
    bytes (img2dataset's, say), or of {bytes, path} as Hugging Face writes it, holds the images themselves. `label` is
    the column of class names, as text whatever they look like, or with `label_is="index"` of class indexes; None for
    unlabelled shards. `where`: conditions such as "width>=64", all of which a row must meet; `limits`: see
    sources.Limits.
    """
    wanted = wanted_of(image, label, label_is, where)
    files = table_patterns.find(pattern)
    surveys = [table_files.survey(path, wanted) for path in files]
    check_rows(pattern, sum(sum(one.rows) for one in surveys), wanted)
    rows = [(path, number, row) for path in files for number, row in enumerate(table_files.read(path, wanted))]
    sources = [table_files.source_of(row, number, path) for path, number, row in rows]
    skipped = failed_rows(zip(files, (one.failed for one in surveys), strict=True))
    if label is None:
        made = write(out, {split: (sources, None)}, [], skipped, Limits(**limits))
    else:
        texts = [str(row.label) for _, _, row in rows]
        numbers, names = numbered(out, texts, pattern, label, label_is)
        made = write(out, {split: (sources, [numbers[text] for text in texts])}, names, skipped, Limits(**limits))
    return made | {"skipped": sum(one.failed.total() for one in surveys)}


def wanted_of(image: str, label: str | None, label_is: str, where: Sequence[str]) -> Wanted:
    if label_is not in ("name", "index"):
        raise ConfigError(f"labels are '{label_is}'; allowed are name and index")
    return Wanted(image, label, conditions_in(where))


def check_rows(pattern: str, rows: int, wanted: Wanted) -> None:
    shown = storage.redact(pattern)
    if not rows and wanted.where:
        conditions = " and ".join(map(str, wanted.where))
        raise DataError(f"no row of {shown} meets --where {conditions}; ask for less")
    if not rows:
        raise DataError(f"{shown} has no rows; give a table with a row per image")


def numbered(
    out: str, texts: Iterable[str], pattern: str, label: str, label_is: str
) -> tuple[dict[str, int], list[str]]:
    """{label: class index}, and all class names."""
    if label_is == "name":
        return by_name(out, texts)
    return by_index(out, texts, f"{storage.redact(pattern)}: column '{label}'")


def failed_rows(of_files: Iterable[tuple[str, Counter[str]]]) -> Skipped:
    """A line of bad_files.txt for each file and each status of rows that img2dataset could not fetch."""
    return [
        (storage.redact(path), f"skipped: {count} rows of status '{status}'")
        for path, failed in of_files
        for status, count in sorted(failed.items())
    ]
