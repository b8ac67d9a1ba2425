"""Compares what a teacher said of images with their true classes: the figures of audit.json."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data import parquet_files
from pipeline.data.confidence_bins import Reliability, reliability
from pipeline.errors import DataError
from pipeline.labelling import calibration, label_noise
from pipeline.labelling.calibration import Answers

STEPS = 100  # of confidence, for accuracy against threshold
NEVER = 2.0  # a confidence that there is not


def compare(
    joined: dict[str, tuple[Answers, Counter[str]]],
    classes: int,
    threshold: float | None,
    thresholds: Mapping[int, float],
    max_noise: float | None = None,
    *,
    calibrate: bool,
) -> dict[str, Any]:
    """What audit.json holds, of the answers of each source and the statuses of its images without one.

    `images`, `bad` (by reason), `accuracy`, `ece`, `nll`, the `temperature` that minimises it, and `calibrated_ece` and
    `calibrated_nll` there; `reliability` and `calibrated_reliability` (per bin `count`, `confidence`, `accuracy`). Of
    the confidences that label files will hold: how many images are `confident`, at or above `threshold` (`thresholds`:
    {class: another one}) or at or above what keeps the noise of each class below `max_noise`, the share of wrong labels
    among them (`noise`), per class `kept`, `precision` and `recall`, and in steps of 0.01 the `steps` `count` and
    `right`. What to expect of the corpus (label_noise.Estimates.describe): `level`, of these thresholds, and `levels`,
    of others. `sources`: images, accuracy and ECE of each.
    """
    found = calibration.joined([answers for answers, _ in joined.values() if len(answers.truth)])
    if not len(found.truth):
        raise DataError("the audit has no image that could be labelled; look at the validation shards")
    # As few digits as another machine would agree on: label files are made with it.
    temperature = float(f"{calibration.best_temperature(found):.4g}")
    raw, honest = (calibration.confidence_at(found, t) for t in (1.0, temperature))
    before, after = (reliability(sure, found.correct) for sure in (raw, honest))
    confidence = honest if calibrate else raw
    level, levels = _expected(found, confidence, classes, threshold, thresholds, max_noise)
    least = [NEVER if one is None else one for one in level["thresholds"]]
    kept = calibration.keep(found, confidence, least, classes)
    steps = reliability(confidence, found.correct, STEPS)
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
        **({} if max_noise is None else {"max_noise": max_noise}),
        "confident": int(kept.kept.sum()),
        "noise": kept.noise,
        "kept": kept.kept.tolist(),
        "precision": kept.precision,
        "recall": kept.recall,
        "reliability": _plain(before),
        "calibrated_reliability": _plain(after),
        "steps": {"count": steps.count.tolist(), "right": np.rint(steps.count * steps.accuracy).astype(int).tolist()},
        "level": level,
        "levels": levels,
        "sources": {source: _summary(answers) for source, (answers, _) in joined.items()},
    }


def _expected(
    found: Answers,
    confidence: npt.NDArray[np.float32],
    classes: int,
    threshold: float | None,
    thresholds: Mapping[int, float],
    max_noise: float | None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The level that selection will use, and those that are shown beside it."""
    least = [] if threshold is None else [thresholds.get(number, threshold) for number in range(classes)]
    estimates = label_noise.estimate(found.predicted, found.correct, confidence, classes, least)
    places = estimates.look_up(least) if max_noise is None else estimates.choose(max_noise)
    return estimates.describe(places, chosen=max_noise is not None), label_noise.levels(estimates)


def _summary(found: Answers) -> dict[str, Any]:
    if not len(found.truth):
        return {"images": 0, "accuracy": None, "ece": None}
    diagram = reliability(calibration.confidence_at(found, 1.0), found.correct)
    return {"images": len(found.truth), "accuracy": float(found.correct.mean()), "ece": diagram.ece}


def _plain(diagram: Reliability) -> dict[str, list[float]]:
    return {name: column.tolist() for name, column in vars(diagram).items()}


def gain(before: Answers, after: Answers) -> dict[str, float] | None:
    """What a model gained on another one on the same images, in points of top-1: `points`, and the 95 % interval of the
    paired difference, `low` to `high` (adjusted Wald: Bonett and Price, Journal of Educational and Behavioral
    Statistics 37, 2012). None where they did not answer on the same images."""
    if not np.array_equal(before.truth, after.truth):
        return None
    n = len(after.truth)
    won, lost = int((after.correct & ~before.correct).sum()), int((before.correct & ~after.correct).sum())
    better, worse = (won + 1) / (n + 2), (lost + 1) / (n + 2)
    middle, half = better - worse, 1.96 * np.sqrt((better + worse - (better - worse) ** 2) / (n + 2))
    values = {"points": (won - lost) / n, "low": max(-1.0, middle - half), "high": min(1.0, middle + half)}
    return {name: round(100 * float(value), 4) for name, value in values.items()}


def confusion(found: Answers) -> list[list[int]]:
    """[true class, answer, images] of every wrong answer that occurs, the most frequent first."""
    wrong = ~found.correct
    pairs, counts = np.unique(np.stack([found.truth[wrong], found.predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        [int(true), int(said), int(count)] for true, said, count in zip(*pairs[:, order], counts[order], strict=True)
    ]


def join(files: Iterable[tuple[str, str]], classes: int) -> tuple[Answers, Counter[str]]:
    """What was said of the images whose class is known, and the statuses of those of which nothing was; `files`: of
    each shard its index file and its label file."""
    parts, bad = [], Counter[str]()
    for indexed, labelled in files:
        known, rows = aligned(indexed, labelled)
        status = rows["status"].combine_chunks().cast(pa.string())
        bad.update(status.filter(pc.not_equal(status, "ok")).to_pylist())
        answered = rows["confidence"].is_valid()
        rows, truth = rows.filter(answered), known["label"].filter(answered).to_numpy()
        if len(rows):
            said = lists(rows, "classes"), lists(rows, "probs"), rows["confidence"].to_numpy()
            parts.append(calibration.answers(*said, truth, classes))
    return calibration.joined(parts), bad


def aligned(indexed: str, labelled: str) -> tuple[pa.Table, pa.Table]:
    """The rows of an index file (index, label, image_hash) and, beside each, what a label file says of that image.
    DataError: it speaks of another one."""
    known = parquet_files.read_table(indexed, ["index", "label", "image_hash"])
    columns = ["status", "confidence", "classes", "probs", "image_hash"]
    rows = parquet_files.read_table(labelled, columns).take(known["index"])  # row i is sample i
    if rows["image_hash"] != known["image_hash"]:
        raise DataError(
            f"{storage.redact(labelled)} speaks of other images than {storage.redact(indexed)}: the shard was "
            "replaced since it was indexed; bring the old one back, or delete the index stage's folder and run "
            "again"
        )
    return known, rows


def lists(rows: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column of equally long lists, [n, k]."""
    column = rows[name].combine_chunks()
    flat: npt.NDArray[Any] = column.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(column), -1)
