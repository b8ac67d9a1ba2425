"""Is every student at least as large as its teacher? Noisy Student wants it so: a smaller one has no room for more than it is
taught (Xie et al. 2020, section 2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pipeline import weights
from pipeline.config.settings import Job
from pipeline.config.settings_train import Train
from pipeline.errors import UserError
from pipeline.plan.graph import Done, stages_of, training_of


def smaller(stage: str, parameters: int, teacher: int) -> str:
    """What is said of a student that is smaller than its teacher."""
    return (
        f"{stage} has {parameters:,} parameters, its teacher {teacher:,}: "
        "Noisy Student wants a student at least as large"
    )


def too_small(job: Job, classes: int, done: Mapping[str, Done]) -> list[str]:
    """The same of every such student of a job, before it is trained. A model that cannot be built is passed over: the
    run will say so."""
    found: list[str] = []
    teacher: int | None = None
    for stage in stages_of(job, done):
        if stage.name in done and "parameters" in done[stage.name].info:
            count = done[stage.name].info["parameters"]
        elif stage.kind == "train":
            count = _count(training_of(job, stage), classes)
        elif stage.kind == "adopt":
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
