"""What benchmarks of training train on what: the cases, their shards with index files of drawn labels, the same as
files."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.augment.view import Augment
from pipeline.data import shards
from pipeline.loading.loader import TrainingShard

QUALITY = 90  # of JPEGs that are stored smaller


@dataclass(frozen=True)
class Case:
    """A model on images; `batch` of one worker; timm's models that stand beside it."""

    model: str
    size: int
    batch: int
    data: str
    classes: int
    augment: Augment
    peers: tuple[str, ...] = ()


SMALL = Augment(32, "rand-m9-n2-mstd0.5", scale=(0.5, 1.0), ratio=(0.8, 1.25), interpolation="bilinear")
POLICIES = {50: "rand-m10-mmax10-n2-p1", 152: "rand-m15-mmax15-n2-p1"}  # of conf/recipe
CASES = {
    "cifar10": Case("lambda_resnet_cifar_14", 32, 128, "cifar10/unlabelled-*.tar", 10, SMALL),
    **{
        f"{depth}-{size}": Case(
            f"lambda_resnet_{depth}", size, batch, "imagenet-sample/*.tar", 1000, Augment(size, POLICIES[depth]), peers
        )
        for depth, size, batch, peers in (
            (50, 160, 32, ("resnetrs50", "lambda_resnet50ts")),
            (152, 224, 32, ("resnetrs152",)),
        )
    },
}
ON_GPU = {"50-160": 512, "152-224": 256}  # images of a step there


def shards_of(data: Path, pattern: str, folder: Path, classes: int, stored: int) -> tuple[TrainingShard, ...]:
    """The shards of a pattern below `data`, with labels drawn at random; `stored` above 0: rewritten, as JPEGs whose
    shorter side has so many pixels."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    found = []
    for path in sorted(data.glob(pattern)):
        tar = _smaller(path, folder / path.name, stored) if stored else path
        samples = shards.scan(str(tar)).samples
        columns = {
            "index": pa.array([sample.index for sample in samples], pa.int32()),
            "key": [f"{sample.index:06d}" for sample in samples],
            "offset": pa.array([sample.offset for sample in samples], pa.int64()),
            "size": pa.array([sample.size for sample in samples], pa.int32()),
            "label": pa.array(draw.integers(0, classes, len(samples)), pa.int32()),
        }
        rows = folder / f"{path.stem}.parquet"
        pq.write_table(pa.table(columns), rows)
        found.append(TrainingShard(str(tar), str(rows), None, len(samples)))
    if not found:
        raise SystemExit(f"no shard matches {pattern} below {data}; name another folder with --data")
    return tuple(found)


def _smaller(path: Path, target: Path, side: int) -> Path:
    with tarfile.open(target, "w") as tar:
        for sample, data in shards.stream(str(path)):
            image = Image.open(io.BytesIO(data)).convert("RGB")
            scale = side / min(image.size)
            smaller = image.resize((round(image.width * scale), round(image.height * scale)))
            buffer = io.BytesIO()
            smaller.save(buffer, "JPEG", quality=QUALITY)
            info = tarfile.TarInfo(f"{sample.index:06d}.jpg")
            info.size = buffer.tell()
            tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return target


def as_files(source: Sequence[TrainingShard], folder: Path, images: int) -> Path:
    """The same images as files in class folders, linked again and again until there are so many; the folder."""
    labels = [label for shard in source for label in pq.read_table(shard.rows)["label"].to_pylist()]
    originals = list(zip(_files(source, folder / "originals"), labels, strict=True))
    for number, (path, label) in enumerate(itertools.islice(itertools.cycle(originals), images)):
        link = folder / "images" / f"{label:04d}" / f"{number:07d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    return folder / "images"


def _files(source: Sequence[TrainingShard], folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True)
    for shard in source:
        for sample, data in shards.stream(shard.path):
            path = folder / f"{Path(shard.path).stem}-{sample.index:06d}.{sample.suffix}"
            path.write_bytes(data)
            yield path
