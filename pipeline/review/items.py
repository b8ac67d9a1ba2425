"""Makes what a person is shown of an image: a small picture, its label, what models say of it, and why it is shown."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipeline import storage
from pipeline.data import images, known_image, parquet_files
from pipeline.data.manifest import manifest_name
from pipeline.data.shards import Shard
from pipeline.labelling import audit

SAID = 5  # classes, the most probable ones
SIDE, PNG_SIDE = 256, 64  # pixels of a picture's longer side at most; up to which it stays without loss
READERS = 8  # threads that read images


@dataclass(frozen=True)
class Wanted:
    """An image that is to be shown: sample `index` of a shard, called `key`, whose bytes lie there. label: the number
    of its class, None where it has none; said: (class, probability) of the most probable ones, by the model of the
    stage `by`."""

    group: str
    shard: Shard
    index: int
    key: str
    offset: int
    size: int
    image_hash: int
    label: int | None
    by: str
    said: tuple[tuple[int, float], ...]
    why: str


@dataclass(frozen=True)
class Item:
    """The same with a file name for people, its bytes' sha256 and a small picture: a data URL, width, height."""

    wanted: Wanted
    path: str
    sha256: str
    picture: str
    width: int
    height: int


@dataclass(frozen=True)
class Rows:
    """A label file of a model, with the labels of its images where an index file has them."""

    group: str
    by: str
    shard: Shard
    labelled: str
    indexed: str | None = None

    def wanted(self, rows: Sequence[int]) -> list[Wanted]:
        """These rows of the index file, where there is one, else of the label file; `why` is still empty."""
        columns = ["index", "key", "offset", "size", "image_hash", "classes", "probs"]
        table, labels = parquet_files.read_table(self.labelled, columns), None
        if self.indexed:
            known = parquet_files.read_table(self.indexed, ["index", "label"]).take(list(rows))
            labels, rows = known["label"].to_pylist(), known["index"].to_pylist()
        table = table.take(list(rows))
        classes, probs = (audit.lists(table, name)[:, :SAID] for name in ("classes", "probs"))
        said = [
            tuple((int(c), float(p)) for c, p in zip(*pair, strict=True)) for pair in zip(classes, probs, strict=True)
        ]
        facts = table.select(columns[:5]).to_pylist()
        return [
            Wanted(self.group, self.shard, **one, label=labels[n] if labels else None, by=self.by, said=said[n], why="")
            for n, one in enumerate(facts)
        ]


def read(wanted: Sequence[Wanted], root: str) -> list[Item]:
    """In the same order; `root`: where manifests of `prepare` may lie. DataError: a shard is not what it was."""
    known = _paths(root, wanted)
    with ThreadPoolExecutor(READERS) as readers:
        return list(readers.map(lambda one: _read(one, known.get((one.shard.name, one.index), one.key)), wanted))


def _paths(root: str, wanted: Sequence[Wanted]) -> dict[tuple[str, int], str]:
    """{(shard, index): path} of the images whose files `prepare` has written down."""
    found: dict[tuple[str, int], str] = {}
    names = sorted({one.shard.name for one in wanted})
    for split in sorted({name.rpartition("-")[0] for name in names}):
        manifest = storage.join(root, manifest_name(split))
        if storage.exists(manifest):
            table = parquet_files.read_table(manifest, ["shard", "index", "path"])
            rows = table.filter(pc.is_in(table["shard"], pa.array(names))).to_pylist()
            found |= {(row["shard"], row["index"]): row["path"] for row in rows}
    return found


def _read(one: Wanted, path: str) -> Item:
    where = f"sample {one.index} ('{one.key}')"
    known = known_image.Known(one.image_hash, None)
    data = known_image.read(one.shard.path, one.offset, one.size, known, where)
    image = images.decode(data, at_least=SIDE)
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    kind, options = ("png", {}) if max(image.size) <= PNG_SIDE else ("jpeg", {"quality": 85})
    out = io.BytesIO()
    image.save(out, kind, **options)
    url = f"data:image/{kind};base64,{base64.b64encode(out.getvalue()).decode()}"
    return Item(one, path, hashlib.sha256(data).hexdigest(), url, *image.size)
