"""Assembles the report of a finished job: numbers, pictures, the page and its tables."""

from __future__ import annotations

import csv
import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline import storage
from pipeline.plan import best, early_stop
from pipeline.plan.context import Context
from pipeline.plan.stage import (
    DETECTION,
    EVALUATION,
    JOB,
    PAGE,
    ROBUSTNESS,
    SPEED_ACCURACY,
    SUMMARY,
    Done,
    Result,
    read_json_file,
)  # fmt: skip
from pipeline.printable import counted
from pipeline.report import accuracy, audit, detection, fonts, generation, mistakes, page, plots, robustness, verdict
from pipeline.report.page import Page, Picture, Section
from pipeline.report.plots import Curve, Model
from pipeline.tracking import journal
from pipeline.tracking.journal import Journal

STAGE_KEYS = (
    "stage", "dir", "model", "top1", "top5", "ece", "parameters", "images_per_second", "slowest_round", "fastest_round",
)  # fmt: skip
ROLL = 400  # points of a learning curve; more are averaged in equal groups


@dataclasses.dataclass(frozen=True)
class Tested:
    """What is known once the models are tested; `drawn`: the class names as plots can show them."""

    images: int
    models: Sequence[Model]
    rows: accuracy.Evaluations
    audits: Sequence[Mapping[str, Any]]
    best: str
    verdict: Sequence[str]
    warnings: Sequence[str]
    drawn: Sequence[str]


def assemble(context: Context) -> Result:
    """Write everything into the folder of the report stage."""
    found = tested(context)
    models, stop = found.models, early_stop.find(context.job, context.needs)
    summary = _summary(context, found) | ({"stop": stop.plain()} if stop else {})
    summary |= {"best": found.best, "verdict": found.verdict, "warnings": found.warnings}
    shards = len(context.corpora["unlabelled"].shards) if found.audits else 0
    total = shards * len(found.audits) + 1
    with context.journal() as log:
        sections = [
            generation.section(
                context, number, one, found.drawn, functools.partial(_progress, log, (number - 1) * shards, total)
            )
            for number, one in enumerate(found.audits, 1)
        ]
        content = page_of(context, found, sections)
        stopped = f"{stop.what.capitalize()} not run: {stop}." if stop else ""
        content = dataclasses.replace(content, stages=_stages(context), stop=stopped)
        pictures = [*content.overview, *(picture for section in sections for picture in section.pictures)]
        files = {picture.name: picture.png for picture in pictures}
        files |= {f"{SPEED_ACCURACY}.csv": _table(models), PAGE: page.render(content)}
        files |= accuracy.tables(models, found.rows, context.corpora.classes)
        for name, data in files.items():
            storage.write_bytes(storage.join(context.folder, name), data)
        storage.write_json(storage.join(context.folder, SUMMARY), summary)
        log.log(total, total)
    metrics = {"gain_points": summary["gain_points"], "top1": models[-1].top1, "top5": models[-1].top5}
    metrics |= {
        f"gen{one['generation']}_expected_noise": one["expected_noise"]
        for one in found.audits
        if one["expected_noise"] is not None
    }
    return Result({"line": summary["report"]}, metrics=metrics, artifacts=[SUMMARY, *files])


def tested(context: Context) -> Tested:
    """From what `evaluate` left, which must be done."""
    evaluation = read_json_file(context.needs["evaluate"], EVALUATION)
    fields, rows = {field.name for field in dataclasses.fields(Model)}, evaluation["models"]
    models = [Model(**{name: row[name] for name in row if name in fields}) for row in rows]
    generations = max(model.generation for model in models)
    audits = [audit.summary(context, number) for number in range(1, generations + 1)]
    taken = best.find(context.needs)
    assert taken  # the teacher at least
    drawn, lacking = fonts.in_plots(context.corpora.classes)
    warnings = [*verdict.of_speed(evaluation), *([lacking] if lacking else [])]
    judged = verdict.sentences(rows, audits, taken.model.name)
    if "corrected" in evaluation:
        judged.append(f"{counted(evaluation['corrected'], 'test label')} corrected by people.")
    return Tested(evaluation["images"], models, rows, audits, taken.model.name, judged, warnings, drawn)


