"""Judges a job in words: what each student gained, which model to take, what to try where nothing was gained, what to
mend before a student learns from labels, and whether a speed can be trusted. Page and screen say the same.

A gain is a student's validation top-1 minus that of the model it learnt from, with the 95 % interval of the paired
difference (`labelling.audit.gain`, in evaluate.json). It is nothing where the interval includes zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from pipeline.labelling import calibration, label_noise
from pipeline.printable import counted

NOISE = 0.05  # of kept labels: what a student learns from without much harm
FEW = 10  # audited images: of fewer nothing is concluded
NAMED = 5  # classes that are named in a sentence
BUSY = 0.1  # share of the cores that a measuring asked for and others took
UNEVEN = 1.5  # how much faster the fastest round is than the slowest, where a speed means little
LEAST_SECONDS = 1.0  # of measuring, for a judgement on it


def sentences(rows: Sequence[Mapping[str, Any]], audits: Sequence[Mapping[str, Any]], best: str) -> list[str]:
    """`rows` of evaluate.json's models, in their order; `audits`: what the report says of each generation's; `best`:
    the stage to take."""
    if len(rows) == 1:
        top1 = rows[0]["validation"]["accuracy"]
        return [f"{rows[0]['stage']} is the only model, with {100 * top1:.1f} % of the validation images right."]
    found = [_gain(before, after) for before, after in pairwise(rows)]
    chosen = next(row for row in rows if row["stage"] == best)
    found.append(
        f"Take {best}: of all models it has the most of the validation images right, "
        f"{100 * chosen['validation']['accuracy']:.1f} %."
    )
    for (_, after), audit in zip(pairwise(rows), audits, strict=False):
        if sign(after) < 1 and (advice := _advice(after["stage"], audit)):
            found.append(advice)
    return found


def so_far(best: str, top1: float | None, models: int) -> str:
    """Of a run whose models are not tested yet: the `best` of those that are trained, by training's own figures."""
    known = "" if top1 is None else f", with {100 * top1:.1f} % of the validation images right"
    if models == 1:
        return f"So far {best} is the only model{known}."
    return f"So far {best} is the best of {models} models{known}; evaluate will compare them."


def sign(row: Mapping[str, Any]) -> int:
    """1: the model gained on the one before it, -1: it lost, 0: neither is certain."""
    gain = row["validation"].get("gain")
    if gain is None:
        return 0
    return 1 if gain["low"] > 0 else -1 if gain["high"] < 0 else 0


