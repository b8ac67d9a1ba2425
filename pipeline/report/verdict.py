"""Judges a job in words: what each student gained, which model to take, and what to try where nothing was gained.

A gain is a student's validation top-1 minus that of the model it learnt from, with the 95 % interval of the paired
difference (`labelling.audit.gain`, in evaluate.json). It is nothing where the interval includes zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

NOISE = 0.05  # of kept labels: what a student learns from without much harm


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
    interval = f"{abs(gain['points']):.1f} points (95 % interval {gain['low']:+.1f} to {gain['high']:+.1f})"
    return {
        1: f"{after['stage']} gained {interval} on {before['stage']}.",
        0: f"{after['stage']} gained nothing that is certain on {before['stage']}: {gain['points']:+.1f} points (95 % "
        f"interval {gain['low']:+.1f} to {gain['high']:+.1f}).",
        -1: f"{after['stage']} is worse than {before['stage']}, by {interval}.",
    }[sign(after)]


def _advice(stage: str, audit: Mapping[str, Any]) -> str:
    """What to try for a student that gained nothing."""
    noise = audit["expected_noise"]
    if noise is None or noise <= NOISE:
        return f"{stage}: its labels are good; try a larger student, a longer training, or more unlabelled images."
    wrong = f"{stage}: {100 * noise:.1f} % of the labels that it learnt from are expected to be wrong"
    better = _threshold(audit["steps"], audit["threshold"])
    if better is None:
        return f"{wrong}, and no threshold keeps that below {100 * NOISE:.0f} %: train the teacher longer."
    return f"{wrong}: raise select.threshold to {better:g}, or train the teacher longer."


def _threshold(steps: Mapping[str, Sequence[int]], now: float) -> float | None:
    """The least threshold above `now` from which on at most NOISE of the audited labels are wrong, of ten at least."""
    count, right = (np.cumsum(np.asarray(steps[name], float)[::-1])[::-1] for name in ("count", "right"))
    for step in range(len(count)):
        threshold = step / len(count)
        if threshold > now and count[step] >= 10 and right[step] >= (1 - NOISE) * count[step]:
            return round(threshold, 2)
    return None
