"""Looks up accuracies to stand beside measured speeds, each with its source: published, or measured.

The table is conf/measure/published_accuracy.yaml. A model is known by its name, its image size and its overrides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from pipeline import storage, weights
from pipeline.config import shipped
from pipeline.config.settings import Measure, Measured
from pipeline.plan.stage import EVALUATION
from pipeline.printable import counted

PUBLISHED = shipped.folder(shipped.CONF) / "measure" / "published_accuracy.yaml"


@dataclass(frozen=True)
class Accuracy:
    """`top1` in percent; `source` begins with "published: " or "measured: "."""

    top1: float
    source: str


def accuracy_of(measured: Measured, known: Mapping[str, Accuracy]) -> Accuracy | None:
    """The accuracy of a model, if it is known."""
    return known.get(_key(measured.model, measured.size, measured.overrides))


def known_accuracies(settings: Measure) -> dict[str, Accuracy]:
    """All accuracies that may be shown; a measured one goes before a published one."""
    found = published(settings.published)
    if settings.accuracy_from:
        found |= evaluated(settings.accuracy_from)
    return found


def published(data: str) -> dict[str, Accuracy]:
    """The cited figures of models trained on "imagenet" alone, or with "extra" data."""
    found: dict[str, Accuracy] = {}
    for block in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")):
        if block["data"] == data:
            for name, top1, *overrides in block["top1"]:
                model, _, size = name.rpartition("@")
                key = _key(model, int(size), overrides[0] if overrides else {})
                found.setdefault(key, Accuracy(top1, f"published: {block['source']}"))
    return found


def evaluated(folder: str) -> dict[str, Accuracy]:
    """Test accuracies of the models that an evaluate stage left in `folder`; of equal models the last one's."""
    evaluation = storage.read_json(storage.join(folder, EVALUATION))
    found = {}
    for row in evaluation["models"]:
        card = weights.read_card(row["dir"])
        source = f"measured: {row['stage']} on {counted(evaluation['images'], 'test image')}"
        found[_key(card.architecture, card.size, card.overrides)] = Accuracy(100 * row["top1"], source)
    return found


def _key(model: str, size: int, overrides: Mapping[str, Any]) -> str:
    if model.startswith("timm/"):
        model = model.partition(".")[0]  # after the point: which weights
    return json.dumps([model, size, dict(overrides)], sort_keys=True)
