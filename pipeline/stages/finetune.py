"""Fine-tune the last model at a higher resolution: head and last norm only, on labelled images as validation sees them.

    gen2-finetune-1a2b3c4d/   what a training stage leaves

It is what Noisy Student ends with (Xie et al. 2020, section 3.1): training at a small resolution, then 1.5 epochs at a larger
one on labelled images without noise, shallow layers fixed. Position embeddings of local scope fit every resolution.
"""

from __future__ import annotations

import dataclasses

from pipeline import storage, weights
from pipeline.augment.view import Augment
from pipeline.config import durations
from pipeline.config.settings_train import peak_rate
from pipeline.errors import ConfigError
from pipeline.loading.loader import SoftTargets
from pipeline.plan.context import Context, Result
from pipeline.plan.graph import training_of
from pipeline.progress import percent
from pipeline.stages import sizes
from pipeline.stages.train import SEEDS_PER_JOB, indexed_shards, leave_model, source, steps_of
from pipeline.train.freeze import ROLES, roles_of
from pipeline.train.loop import TrainSpec
from pipeline.train.loop import run as train


def run(context: Context) -> Result:
    settings, name = context.job.finetune, context.stage.needs[-1]
    before = weights.read_card(context.needs[name].folder)
    size = settings.resolution or before.size
    if size < before.size:
        raise ConfigError(
            f"finetune.resolution is {size}, less than the {before.size} pixels at which {name} was trained; "
            "raise it, or drop `finetune`"
        )
    card = dataclasses.replace(before, size=size, crop=settings.crop or before.crop)
    model = weights.build_model(card.architecture, len(card.classes), card.overrides)
    sizes.check_size(model, card.architecture, size)
    roles_of(model)
    spec = make_spec(context, card)
    result = leave_model(context, spec, context.fit(train, spec), card, weights.parameter_count(model))
    was = context.needs[name].info.get("validation", {}).get("top1")
    line = f"{name} at {size} pixels, {spec.steps:,} steps, validation top-1 {percent(result.metrics['top1'])}"
    line += "" if was is None else f" ({percent(was)} at {before.size})"
    return dataclasses.replace(result, info={**result.info, "line": line})


def make_spec(context: Context, card: weights.Card) -> TrainSpec:
    """The fine-tune of the model before this stage; `card`: what model.yaml will say of it."""
    job, settings = context.job, context.job.finetune
    trained = training_of(job, context.stage)  # this is carried out as that was
    labelled = indexed_shards(context, "labelled")
    steps, per_epoch = steps_of(context.stage.name, settings.duration, labelled, settings.batch)
    return TrainSpec(
        folder=context.folder,
        model=card.architecture,
        classes=len(card.classes),
        overrides=card.overrides,
        init=storage.join(context.needs[context.stage.needs[-1]].folder, weights.WEIGHTS),
        only=ROLES,
        seed=job.seed * SEEDS_PER_JOB + context.stage.generation,
        sources=(source("labelled", labelled, settings.batch, trained),),
        augment=Augment(card.size, view=card.view()),
        view=card.view(),
        soft=SoftTargets(smoothing=settings.label_smoothing),
        validation=tuple(indexed_shards(context, "validation")),
        steps=steps,
        steps_per_epoch=per_epoch,
        lr=peak_rate(settings, settings.batch),
        warmup=min(durations.steps(settings.warmup, per_epoch), steps // 2),
        optimizer=settings.optimizer,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
        ema=settings.ema,
        evaluate_every=durations.steps(settings.evaluate_every, per_epoch),
        checkpoint_every=max(1, durations.steps(settings.checkpoint_every, per_epoch)),
        precision=trained.precision,
        keep=trained.keep,
        compile=trained.compile,
        parallel=trained.parallel,
        static_graph=trained.static_graph,
        workers=job.workers.loader,
        threads=job.workers.threads or None,
    )