def page_of(context: Context, found: Tested, sections: Sequence[Section]) -> Page:
    """The page of tested models, with `finished` as its stages."""
    overview = _overview(found.models, found.images, context.needs)
    overview += accuracy.pictures(found.models, found.rows, found.drawn)
    overview += robustness.pictures(context, found.models)
    overview += detection.pictures(context)
    tested = read_json_file(context.needs["detect-evaluate"], DETECTION) if "detect-evaluate" in context.needs else None
    taken = [model.stage for model in found.models].index(found.best)
    return Page(
        context.job.name,
        found.images,
        found.models,
        overview,
        sections,
        finished(context),
        command=command(context),
        further=accuracy.further(found.models, found.rows),
        sets=accuracy.on_sets(found.models, found.rows),
        verdict=found.verdict,
        warnings=found.warnings,
        detectors=detection.table(tested) if tested else (),
        annotations=detection.dropped(context) if tested else (),
        mistakes=mistakes.section(context, found.models[taken], found.rows[taken]),
    )


def _progress(log: Journal, before: int, total: int, number: int) -> None:
    log.log(before + number, total)


def _summary(context: Context, found: Tested) -> dict[str, Any]:
    models = found.models
    corrupted = {}
    if "robustness" in context.needs:
        path = storage.join(context.needs["robustness"].folder, ROBUSTNESS)
        corrupted = {"robustness": storage.redact(path)}
    return {
        "job": context.job.name,
        "stages": [{key: getattr(model, key) for key in STAGE_KEYS} for model in models],
        "audits": [{name: value for name, value in one.items() if name != "steps"} for one in found.audits],
        "gain_points": round(100 * (models[-1].top1 - models[0].top1), 6),
        "seconds": {stage.name: stage.info["seconds"] for stage in context.needs.values()},
        "report": storage.redact(storage.join(context.folder, PAGE)),
        **corrupted,
    }


def _table(models: Sequence[Model]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, [field.name for field in dataclasses.fields(Model)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(model) for model in models)
    return out.getvalue().encode()


def _overview(models: Sequence[Model], images: int, needs: Mapping[str, Done]) -> list[Picture]:
    pictures = [
        Picture(
            "accuracy_by_generation.png",
            plots.accuracy_by_generation(models, images),
            "Top-1 accuracy by generation",
            f"Top-1 on {counted(images, 'test image')}; the whiskers are one standard error.",
        ),
        Picture(
            "speed_accuracy.png",
            plots.speed_accuracy(models),
            "Accuracy over inference speed",
            f"Up is more accurate, right is faster: inference in {models[0].dtype}, measured side by side.",
        ),
    ]
    return pictures + learning_curves({model.stage: needs[model.stage].folder for model in models})


def learning_curves(folders: Mapping[str, str]) -> list[Picture]:
    """One picture, or none where nothing was recorded; `folders` of training stages, which may still run."""
    validation, loss = [], []
    for stage, folder in folders.items():
        records = journal.read(folder)[0]
        validation += _curve(stage, records, "validation", "top1")
        loss += _curve(stage, records, "train", "loss")
    if not validation or not loss:
        return []
    caption = (
        "Validation accuracy of the averaged weights, and the loss on noised training images, which for students "
        "is measured against pseudo-labels too."
    )
    png = plots.learning_curves(validation, loss)
    return [Picture("learning_curves.png", png, "Learning curves of teacher and students", caption)]


def _curve(stage: str, records: Sequence[Mapping[str, Any]], kind: str, name: str) -> list[Curve]:
    """One curve, or none where nothing was recorded (a teacher that was not trained here)."""
    points = [
        (record["step"], record[name])
        for record in records
        if record.get("kind") == kind and isinstance(record.get(name), (int, float))
    ]
    group = -(-len(points) // ROLL)
    groups = [points[i : i + group] for i in range(0, len(points), group)] if group else []
    steps, values = ([sum(p[k] for p in some) / len(some) for some in groups] for k in (0, 1))
    generation = plots.generation_of(stage)
    # There is one that is tuned, of the last student's colour, and little room.
    label = "tuned" if stage.endswith("finetune") else plots.label_of(generation)
    return [Curve(label, generation, steps, values)] if points else []


def command(context: Context) -> str:
    """What runs the job again."""
    return f"noisy-lambda run {storage.redact(storage.join(context.job.output, JOB))}"


def finished(context: Context) -> list[tuple[str, str, str, str]]:
    """(stage, folder, fingerprint, seconds) of what is done, as the page lists it."""
    return [
        (stage.name, storage.name(stage.folder), stage.fingerprint, f"{stage.info['seconds']:,.1f}")
        for stage in context.needs.values()
    ]


def _stages(context: Context) -> list[tuple[str, str, str, str]]:
    return [*finished(context), (context.stage.name, storage.name(context.folder), context.fingerprint, "")]
