"""Says how each model of a run labels the validation images, by the very way in which it would label others."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import storage, weights
from pipeline.data import index_files, label_files
from pipeline.errors import DataError
from pipeline.labelling import audit
from pipeline.labelling.calibration import Answers
from pipeline.labelling.labeller import IN_FLIGHT, LabelSpec, make_labeller
from pipeline.plan.context import Context

SMALL_BYTES = 2 << 20  # of shards that this process looks at in the time in which a worker starts
Figures = dict[str, Any]


def validate_all(context: Context, stages: Sequence[str]) -> dict[str, Figures]:
    """`_validate` of every model, with what each gained on the one before it, from which it learnt."""
    found: dict[str, Figures] = {}
    before = None
    for stage in stages:
        found[stage], answers = _validate(context, stage)
        if before is not None:
            found[stage]["gain"] = audit.gain(before, answers)
        before = answers
    return found


def _validate(context: Context, stage: str) -> tuple[Figures, Answers]:
    """What a model says of the validation images, by the very way in which it would label others."""
    model, shards = context.needs[stage], context.corpora["validation"].shards
    spec = LabelSpec(
        load=weights.load_model,
        weights=model.folder,
        teacher=model.output,
        out=context.folder,
        classes=tuple(context.corpora.classes),
        batch=context.job.evaluate.batch,
        threads=max(2, math.ceil(context.job.workers.cpus)),
        cache=context.cache,
    )
    small = not context.job.workers.label_gpus and sum(shard.size for shard in shards) <= SMALL_BYTES
    named = [dataclasses.replace(shard, name=f"validation/{stage}/{shard.name}") for shard in shards]
    units = [(shard.name, shard) for shard in named]
    workers = context.job.workers.label
    labeller = functools.partial(make_labeller, spec)
    for outcome in context.map(labeller, units, workers, small=small, overlap=IN_FLIGHT):
        if outcome.value is None:
            raise DataError(f"cannot look at the validation shard {outcome.name}: {outcome.error}")
    index = context.needs["index"].folder
    indexed = [index_files.rows_path(index, "validation", shard.name) for shard in shards]
    labelled = [storage.join(context.folder, label_files.file_name(shard.name)) for shard in named]
    classes = len(context.corpora.classes)
    answers, bad = audit.join(zip(indexed, labelled, strict=True), classes)
    found = audit.compare({"validation": (answers, bad)}, classes, 0.0, {}, calibrate=False)
    kept = ("images", "bad", "accuracy", "ece", "nll", "temperature", "calibrated_ece", "calibrated_nll", "reliability")
    figures = {name: found[name] for name in kept}
    figures["per_class"] = np.bincount(answers.truth, minlength=classes).tolist()
    return figures | {"confusion": audit.confusion(answers)}, answers