def _gain(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    gain = after["validation"].get("gain")
    if gain is None:
        return f"What {after['stage']} gained on {before['stage']} is not known: they answered on different images."
    interval = f"95 % interval {gain['low']:+.1f} to {gain['high']:+.1f}"
    points = f"{abs(gain['points']):.1f} points of validation top-1 ({interval})"
    return {
        1: f"{after['stage']} gained {points} on {before['stage']}.",
        0: f"{after['stage']} gained nothing that is certain on {before['stage']}: {gain['points']:+.1f} points of "
        f"validation top-1 ({interval}).",
        -1: f"{after['stage']} is worse than {before['stage']}, by {points}.",
    }[sign(after)]


def expected(audited: Mapping[str, Any], copies_per_class: Sequence[int]) -> dict[str, float | None]:
    """`expected_noise`, the share of wrong labels to expect in what was kept, and the interval from `expected_low` to
    `expected_high`; `audited`: audit.json, of which earlier versions' have no interval."""
    if "level" not in audited:
        return {"expected_noise": calibration.expected_noise(audited["precision"], audited["noise"], copies_per_class)}
    found = label_noise.in_all(audited["level"], copies_per_class)
    return {f"expected_{name}": value for name, value in found.items()}


def of_labels(audit: Mapping[str, Any]) -> str:
    """How many of the kept labels are wrong, as part of a sentence; `audit`: with what `expected` found."""
    if audit["expected_noise"] is None:
        return "nothing is known of the kept labels"
    between = ""
    if audit.get("expected_low") is not None:
        between = f" ({100 * audit['expected_low']:.1f} to {100 * audit['expected_high']:.1f} %)"
    return f"{100 * audit['expected_noise']:.1f} %{between} of the kept labels are expected to be wrong"


def of_selection(audit: Mapping[str, Any], kept_per_class: Sequence[int], names: Sequence[str]) -> list[str]:
    """What speaks against training a student on what was kept, and what to do; nothing where it is good. `audit`: of
    audit.json `steps` and `threshold` (or `max_noise`), with what `expected` found, as in summary.json."""
    found = []
    if _noisy(audit):
        found.append(f"{_capital(_mend(audit))}.")
    empty = [names[number] for number, kept in enumerate(kept_per_class) if not kept]
    if empty:
        shown = ", ".join(empty[:NAMED]) + (" …" if len(empty) > NAMED else "")
        them = "it" if len(empty) == 1 else "them"
        lower = f"give {them} a lower threshold in select.thresholds"
        lower = "raise select.max_noise" if "max_noise" in audit else lower
        found.append(
            f"Of {len(empty):,} of {counted(len(names), 'class')} no image is kept ({shown}), so the student learns "
            f"{them} from labelled images alone: {lower}, label more images of {them}, or train the teacher longer."
        )
    return found


def of_speed(evaluation: Mapping[str, Any]) -> list[str]:
    """Why the measured speeds mean little; nothing where they can be trusted, or an earlier version measured them."""
    load = evaluation.get("load")
    if not load or load["seconds"] < LEAST_SECONDS:
        return []
    found = []
    lacking = load["others"] + load["threads"] - load["cores"]
    if lacking > BUSY * load["threads"]:
        found.append(
            f"other processes kept {load['others']:.1f} of {counted(load['cores'], 'core')} busy while speed was "
            "measured"
        )
    ratios = {row["stage"]: row["fastest_round"] / row["slowest_round"] for row in evaluation["models"]}
    stage = max(ratios, key=lambda name: ratios[name])
    if ratios[stage] > UNEVEN:
        found.append(f"the fastest round of {stage} was {ratios[stage]:.1f} times as fast as its slowest")
    if not found:
        return []
    return [
        f"{_capital(', and '.join(found))}: images/s say little; to measure again while nothing else runs, delete the "
        "folders of evaluate and report and run the same command."
    ]


def _advice(stage: str, audit: Mapping[str, Any]) -> str:
    """What to try for a student that gained nothing."""
    if _noisy(audit):
        return f"{stage}: {_mend(audit)}."
    return f"{stage}: its labels are good; try a larger student, a longer training, or more unlabelled images."


def _noisy(audit: Mapping[str, Any]) -> bool:
    noise = audit["expected_noise"]
    return noise is None or noise > audit.get("max_noise", NOISE)


def _mend(audit: Mapping[str, Any]) -> str:
    """What is wrong with the labels, and what makes them better."""
    what = of_labels(audit)
    if audit["expected_noise"] is None:
        return f"{what}, for no audited image is so sure: lower select.threshold, or train the teacher longer"
    if "max_noise" in audit:
        return f"{what}: lower select.max_noise from {audit['max_noise']:g}, or train the teacher longer"
    better = _threshold(audit["steps"], audit["threshold"])
    if better is None:
        return f"{what}, and no threshold keeps that below {100 * NOISE:.0f} %: train the teacher longer"
    return f"{what}: raise select.threshold to {better:g}, or train the teacher longer"


def _threshold(steps: Mapping[str, Sequence[int]], now: float) -> float | None:
    """The least threshold above `now` from which on at most NOISE of the audited labels are wrong, of FEW at least."""
    count, right = (np.cumsum(np.asarray(steps[name], float)[::-1])[::-1] for name in ("count", "right"))
    for step in range(len(count)):
        threshold = step / len(count)
        if threshold > now and count[step] >= FEW and right[step] >= (1 - NOISE) * count[step]:
            return round(threshold, 2)
    return None


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
