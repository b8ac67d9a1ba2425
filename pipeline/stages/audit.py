"""Is the labelling any good? Images whose class is known go through the very same labelling path, and are compared.

    gen1-audit-1a2b3c4d/validation/<shard>.parquet   label files of the validation shards (labels.SCHEMA)
    gen1-audit-1a2b3c4d/audit_only/<shard>.parquet   and of data.audit_only, where it is set
    gen1-audit-1a2b3c4d/audit.json                   what `compare` found

The files hold the teacher's own probabilities. With `label.calibrate` its label files will hold calibrated ones, so the
figures at the threshold are of those.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data import label_files
from pipeline.data.classes import by_number
from pipeline.data.shards import Shard
from pipeline.errors import DataError
from pipeline.labelling import calibration
from pipeline.labelling.calibration import Answers
from pipeline.labelling.labeller import IN_FLIGHT, make_labeller
from pipeline.plan.context import Context, Result
from pipeline.plan.early_stop import AUDIT
from pipeline.plan.graph import held_out_of
from pipeline.stages import index
from pipeline.stages.label import make_spec

STEPS = 100  # of confidence, for accuracy against threshold
SMALL_BYTES = 2 << 20  # of shards that this process labels in the time in which a worker starts


def run(context: Context) -> Result:
    sources = [source for source in held_out_of(context.job) if source != "test"]
    audited = {source: [_inside(source, shard) for shard in context.sources[source].shards] for source in sources}
    units = [(shard.name, shard) for shards in audited.values() for shard in shards]
    # Only workers have the accelerators, on which answers differ in the last digits: see like with like.
    small = not context.job.workers.gpus and sum(shard.size for _, shard in units) <= SMALL_BYTES
    labeller = functools.partial(make_labeller, make_spec(context, temperature=1.0))
    with context.journal() as log:
        for done, outcome in enumerate(
            context.map(labeller, units, context.job.workers.label, small=small, overlap=IN_FLIGHT), 1
        ):
            if outcome.value is None:
                raise DataError(f"cannot audit on the shard {outcome.name}: {outcome.error}")
            log.log(done, len(units))
    generation = context.job.generations[context.stage.generation - 1]
    names = context.sources.classes
    joined = {source: _join(context, source) for source in sources}
    found = compare(
        joined,
        len(names),
        generation.select.threshold,
        by_number(generation.select.thresholds, names, "select.thresholds"),
        calibrate=generation.label.calibrate,
    )
    storage.write_json(storage.join(context.folder, AUDIT), found)
    temperature = found["temperature"]
    if generation.label.calibrate and temperature in (calibration.COOLEST, calibration.HOTTEST):
        context.warn(
            f"{context.stage.name}: no temperature between {calibration.COOLEST} and {calibration.HOTTEST} calibrates the "
            f"teacher on {found['images']} images; {temperature} is used, look at the reliability diagram in the report"
        )
    numbers = (
        "images",
        "accuracy",
        "ece",
        "nll",
        "temperature",
        "calibrated_ece",
        "calibrated_nll",
        "confident",
        "noise",
    )
    metrics = {name: float(found[name]) for name in numbers if found[name] is not None}
    return Result({"line": line_of(found), "temperature": temperature}, metrics=metrics, artifacts=[AUDIT])


def line_of(found: dict[str, Any]) -> str:
    """An audit in one line."""
    noise = "nothing" if found["noise"] is None else f"{100 * found['noise']:.1f} % wrong"
    return (
        f"accuracy {100 * found['accuracy']:.1f} % on {found['images']:,} images, ECE {found['ece']:.3f}, temperature "
        f"{found['temperature']:.2f}{' (applied)' if found['calibrate'] else ''}, {noise} at confidence ≥ {found['threshold']:g}"
    )


def compare(
    joined: dict[str, tuple[Answers, Counter[str]]],
    classes: int,
    threshold: float,
    thresholds: Mapping[int, float],
    *,
    calibrate: bool,
) -> dict[str, Any]:
    """What audit.json holds, of the answers of each source and the statuses of its images without one.

    `images`, `bad` (by reason), `accuracy`, `ece`, `nll`, the `temperature` that minimises it, and `calibrated_ece` and
    `calibrated_nll` there; `reliability` and `calibrated_reliability` (per bin `count`, `confidence`, `accuracy`). Of the
    confidences that label files will hold: how many images are `confident`, at or above `threshold` (`thresholds`:
    {class: another one}), the share of wrong labels among them (`noise`), per class `kept`, `precision` and `recall`, and in steps of 0.01 the `steps` `count` and
    `right`. `sources`: images, accuracy and ECE of each.
    """
    found = calibration.joined([answers for answers, _ in joined.values() if len(answers.truth)])
    if not len(found.truth):
        raise DataError("the audit has no image that could be labelled; look at the validation shards")
    # As few digits as another machine would agree on: label files are made with it.
    temperature = float(f"{calibration.best_temperature(found):.4g}")
    raw, honest = (calibration.confidence_at(found, t) for t in (1.0, temperature))
    before, after = (calibration.reliability(sure, found.correct) for sure in (raw, honest))
    confidence = honest if calibrate else raw
    least = [thresholds.get(number, threshold) for number in range(classes)]
    kept = calibration.keep(found, confidence, least, classes)
    steps = calibration.reliability(confidence, found.correct, STEPS)
    bad = sum((bad for _, bad in joined.values()), Counter[str]())
    return {
        "images": len(found.truth),
        "bad": dict(bad),
        "accuracy": float(found.correct.mean()),
        "ece": before.ece,
        "nll": calibration.nll(found),
        "temperature": temperature,
        "calibrate": calibrate,
        "calibrated_ece": after.ece,
        "calibrated_nll": calibration.nll(found, temperature),
        "exact": not found.unnamed,
        "threshold": threshold,
        "confident": int(kept.kept.sum()),
        "noise": kept.noise,
        "kept": kept.kept.tolist(),
        "precision": kept.precision,
        "recall": kept.recall,
        "reliability": _plain(before),
        "calibrated_reliability": _plain(after),
        "steps": {"count": steps.count.tolist(), "right": np.rint(steps.count * steps.accuracy).astype(int).tolist()},
        "sources": {source: _summary(answers) for source, (answers, _) in joined.items()},
    }


def _summary(found: Answers) -> dict[str, Any]:
    if not len(found.truth):
        return {"images": 0, "accuracy": None, "ece": None}
    diagram = calibration.reliability(calibration.confidence_at(found, 1.0), found.correct)
    return {"images": len(found.truth), "accuracy": float(found.correct.mean()), "ece": diagram.ece}


def _plain(diagram: calibration.Reliability) -> dict[str, list[float]]:
    return {name: column.tolist() for name, column in vars(diagram).items()}


def _inside(source: str, shard: Shard) -> Shard:
    """The shard under the name of its label file: shards of two sources may be called the same."""
    return dataclasses.replace(shard, name=f"{source}/{shard.name}")


def _join(context: Context, source: str) -> tuple[Answers, Counter[str]]:
    """What was said of every indexed image of a source, and the statuses of those of which nothing was."""
    classes = len(context.sources.classes)
    parts, bad = [], Counter[str]()
    for shard in context.sources[source].shards:
        known = label_files.read_labels(
            index.rows_path(context.needs["index"].folder, source, shard.name), ["index", "label"]
        )
        rows = label_files.read_labels(
            storage.join(context.folder, label_files.file_name(_inside(source, shard).name)),
            ["status", "confidence", "classes", "probs"],
        ).take(known["index"])  # row i is sample i
        status = rows["status"].combine_chunks().cast(pa.string())
        bad.update(status.filter(pc.not_equal(status, "ok")).to_pylist())
        answered = rows["confidence"].is_valid()
        rows, truth = rows.filter(answered), known["label"].filter(answered).to_numpy()
        if len(rows):
            said = _lists(rows, "classes"), _lists(rows, "probs"), rows["confidence"].to_numpy()
            parts.append(calibration.answers(*said, truth, classes))
    return calibration.joined(parts), bad


def _lists(rows: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of equally long lists, [n, k]."""
    column = rows[name].combine_chunks()
    flat: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1)
