"""Train a teacher or a student: resolve the settings into a TrainSpec and hand it to the one training loop.

gen0-teacher-1a2b3c4d/   checkpoints/  model.safetensors  model.yaml  metrics.jsonl  result.json  done.json
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from pipeline import storage, weights
from pipeline.augment import view
from pipeline.config import durations
from pipeline.config.settings import Job
from pipeline.config.settings_train import Train, peak_rate
from pipeline.data import label_files
from pipeline.errors import ConfigError, TrainingError
from pipeline.loading import sample_order
from pipeline.loading.loader import SoftTargets, TrainingShard, TrainingSource
from pipeline.plan.context import Context, Result
from pipeline.plan.graph import Done, Stage, stages_of, training_of
from pipeline.progress import percent
from pipeline.stages import index, shuffle, sizes
from pipeline.stages.capacity import smaller
from pipeline.stages.select import SUMMARY
from pipeline.train.freeze import roles_of
from pipeline.train.loop import TrainSpec
from pipeline.train.loop import run as train

SEEDS_PER_JOB = 1000  # every generation has its own order and noise


def run(context: Context) -> Result:
    settings, classes = training_of(context.job, context.stage), context.sources.classes
    check_models(context)
    spec = make_spec(context, settings)
    if note := shuffle.advice(context.needs["index"].folder, settings, context.job.seed):
        context.warn(f"{context.stage.name}: {note}")
    parameters = weights.parameter_count(weights.build_model(spec.model, spec.classes, spec.overrides))
    if context.stage.generation:
        teacher = context.needs[context.stage.needs[-1]].info["parameters"]
        if parameters < teacher:
            context.warn(smaller(context.stage.name, parameters, teacher))
    return leave_model(context, spec, context.fit(train, spec), card_of(settings, classes), parameters)


def leave_model(
    context: Context, spec: TrainSpec, result: Mapping[str, Any], card: weights.Card, parameters: int
) -> Result:
    """What a stage leaves whose loop has ended with `result`: the card beside the weights, and their identity."""
    weights.write_card(context.folder, card)
    made = storage.sha256(storage.join(context.folder, weights.WEIGHTS))
    metrics: dict[str, float] = {key: float(result[key]) for key in ("top1", "top5", "loss") if key in result}
    line = f"{spec.model}, {spec.steps:,} steps, validation top-1 {percent(metrics.get('top1', float('nan')))}"
    line += f" at step {result['best_step']:,}" if "best_step" in result else ""
    line += f", went back {result['rollbacks']} times" if "rollbacks" in result else ""
    facts = {"model": spec.model, "parameters": parameters, "steps": spec.steps, "validation": metrics}
    return Result(
        {**facts, "view": dataclasses.asdict(card.view()), "line": line},
        output=made,
        metrics=metrics | {"parameters": float(parameters)},
        model=True,
    )


def check_models(context: Context) -> None:
    """Build the models of this stage and of those after it, show each a blank image, and count their steps: a mistake in
    the last student shall not wait until the teacher is trained. ConfigError."""
    job, labelled = context.job, indexed_shards(context, "labelled")
    ahead = [
        stage for stage in stages_of(job) if stage.kind == "train" and stage.generation >= context.stage.generation
    ]
    for stage in ahead:
        settings = training_of(job, stage)
        model = check_settings(stage, settings, len(context.sources.classes))
        sizes.check_size(model, settings.model, settings.resolution)
        sizes.check_further_sizes(model, settings.model, job.evaluate.sizes)
        steps_of(stage.name, settings.duration, labelled, settings.batch)
        if job.finetune.resolution and stage is ahead[-1]:
            sizes.check_size(model, settings.model, job.finetune.resolution)
            roles_of(model)
            steps_of("finetune", job.finetune.duration, labelled, job.finetune.batch)


def check_settings(stage: Stage, settings: Train, classes: int) -> nn.Module:
    """The model of a training stage. ConfigError, with the stage's name: it, or what it is to be trained with, cannot be."""
    try:
        augment_of(settings)
        if stage.generation:
            pseudo_per_step(settings)
        return weights.build_model(settings.model, classes, architecture_overrides(settings))
    except ConfigError as error:
        raise ConfigError(f"{stage.name}: {error}") from error


