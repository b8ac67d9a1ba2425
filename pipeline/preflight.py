"""Checks models before time is spent on them: whether they can be built, take the images, and are large enough.

Training stages check all models that are still to come, and `plan` those of a whole job, so that a mistake in the last
student does not wait until the teacher is trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from models.first_layer import first_convolution
from pipeline import weights
from pipeline.augment.noise import augment_of
from pipeline.config.settings import Job
from pipeline.config.settings_train import Train, pseudo_per_step
from pipeline.errors import ConfigError, UserError, WeightsError
from pipeline.plan.inputs import training_of
from pipeline.plan.stage import Done, Stage
from pipeline.train.backbone import check_backbone, classifier_of
from pipeline.train.freeze import roles_of
from pipeline.train.input_size import check_further_sizes, check_size
from pipeline.train.spec import architecture_overrides, steps_of


def check_models(job: Job, stages: Iterable[Stage], classes: int, labelled: int) -> None:
    """Build the models of these training stages, show each a blank image, and count their steps on so many labelled
    images. ConfigError."""
    ahead = [stage for stage in stages if stage.kind == "train"]
    check_starts(job, ahead, classes)
    for stage in ahead:
        settings = training_of(job, stage)
        model = _build(stage, settings, classes)
        if settings.pretrained is True:  # fetched now, not after the stages before it
            weights.build_model(settings.model, classes, architecture_overrides(settings), pretrained=True)
        check_size(model, settings.model, settings.resolution)
        check_further_sizes(model, settings.model, job.evaluate.sizes)
        steps_of(stage.name, settings.duration, settings.batch, labelled)
        if job.finetune.resolution and stage is ahead[-1]:
            check_size(model, settings.model, job.finetune.resolution)
            roles_of(model)
            steps_of("finetune", job.finetune.duration, job.finetune.batch, labelled)


def check_starts(job: Job, stages: Iterable[Stage], classes: int) -> None:
    """What these training stages start from, as far as it can be known before anything is trained. ConfigError."""
    before: nn.Module | None = None
    for stage in stages:
        settings = training_of(job, stage)
        with torch.device("meta"):
            model = _build(stage, settings, classes)
            try:
                if isinstance(settings.pretrained, str):
                    check_backbone(model, settings.pretrained)
                elif settings.pretrained and not weights.is_published(settings.model):
                    raise ConfigError(weights.no_published_weights(settings.model))
                if settings.freeze:
                    classifier_of(model, settings.model)
                if settings.first_layer == "whitening":
                    _check_first_layer(model, settings.model)
            except UserError as error:
                raise ConfigError(f"{stage.name}: {error}") from error
            if settings.init == "teacher" and stage.generation and before is not None:
                try:
                    weights.load_state(model, before.state_dict(), "the teacher's weights")
                except WeightsError as error:
                    raise ConfigError(f"{stage.name}: init is 'teacher', but {error}") from error
        before = model


def _check_first_layer(model: nn.Module, name: str) -> None:
    try:
        first_convolution(model)
    except ValueError as error:
        raise ConfigError(f"first_layer is whitening, but {error} (model '{name}'); drop first_layer") from error


def mistakes(job: Job, stages: Iterable[Stage], classes: int, done: Mapping[str, Done]) -> list[str]:
    """What is wrong with the models of training stages that are not done; they are built without memory for weights."""
    found = []
    try:
        check_starts(job, [stage for stage in stages if stage.kind == "train" and stage.name not in done], classes)
    except ConfigError as error:
        found.append(str(error))
    for stage in stages:
        if stage.kind == "train" and stage.name not in done:
            try:
                with torch.device("meta"):
                    _build(stage, training_of(job, stage), classes)
            except ConfigError as error:
                if str(error) not in found:
                    found.append(str(error))
    return found


def _build(stage: Stage, settings: Train, classes: int) -> nn.Module:
    """The model of a training stage. ConfigError, with the stage's name: it, or what it is to be trained with, cannot
    be."""
    try:
        augment_of(settings)
        if stage.generation:
            pseudo_per_step(settings)
        return weights.build_model(settings.model, classes, architecture_overrides(settings))
    except ConfigError as error:
        raise ConfigError(f"{stage.name}: {error}") from error


def smaller(stage: str, parameters: int, teacher: int) -> str:
    """What is said of a student that is smaller than its teacher: it has no room for more than it is taught (Xie et al.
    2020, section 2)."""
    return (
        f"{stage} has {parameters:,} parameters, its teacher {teacher:,}: "
        "Noisy Student wants a student at least as large"
    )


def too_small(job: Job, stages: Iterable[Stage], classes: int, done: Mapping[str, Done]) -> list[str]:
    """The same of every such student of a job, before it is trained. A model that cannot be built is passed over: the
    run will say so."""
    found: list[str] = []
    teacher: int | None = None
    for stage in stages:
        if stage.name in done and "parameters" in done[stage.name].info:
            count = done[stage.name].info["parameters"]
        elif stage.kind == "train":
            count = _count(training_of(job, stage), classes)
        elif stage.model:
            count = None
        else:
            continue
        if stage.generation and teacher and count and count < teacher:
            found.append(smaller(stage.name, count, teacher))
        teacher = count
    return found


def _count(settings: Train, classes: int) -> int | None:
    """Parameters of the architecture, which is built without memory for them."""
    try:
        with torch.device("meta"):
            return weights.parameter_count(weights.build_model(settings.model, classes, settings.overrides))
    except UserError:
        return None
