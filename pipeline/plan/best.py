"""Says of a run's models which is the best, and how sure each may be: for `predict RUN`, MLflow and others alike."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.plan.stage import AUDIT, EVALUATION, Done, read_done, read_json_file


@dataclass(frozen=True)
class Best:
    """A finished model and its validation top-1, a share; None where no stage has measured it."""

    model: Done
    top1: float | None


def find(done: Mapping[str, Done]) -> Best | None:
    """The model of best validation top-1 among finished stages, of equal ones the later; None where there is none.

    `evaluate` looks at all of them alike, and its figures go first; before it is done, training's own are compared.
    """
    models = [one for one in done.values() if one.model]
    top1: dict[str, float | None] = {one.name: one.info.get("validation", {}).get("top1") for one in models}
    if "evaluate" in done:
        for row in read_json_file(done["evaluate"], EVALUATION)["models"]:
            if "validation" in row:  # since 0.3
                top1[row["stage"]] = row["validation"]["accuracy"]
    known = [Best(one, top1[one.name]) for one in models if top1[one.name] is not None]
    if not known:
        return Best(models[-1], None) if models else None
    return max(reversed(known), key=lambda best: best.top1 or 0.0)


def evaluated(folder: str) -> dict[str, Any] | None:
    """What `evaluate` says of the model in a stage's folder: its entry in evaluate.json; None where it says nothing."""
    own = storage.name(folder)
    for found in _records(folder, "evaluate", EVALUATION):
        for row in found["models"]:
            if storage.name(row["dir"]) == own:
                return dict(row)
    return None


def temperature_of(folder: str) -> float | None:
    """What divides the logits of the model in a stage's folder so that its probabilities are honest: what `evaluate`
    found on the validation images, else an audit; None where neither looked at it."""
    row = evaluated(folder)
    if row and "validation" in row:
        return float(row["validation"]["temperature"])
    for found in _records(folder, r"gen\d+-audit", AUDIT):
        if found.get("model") == storage.name(folder):
            return float(found["temperature"])
    return None


def _records(folder: str, kind: str, file: str) -> Iterator[dict[str, Any]]:
    """A JSON file of each finished stage of a kind in the run that a stage's folder lies in."""
    run = folder.rstrip("/").removesuffix(storage.name(folder)).rstrip("/") or "."
    for name in storage.listdir(run):
        if re.fullmatch(f"{kind}-[0-9a-f]{{8}}", name) and read_done(storage.join(run, name)):
            yield json.loads(storage.read_bytes(storage.join(run, name, file)))
