"""Use existing weights as the teacher: `teacher.checkpoint` names a stage folder or a .safetensors file.

A model.yaml beside the weights says what they are; without one, the teacher's settings do.
"""

from __future__ import annotations

from pipeline import storage, weights
from pipeline.errors import WeightsError
from pipeline.stages.context import Context, Result
from pipeline.stages.train import card_of, check_models


def run(context: Context) -> Result:
    source, settings, classes = str(context.job.teacher.checkpoint), context.job.teacher, context.sources.classes
    check_models(context)
    if source.endswith(".safetensors"):
        path, folder = source, source.removesuffix(storage.name(source))
        described = storage.name(source) == weights.WEIGHTS and storage.exists(storage.join(folder, weights.CARD))
        card = weights.read_card(folder) if described else card_of(settings, classes)
    else:
        path, card = storage.join(source, weights.WEIGHTS), weights.read_card(source)
    if card.classes != classes:
        raise WeightsError(
            f"teacher.checkpoint {storage.redact(source)} was trained for other classes ({describe(card.classes)}) than "
            f"this job's ({describe(classes)}); name a checkpoint of the same class list in the same order"
        )
    model = weights.build_model(card.architecture, len(classes), card.overrides)
    state = weights.read_state(path)
    weights.load_state(model, state, path)
    weights.save_state(storage.join(context.folder, weights.WEIGHTS), state)
    weights.write_card(context.folder, card)
    made = storage.sha256(storage.join(context.folder, weights.WEIGHTS))
    parameters = weights.parameter_count(model)
    return Result(
        {
            "model": card.architecture,
            "parameters": parameters,
            "line": f"{card.architecture} from {storage.redact(source)}",
        },
        output=made,
        metrics={"parameters": parameters},
        model=True,
    )


def describe(classes: list[str]) -> str:
    return f"{len(classes)}: {', '.join(classes[:3])}{' …' if len(classes) > 3 else ''}"
