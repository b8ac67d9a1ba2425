"""Tests every model on corrupted test images: the fifteen corruptions of Hendrycks and Dietterich (2019).

    robustness-1a2b3c4d/robustness.json   {"images", "severities", "reference", "models": [{"stage", "clean_error",
                                           "errors": {corruption: [one a severity]}, "mean_error", "ce": {corruption},
                                           "mce", "relative_ce": {corruption}, "relative_mce"}, …]}
    robustness-1a2b3c4d/robustness.csv    a row per model, corruption and severity

Errors are percent. The pictures are made from this job's test images, so its figures are no figures of ImageNet-C: they
compare the models of a run with each other. All models see the same pixels, whatever the number of workers.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs, model_identity
from pipeline.plan.kind import Kind
from pipeline.plan.stage import ROBUSTNESS, Result
from pipeline.stages.train import indexed_shards

TABLE = "robustness.csv"
SMALL_BYTES = 2 << 20  # of shards that this process looks at in the time in which a worker starts


def identity(inputs: Inputs) -> dict[str, Any]:
    return {
        "settings": identity_of(inputs.job.evaluate.robustness),
        "models": [model_identity(inputs.done[name]) for name in inputs.stage.needs if name != "index"],
        "test": inputs.content["test"],
        "classes": inputs.classes,
    }


def run(context: Context) -> Result:
    from pipeline.corruption import errors

    settings = context.job.evaluate.robustness
    names = settings.corruptions
    trained = {name: done.folder for name, done in context.needs.items() if name != "index"}
    counted, images = _count(context, list(trained.values()))
    models = [
        errors.Errors(float(counted[None][0][place]), {name: counted[name][:, place].tolist() for name in names})
        for place in range(len(trained))
    ]
    reference = models[0] if settings.reference == "teacher" else errors.alexnet(names)
    rows = [{"stage": stage, **errors.summary(model, reference)} for stage, model in zip(trained, models, strict=True)]
    found = {"images": images, "severities": settings.severities, "reference": settings.reference, "models": rows}
    storage.write_json(storage.join(context.folder, ROBUSTNESS), found)
    storage.write_bytes(storage.join(context.folder, TABLE), _table(rows, settings.severities))
    metrics = {
        f"{row['stage']}/{name}": float(row[name])
        for row in rows
        for name in ("mean_error", "mce", "relative_mce")
        if row[name] is not None
    }
    return Result({"line": _line(rows, settings.reference, images)}, metrics=metrics, artifacts=[ROBUSTNESS, TABLE])


def _count(context: Context, folders: Sequence[str]) -> tuple[dict[str | None, Any], int]:
    """{corruption, None for none: error of each severity and model, shares float64 [s, m]}, and how many images."""
    import numpy as np

    from pipeline.data.index_files import image_hashes
    from pipeline.train import corrupted

    settings = context.job.evaluate.robustness
    shards = list(zip(context.corpora["test"].shards, indexed_shards(context, "test"), strict=True))
    limit = None
    if settings.images:
        hashes = image_hashes(context.needs["index"].folder, [("test", shard.name) for shard, _ in shards])
        drawn = np.sort(corrupted.draw(hashes))
        limit = int(drawn[min(settings.images, len(drawn)) - 1])
    names = (None, *settings.corruptions)
    units = [(f"{name or 'clean'}, {shard.name}", (name, rows)) for name in names for shard, rows in shards]
    worker = functools.partial(
        corrupted.corrupted_worker, context.job.evaluate.batch, folders, settings.severities, limit
    )
    small = not context.job.workers.label_gpus and len(units) * sum(shard.size for shard, _ in shards) <= SMALL_BYTES
    answers: dict[str, corrupted.Counted] = {}
    with context.journal() as log:
        for outcome in context.map(worker, units, small=small):
            if outcome.value is None:
                raise DataError(f"cannot test on {outcome.name}: {outcome.error}")
            answers[outcome.name] = outcome.value
            log.log(len(answers), len(units))
    clean = [answers[f"clean, {shard.name}"] for shard, _ in shards]
    images, bad = sum(one.images for one in clean), sum(one.bad for one in clean)
    if not images or bad > context.job.data.max_bad_fraction * (images + bad):
        raise DataError(
            f"{bad} of {images + bad} test images cannot be decoded, more than data.max_bad_fraction "
            f"{context.job.data.max_bad_fraction} allows; restore the test shards"
        )
    wrong = {name: sum(answers[f"{name or 'clean'}, {shard.name}"].wrong for shard, _ in shards) for name in names}
    return {name: number / images for name, number in wrong.items()}, images


def _table(rows: Sequence[Mapping[str, Any]], severities: Sequence[int]) -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["stage", "corruption", "severity", "error"])
    for row in rows:
        writer.writerow([row["stage"], "none", 0, row["clean_error"]])
        for name, errors in row["errors"].items():
            pairs = zip(severities, errors, strict=True)
            writer.writerows([row["stage"], name, severity, error] for severity, error in pairs)
    return out.getvalue().encode()


def _line(rows: Sequence[Mapping[str, Any]], reference: str, images: int) -> str:
    wrong = ", ".join(f"{row['stage']} {row['mean_error']:.1f} %" for row in rows)
    found = f"mean error on {images:,} corrupted images: {wrong}"
    if reference == "teacher" and len(rows) == 1:  # whose mCE says nothing
        return found
    mce = ", ".join("not known" if row["mce"] is None else f"{row['mce']:.1f}" for row in rows)
    return f"{found}; mCE against {'AlexNet' if reference == 'alexnet' else 'the teacher'}: {mce}"


KIND = Kind(
    "robustness",
    stages="robustness",
    needs=lambda line, generation: ("index", *line.models),
    identity=identity,
    run=run,
)
