"""Audits the labelling: images whose class is known go through the very same labelling path, and are compared.

    gen1-audit-1a2b3c4d/validation/<shard>.parquet   label files of the validation shards (label_files.SCHEMA)
    gen1-audit-1a2b3c4d/audit_only/<shard>.parquet   and of data.audit_only, where it is set
    gen1-audit-1a2b3c4d/audit.json                   what `labelling.audit.compare` found

The files hold the teacher's own probabilities. With `label.calibrate` its label files will hold calibrated ones, so the
figures at the threshold are of those.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from pipeline import storage
from pipeline.config.fields import identity_of
from pipeline.data.classes import by_number
from pipeline.data.samples import RULE
from pipeline.data.shards import Shard
from pipeline.errors import DataError
from pipeline.plan.context import Context
from pipeline.plan.corpora import audited_of
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind
from pipeline.plan.stage import AUDIT, Result
from pipeline.printable import counted
from pipeline.stages.label import make_spec

SMALL_BYTES = 2 << 20  # of shards that this process labels in the time in which a worker starts
NUMBERS = (
    "images", "accuracy", "ece", "nll", "temperature", "calibrated_ece", "calibrated_nll", "confident", "noise",
)  # fmt: skip


def identity(inputs: Inputs) -> dict[str, Any]:
    generation = inputs.generation
    settings = identity_of(generation.label)
    settings.pop("corpus", None)  # what is labelled later changes nothing here
    return {
        "settings": settings,
        "threshold": generation.select.threshold,
        "thresholds": generation.select.thresholds,
        **({} if generation.select.max_noise is None else {"max_noise": generation.select.max_noise}),
        "teacher": inputs.model,
        "audited": {name: inputs.content[name] for name in audited_of(inputs.job)},
        "classes": inputs.classes,
    }


def run(context: Context) -> Result:
    from pipeline.labelling import audit, calibration

    sources = audited_of(context.job)
    _label(context, sources)
    generation = context.job.generations[context.stage.generation - 1]
    names = context.corpora.classes
    found = audit.compare(
        {source: audit.join(_files(context, source), len(names)) for source in sources},
        len(names),
        generation.select.threshold,
        by_number(generation.select.thresholds, names, "select.thresholds"),
        generation.select.max_noise,
        calibrate=generation.label.calibrate,
    )
    model = storage.name(context.needs[context.stage.needs[-1]].folder)
    storage.write_json(storage.join(context.folder, AUDIT), {"model": model, **found})
    temperature = found["temperature"]
    if generation.label.calibrate and temperature in (calibration.COOLEST, calibration.HOTTEST):
        context.warn(
            f"{context.stage.name}: no temperature between {calibration.COOLEST} and {calibration.HOTTEST} calibrates "
            f"the teacher on {counted(found['images'], 'image')}; {temperature} is used, "
            "look at the reliability diagram in the report"
        )
    metrics = {name: float(found[name]) for name in NUMBERS if found[name] is not None}
    info = {"line": line_of(found), "temperature": temperature}
    if all(least is None for least in found["level"]["thresholds"]):
        info["too_noisy"] = generation.select.max_noise  # with which the generations end here (plan.early_stop)
    return Result(info, metrics=metrics, artifacts=[AUDIT])


def _label(context: Context, sources: tuple[str, ...]) -> None:
    from pipeline.labelling.labeller import IN_FLIGHT, make_labeller

    audited = [_inside(source, shard) for source in sources for shard in context.corpora[source].shards]
    # Only workers have the accelerators, on which answers differ in the last digits: see like with like.
    small = not context.job.workers.label_gpus and sum(shard.size for shard in audited) <= SMALL_BYTES
    labeller = functools.partial(make_labeller, make_spec(context, temperature=1.0))
    units = [(shard.name, shard) for shard in audited]
    workers = context.job.workers.label
    with context.journal() as log:
        for done, outcome in enumerate(context.map(labeller, units, workers, small=small, overlap=IN_FLIGHT), 1):
            if outcome.value is None:
                raise DataError(f"cannot audit on the shard {outcome.name}: {outcome.error}")
            log.log(done, len(units))


def line_of(found: dict[str, Any]) -> str:
    """An audit in one line."""
    noise = "nothing" if found["noise"] is None else f"{100 * found['noise']:.1f} % wrong"
    rule = f"max_noise {found['max_noise']:g}" if "max_noise" in found else f"confidence ≥ {found['threshold']:g}"
    return (
        f"accuracy {100 * found['accuracy']:.1f} % on {counted(found['images'], 'image')}, ECE {found['ece']:.3f}, "
        f"temperature {found['temperature']:.2f}{' (applied)' if found['calibrate'] else ''}, {noise} at {rule}"
    )


def _inside(source: str, shard: Shard) -> Shard:
    """The shard under the name of its label file: shards of two sources may be called the same."""
    return dataclasses.replace(shard, name=f"{source}/{shard.name}")


def _files(context: Context, source: str) -> list[tuple[str, str]]:
    """(index file, label file) of each audited shard."""
    from pipeline.data.index_files import rows_path
    from pipeline.data.label_files import file_name

    index = context.needs["index"].folder
    return [
        (rows_path(index, source, shard.name), storage.join(context.folder, file_name(_inside(source, shard).name)))
        for shard in context.corpora[source].shards
    ]


KIND = Kind(
    "audit",
    stages=r"gen\d+-audit",
    needs=lambda line, generation: ("index", line.model),
    identity=identity,
    run=run,
    format=RULE,
)
