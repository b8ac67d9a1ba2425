"""Indexes shards of scenes: where each good image lies, and its objects; checks them, and counts.

    detect-index-1a2b3c4d/<source>/<shard>.parquet   a row per good image (pipeline.detection.rows)
    detect-index-1a2b3c4d/shards.json                {source: {shard name: rows}}

Mistakes in the annotations surface here, before anything is trained.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.data.samples import left_out
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.corpora import detection_sources_of, setting_of
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind, Line
from pipeline.plan.stage import SHARDS, Result, read_json_file
from pipeline.printable import counted

if TYPE_CHECKING:
    from pipeline.loading.training_rows import TrainingShard

SMALL_BYTES = 32 << 20  # of shards that one process reads in the time in which a worker starts


def needs(line: Line, generation: int) -> tuple[str, ...]:
    return line.names("detect-prepare")


def identity(inputs: Inputs) -> dict[str, Any]:
    corpora = {name: inputs.corpora[name] for name in detection_sources_of(inputs.job)}
    stamps = [shard.stamp for name in corpora for shard in corpora[name].shards]
    return {
        "corpora": {name: found.fingerprint for name, found in corpora.items()},
        "origin": inputs.output("detect-prepare") if inputs.stage.needs else stamps,
        "classes": inputs.corpora.detection_classes,
        **inputs.image_limit,
    }


def run(context: Context) -> Result:
    import numpy as np

    from pipeline.detection import rows

    classes, sources = context.corpora.detection_classes, detection_sources_of(context.job)
    units = [
        (f"{source}/{shard.name}", (source, shard)) for source in sources for shard in context.corpora[source].shards
    ]
    worker = functools.partial(rows.make_indexer, context.folder, classes, context.cache, context.max_image_bytes)
    found: dict[str, rows.Indexed] = {}
    bad: dict[str, Counter[str]] = {source: Counter() for source in sources}
    with context.journal() as log:
        small = sum(shard.size for _, (_, shard) in units) <= SMALL_BYTES
        for number, outcome in enumerate(context.map(worker, units, context.job.workers.label, small=small), 1):
            one = outcome.value
            if one is None:
                raise DataError(f"cannot index the shard {outcome.name}: {outcome.error}")
            found[outcome.name] = one
            source = outcome.name.partition("/")[0]
            for key, reason in one.bad:
                context.warn(f"image '{key}' of shard {outcome.name} is left out: {reason}")
                bad[source][reason] += 1
            for reason, count in one.left.images.items():
                context.warn(left_out(outcome.name, reason, count, one.left.example[reason]))
                bad[source][reason] += count
            log.log(number, len(units), shard=outcome.name, images=one.images, objects=int(one.per_class.sum()))
    shards = {
        source: {s.name: found[f"{source}/{s.name}"].images for s in context.corpora[source].shards}
        for source in sources
    }
    counts: dict[str, dict[str, Any]] = {}
    content = {}
    for source in sources:
        of_source = [found[f"{source}/{shard.name}"] for shard in context.corpora[source].shards]
        per_class = sum((one.per_class for one in of_source), np.zeros(len(classes), np.int64))
        dropped: Counter[str] = sum((one.dropped for one in of_source), Counter())
        counts[source] = {
            "images": sum(one.images for one in of_source),
            "objects": int(per_class.sum()),
            "per_class": per_class.tolist(),
            "crowds": sum(one.crowds for one in of_source),
            "without_objects": sum(one.empty for one in of_source),
            "dropped": dict(sorted(dropped.items())),
            "bad": dict(bad[source]),
        }
        content[source] = hashlib.sha256(json.dumps([one.digest for one in of_source]).encode()).hexdigest()
        _check(context, source, counts[source])
    if unlearnt := [name for name, number in zip(classes, counts[sources[0]]["per_class"], strict=True) if not number]:
        context.warn(
            f"no training object of {counted(len(unlearnt), 'class', 'classes')} ({', '.join(unlearnt[:3])}): "
            "detectors cannot learn them"
        )
    storage.write_json(storage.join(context.folder, SHARDS), shards)
    said = [
        f"{one['images']:,} images with {one['objects']:,} objects ({name.rpartition('.')[2]})"
        for name, one in counts.items()
    ]
    lost = sum(sum(one["dropped"].values()) for one in counts.values())
    line = ", ".join(said) + (f", {lost:,} annotations dropped" if lost else "")
    total = sum((Counter(one["bad"]) for one in counts.values()), Counter[str]())
    return Result(
        {"counts": counts, "content": content, "bad": dict(total), "line": line},
        output=hashlib.sha256(json.dumps([content, classes]).encode()).hexdigest(),
    )


def _check(context: Context, source: str, counts: dict[str, Any]) -> None:
    """DataError: no image, no object, or more bad images than allowed."""
    lost = sum(counts["bad"].values())
    if lost > context.job.data.max_bad_fraction * (lost + counts["images"]):
        raise DataError(
            f"{lost} of {lost + counts['images']} images of {setting_of(source)} cannot be used, more than "
            f"data.max_bad_fraction {context.job.data.max_bad_fraction} allows; mend the shards or raise it"
        )
    if not counts["objects"]:
        raise DataError(
            f"the {counts['images']} images of {setting_of(source)} have no annotations, so there is nothing to learn "
            "or to score; prepare shards with objects by `noisy-lambda prepare coco`"
        )


def scene_shards(context: Context, source: str) -> list[TrainingShard]:
    """The shards of a source of scenes with their index files."""
    from pipeline.stages.train import shards_of

    done = context.needs["detect-index"]
    return shards_of(context, source, done.folder, read_json_file(done, SHARDS)[source])


KIND = Kind("detect-index", stages="detect-index", needs=needs, identity=identity, run=run)
