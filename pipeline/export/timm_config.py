"""Makes an export of a timm model a folder that `timm.create_model("local-dir:…", pretrained=True)` loads."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from pipeline.weights import Card

NAME = "config.json"  # beside model.safetensors, whose names are timm's own
TIMM = "timm/"


def text_of(module: nn.Module, card: Card, folder: str) -> bytes:
    """The config.json of a timm model; timm writes it, with a copy of the weights, into the empty local `folder`."""
    from timm.models import save_for_hf

    looks = {
        "input_size": (3, card.size, card.size),
        "crop_pct": card.crop,
        "interpolation": card.interpolation,
        "mean": tuple(card.mean),
        "std": tuple(card.std),
    }
    config = {"label_names": list(card.classes), "pretrained_cfg": looks}
    save_for_hf(module, folder, model_config=config, model_args=dict(card.overrides), safe_serialization=True)
    return Path(folder, NAME).read_bytes()
