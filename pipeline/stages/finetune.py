"""Fine-tunes the last model at a higher resolution: head and last norm only, on labelled images as validation sees
them.

    gen2-finetune-1a2b3c4d/   what a training stage leaves

It is what Noisy Student ends with (Xie et al. 2020, section 3.1): training at a small resolution, then 1.5 epochs at a
larger one on labelled images without noise, shallow layers fixed. Position embeddings of local scope fit every
resolution.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.config.settings_train import Finetune, Train
from pipeline.errors import ConfigError
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs, training_of
from pipeline.plan.kind import Kind
from pipeline.plan.stage import WEIGHTS, Result
from pipeline.printable import counted
from pipeline.progress import percent
from pipeline.stages.train import leave_model, make_spec

if TYPE_CHECKING:
    from pipeline.weights import Card

IDENTITY_CARRIED = ("segments", "window", "precision")  # what it takes from the training before it
CARRIED = (*IDENTITY_CARRIED, "keep", "compile", "parallel", "static_graph")
OWN = [item.name for item in dataclasses.fields(Finetune) if item.name not in ("resolution", "crop")]


def identity(inputs: Inputs) -> dict[str, Any]:
    trained, usual = identity_of(training_of(inputs.job, inputs.stage)), identity_of(Train(model=""))
    return {
        "settings": identity_of(inputs.job.finetune),
        "seed": inputs.job.seed,
        "model": inputs.model,
        "labelled": inputs.content["labelled"],
        "classes": inputs.classes,
        **{name: trained[name] for name in IDENTITY_CARRIED if trained.get(name) != usual.get(name)},
    }


def run(context: Context) -> Result:
    from pipeline import weights
    from pipeline.train.freeze import ROLES, roles_of
    from pipeline.train.input_size import check_size
    from pipeline.train.loop import run as train

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
    check_size(model, card.architecture, size)
    roles_of(model)
    init = storage.join(context.needs[name].folder, WEIGHTS)
    spec = make_spec(context, training(settings, training_of(context.job, context.stage), card), init=init, only=ROLES)
    result = leave_model(context, spec, context.fit(train, spec), card, weights.parameter_count(model))
    was = context.needs[name].info.get("validation", {}).get("top1")
    top1 = percent(result.info["validation"]["top1"])
    line = f"{name} at {size} pixels, {counted(spec.steps, 'step')}, validation top-1 {top1}"
    line += "" if was is None else f" ({percent(was)} at {before.size})"
    return dataclasses.replace(result, info={**result.info, "line": line})


def training(settings: Finetune, trained: Train, card: Card) -> Train:
    """The fine-tune as a training without noise, carried out as the one before it was, `trained`; `card`: what
    model.yaml will say of the model."""
    carried = {name: getattr(trained, name) for name in CARRIED}
    return dataclasses.replace(
        Train(
            model=card.architecture,
            overrides=dict(card.overrides),
            resolution=card.size,
            crop=card.crop,
            interpolation=card.interpolation,
            mean=list(card.mean),
            std=list(card.std),
            test_views=list(card.test_views),
        ),
        **carried,
        **{name: getattr(settings, name) for name in OWN},
    )


KIND = Kind(
    "finetune",
    stages=r"gen\d+-finetune",
    needs=lambda line, generation: ("index", line.model),
    identity=identity,
    run=run,
    model=True,
)
