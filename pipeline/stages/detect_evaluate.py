"""Tests the detectors, as COCO does.

detect-evaluate-1a2b3c4d/detection.json           {"source": test or validation, "images", "objects", "detectors":
                                                  [{"name", "model", "parameters", "body_parameters", "box": {"ap",
                                                  "ap50", …, "per_class", "curve"}, "mask": …}]}; undefined is null
detect-evaluate-1a2b3c4d/<name>/detections.json   what each found, in COCO's format, with the ids that images and
                                                  categories had where they come from
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.errors import DataError, OutputError
from pipeline.plan.context import Context
from pipeline.plan.corpora import tested_scenes_of
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind, Line
from pipeline.plan.stage import DETECTION, WEIGHTS, Result
from pipeline.printable import counted
from pipeline.progress import percent
from pipeline.stages.detect_index import scene_shards

if TYPE_CHECKING:
    from pipeline.detection.figures import Found
    from pipeline.detection.scene import Scene
    from pipeline.loading.training_rows import TrainingShard

METRICS = ("ap", "ap50", "ap75")


def needs(line: Line, generation: int) -> tuple[str, ...]:
    return ("detect-index", *line.names("detector"))


def identity(inputs: Inputs) -> dict[str, Any]:
    source = tested_scenes_of(inputs.job)
    return {
        "source": source,
        "scenes": inputs.done["detect-index"].info["content"][source],
        "classes": inputs.corpora.detection_classes,
        "detectors": {name: inputs.output(name) for name in inputs.stage.needs if name.startswith("detector-")},
    }


@dataclass(frozen=True)
class Trial:
    """One detector, in the folder of its stage, on one shard."""

    folder: str
    shard: TrainingShard


def run(context: Context) -> Result:
    from pipeline.detection import figures
    from pipeline.detection.rows import load_rows

    source, classes = tested_scenes_of(context.job), context.corpora.detection_classes
    shards = scene_shards(context, source)
    scenes = [
        rows.scene(number, classes) for rows in map(load_rows, shards) for number in range(len(rows.texts))
    ]  # fmt: skip
    names = [name for name in context.stage.needs if name.startswith("detector-")]
    for name in names:
        if storage.sha256(storage.join(context.needs[name].folder, WEIGHTS)) != context.needs[name].output:
            raise OutputError(
                f"{WEIGHTS} of {storage.redact(context.needs[name].folder)} is not the file that its stage left; "
                "delete that folder, and the run makes it again"
            )
    units = [
        (f"{name}/{place}", Trial(context.needs[name].folder, shard))
        for name in names
        for place, shard in enumerate(shards)
    ]
    answers: dict[str, list[list[Found]]] = {}
    worker = functools.partial(make_finder, context.job.detection.batch)
    with context.journal() as log:
        for number, outcome in enumerate(context.map(worker, units, context.job.workers.label), 1):
            if outcome.value is None:
                raise DataError(f"cannot test {outcome.name.partition('/')[0]}: {outcome.error}")
            answers[outcome.name] = outcome.value
            log.log(number, len(units))
    rows: list[dict[str, Any]] = []
    metrics: dict[str, float] = {}
    for name in names:
        found = [answer for place in range(len(shards)) for answer in answers[f"{name}/{place}"]]
        short, made = name.removeprefix("detector-"), context.needs[name].info
        storage.write_json(storage.join(context.folder, short, "detections.json"), as_coco(scenes, found, classes))
        measured = figures.measure(scenes, found, classes)
        facts = {key: made[key] for key in ("model", "parameters", "body_parameters")}
        rows.append({"name": short, "stage": name, **facts, **measured})
        for kind in figures.KINDS:
            metrics |= {f"{short}_{kind}_{key}": measured[kind][key] or 0.0 for key in METRICS}
    tested = source.removeprefix("detection.")
    record = {
        "source": tested,
        "images": len(scenes),
        "objects": sum(len(scene.single) for scene in scenes),
        "detectors": rows,
    }
    storage.write_json(storage.join(context.folder, DETECTION), record)
    said = [
        f"{row['name']} {percent(row['box']['ap50'] or 0.0)} / {percent(row['mask']['ap50'] or 0.0)}" for row in rows
    ]
    line = f"AP50 of boxes / masks on {counted(len(scenes), f'{tested} image')}: {', '.join(said)}"
    return Result({"line": line, "source": tested}, metrics=metrics, artifacts=[DETECTION])


def make_finder(batch: int) -> Callable[[Trial], list[list[Found]]]:
    """A worker: what a detector finds in each image of an indexed shard, in the order of its rows."""
    from pipeline.cluster.world import join
    from pipeline.detection.find import find_in
    from pipeline.detection.network import load_detector
    from pipeline.detection.rows import load_rows

    load = functools.lru_cache(maxsize=1)(load_detector)

    def find(trial: Trial) -> list[list[Found]]:
        with join() as world:
            detector, card = load(trial.folder)
            rows = load_rows(trial.shard)
            units = [(trial.shard, rows, number) for number in range(len(rows.texts))]
            return find_in(detector.to(world.device), card, units, batch, world.device)

    return find


def as_coco(
    scenes: Sequence[Scene], answers: Sequence[Sequence[Found]], classes: Sequence[str]
) -> list[dict[str, Any]]:
    """COCO results with the images' and categories' own ids."""
    number = {name: place for place, name in enumerate(classes)}
    return [
        {
            "image_id": scene.image_id,
            "category_id": scene.category_ids[number[found.name]],
            "bbox": [round(value, 2) for value in found.box],
            "score": round(found.score, 5),
            "segmentation": {"size": [scene.height, scene.width], "counts": found.mask},
        }
        for scene, answer in zip(scenes, answers, strict=True)
        for found in answer
    ]


KIND = Kind("detect-evaluate", stages="detect-evaluate", needs=needs, identity=identity, run=run)
