"""Reads the corrections of a job's labels: a CSV in which a person says of single samples what they show.

    source,shard,index,path,class,sha256
    labelled,a/000.tar,17,birds/owl_3.jpg,owl,9f86d081884c7d65…

A row is known by source, shard and index; `class` is the name of a class, or `drop` for an image that is to be left
out; `sha256` is that of the image's bytes, so that no row can meet another image than the one that was looked at.
`path` is for people. Shards are never written again: what is corrected are the rows of index and label files.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.data.classes import plain
from pipeline.errors import DataError

SOURCES = ("labelled", "unlabelled", "validation", "test", "audit_only")
COLUMNS = ("source", "shard", "index", "path", "class", "sha256")
DROP = "drop"


@dataclass(frozen=True)
class Correction:
    """What one sample shows: a class index, or None where it is to be left out. `line`: of the file."""

    label: int | None
    sha256: str
    line: str

    def check(self, data: bytes, where: str) -> None:
        """DataError unless the image is the one that was looked at."""
        if (found := hashlib.sha256(data).hexdigest()) != self.sha256:
            raise DataError(
                f"{self.line} is of another image than {where}: sha256 {self.sha256[:12]}… there, {found[:12]}… in the "
                "shard; look at that image again and correct the row, or delete it"
            )

    def missing(self, index: int, shard: str, samples: int) -> str:
        """What is wrong with a correction of a sample that there is not."""
        return (
            f"{self.line} names sample {index} of shard {shard}, which has {samples}, counted from 0; correct the row, "
            "or delete it"
        )


OfShard = Mapping[int, Correction]
"""Corrections of a shard by sample index."""


@dataclass(frozen=True)
class Corrections:
    """All corrections of a file: {source: {shard: {index: Correction}}}."""

    sources: Mapping[str, Mapping[str, OfShard]]

    def of(self, source: str, shard: str) -> OfShard:
        return self.sources.get(source, {}).get(shard, {})

    def count(self, source: str) -> int:
        """How many samples of a source are corrected."""
        return sum(map(len, self.sources.get(source, {}).values()))

    def digest(self, source: str) -> str | None:
        """Identity of a source's corrections; None where there is none."""
        rows = [
            [shard, index, row.label, row.sha256]
            for shard, found in self.sources.get(source, {}).items()
            for index, row in found.items()
        ]
        return hashlib.sha256(json.dumps(sorted(rows, key=lambda row: row[:2])).encode()).hexdigest() if rows else None

    def check_shards(self, source: str, shards: Collection[str]) -> None:
        """DataError for a row whose shard the source does not have."""
        for shard, rows in self.sources.get(source, {}).items():
            if shard not in shards:
                close = difflib.get_close_matches(shard, shards, 1, 0.6)
                hint = f"did you mean {close[0]}?" if close else f"it has {len(shards)}, the first is {min(shards)}"
                line = next(iter(rows.values())).line
                raise DataError(f"{line} names the shard '{shard}', which the {source} shards do not have; {hint}")


NONE = Corrections({})


def read(path: str, classes: Sequence[str]) -> Corrections:
    """The corrections in a file, of a job with these classes. DataError names the first mistake."""
    shown = storage.redact(path)
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"corrections: there is no {shown}; name a CSV with the columns {','.join(COLUMNS)}") from None
    except (IsADirectoryError, PermissionError) as error:
        raise DataError(
            f"corrections: {shown} cannot be read ({type(error).__name__}); name a CSV with the columns "
            f"{','.join(COLUMNS)}"
        ) from None
    except UnicodeDecodeError:
        raise DataError(f"corrections: {shown} is not UTF-8 text; save it as CSV in UTF-8") from None
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names = {plain(name): number for number, name in enumerate(classes)}
    if DROP in names:
        raise DataError(f"corrections: a class is called '{DROP}', which stands for no class there; rename the class")
    found: dict[str, dict[str, dict[int, Correction]]] = {}
    try:
        header = next(rows, [])
        if sorted(header) != sorted(COLUMNS):
            raise DataError(
                f"corrections: {shown} begins with the columns {','.join(header)[:200] or '(none)'}; they must be "
                f"{','.join(COLUMNS)}"
            )
        for values in rows:
            if values:
                line = f"corrections: line {rows.line_num} of {shown}"
                if len(values) != len(header):
                    raise DataError(f"{line} has {len(values)} fields; it takes {len(header)}: {','.join(header)}")
                _take(found, dict(zip(header, map(str.strip, values), strict=True)), line, names)
    except csv.Error as error:
        raise DataError(f"corrections: line {rows.line_num} of {shown} is no CSV ({error})") from None
    return Corrections(found)


def _take(
    found: dict[str, dict[str, dict[int, Correction]]],
    row: Mapping[str, str],
    line: str,
    names: Mapping[str, int],
) -> None:
    if row["source"] not in SOURCES:
        raise DataError(f"{line} has the source '{row['source'][:40]}'; it must be one of {', '.join(SOURCES)}")
    if not re.fullmatch(r"[0-9]{1,9}", row["index"]):
        raise DataError(f"{line} has the index '{row['index'][:40]}'; it takes the number of the sample in its shard")
    if not re.fullmatch(r"[0-9a-fA-F]{64}", row["sha256"]):
        raise DataError(
            f"{line} has the sha256 '{row['sha256'][:70]}'; it takes the 64 hex digits that `sha256sum` prints of the "
            "image, so that the row cannot meet another one"
        )
    name = plain(row["class"])
    if name != DROP and name not in names:
        close = difflib.get_close_matches(name, names, 1, 0.6)
        hint = f"did you mean '{close[0]}'?" if close else f"the {len(names)} classes begin with '{min(names)}'"
        raise DataError(f"{line} has the class '{name[:40]}'; it takes a name of classes.json or '{DROP}'; {hint}")
    correction = Correction(None if name == DROP else names[name], row["sha256"].lower(), line)
    shard = found.setdefault(row["source"], {}).setdefault(row["shard"], {})
    before = shard.setdefault(int(row["index"]), correction)
    if (before.label, before.sha256) != (correction.label, correction.sha256):
        number = before.line.split()[2]
        raise DataError(f"{line} says something else of the same sample than line {number}; delete one of them")
