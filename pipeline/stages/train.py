"""Trains a teacher or a student: gathers its shards and settings, and hands them to the one training loop.

gen0-teacher-1a2b3c4d/   checkpoints/  model.safetensors  model.yaml  metrics.jsonl  result.json  done.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.config.settings_train import Train
from pipeline.plan.adopted import pretrained_sha256
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs, training_of
from pipeline.plan.kind import Kind, Line
from pipeline.plan.stage import SELECTION, SHARDS, WEIGHTS, Result, read_json_file
from pipeline.printable import counted
from pipeline.progress import percent

if TYPE_CHECKING:
    from pipeline import weights
    from pipeline.loading.training_rows import TrainingShard
    from pipeline.train.spec import TrainSpec


def needs(line: Line, generation: int) -> tuple[str, ...]:
    return ("index", line.last("label"), line.last("select"), line.model) if generation else ("index",)


def identity(inputs: Inputs) -> dict[str, Any]:
    training = training_of(inputs.job, inputs.stage)
    settings = identity_of(training)
    if isinstance(training.pretrained, str):
        settings["pretrained"] = {"weights": pretrained_sha256(training.pretrained, inputs.stage.name)}
    given: dict[str, Any] = {
        "settings": settings,
        "seed": inputs.job.seed,
        "generation": inputs.stage.generation,
        "labelled": inputs.content["labelled"],
        "classes": inputs.classes,
    }
    if inputs.stage.generation:
        given["selection"] = inputs.output(f"gen{inputs.stage.generation}-select")
    if settings["init"] == "teacher":
        given["initial"] = inputs.before.output
    if training.weights == "best":  # the best of those that are looked at
        given["evaluate_every"] = training.evaluate_every
        given |= inputs.corrections("validation")
    if training.rollbacks:  # which go back to a checkpoint
        given["checkpoint_every"] = training.checkpoint_every
    return given


def run(context: Context) -> Result:
    from pipeline import preflight, weights
    from pipeline.loading import shuffle_quality

    stage, settings, classes = context.stage, training_of(context.job, context.stage), context.corpora.classes
    check_models(context)
    spec = make_spec(context, settings)
    if note := shuffle_quality.advice_on(context.needs["index"].folder, settings, context.job.seed):
        context.warn(f"{stage.name}: {note}")
    parameters = weights.parameter_count(weights.build_model(settings.model, len(classes), spec.overrides))
    if stage.generation:
        teacher = context.needs[stage.needs[-1]].info["parameters"]
        if parameters < teacher:
            context.warn(preflight.smaller(stage.name, parameters, teacher))
    card = weights.card_of(settings.model, spec.overrides, classes, spec.view, spec.test_views)
    trained = context.fit(loop_of(settings), spec)
    result = leave_model(context, spec, trained, card, parameters)
    if isinstance(settings.pretrained, str):
        line = f"{result.info['line']}, from {storage.redact(settings.pretrained)} with a new classifier"
        result = dataclasses.replace(result, info={**result.info, "line": line})
    return result


def loop_of(settings: Train) -> Callable[..., dict[str, Any]]:
    """What trains a network with these settings: the one training loop, or, of a frozen one, the probe."""
    from pipeline.train import loop, probe

    return probe.run if settings.freeze else loop.run


def leave_model(
    context: Context, spec: TrainSpec, result: Mapping[str, Any], card: weights.Card, parameters: int
) -> Result:
    """What a stage leaves whose loop has ended with `result`: the card beside the weights, and their identity."""
    from pipeline import weights

    weights.write_card(context.folder, card)
    made = storage.sha256(storage.join(context.folder, WEIGHTS))
    metrics: dict[str, float] = {key: float(result[key]) for key in ("top1", "top5", "loss") if key in result}
    top1 = percent(metrics.get("top1", float("nan")))
    line = f"{card.architecture}, {counted(spec.steps, 'step')}, validation top-1 {top1}"
    line += f" at step {result['best_step']:,}" if "best_step" in result else ""
    line += f", went back {counted(result['rollbacks'], 'time')}" if "rollbacks" in result else ""
    facts = {"model": card.architecture, "parameters": parameters, "steps": spec.steps, "validation": metrics}
    return Result(
        {**facts, "view": card.looks(), "line": line},
        output=made,
        metrics={f"best_validation_{key}": value for key, value in metrics.items()} | {"parameters": float(parameters)},
        model=True,
    )


def check_models(context: Context) -> None:
    """`preflight.check_models` of this training stage and those after it."""
    from pipeline import preflight

    ahead = [stage for stage in context.stages if stage.generation >= context.stage.generation]
    labelled = sum(shard.count for shard in indexed_shards(context, "labelled"))
    preflight.check_models(context.job, ahead, len(context.corpora.classes), labelled)


def make_spec(
    context: Context,
    settings: Train,
    *,
    labelled: list[TrainingShard] | None = None,
    init: str | None = None,
    only: tuple[str, ...] = (),
) -> TrainSpec:
    """The TrainSpec of a training stage, of a fold, which trains on a part of the labelled images (`labelled`), or of a
    fine-tune, which names the weights that it starts from (`init`) and the roles of the parameters that it trains
    (`only`)."""
    from pipeline.train import spec

    job, stage = context.job, context.stage
    only = only or (("head",) if settings.freeze else ())
    if settings.init == "teacher" and stage.generation and init is None:
        init = storage.join(context.needs[stage.needs[-1]].folder, WEIGHTS)
    return spec.make_spec(
        settings,
        stage=stage.name,
        folder=context.folder,
        classes=len(context.corpora.classes),
        labelled=indexed_shards(context, "labelled") if labelled is None else labelled,
        pseudo=selected_shards(context) if stage.generation and not only else None,
        validation=indexed_shards(context, "validation"),
        seed=job.seed,
        generation=stage.generation,
        init=init,
        only=only,
        workers=job.workers.loader,
        threads=job.workers.threads or None,
    )


def indexed_shards(context: Context, source: str) -> list[TrainingShard]:
    """The labelled, validation or test shards with their index files."""
    done = context.needs["index"]
    return shards_of(context, source, done.folder, read_json_file(done, SHARDS)[source])


def shards_of(context: Context, source: str, folder: str, counts: Mapping[str, int]) -> list[TrainingShard]:
    """The shards of a source with the index files that lie in `folder`; `counts`: their rows."""
    from pipeline.data.index_files import metadata_of, rows_path
    from pipeline.loading.training_rows import TrainingShard

    return [
        TrainingShard(
            shard.path,
            rows_path(folder, source, shard.name),
            None,
            counts[shard.name],
            context.cache,
            expected=metadata_of(folder, source, shard.name),
        )
        for shard in context.corpora[source].shards
    ]


def selected_shards(context: Context) -> list[TrainingShard]:
    """The unlabelled shards of which the selection keeps something, with their label and selection files."""
    from pipeline.data.label_files import class_list_hash, file_name
    from pipeline.labelling.corrected import label_path
    from pipeline.loading.training_rows import TrainingShard

    label, select = (context.needs[f"gen{context.stage.generation}-{kind}"].folder for kind in ("label", "select"))
    teacher = context.needs[context.stage.needs[-1]].output
    by = {"class_list": class_list_hash(context.corpora.classes), "teacher": teacher}
    selection = read_json_file(context.needs[f"gen{context.stage.generation}-select"], SELECTION)
    counts, corrected = selection["shards"], selection.get("corrected", {})
    return [
        TrainingShard(
            shard.path,
            label_path(label, select, shard.name, corrected),
            storage.join(select, file_name(shard.name)),
            counts[shard.name],
            context.cache,
            shard.size,
            {"shard": shard.name, "shard_size": shard.size, **by},
            {"stage": storage.name(select), "shard": shard.name},
        )
        for shard in context.corpora["unlabelled"].shards
        if counts.get(shard.name)
    ]


KIND = Kind("train", stages=r"gen0-teacher|gen\d+-student", needs=needs, identity=identity, run=run, model=True)
