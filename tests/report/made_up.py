"""Made-up runs for the report: real shards, label files, audits, selections and journals, invented models."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.cluster.inline import Inline
from pipeline.config.settings import Data, Generation, Job, Select
from pipeline.config.settings_train import Teacher
from pipeline.data import label_files, shards
from pipeline.graph import stages_of
from pipeline.labelling import audit, calibration
from pipeline.plan.context import Context
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import Done
from pipeline.selection.select import Settings, select_all
from pipeline.tracking.journal import Journal

NAMES = ["zero", "one", "two"]


def random_images(count: int, seed: int = 0, side: int = 12) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [png_of(rng.integers(0, 255, (side, side, 3), np.uint8)) for _ in range(count)]


def png_of(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "png")
    return out.getvalue()


def random_probs(count: int, classes: int, seed: int) -> np.ndarray:
    logits = 2.5 * np.random.default_rng(seed).standard_normal((count, classes))
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (probs / probs.sum(axis=1, keepdims=True)).astype(np.float32)


def write_tar(path: Path, pictures: Sequence[bytes], key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(pictures):
            info = tarfile.TarInfo(f"{key}{number:05d}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_labels(folder: str, shard: Any, probs: np.ndarray, bad: set[int]) -> None:
    samples = shards.scan(shard.path).samples
    good = np.array([n for n in range(len(samples)) if n not in bad], np.int64)
    columns = {
        "index": [sample.index for sample in samples],
        "key": [label_files.printable_key(sample.key) for sample in samples],
        "offset": [sample.offset for sample in samples],
        "size": [sample.size for sample in samples],
        "status": ["truncated" if n in bad else "ok" for n in range(len(samples))],
        "image_hash": np.arange(len(samples), dtype=np.uint64),
    }
    table = label_files.make_table(columns, good, label_files.rows_from_probs(probs[good]))
    label_files.write_labels(
        storage.join(folder, label_files.file_name(shard.name)), table, {"shard": shard.name, "cut": None}
    )


def audit_of(classes: int, seed: int, threshold: float = 0.5) -> dict[str, Any]:
    """An audit of 200 images by a teacher that is a little too sure."""
    probs = random_probs(200, classes, 100 + seed)
    rng = np.random.default_rng(seed)
    truth = np.array([rng.choice(classes, p=np.sqrt(row) / np.sqrt(row).sum()) for row in probs], np.int32)
    rows = label_files.rows_from_probs(probs)
    found = calibration.answers(rows.classes, rows.probs, rows.confidence, truth, classes)
    return audit.compare({"validation": (found, Counter())}, classes, threshold, {}, calibrate=False)


def counts_of(images: int, classes: int, top1: float) -> dict[str, list[int]]:
    """Of each class its test images, and the right ones, of which a later class has more; the last has no image."""
    counts = np.full(classes, images // classes)
    counts[-1] = 0
    right = np.minimum(counts, counts * top1 * np.linspace(0.9, 1.1, classes))
    return {"images": counts.tolist(), "right": right.astype(int).tolist()}


def write_journal(folder: str, generation: int, steps: int, top1: float) -> None:
    log = Journal(folder)
    log.log(0, steps, kind="start", epoch_is="one pass")
    for step in range(10, steps + 1, 10):
        loss = 0.3 + 2 * 0.995**step + 0.1 * generation
        log.log(step, steps, kind="train", loss=loss, lr=0.1, images_per_second=900.0, epoch=step / 10)
        if step % (steps // 10) == 0:
            log.log(step, steps, kind="validation", top1=top1 * (1 - 0.6 * 0.98**step), top5=0.99, loss=0.5)
    log.close()


def fake_run(
    root: Path,
    *,
    names: Sequence[str] = NAMES,
    pictures: Sequence[Sequence[bytes]] = (),
    probs: Sequence[Sequence[np.ndarray]] = (),
    top1: Sequence[float] = (0.8422, 0.8956, 0.9311),
    select: Select | None = None,
    bad: set[int] | None = None,
    failed: Sequence[int] = (),
    key: str = "",
    output: str = "",
) -> Context:
    """A run in which all but the report is done. `pictures`: of each unlabelled shard; `probs`: of each generation
    and shard; `bad`: rows of the first shard; `failed`: shards without labels."""
    select = select or Select(threshold=0.5, per_class=12)
    generations = [Generation(select=select) for _ in probs]
    job = Job(
        name="made-up <run>",
        output=output or str(root / "run"),
        data=Data(root=str(root / "data")),
        teacher=Teacher(model="lambda_tiny"),
        generations=generations,
    )
    storage.write_json(str(root / "data" / "classes.json"), list(names))
    for number, found in enumerate(pictures):
        write_tar(root / "data" / f"unlabelled-{number:03d}.tar", found, key)
    done: dict[str, Done] = {}
    sources = Corpora(job, done)
    models = []
    for stage in stages_of(job)[:-1]:
        folder = str(root / "run" / f"{stage.name}-1a2b3c4d")
        storage.make_folder(folder)
        if stage.kind == "train":
            write_journal(folder, stage.generation, 200 + 200 * stage.generation, top1[stage.generation])
            speed = [9000.0, 5200.0, 4700.0][stage.generation]
            models.append(
                {
                    "stage": stage.name,
                    "dir": folder,
                    "model": "lambda_tiny",
                    "top1": top1[stage.generation],
                    "validation": {
                        "accuracy": top1[stage.generation],
                        "gain": {"points": 2.0, "low": 0.5, "high": 3.5} if stage.generation else None,
                    },
                    "top5": 0.99,
                    "loss": 0.4,
                    "ece": 0.04 + 0.01 * stage.generation,
                    "count": 450,
                    "per_class": counts_of(450, len(names), top1[stage.generation]),
                    "bad": 0,
                    "parameters": 84_000 * (1 + stage.generation),
                    "size": 16,
                    "images_per_second": speed,
                    "batch": 256,
                    "device": "CPU, 2 threads",
                    "dtype": "float32",
                }
            )
        elif stage.kind == "audit":
            storage.write_json(storage.join(folder, "audit.json"), audit_of(len(names), stage.generation))
        elif stage.kind == "label":
            for number, shard in enumerate(sources["unlabelled"].shards):
                if number in failed:
                    record = {"shard": shard.name, "error": "it is <damaged>", "attempts": 3}
                    storage.write_json(storage.join(folder, shard.name.removesuffix(".tar") + ".failed.json"), record)
                else:
                    write_labels(
                        folder,
                        shard,
                        probs[stage.generation - 1][number],
                        (bad or set()) if number == 0 else set(),
                    )
        elif stage.kind == "select":
            labelled = done[f"gen{stage.generation}-label"].folder
            paths = [storage.join(labelled, n) for n in storage.listdir(labelled) if n.endswith(".parquet")]
            settings = Settings(len(names), threshold=select.threshold, per_class=select.per_class)
            summary = select_all(paths, settings, lambda f, groups: [f(g) for g in groups], folder)
            storage.write_json(storage.join(folder, "summary.json"), summary)
        elif stage.kind == "evaluate":
            storage.write_json(storage.join(folder, "evaluate.json"), {"images": 450, "models": models})
        info = {"seconds": 12.3, "line": ""}
        done[stage.name] = Done(stage.name, folder, "1a2b3c4d" * 8, "", info, model=stage.model)
    stage = stages_of(job)[-1]
    folder = storage.join(job.output, "report-5e6f7a8b")
    storage.make_folder(folder)
    needs = {name: done[name] for name in stage.needs}
    return Context(job, stage, stages_of(job), folder, "5e6f7a8b" * 8, needs, sources, Inline(), pytest.fail, "")


def two_generations(root: Path, **more: Any) -> Context:
    pictures = [random_images(60, 1), random_images(45, 2)]
    probs = [
        [random_probs(len(p), len(more.get("names", NAMES)), 10 * g + n) for n, p in enumerate(pictures)]
        for g in (1, 2)
    ]
    return fake_run(root, **{"pictures": pictures, "probs": probs, **more})


class Parsed(HTMLParser):
    """Tags, addresses and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(context: Context) -> tuple[str, Parsed]:
    page = storage.read_bytes(storage.join(context.folder, "index.html")).decode()
    return page, Parsed(page)
