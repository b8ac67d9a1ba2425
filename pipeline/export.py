"""Exports a trained stage: safetensors, model.yaml, and ONNX with a dynamic batch, checked against torch.

OUT/model.safetensors   OUT/model.yaml   OUT/model.onnx
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from pipeline import storage, weights
from pipeline.errors import UserError, WeightsError
from pipeline.plan import best

TOLERANCE = 1e-3  # of logits of order one, fp32 on two different runtimes
BATCHES = (1, 2, 5)


def export(stage_dir: str, out: str | None = None) -> list[str]:
    """Export the model in `stage_dir`; returns the paths written. Input: float32 [batch, 3, size, size], normalised as
    model.yaml says. Output: logits [batch, classes]. WeightsError where ONNX and torch disagree."""
    out = out or storage.join(stage_dir, "export")
    model, card = weights.load_model(stage_dir)
    targets = [storage.join(out, name) for name in (weights.WEIGHTS, weights.CARD, "model.onnx")]
    with tempfile.TemporaryDirectory() as folder:
        local = str(Path(folder, "model.onnx"))
        _to_onnx(model, card.size, local)
        _check(model, card.size, local)
        weights.save_state(targets[0], model.state_dict())
        weights.write_card(out, dataclasses.replace(card, temperature=best.temperature_of(stage_dir)))
        with storage.writing(targets[2]) as temporary:
            shutil.copyfile(local, temporary)
    return targets


def _to_onnx(model: torch.nn.Module, size: int, path: str) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            "ONNX export needs packages that are not installed; run `pip install 'noisy-lambda[export]'`"
        ) from error
    example = torch.randn(2, 3, size, size)  # a batch of one would be taken for a constant
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings(), contextlib.redirect_stdout(None):
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=True,
            dynamic_shapes=({0: batch},),
            input_names=["images"],
            output_names=["logits"],
            external_data=False,
            verbose=False,
        )


def _check(model: torch.nn.Module, size: int, path: str) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    for batch in BATCHES:
        images = torch.randn(batch, 3, size, size, generator=generator)
        with torch.inference_mode():
            expected = model(images).numpy()
        [found] = session.run(None, {"images": images.numpy()})
        difference = float(np.abs(found - expected).max() / max(1.0, float(np.abs(expected).max())))
        if not difference < TOLERANCE:
            raise WeightsError(
                f"the exported ONNX model differs from torch by {difference:.2g} on random input (batch {batch}), more "
                f"than {TOLERANCE}; nothing was written"
            )
