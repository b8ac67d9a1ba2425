"""Looks at weights that are given (`teacher.checkpoint`, `pretrained`): their identity, and the classes they know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.config.pretrained import weights_file
from pipeline.errors import WeightsError
from pipeline.plan.stage import CARD, WEIGHTS


def checkpoint_sha256(source: str) -> str | dict[str, str]:
    """Identity of an entry of `teacher.checkpoint`. WeightsError: there is nothing."""
    path, card = adopted_files(source)
    if not source.endswith(".safetensors") and not storage.is_url(source) and Path(source).is_file():
        raise WeightsError(
            f"teacher.checkpoint: {source} is no .safetensors file; other formats can run code when they are opened, "
            "so convert it once: python -c \"import torch, safetensors.torch as s; d = torch.load('FILE', "
            "weights_only=True); s.save_file(d.get('state_dict', d), 'weights.safetensors')\""
        )
    if not storage.exists(path):
        raise WeightsError(
            f"teacher.checkpoint: there is nothing at {storage.redact(path)}; name a stage folder with {WEIGHTS} "
            f"and {CARD}, or a .safetensors file"
        )
    found = storage.sha256(path)
    return {"weights": found, "card": storage.sha256(card)} if card and storage.exists(card) else found


def pretrained_sha256(source: str, stage: str) -> str:
    """Identity of the weights that a training's `pretrained` names. WeightsError: there are none."""
    path = weights_file(source)
    if not storage.exists(path):
        raise WeightsError(
            f"{stage}: pretrained names {storage.redact(source)}, and there is no {storage.redact(path)}; name a stage "
            "folder or a .safetensors file"
        )
    return storage.sha256(path)


def adopted_files(source: str) -> tuple[str, str | None]:
    """The weights that an entry of `teacher.checkpoint` names, and where the model.yaml would be that says what they
    are: weights of another name than a stage gives them have none."""
    path = weights_file(source)
    folder = path.removesuffix(WEIGHTS)
    return path, f"{folder}{CARD}" if storage.name(path) == WEIGHTS else None


def classes_of(checkpoint: Any) -> list[str] | None:
    """The class list in the model.yaml of `teacher.checkpoint`, of several the first one's; None where there is no such
    file. WeightsError: it is none. (pipeline.weights reads all of it, and imports torch.)"""
    import yaml

    source = checkpoint if isinstance(checkpoint, str) else checkpoint[0]
    card = adopted_files(source)[1]
    try:
        data = storage.read_bytes(card) if card else None
    except FileNotFoundError:
        return None
    if card is None or data is None:
        return None
    try:
        said = yaml.safe_load(data)["classes"]
    except (TypeError, KeyError, yaml.YAMLError) as error:
        raise WeightsError(f"{storage.redact(card)} is not a model card: {error}") from error
    return [str(name) for name in said]
