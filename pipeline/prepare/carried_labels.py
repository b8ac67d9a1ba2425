"""Carries label files over to the shards in which their images lie now, so that nothing is labelled again.

The folders of label files that a run has of the old shards get others beside them, of the new shards. The label stage
takes files over from there as it does under `--refreeze`: where teacher, options and the shard are what they were.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data import label_files, parquet_files
from pipeline.data.label_files import Predictions
from pipeline.data.samples import Left, Sample
from pipeline.data.shard_patterns import entry_at
from pipeline.data.shards import Shard
from pipeline.errors import DataError
from pipeline.plan.mended import LABEL_FOLDER
from pipeline.plan.stage import read_done

COLUMNS = ("status", "label", "confidence", "classes", "probs", "image_hash", "crc32")
OF_SHARD = ("shard", "shard_size")
Label = list[Any]
"""The values of COLUMNS of one sample, as JSON holds them exactly."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Carried:
    """A folder of label files, the one that the new ones go to, and what all its files say of themselves."""

    folder: str
    out: str
    says: dict[str, Any]

    def labels(self, shard: Shard) -> list[Label]:
        """Of each sample of a shard, in order. DataError: there is no such file, or it is of something else."""
        path = storage.join(self.folder, label_files.file_name(shard.name))
        table, metadata = parquet_files.read_with_metadata(path, COLUMNS[:-1], optional=COLUMNS[-1:])
        common = {name: self.says[name] for name in label_files.CHECKED if name in self.says and name not in OF_SHARD}
        label_files.check_labels(metadata, {"shard": shard.name, "shard_size": shard.size, **common}, path)
        nothing = [None] * table.num_rows  # files of 0.2.0 and earlier have no crc32
        cells = [table[name].to_pylist() if name in table.column_names else nothing for name in COLUMNS]
        probs = COLUMNS.index("probs")
        cells[probs] = [None if row is None else [float(value) for value in row] for row in cells[probs]]
        return [list(row) for row in zip(*cells, strict=True)]

    def write(self, shard: str, path: str, samples: Sequence[Sample], labels: Sequence[Label]) -> None:
        """The label file of a new shard, which lies at `path`."""
        columns = dict(zip(COLUMNS, zip(*labels, strict=True), strict=True))
        rows = np.flatnonzero([status == "ok" for status in columns["status"]])

        def good(name: str, kind: type[np.generic]) -> Any:
            return np.array([columns[name][row] for row in rows.tolist()], kind)

        classes, probs = good("classes", np.int32), good("probs", np.float16)
        if not len(rows):
            classes, probs = np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float16)
        found = Predictions(good("label", np.int32), good("confidence", np.float32), classes, probs)
        table = label_files.make_table(
            {
                "index": [sample.index for sample in samples],
                "key": [label_files.printable_key(sample.key) for sample in samples],
                "offset": [sample.offset for sample in samples],
                "size": [sample.size for sample in samples],
                **{name: columns[name] for name in ("status", "image_hash", "crc32")},
            },
            rows,
            found,
        )
        entry = entry_at(path)
        of_shard = {
            "shard": shard,
            "shard_size": entry.size,
            "shard_sha256": storage.sha256(path),
            "shard_stamp": entry.stamp,
            "rows": len(samples),
            "counts": dict(sorted(Counter(columns["status"]).items())),
            "without_image": 0,
            "left": dataclasses.asdict(Left()),
            "cut": None,
            "seconds": {},
        }
        label_files.write_labels(storage.join(self.out, label_files.file_name(shard)), table, {**self.says, **of_shard})


def check(label: Label, image: bytes, where: str) -> None:
    """DataError: a label is of another image."""
    known = dict(zip(COLUMNS, label, strict=True))
    wrong = known["crc32"] is not None and known["crc32"] != zlib.crc32(image)
    if wrong or (known["image_hash"] is not None and known["image_hash"] != label_files.image_hash(image)):
        raise DataError(
            f"{where} is another image than the one that was labelled; bring that shard back, or leave out --labels"
        )


def find(run: str, shards: Sequence[Shard], identity: str) -> list[Carried]:
    """The folders in the output of a run whose label files are of these shards. DataError: there is none."""
    found = []
    for name in storage.listdir(run):
        folder = storage.join(run, name)
        if not LABEL_FOLDER.fullmatch(name) or read_done(folder) is None:
            continue
        says = _says(folder, shards)
        if says is None:
            continue
        if says.get("selection") is not None:
            log.warning("%s labels only what a selection kept; it is not carried over", storage.redact(folder))
            continue
        new = hashlib.sha256(f"{name}:{identity}".encode()).hexdigest()[:8]
        found.append(Carried(folder, storage.join(run, f"{name.rpartition('-')[0]}-{new}"), says))
    if not found:
        raise DataError(
            f"--labels {storage.redact(run)} has no finished label stage of these shards (genK-label-… with a label "
            "file of each); name the output of the run that labelled them, or leave --labels out"
        )
    return found


def _says(folder: str, shards: Sequence[Shard]) -> dict[str, Any] | None:
    """What the first shard's label file says of itself, None where the folder's files are of other shards."""
    present = set(storage.walk(folder))
    names: Mapping[str, str] = {shard.name: label_files.file_name(shard.name) for shard in shards}
    if not set(names.values()) <= present:
        return None
    says = parquet_files.read_metadata(storage.join(folder, names[shards[0].name]))
    return says if says.get("shard_size") == shards[0].size else None