def mistakes(job: Job, classes: int, done: Mapping[str, Done]) -> list[str]:
    """What `check_settings` says of the stages that are not done; the models are built without memory for weights."""
    found = []
    for stage in stages_of(job, done):
        if stage.kind == "train" and stage.name not in done:
            try:
                with torch.device("meta"):
                    check_settings(stage, training_of(job, stage), classes)
            except ConfigError as error:
                found.append(str(error))
    return found


def pseudo_per_step(settings: Train) -> int:
    """Pseudo-labelled images in a global step; ConfigError where rounding leaves none of those that were asked for."""
    found = round(settings.unlabelled_ratio * settings.batch)
    if settings.unlabelled_ratio and not found:
        raise ConfigError(
            f"unlabelled_ratio {settings.unlabelled_ratio:g} × batch {settings.batch} is less than one pseudo-labelled image "
            "a step; raise one of them, or write unlabelled_ratio: 0 for none"
        )
    return found


def make_spec(context: Context, settings: Train) -> TrainSpec:
    """The TrainSpec of a training stage: epochs become steps, patterns become shards with counts."""
    job, stage = context.job, context.stage
    labelled = indexed_shards(context, "labelled")
    sources = [source("labelled", labelled, settings.batch, settings)]
    if stage.generation:
        selected = selected_shards(context)
        sources.append(source("pseudo", selected, pseudo_per_step(settings), settings))
    sources = [used for used in sources if used.per_step]
    steps, per_epoch = steps_of(stage.name, settings.duration, labelled, settings.batch)
    per_step = sum(used.per_step for used in sources)
    teacher = context.needs[stage.needs[-1]].folder if stage.generation else ""
    return TrainSpec(
        folder=context.folder,
        model=settings.model,
        classes=len(context.sources.classes),
        overrides=architecture_overrides(settings),
        pretrained=settings.pretrained,
        init=storage.join(teacher, weights.WEIGHTS) if settings.init == "teacher" and teacher else None,
        sources=tuple(sources),
        augment=augment_of(settings),
        validation=tuple(indexed_shards(context, "validation")),
        view=card_of(settings, []).view(),
        steps=steps,
        steps_per_epoch=per_epoch,
        warmup=min(durations.steps(settings.warmup, per_epoch), steps // 2),
        lr=peak_rate(settings, per_step),
        seed=job.seed * SEEDS_PER_JOB + stage.generation,
        optimizer=settings.optimizer,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        accumulate=settings.accumulate,
        rollbacks=settings.rollbacks,
        rollback_factor=settings.rollback_factor,
        weights=settings.weights,
        pseudo_weight=settings.pseudo_weight,
        soft=SoftTargets(
            smoothing=settings.label_smoothing, temperature=settings.temperature, hard_pseudo=settings.labels == "hard"
        ),
        ema=settings.ema,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
        evaluate_every=durations.steps(settings.evaluate_every, per_epoch),
        evaluate_raw=settings.evaluate_raw,
        checkpoint_every=max(1, durations.steps(settings.checkpoint_every, per_epoch)),
        keep=settings.keep,
        precision=settings.precision,
        compile=settings.compile,
        parallel=settings.parallel,
        static_graph=settings.static_graph,
        workers=job.workers.loader,
        threads=job.workers.threads or None,
    )


def steps_of(stage: str, duration: str, labelled: Sequence[TrainingShard], batch: int) -> tuple[int, float]:
    """(steps of a stage, steps of an epoch); ConfigError for none."""
    images = sum(shard.count for shard in labelled)
    steps = durations.steps(duration, images / batch)
    if steps < 1:
        raise ConfigError(
            f"{stage}: duration {duration} is less than one step of {batch} images "
            f"({images} labelled images); lengthen it or lower batch"
        )
    return steps, images / batch


def source(name: str, shards: Sequence[TrainingShard], per_step: int, settings: Train) -> TrainingSource:
    """These shards in the order of `settings`. TrainingError: too few images for a step."""
    held = sum(shard.count for shard in shards)
    if name == "pseudo" and per_step > held:
        raise TrainingError(
            f"each step takes {per_step:,} pseudo-labelled images (unlabelled_ratio {settings.unlabelled_ratio:g} × batch "
            f"{settings.batch}), but the selection holds {held:,}, copies included; lower unlabelled_ratio or batch, or let "
            "`select` keep more (a lower threshold, a higher per_class)"
        )
    segments = sample_order.segments_for(len(shards), settings.segments)
    return TrainingSource(name, tuple(shards), per_step, segments, settings.window)


def indexed_shards(context: Context, source: str) -> list[TrainingShard]:
    """The labelled, validation or test shards with their index files."""
    folder = context.needs["index"].folder
    counts = storage.read_json(storage.join(folder, index.SHARDS))[source]
    return [
        TrainingShard(shard.path, index.rows_path(folder, source, shard.name), None, counts[shard.name], context.cache)
        for shard in context.sources[source].shards
    ]


def selected_shards(context: Context) -> list[TrainingShard]:
    """The unlabelled shards of which the selection keeps something, with their label and selection files."""
    label, select = (context.needs[f"gen{context.stage.generation}-{kind}"].folder for kind in ("label", "select"))
    teacher = context.needs[context.stage.needs[-1]].output
    by = {"class_list": label_files.class_list_hash(context.sources.classes), "teacher": teacher}
    counts = storage.read_json(storage.join(select, SUMMARY))["shards"]
    return [
        TrainingShard(
            shard.path,
            storage.join(label, label_files.file_name(shard.name)),
            storage.join(select, label_files.file_name(shard.name)),
            counts[shard.name],
            context.cache,
            shard.size,
            {"shard": shard.name, "shard_size": shard.size, **by},
        )
        for shard in context.sources["unlabelled"].shards
        if counts.get(shard.name)
    ]


def card_of(settings: Train, classes: list[str]) -> weights.Card:
    """What model.yaml will say of a model trained with these settings."""
    return weights.Card(
        settings.model,
        classes,
        settings.resolution,
        settings.crop,
        settings.interpolation,
        list(settings.mean),
        list(settings.std),
        architecture_overrides(settings),
    )


def augment_of(settings: Train) -> view.Augment:
    """The training view of these settings."""
    affine = settings.affine
    mean = (settings.mean[0], settings.mean[1], settings.mean[2])
    moved = view.Affine(affine.degrees, affine.translate, _pair(affine.scale), affine.shear)
    return view.Augment(
        size=settings.resolution, policy=settings.augment, ops=tuple(settings.augment_ops), scale=_pair(settings.crop_scale),
        ratio=_pair(settings.crop_ratio), flip=settings.flip, affine=None if moved == view.Affine() else moved,
        interpolation="bicubic" if settings.interpolation == "lanczos" else settings.interpolation, mean=mean,
        on_device=settings.augment_on == "device" and bool(settings.augment))  # fmt: skip


def _pair(values: list[float]) -> tuple[float, float]:
    return values[0], values[1]


def architecture_overrides(settings: Train) -> dict[str, Any]:
    """`overrides` with dropout and stochastic depth under the names that ours and timm's architectures use."""
    timm = settings.model.startswith("timm/")
    noise = {
        "drop_rate" if timm else "dropout": settings.dropout,
        "drop_path_rate" if timm else "stochastic_depth": settings.stochastic_depth,
    }
    return {**settings.overrides, **{name: rate for name, rate in noise.items() if rate}}
