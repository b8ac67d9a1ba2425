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

`sizes` are the further ones of `evaluate.sizes`, `sets` those of `evaluate.sets` (stages.further_sets); `raw`, with
`evaluate.raw`, is what the weights of the same step reach themselves, where the model is their moving average.
`validation` is what `labelling.audit.compare` finds (accuracy, temperature, calibration), `confusion`, and the `gain`
on the model before: what `predict`, the report and the choice of the best model go by. `flops` are two per multiply-add
for one image, null where they cannot be counted (`report.costs_on_paper`); `latency_ms` is the time from call to result
for one image; `load` is what others took of the machine while speed was measured (train.machine_load).

A shard is tested by one worker, which adds up what it counts: every image counts once however many workers there are.
The test shards and the further sets are used here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs, model_identity
from pipeline.plan.kind import Kind
from pipeline.plan.stage import EVALUATION, Result
from pipeline.printable import counted
from pipeline.progress import percent
from pipeline.stages import further_sets
from pipeline.stages.further_sets import SHOWN, TestShard
from pipeline.stages.train import indexed_shards
from pipeline.tracking.journal import Journal

if TYPE_CHECKING:
    from pipeline.train.trials import Trial

SMALL_BYTES = 2 << 20  # of shards that this process looks at in the time in which a worker starts
Figures = dict[str, Any]


def identity(inputs: Inputs) -> dict[str, Any]:
    found = {
        "settings": identity_of(inputs.job.evaluate),
        "models": [model_identity(inputs.done[name]) for name in inputs.stage.needs if name != "index"],
        "test": inputs.content["test"],
        "validation": inputs.content["validation"],
        "classes": inputs.classes,
    }
    return found | further_sets.identity(inputs)


def run(context: Context) -> Result:
    from pipeline.labelling.validated import validate_all
    from pipeline.train import trials

    settings = context.job.evaluate
    trained = {name: done.folder for name, done in context.needs.items() if name != "index"}
    with context.journal() as log:
        test = zip(context.corpora["test"].shards, indexed_shards(context, "test"), strict=True)
        sources = {"test": [TestShard(shard.name, shard.size, rows) for shard, rows in test]}
        sources |= further_sets.index(context, log)
        tried = {name: _trials(context, name, folder) for name, folder in trained.items()}
        figures = _test(context, [trial for several in tried.values() for trial in several], sources, log)
        on_sets = further_sets.figures(context, tried, figures, sources)
        validated = validate_all(context, list(trained))
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
            **_row(tried[name], figures, on_sets[name]),
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
    return found + further_sets.trials(context, stage, folder, own)


def _test(
    context: Context, trials: Sequence[Trial], sources: Mapping[str, Sequence[TestShard]], log: Journal
) -> dict[tuple[Trial, str], Figures]:
    """What `Scores.figures` says of each trial on all shards of its source (""), and on those of each part of it."""
    import torch

    from pipeline.train.scores import Scores
    from pipeline.train.trials import counting_worker

    pairs = {f"{trial}, {shard.name}": (trial, shard) for trial in trials for shard in sources[trial.source]}
    units = [(name, (trial, shard.rows, shard.right)) for name, (trial, shard) in pairs.items()]
    bytes_ = sum(shard.size for _, shard in pairs.values())
    small = not context.job.workers.label_gpus and bytes_ <= SMALL_BYTES
    count = functools.partial(counting_worker, context.job.evaluate.batch)
    sums: dict[str, list[float]] = {}
    for outcome in context.map(count, units, small=small):
        if outcome.value is None:
            raise DataError(f"cannot evaluate {outcome.name}: {outcome.error}")
        sums[outcome.name] = outcome.value
        log.log(len(sums), len(units))
    found: dict[tuple[Trial, str], Scores] = {}
    for name, (trial, shard) in pairs.items():  # in one order, for the last digits depend on it
        for part in {"", shard.part}:
            scores = found.setdefault((trial, part), Scores(len(context.corpora.classes) if trial.by_class else 0))
            scores.sums += torch.tensor(sums[name], dtype=torch.float64)
    return {key: scores.figures() for key, scores in found.items()}


def _row(
    trials: Sequence[Trial], figures: Mapping[tuple[Trial, str], Figures], on_sets: Mapping[str, Figures]
) -> Figures:
    """What is said of one model, whose own trial comes first."""
    from pipeline import weights

    own, *others = trials
    card = weights.read_card(own.folder)
    row = {"model": card.architecture, "size": own.size, **figures[own, ""], "sizes": [], "sets": on_sets}
    for trial in others:
        some = {name: figures[trial, ""][name] for name in SHOWN}
        if trial.raw:
            row["raw"] = some
        elif trial.size != own.size:
            row["sizes"].append({"size": trial.size, **some})
    return row


def _flops(context: Context, stage: str, folder: str) -> int | None:
    import torch

    from models.over_views import answering
    from pipeline import weights
    from pipeline.report.costs_on_paper import flops

    card = weights.read_card(folder)
    try:
        with torch.device("meta"):  # where attention is counted too
            model = weights.build_model(card.architecture, len(card.classes), card.overrides)
            return flops(answering(model, card.test_views), card.size)
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
            f"{stage}/{name}/{key}": some[key]
            for name, some in model["sets"].items()
            for key in ("top1", "top5", "mce", "relative_mce")
            if some.get(key) is not None
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
