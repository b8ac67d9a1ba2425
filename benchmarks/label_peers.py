"""Labelling by others: Ray Data, and timm's own dataset, transform, DataLoader and inference loop.

Both see the same images, show them to the same teacher and write the same columns: key, label, confidence, and the 32
most probable classes with their probabilities. Both get their start for free: a first pass does not count.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.cluster.ray_session import Session
from pipeline.data import images, shards
from pipeline.labelling.teacher import Teacher

TOP = 32


def top(probs: np.ndarray) -> dict[str, np.ndarray]:
    """The columns that both write."""
    classes = np.argsort(-probs, axis=1)[:, :TOP]
    found = np.take_along_axis(probs, classes, axis=1)
    return {"label": classes[:, 0], "confidence": found[:, 0], "classes": classes, "probs": found.astype(np.float16)}


class Ask:
    """The teacher in an actor of Ray Data."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        probs, _ = self.teacher.launch(torch.from_numpy(np.stack(list(batch["pixels"]))))()
        return {"key": batch["__key__"], **top(probs)}


@contextlib.contextmanager
def ray_data(paths: list[str], teacher: Teacher, batch: int, count: int, out: Path) -> Iterator[Callable[[], float]]:
    """read_webdataset, decoding in tasks, the teacher in one actor, write_parquet."""
    session = Session("embedded", None, None)
    session.start()  # before Ray is imported: it reads its settings then
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    view, gpus = teacher.view, 1 if teacher.device.type == "cuda" else 0

    def decode(rows: dict[str, Any]) -> dict[str, Any]:
        pixels = [images.load(data, view) for data in rows["jpg"]]
        return {"__key__": rows["__key__"], "pixels": np.stack(pixels)}

    def run() -> float:
        shutil.rmtree(out, ignore_errors=True)
        start = time.perf_counter()
        (
            ray.data.read_webdataset(paths, decoder=None)
            .map_batches(decode, batch_size=batch)
            # With a core of its own the actor would leave the reading tasks none of two (ray-project/ray#44687).
            .map_batches(
                Ask, batch_size=batch, fn_constructor_args=(teacher,), num_cpus=0, num_gpus=gpus,
                compute=ray.data.ActorPoolStrategy(size=1),
            )
            .write_parquet(str(out))
        )  # fmt: skip
        return count / (time.perf_counter() - start)

    try:
        yield run
    finally:
        session.close()


@contextlib.contextmanager
def timm_loop(
    paths: list[str], teacher: Teacher, batch: int, count: int, workers: int, folder: Path
) -> Iterator[Callable[[], float]]:
    """The images as files in a folder, timm's dataset and evaluation transform, and the loop of its inference.py."""
    from timm.data import create_dataset, create_loader

    view = teacher.view
    files = folder / "images" / "all"
    files.mkdir(parents=True)
    for path in paths:
        for sample, data in shards.stream(path):
            (files / f"{Path(path).stem}-{sample.index:05d}.{sample.suffix}").write_bytes(data)
    dataset = create_dataset("", str(folder / "images"))

    def run() -> float:
        start = time.perf_counter()
        loader = create_loader(
            dataset, (3, view.size, view.size), batch, is_training=False, use_prefetcher=False, num_workers=workers,
            interpolation=view.interpolation, mean=view.mean, std=view.std, crop_pct=view.crop,
        )  # fmt: skip
        parts = []
        device = teacher.device
        with torch.inference_mode(), torch.autocast(device.type, teacher.dtype, enabled=device.type == "cuda"):
            for pixels, _ in loader:
                pixels = pixels.to(device).contiguous(memory_format=torch.channels_last)
                parts.append(top(teacher.module(pixels).float().softmax(1).cpu().numpy()))
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        names = [Path(name).stem for name in dataset.filenames(basename=True)]
        table = pa.table({"key": names, **{name: list(column) for name, column in columns.items()}})
        pq.write_table(table, folder / "labels.parquet", compression="zstd")
        return count / (time.perf_counter() - start)

    yield run
