"""Fills in what an adopted teacher is: the model.yaml of `teacher.checkpoint` says it where the job does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline import storage
from pipeline.config import job_file
from pipeline.config.fields import REQUIRED
from pipeline.errors import ConfigError

CARD = "model.yaml"


def fill_in(raw: dict[str, Any], path: str) -> None:
    """Set `teacher.model` of a job that names a `teacher.checkpoint` and no model, as if it had been written there.
    ConfigError: nothing says what the weights are; a job that only labels (its model is "" by now) need not know yet.
    """
    import yaml

    teacher = raw.get("teacher")
    if not isinstance(teacher, Mapping) or teacher.get("model") not in (None, "", REQUIRED):
        return
    named = teacher.get("checkpoint")
    first = named[0] if isinstance(named, list) and named else named
    if not isinstance(first, str) or not first:  # checked elsewhere
        return
    card = storage.join(first.removesuffix("model.safetensors").rstrip("/"), CARD)
    try:
        if first.endswith(".safetensors") and storage.name(first) != "model.safetensors":
            raise FileNotFoundError
        model = job_file.parse(storage.read_bytes(card).decode())["architecture"]
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        if teacher.get("model") == "":
            return
        raise ConfigError(
            f"{path}: teacher.model is not set, and no {CARD} beside teacher.checkpoint {storage.redact(first)} says "
            "what its weights are; name a stage's folder, or set teacher.model"
        ) from error
    raw["teacher"] = {**teacher, "model": str(model)}
