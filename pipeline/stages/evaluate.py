"""Tests the teacher and every student: accuracy on the test shards and further sets, what they say of every validation
image, and inference speed side by side.

    evaluate-1a2b3c4d/evaluate.json   {"images", "models": [{"stage", "dir", "model", "size", "top1", "top5", "loss",
                                       "ece", "count", "bad", "per_class": {"images", "right"},
                                       "sizes": [{"size", "top1", …}, …], "sets": {name: {"top1", …}},
                                       "raw": {"top1", …}, "validation": {…},
                                       "parameters", "flops", "images_per_second", "slowest_round",
                                       "fastest_round", "latency_ms", "batch", "device", "dtype"}, …],
                                       "load": {"cores", "others", "threads", "seconds"}},
                                       with corrections "corrected": test labels
    evaluate-1a2b3c4d/evaluate.sets.<name>/<shard>.parquet   a row per good image of a further set (data.index_files)
    evaluate-1a2b3c4d/validation/<stage>/<shard>.parquet     what a model says of each (label_files.SCHEMA)

`sizes` are the further ones of `evaluate.sizes`, `sets` those of `evaluate.sets`; `raw`, with `evaluate.raw`, is what
the weights of the same step reach themselves, where the model is their moving average. `validation` is what
`labelling.audit.compare` finds (accuracy, temperature, calibration), `confusion`, and the `gain` on the model before:
what `predict`, the report and the choice of the best model go by. `flops` are two per multiply-add for one image, null
where they cannot be counted (`report.costs_on_paper`); `latency_ms` is the time from call to result for one image;
`load` is what others took of the machine while speed was measured (train.machine_load).

A shard is tested by one worker, which adds up what it counts: every image counts once however many workers there are.
The test shards and the further sets are used here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.corpora import set_source
from pipeline.plan.inputs import Inputs, model_identity
from pipeline.plan.kind import Kind
from pipeline.plan.stage import EVALUATION, Result
from pipeline.printable import counted
from pipeline.progress import percent
from pipeline.stages.index import Indexed, check_usable, index_sources
from pipeline.stages.train import indexed_shards, shards_of
from pipeline.tracking.journal import Journal

if TYPE_CHECKING:
    from pipeline.labelling.calibration import Answers
    from pipeline.loading.training_rows import TrainingShard
    from pipeline.train.trials import Trial

SMALL_BYTES = 2 << 20  # of shards that this process looks at in the time in which a worker starts
SHOWN = ("top1", "top5", "loss", "ece")  # of a further size or set, and of raw weights
Figures = dict[str, Any]


def identity(inputs: Inputs) -> dict[str, Any]:
    found = {
        "settings": identity_of(inputs.job.evaluate),
        "models": [model_identity(inputs.done[name]) for name in inputs.stage.needs if name != "index"],
        "test": inputs.content["test"],
        "validation": inputs.content["validation"],
        "classes": inputs.classes,
    }
    corpora = {name: inputs.corpora[set_source(name)] for name in sorted(inputs.job.evaluate.sets)}
    sets = {name: [shards.fingerprint, [s.stamp for s in shards.shards]] for name, shards in corpora.items()}
    return found | ({"sets": sets} if sets else {})


def run(context: Context) -> Result:
    from pipeline.train import trials

    settings = context.job.evaluate
    trained = {name: done.folder for name, done in context.needs.items() if name != "index"}
    with context.journal() as log:
        sources = {"test": indexed_shards(context, "test"), **_index_sets(context, log)}
        tried = {name: _trials(context, name, folder) for name, folder in trained.items()}
        figures = _test(context, [trial for several in tried.values() for trial in several], sources, log)
        validated = _validate_all(context, list(trained))
        # All in one worker and one after another: figures of speed are worth something only side by side.
        measure = functools.partial(trials.speed_worker, settings.batch, settings.speed_seconds)
        [speed] = context.map(measure, [("speed", list(trained.values()))], workers=1)
        if speed.value is None:
            raise DataError(f"cannot measure the models' speed: {speed.error}")
    measured, load = speed.value
    models = [
        {
            "stage": name,
            "dir": folder,
            **_row(tried[name], figures, settings.sets),
            "validation": validated[name],
            "flops": _flops(context, name, folder),
            **of_speed,
        }
        for (name, folder), of_speed in zip(trained.items(), measured, strict=True)
    ]
    bad, count = models[0]["bad"], models[0]["count"] + models[0]["bad"]
    if bad > context.job.data.max_bad_fraction * count:
        raise DataError(
            f"{bad} of {count} test images cannot be decoded, more than data.max_bad_fraction "
            f"{context.job.data.max_bad_fraction} allows; restore the test shards"
        )
    corrected = context.needs["index"].info.get("corrected", {}).get("test", 0)
    found = {"images": count, "models": models, "load": load} | ({"corrected": corrected} if corrected else {})
    storage.write_json(storage.join(context.folder, EVALUATION), found)
    line = ", ".join(f"{model['stage']} {percent(model['top1'])}" for model in models)
    line += f"; {counted(corrected, 'test label')} corrected" if corrected else ""
    return Result({"line": f"test top-1: {line}"}, metrics=_metrics(models), artifacts=[EVALUATION])


def _index_sets(context: Context, log: Journal) -> dict[str, list[TrainingShard]]:
    """The shards of `evaluate.sets` by source, with index files that are written here."""
    sources = [set_source(name) for name in context.job.evaluate.sets]
    if not sources:
        return {}
    found = index_sources(context, sources, log)
    check_usable(context, found)
    _warn_of_known(context, found)
    return {source: shards_of(context, source, context.folder, found.rows[source]) for source in sources}


def _warn_of_known(context: Context, found: Indexed) -> None:
    """Of images of a set that the models were trained on."""
    import numpy as np

    from pipeline.data.index_files import image_hashes

    trained_on = [("labelled", shard.name) for shard in context.corpora["labelled"].shards]
    labelled = image_hashes(context.needs["index"].folder, trained_on)
    for source, shards in found.rows.items():
        hashes = image_hashes(context.folder, [(source, name) for name in shards])
        if known := int(np.isin(hashes, labelled).sum()):
            context.warn(
                f"{known:,} of {len(hashes):,} different images of {source} are labelled images too, on which models "
                "were trained: what they reach on that set says less; take them out of its shards"
            )


def _trials(context: Context, stage: str, folder: str) -> list[Trial]:
    """A model at its own size, its raw weights, the further sizes, and the further sets at its own size."""
    from pipeline import weights
    from pipeline.train import checkpoint
    from pipeline.train.trials import Trial

    settings, own = context.job.evaluate, weights.read_card(folder).size
    found = [Trial(stage, folder, own)]
    result = checkpoint.read_result(folder) if settings.raw else None  # weights from elsewhere come without one
    if result:
        step = result.get("best_step", result["step"])
        found.append(Trial(stage, folder, own, raw=checkpoint.raw_weights(folder, step)))
    found += [Trial(stage, folder, size) for size in sorted({*settings.sizes} - {own})]
    return found + [Trial(stage, folder, own, set_source(name)) for name in settings.sets]


def _test(
    context: Context, trials: Sequence[Trial], sources: Mapping[str, Sequence[TrainingShard]], log: Journal
) -> dict[Trial, Figures]:
    """What `Scores.figures` says of each trial on all shards of its source."""
    import torch

    from pipeline.train.scores import Scores
    from pipeline.train.trials import counting_worker

    named = {
        source: list(zip(context.corpora[source].shards, shards, strict=True)) for source, shards in sources.items()
    }
    units = [(f"{trial}, {shard.name}", (trial, rows)) for trial in trials for shard, rows in named[trial.source]]
    bytes_ = sum(shard.size for trial in trials for shard, _ in named[trial.source])
    small = not context.job.workers.label_gpus and bytes_ <= SMALL_BYTES
    count = functools.partial(counting_worker, context.job.evaluate.batch)
    sums: dict[str, list[float]] = {}
    for outcome in context.map(count, units, small=small):
        if outcome.value is None:
            raise DataError(f"cannot evaluate {outcome.name}: {outcome.error}")
        sums[outcome.name] = outcome.value
        log.log(len(sums), len(units))
    found = {trial: Scores(len(context.corpora.classes)) for trial in trials}
    for name, (trial, _) in units:  # in one order, for the last digits depend on it
        found[trial].sums += torch.tensor(sums[name], dtype=torch.float64)
    return {trial: scores.figures() for trial, scores in found.items()}


def _validate_all(context: Context, stages: Sequence[str]) -> dict[str, Figures]:
    """`_validate` of every model, with what each gained on the one before it, from which it learnt."""
    from pipeline.labelling import audit

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
    import numpy as np

    from pipeline import weights
    from pipeline.data import index_files, label_files
    from pipeline.labelling import audit
    from pipeline.labelling.labeller import IN_FLIGHT, LabelSpec, make_labeller

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


def _row(trials: Sequence[Trial], figures: Mapping[Trial, Figures], sets: Mapping[str, str]) -> Figures:
    """What is said of one model, whose own trial comes first."""
    from pipeline import weights

    own, *others = trials
    card = weights.read_card(own.folder)
    row = {"model": card.architecture, "size": own.size, **figures[own], "sizes": [], "sets": {}}
    names = {set_source(name): name for name in sets}
    for trial in others:
        some = {name: figures[trial][name] for name in SHOWN}
        if trial.raw:
            row["raw"] = some
        elif trial.source in names:
            row["sets"][names[trial.source]] = some
        else:
            row["sizes"].append({"size": trial.size, **some})
    return row


def _flops(context: Context, stage: str, folder: str) -> int | None:
    import torch

    from pipeline import weights
    from pipeline.report.costs_on_paper import flops

    card = weights.read_card(folder)
    try:
        with torch.device("meta"):  # where attention is counted too
            return flops(weights.build_model(card.architecture, len(card.classes), card.overrides), card.size)
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        context.warn(f"{stage}: the FLOPs of {card.architecture} cannot be counted ({reason})")
        return None


def _metrics(models: Sequence[Figures]) -> dict[str, float]:
    found: dict[str, float] = {}
    for model in models:
        stage = model["stage"]
        numbers = ("top1", "top5", "ece", "images_per_second", "latency_ms", "parameters", "flops")
        found |= {f"{stage}/{key}": float(model[key]) for key in numbers if model[key] is not None}
        found |= {f"{stage}/top1_at_{other['size']}": other["top1"] for other in model["sizes"]}
        found |= {
            f"{stage}/{name}/{key}": some[key] for name, some in model["sets"].items() for key in ("top1", "top5")
        }
        if "raw" in model:
            found[f"{stage}/raw_top1"] = model["raw"]["top1"]
    return found


KIND = Kind(
    "evaluate",
    stages="evaluate",
    needs=lambda line, generation: ("index", *line.models),
    identity=identity,
    run=run,
)
