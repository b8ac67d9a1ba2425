"""Uses existing weights as the teacher: `teacher.checkpoint` names a stage folder or a .safetensors file, or several,
which are averaged.

A model.yaml beside the weights says what they are; without one, the teacher's settings do.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.errors import WeightsError
from pipeline.plan import best
from pipeline.plan.adopted import adopted_files, checkpoint_sha256
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import CARD, WEIGHTS, Result
from pipeline.stages.train import check_models

NEW_CLASSIFIER = "to train a new classifier on these weights, name them as teacher.pretrained, not as checkpoint"

if TYPE_CHECKING:
    import torch

    from pipeline import weights

    State = dict[str, torch.Tensor]


def identity(inputs: Inputs) -> dict[str, Any]:
    named = inputs.job.teacher.checkpoint
    found = checkpoint_sha256(named) if isinstance(named, str) else [checkpoint_sha256(one) for one in named]
    return {"weights": found, "settings": identity_of(inputs.job.teacher), "classes": inputs.classes}


def run(context: Context) -> Result:
    from pipeline import weights
    from pipeline.train.input_size import check_further_sizes

    if not context.job.labels_only:
        check_models(context)
    named = context.job.teacher.checkpoint
    sources = [named] if isinstance(named, str) else list(named)
    found = [_read(context, source) for source in sources]
    card, state = found[0] if len(found) == 1 else _averaged(sources, found)
    if context.job.labels_only:
        card = dataclasses.replace(card, temperature=_temperature(sources, card))
    weights.save_state(storage.join(context.folder, WEIGHTS), state)
    weights.write_card(context.folder, card)
    model = weights.build_model(card.architecture, len(card.classes), card.overrides)
    check_further_sizes(model, card.architecture, context.job.evaluate.sizes)
    made = storage.sha256(storage.join(context.folder, WEIGHTS))
    parameters = weights.parameter_count(model)
    pairs = zip(sources, found, strict=True)
    line = ", ".join(f"{card.architecture} from {storage.redact(source)}" for source, (card, _) in pairs)
    return Result(
        {
            "model": card.architecture,
            "parameters": parameters,
            "view": card.looks(),
            "line": line if len(sources) == 1 else f"the mean of {line}",
            **({"temperature": card.temperature} if context.job.labels_only else {}),
        },
        output=made,
        metrics={"parameters": parameters},
        model=True,
    )


def _read(context: Context, source: str) -> tuple[weights.Card, State]:
    """What the weights are, and the weights, which fit."""
    from pipeline import weights
    from pipeline.train.backbone import differing_head
    from pipeline.train.spec import architecture_overrides, view_of

    settings, classes = context.job.teacher, context.corpora.classes
    path, described = adopted_files(source)
    if source != path:
        card = weights.read_card(source)
    elif described and storage.exists(described):
        card = weights.read_card(path.removesuffix(WEIGHTS))
    elif not settings.model:
        raise WeightsError(
            f"teacher.checkpoint {storage.redact(source)} has no {CARD} beside it that says what it is; name a stage "
            "folder or an export, or set teacher.model, resolution, mean and std, with data.classes"
        )
    else:
        card = weights.card_of(
            settings.model, architecture_overrides(settings), classes, view_of(settings), settings.test_views
        )
    if card.classes != classes:
        raise WeightsError(
            f"teacher.checkpoint {storage.redact(source)} was trained for other classes ({describe(card.classes)}) "
            f"than this job's ({describe(classes)}); name a checkpoint of the same class list in the same order, or "
            f"{NEW_CLASSIFIER}"
        )
    state, prefix = weights.without_prefix(weights.read_state(path))
    if prefix:
        context.warn(
            f"all names in {storage.redact(path)} begin with '{prefix}', which a wrapper puts there: it is left out"
        )
    model = weights.build_model(card.architecture, len(classes), card.overrides)
    if differing := differing_head(model, state):
        raise WeightsError(
            f"teacher.checkpoint {storage.redact(path)} has another classifier than {len(classes)} classes take: "
            f"{differing}; {NEW_CLASSIFIER}"
        )
    weights.load_state(model, state, path)
    return card, state


def _temperature(sources: list[str], card: weights.Card) -> float | None:
    """What makes the probabilities of given weights honest, as their card or their own run says; None: neither does."""
    if card.temperature is not None or len(sources) > 1:  # nobody has looked at several together
        return card.temperature
    path, _ = adopted_files(sources[0])
    return best.temperature_of(path.removesuffix(storage.name(path)).rstrip("/"))


def _averaged(sources: list[str], found: list[tuple[weights.Card, State]]) -> tuple[weights.Card, State]:
    """All of them as one model."""
    from pipeline import weights

    first = found[0][0]
    for source, (card, _) in zip(sources, found, strict=True):
        if card.looks() != first.looks():
            raise WeightsError(
                f"teacher.checkpoint {storage.redact(source)} looks at images as {_shown(card)}, and "
                f"{storage.redact(sources[0])} as {_shown(first)}; teachers that "
                "are averaged must look at the same pixels"
            )
    members = [{"architecture": card.architecture, "overrides": dict(card.overrides)} for card, _ in found]
    card = dataclasses.replace(first, architecture=weights.ENSEMBLE, overrides={"members": members}, temperature=None)
    return card, weights.joined_states(state for _, state in found)


def _shown(card: weights.Card) -> str:
    return f"{card.size} pixels, crop {card.crop}, {card.interpolation}, mean {card.mean}, std {card.std}" + (
        f", test_views {card.test_views}" if card.test_views else ""
    )


def describe(classes: list[str]) -> str:
    return f"{len(classes)}: {', '.join(classes[:3])}{' …' if len(classes) > 3 else ''}"


KIND = Kind(
    "adopt",
    stages="gen0-teacher",
    needs=lambda line, generation: line.names("index"),
    identity=identity,
    run=run,
    model=True,
)
