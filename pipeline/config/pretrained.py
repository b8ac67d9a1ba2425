"""Fills in what pretrained weights know themselves, where a job does not say it: how they look at images, and what they
are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from pipeline import storage

VIEW = ("resolution", "crop", "interpolation", "mean", "std")
NOISE = ("dropout", "stochastic_depth", "drop_rate", "drop_path_rate")  # of the training before; this one has its own
FILE, CARD = "model.safetensors", "model.yaml"  # of a stage's folder

log = logging.getLogger(__name__)


def fill_in(raw: Mapping[str, Any]) -> None:
    """Add to the settings of each model of a job, as its file has them, those that it leaves to the weights."""
    named = {"teacher": raw.get("teacher")}
    named |= {f"generations[{i}].student": one["student"] for i, one in enumerate(raw["generations"])}
    for where, settings in named.items():
        if isinstance(settings, dict):
            _fill_in(settings, where)


def _fill_in(settings: dict[str, Any], where: str) -> None:
    source = settings.get("pretrained")
    if source is not True and not isinstance(source, str):
        return
    known = _of_card(source) if isinstance(source, str) else {}
    known = known or _of_timm(str(settings.get("model", "")))
    for name in ("mean", "std"):
        if name in known and settings.get(name) not in (None, known[name]):
            log.warning(
                "%s.%s is %s, and its pretrained weights were trained with %s: leave it out, unless you know why",
                where, name, settings[name], known[name],
            )  # fmt: skip
    for name, value in known.items():
        settings.setdefault(name, value)


def weights_file(source: str) -> str:
    """The file that a stage's folder or a .safetensors file means."""
    return source if source.endswith(".safetensors") else storage.join(source, FILE)


def _of_card(source: str) -> dict[str, Any]:
    """What the model.yaml beside the weights says; {} where there is none, or a damaged one: the stage will say so."""
    import yaml

    path = weights_file(source)
    if storage.name(path) != FILE:
        return {}
    try:
        card = yaml.safe_load(storage.read_bytes(f"{path.removesuffix(FILE)}{CARD}"))
        view = {name: card["size" if name == "resolution" else name] for name in VIEW}
        overrides = {name: value for name, value in card["overrides"].items() if name not in NOISE}
        return {"model": card["architecture"], "overrides": overrides, **view}
    except (OSError, yaml.YAMLError, TypeError, KeyError, AttributeError):
        return {}


def _of_timm(model: str) -> dict[str, Any]:
    """What timm says of the published weights of one of its models; {} of others."""
    if not model.startswith("timm/"):
        return {}
    import timm
    from timm.data import resolve_data_config

    name = model.removeprefix("timm/")
    try:
        config = timm.get_pretrained_cfg(name) if timm.is_model(name.split(".")[0]) else None
    except RuntimeError:  # no such tag: the stage will say so
        return {}
    if config is None:
        return {}
    found = resolve_data_config(pretrained_cfg=config.to_dict())
    view = {"resolution": found["input_size"][-1], "crop": found["crop_pct"], "interpolation": found["interpolation"]}
    return view | {name: [float(value) for value in found[name]] for name in ("mean", "std")}
