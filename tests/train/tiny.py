"""Tiny shards with a learnable task, and the smallest training runs on them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import tarfile
import threading
import time
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.config.settings_train import Train
from pipeline.data import label_files
from pipeline.data.images import View
from pipeline.loading.loader import TrainingData, TrainingShard, TrainingSource, batches
from pipeline.train import classification
from pipeline.train.spec import TrainSpec

CLASSES, SIZE = 4, 8
VIEW = View(SIZE, crop=1.0)
VIT = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}  # no batch norm
NOISE = {"drop_rate": 0.2, "drop_path_rate": 0.2}


def write_shard(path: Path, count: int, seed: int, broken: int | None = None) -> TrainingShard:
    """A tar of PNGs, a bright quadrant of noise being the class, with its index file beside it."""
    draw = np.random.default_rng(seed)
    found = draw.integers(0, CLASSES, count)
    with tarfile.open(path, "w") as tar:
        for index, label in enumerate(found):
            pixels = draw.integers(0, 160, (SIZE, SIZE, 3), dtype=np.uint8)
            top, left = divmod(int(label), 2)
            pixels[4 * top : 4 * top + 4, 4 * left : 4 * left + 4] += 95
            file = io.BytesIO(b"broken" if index == broken else b"")
            if index != broken:
                Image.fromarray(pixels).save(file, "PNG")
            info = tarfile.TarInfo(f"{index:04d}.png")
            info.size = len(file.getvalue())
            tar.addfile(info, io.BytesIO(file.getvalue()))
    with tarfile.open(path) as tar:
        places = [(member.offset_data, member.size) for member in tar]
        hashes = [label_files.image_hash(tar.extractfile(member).read()) for member in tar]
    rows = path.with_suffix(".parquet")
    table = {
        "index": pa.array(range(count), pa.int32()),
        "key": [f"{i:04d}" for i in range(count)],
        "offset": pa.array([offset for offset, _ in places], pa.int64()),
        "size": pa.array([size for _, size in places], pa.int32()),
        "label": pa.array(found, pa.int32()),
        "image_hash": pa.array(hashes, pa.uint64()),
    }
    pq.write_table(pa.table(table), rows)
    return TrainingShard(str(path), str(rows), None, count)


def write_pseudo(path: Path, count: int, seed: int) -> TrainingShard:
    """The same with a label file (right, but not sure) and a selection that takes every other image, some twice."""
    shard = write_shard(path, count, seed)
    rows = pq.read_table(shard.rows).to_pydict()
    truth = np.array(rows["label"], np.int32)
    probs = np.full((count, CLASSES), 0.1, np.float32)
    probs[np.arange(count), truth] = 0.7
    columns = {name: rows[name] for name in ("index", "key", "offset", "size", "image_hash")}
    columns |= {"status": ["ok"] * count}
    table = label_files.make_table(columns, np.arange(count), label_files.rows_from_probs(probs))
    label_files.write_labels(shard.rows, table, {})
    chosen = list(range(0, count, 2))
    copies = [1 + i % 3 for i in range(len(chosen))]
    selection = path.with_suffix(".selection.parquet")
    pq.write_table(pa.table({"index": pa.array(chosen, pa.int32()), "copies": pa.array(copies, pa.int32())}), selection)
    return dataclasses.replace(shard, selection=str(selection), count=sum(copies))


def make_spec(data: Path, folder: Path | str, **changes: Any) -> TrainSpec:
    """A student's run on shards under `data` (written there if they are not): 20 steps of 5 + 8 images."""
    if not data.exists():
        data.mkdir()
        spec = {
            "labelled": [write_shard(data / f"l{i}.tar", 24, seed=i) for i in range(2)],
            "pseudo": [write_pseudo(data / f"u{i}.tar", 40, seed=10 + i) for i in range(2)],
            "validation": [write_shard(data / f"v{i}.tar", 15, seed=20 + i) for i in range(2)],
        }
        plain = {name: [dataclasses.asdict(shard) for shard in shards] for name, shards in spec.items()}
        (data / "shards.json").write_text(json.dumps(plain))
    stored = json.loads((data / "shards.json").read_text())
    shards = {name: tuple(TrainingShard(**shard) for shard in found) for name, found in stored.items()}
    settings: dict[str, Any] = {
        "model": "timm/vit_tiny_patch16_224",
        "overrides": {**VIT, **NOISE},
        "resolution": SIZE,
        "crop": 1.0,
        "augment": "rand-m5-n1-p1",
        "crop_scale": [0.8, 1.0],
        "flip": 0.0,
        "label_smoothing": 0.1,
        "ema": 0.9,
    }
    resolved: dict[str, Any] = {
        "folder": str(folder),
        "classes": CLASSES,
        "sources": (
            TrainingSource("labelled", shards["labelled"], per_step=5, segments=2),
            TrainingSource("pseudo", shards["pseudo"], per_step=8, segments=2),
        ),
        "validation": shards["validation"],
        "steps": 20,
        "steps_per_epoch": 48 / 5,
        "lr": 0.05,
        "warmup": 4,
        "checkpoint_every": 10,
        "threads": 1,
    }
    return change(TrainSpec(settings=Train(**settings), **resolved), **changes)


