"""Runs an exported ONNX model as a torch module, and keeps what model.yaml says in the file's metadata.

Metadata: `architecture`, `classes` (names in index order), `size`, `crop`, `interpolation`, `mean`, `std`, and
`temperature` where it is known; lists and numbers as JSON.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import torch
from torch import nn

from pipeline import storage
from pipeline.errors import UserError, WeightsError
from pipeline.weights import Card

NAME = "model.onnx"
TEXTS = ("architecture", "interpolation")
KEYS = (*TEXTS, "classes", "size", "crop", "mean", "std")


class OnnxNetwork(nn.Module):
    """Logits float32 [b, classes] of images float32 [b, 3, size, size], by onnxruntime on the CPU."""

    def __init__(self, session: Any) -> None:
        super().__init__()
        self.session = session
        self.input = session.get_inputs()[0].name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        [logits] = self.session.run(None, {self.input: x.detach().float().cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(x.device)


def metadata_of(card: Card) -> dict[str, str]:
    """What an ONNX file says of its model."""
    said = dataclasses.asdict(card)
    keys = KEYS if card.temperature is None else (*KEYS, "temperature")
    return {key: said[key] if key in TEXTS else json.dumps(said[key], ensure_ascii=False) for key in keys}


def load(path: str) -> tuple[OnnxNetwork, Card]:
    """A model and its card, of a file that `export` wrote. UserError: onnxruntime is not installed. WeightsError: it is
    no such file."""
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError(
            f"{storage.redact(path)} needs onnxruntime, which is not installed; run `pip install onnxruntime`, or name "
            "the model's folder with model.safetensors"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors, which are raised too
    try:
        session = onnxruntime.InferenceSession(storage.read_bytes(path), options, providers=["CPUExecutionProvider"])
    except OSError:
        raise
    except Exception as error:  # onnxruntime has a type for each kind of damage, all of them its own
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(f"{storage.redact(path)} is no ONNX model that onnxruntime runs ({reason})") from error
    said = session.get_modelmeta().custom_metadata_map
    missing = [key for key in KEYS if key not in said]
    if missing:
        raise WeightsError(
            f"{storage.redact(path)} does not say in its metadata what it is ({', '.join(missing)} missing): it was "
            "not written by this version's `noisy-lambda export`; export its stage again"
        )
    kept = (*KEYS, "temperature") if "temperature" in said else KEYS
    try:
        card = Card(**{key: said[key] if key in TEXTS else json.loads(said[key]) for key in kept})
        card.view()
    except (ValueError, TypeError, UserError) as error:
        raise WeightsError(f"the metadata of {storage.redact(path)} are damaged: {error}") from error
    return OnnxNetwork(session), card
