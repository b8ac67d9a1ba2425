"""What benchmarks label: photos under many names, and small JPEGs that are made up."""

from __future__ import annotations

import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data import shards
from pipeline.data.shards import Shard


@dataclass(frozen=True)
class Corpus:
    shards: list[Shard]
    images: int


def merged(folder: Path, target: Path) -> Path:
    """One shard that holds the images of all the shards in the folder; the folder it is in."""
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise SystemExit(f"--photos {folder} holds no tar; name a folder of shards")
    target.mkdir(parents=True)
    with tarfile.open(target / "photos.tar", "w") as out:
        for number, path in enumerate(paths):
            with tarfile.open(path) as tar:
                for member in tar:
                    member.name = f"{number:03d}-{member.name}"
                    out.addfile(member, tar.extractfile(member))
    return target


def copies(folder: Path, target: Path, times: int) -> Corpus:
    """Every shard in the folder under `times` names."""
    target.mkdir(parents=True)
    found: list[Shard] = []
    count = 0
    for path in sorted(folder.glob("*.tar")):
        count += len(shards.scan(str(path)).samples) * times
        for number in range(times):
            copy = target / f"{path.stem}-{number:03d}.tar"
            copy.symlink_to(path.resolve())
            found.append(Shard(copy.name, str(copy), path.stat().st_size, "", "unlabelled"))
    return Corpus(found, count)


def small_jpegs(folder: Path, count: int) -> Corpus:
    """Shards of 1,000 JPEGs of 64 x 64 pixels."""
    folder.mkdir(parents=True)
    found: list[Shard] = []
    random = np.random.default_rng(0)
    for first in range(0, count, 1000):
        path = folder / f"{first // 1000:05d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in range(first, min(first + 1000, count)):
                coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                buffer = io.BytesIO()
                coarse.resize((64, 64), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
                info = tarfile.TarInfo(f"{number:08d}.jpg")
                info.size = len(buffer.getvalue())
                tar.addfile(info, io.BytesIO(buffer.getvalue()))
        found.append(Shard(path.name, str(path), path.stat().st_size, "", "unlabelled"))
    return Corpus(found, count)
