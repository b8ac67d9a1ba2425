"""Measures models side by side: speed, latency and memory here, parameters and FLOPs on paper, accuracy with its
source.

    measure-1a2b3c4d/speed_accuracy.csv   a row per model, see report.measured_table
    measure-1a2b3c4d/speed_accuracy.md    the same for people
    measure-1a2b3c4d/speed_accuracy.png   speed against accuracy, a curve per family, where accuracies are known
    measure-1a2b3c4d/summary.json         {"job", "rows": [{column: value}, …], "report"}

Figures belong to the machine: on another machine, name another `output`. Out of memory is a row that says so.
"""

from __future__ import annotations

import functools
from typing import Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.config.settings import Job, Measured
from pipeline.errors import ClusterError, ConfigError
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import EVALUATION, SPEED_ACCURACY, SUMMARY, Result

METRICS = ("inference_images_per_second", "training_images_per_second", "latency_ms", "top1")


def identity(inputs: Inputs) -> dict[str, Any]:
    return {"settings": identity_of(inputs.job.measure), "evaluation": _evaluation_sha256(inputs.job)}


def _evaluation_sha256(job: Job) -> str | None:
    folder = job.measure.accuracy_from
    if folder is None:
        return None
    path = storage.join(folder, EVALUATION)
    if not storage.exists(path):
        raise ConfigError(
            f"measure.accuracy_from: there is no {EVALUATION} in {storage.redact(folder)}; "
            "name the evaluate-… folder of a finished run"
        )
    return storage.sha256(path)


def run(context: Context) -> Result:
    from pipeline.report import measured_plot, measured_table, measurements
    from pipeline.report.costs_on_paper import on_paper
    from pipeline.report.known_accuracy import accuracy_of, known_accuracies

    settings, models = context.job.measure, context.job.measure.models
    known = known_accuracies(settings)
    papers = [on_paper(f"measure.models[{i}]", measured, settings.map_batch) for i, measured in enumerate(models)]
    # All in one worker and by turns: figures of speed are worth something only side by side.
    worker = functools.partial(measurements.make_worker, context.folder, settings)
    [outcome] = context.map(worker, [("models", models)], workers=1)
    if outcome.value is None:
        raise ClusterError(f"cannot measure the models: {outcome.error}")
    rows = []
    for measured, paper, figures in zip(models, papers, outcome.value, strict=True):
        accuracy = accuracy_of(measured, known)
        shown = {"top1": accuracy.top1 if accuracy else None, "accuracy_source": accuracy.source if accuracy else None}
        rows.append({"name": measured.name, **_built_from(measured), **paper, **shown, **figures})

    report = storage.join(context.folder, f"{SPEED_ACCURACY}.md")
    files = {
        f"{SPEED_ACCURACY}.csv": measured_table.as_csv(rows),
        f"{SPEED_ACCURACY}.md": measured_table.as_markdown(context.job.name, rows, settings.map_batch),
    }
    picture = measured_plot.pareto(rows)
    if picture:
        files[f"{SPEED_ACCURACY}.png"] = picture
    else:
        context.warn("no plot of speed against accuracy: no model that fits has a known accuracy")
    for name, data in files.items():
        storage.write_bytes(storage.join(context.folder, name), data)
    storage.write_json(storage.join(context.folder, SUMMARY), {"job": context.job.name, "rows": rows, "report": report})
    metrics = {f"{row['name']}/{key}": float(row[key]) for row in rows for key in METRICS if row[key] is not None}
    return Result({"line": report}, metrics=metrics, artifacts=[*files, SUMMARY])


def _built_from(measured: Measured) -> dict[str, Any]:
    return {"model": measured.model, "size": measured.size, "overrides": measured.overrides}


KIND = Kind("measure", stages="measure", needs=lambda line, generation: (), identity=identity, run=run)
