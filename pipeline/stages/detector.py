"""Trains a detector: Mask R-CNN on a body of ours, of timm or of an earlier stage, by the one training loop.

detector-lambda-1a2b3c4d/   checkpoints/  model.safetensors  detector.yaml  metrics.jsonl  result.json  done.json
"""

from __future__ import annotations

import functools
from typing import Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.config.settings import Job
from pipeline.config.settings_detection import OF_JOB, Detector
from pipeline.plan.adopted import pretrained_sha256
from pipeline.plan.context import Context
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind, Line
from pipeline.plan.stage import WEIGHTS, Result, Stage
from pipeline.printable import counted
from pipeline.progress import percent
from pipeline.stages.detect_index import scene_shards


def detector_of(job: Job, stage: Stage) -> Detector:
    """The settings of a detector's stage."""
    return next(one for one in job.detection.detectors if stage.name == f"detector-{one.name}")


def needs(line: Line, generation: int) -> tuple[str, ...]:
    settings = line.job.detection.detectors[len(line.names("detector"))]
    if not settings.init or not OF_JOB.fullmatch(settings.init):
        return ("detect-index",)
    # After an early stop the last model is the one that there is.
    return ("detect-index", settings.init if settings.init in line.models else line.model)


def identity(inputs: Inputs) -> dict[str, Any]:
    settings = detector_of(inputs.job, inputs.stage)
    scenes = inputs.done["detect-index"].info["content"]
    given: dict[str, Any] = {
        "settings": {name: value for name, value in identity_of(settings).items() if name != "init"},
        "seed": inputs.job.seed,
        "scenes": scenes["detection.train"],
        "classes": inputs.corpora.detection_classes,
    }
    if settings.init:
        of_job = len(inputs.stage.needs) > 1
        given["initial"] = inputs.before.output if of_job else pretrained_sha256(settings.init, inputs.stage.name)
    if settings.weights == "best":  # the best of those that are looked at
        given |= {"evaluate_every": settings.evaluate_every, "validation": scenes["detection.validation"]}
    if settings.rollbacks:  # which go back to a checkpoint
        given["checkpoint_every"] = settings.checkpoint_every
    return given


def run(context: Context) -> Result:
    from pipeline import weights
    from pipeline.detection.card import write_card
    from pipeline.detection.network import build_detector
    from pipeline.detection.spec import make_spec
    from pipeline.detection.task import DETECTION
    from pipeline.train import loop

    settings, name = detector_of(context.job, context.stage), context.stage.name
    init = settings.init
    if len(context.needs) > 1:
        init = storage.join(context.needs[context.stage.needs[-1]].folder, WEIGHTS)
    spec = make_spec(
        settings,
        stage=name,
        folder=context.folder,
        classes=context.corpora.detection_classes,
        train=scene_shards(context, "detection.train"),
        validation=scene_shards(context, "detection.validation"),
        seed=context.job.seed,
        body=init,
        workers=context.job.workers.loader,
        threads=context.job.workers.threads or None,
    )
    detector = build_detector(spec.card)  # a mistake in it shows here
    parameters = weights.parameter_count(detector)
    result = context.fit(functools.partial(loop.run, task=DETECTION), spec)
    write_card(context.folder, spec.card)
    metrics = {key: float(value) for key, value in result.items() if key.startswith(("box_", "mask_"))}
    found = f"validation AP50 of boxes {percent(metrics['box_ap50'])}, of masks {percent(metrics['mask_ap50'])}"
    line = f"{settings.model}, {counted(spec.steps, 'step')}, {found}"
    line += f" at step {result['best_step']:,}" if "best_step" in result else ""
    facts = {
        "model": settings.model,
        "parameters": parameters,
        "body_parameters": weights.parameter_count(detector.backbone.body),  # type: ignore[arg-type]
        "steps": spec.steps,
        "validation": metrics,
        "line": line,
    }
    made = storage.sha256(storage.join(context.folder, WEIGHTS))
    return Result(facts, output=made, metrics={**metrics, "parameters": float(parameters)})


KIND = Kind("detector", stages=r"detector-[a-z0-9_]+", needs=needs, identity=identity, run=run)