def change(spec: TrainSpec, **changes: Any) -> TrainSpec:
    """The spec with other fields, or other ones of its settings; a name that both have is that of the spec."""
    own = {field.name for field in dataclasses.fields(TrainSpec)}
    settings = {name: value for name, value in changes.items() if name not in own}
    rest = {name: value for name, value in changes.items() if name in own}
    return dataclasses.replace(spec, settings=dataclasses.replace(spec.settings, **settings), **rest)


def without_noise(**changes: Any) -> dict[str, Any]:
    """Changes of a spec that leave nothing depending on how a batch is cut into slices."""
    return {"overrides": VIT, **changes}


def die_at(step: int, how: str = "kill", once: Path | None = None) -> None:
    """From now on, training in this process ends when the batch of `step` comes: kill -9, or an exception.

    `once`: a file that has to be there first (checkpoints are written in the background).
    """

    def dying(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        for batch in batches(*args, **kwargs):
            if batch["step"] == step:
                if how != "kill":
                    raise InterruptedError(f"step {step}")
                while once and not once.exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    classification.batches = dying


def terminate_at(step: int) -> None:
    """From now on, the batch of `step` comes with a SIGTERM: to torchrun, which passes it on, or to this process."""
    given = classification.batches

    def terminated(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        arrived, handler = threading.Event(), cast(Callable, signal.getsignal(signal.SIGTERM))
        signal.signal(signal.SIGTERM, lambda *received: (handler(*received), arrived.set()))
        for batch in given(*args, **kwargs):
            if batch["step"] == step:
                os.kill(os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid(), signal.SIGTERM)
                arrived.wait()
            yield batch

    classification.batches = terminated


Sample = tuple[str, int, int, int, int]
"""Source, shard, index, augmentation seed, CRC-32 of the augmented pixels."""


def samples_of(data: TrainingData, batch: dict[str, Any]) -> list[Sample]:
    """What a batch of `data` holds."""
    found = []
    for number, (chosen, seeds) in enumerate(data.samples(batch["step"])):
        for shard, slot, seed in zip(chosen.shard.tolist(), chosen.slot.tolist(), seeds.tolist(), strict=True):
            rows = data.rows(number, shard)
            found.append((data.sources[number].name, shard, int(rows.index[rows.row_of_slot[slot]]), seed))
    pixels = [zlib.crc32(image.numpy().tobytes()) for image in batch["images"]]
    return [(*sample, crc) for sample, crc in zip(found, pixels, strict=True)]


def record(folder: Path) -> None:
    """From now on, training in this process notes in a file of `folder` what its batches hold; see `recorded`."""
    given = classification.batches

    def noting(sources: Any, **rest: Any) -> Iterator[dict[str, Any]]:
        known = {name: rest[name] for name in ("augment", "classes", "soft", "seed", "rank", "world")}
        data = TrainingData(sources, **known)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{os.getpid()}.jsonl").open("a", buffering=1) as file:
            for batch in given(sources, **rest):
                file.write(json.dumps({"step": batch["step"], "samples": samples_of(data, batch)}) + "\n")
                yield batch

    classification.batches = noting


def recorded(folder: Path) -> dict[int, Counter[Sample]]:
    """What the global batches of the steps held that one run, of any number of workers, noted in `folder`."""
    found: dict[int, Counter[Sample]] = defaultdict(Counter)
    for file in folder.iterdir():
        for line in map(json.loads, file.read_text().splitlines()):
            found[line["step"]].update(map(tuple, line["samples"]))
    return found


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of two state dicts."""
    assert a.keys() == b.keys()
    return max(float((a[name].double() - b[name].double()).abs().max()) for name in a)
