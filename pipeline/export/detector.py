"""Exports a detector: its weights and card, a model card, and body and feature pyramid as ONNX.

OUT/model.safetensors   OUT/detector.yaml   OUT/pyramid.onnx   OUT/README.md

The rest of Mask R-CNN (proposals, suppression, heads) has shapes that depend on what is in an image; programs that run
ONNX bring it themselves.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from pipeline import storage, weights
from pipeline.detection.card import DetectorCard, write_card
from pipeline.detection.network import load_detector
from pipeline.errors import OutputError, WeightsError
from pipeline.export.onnx_file import TOLERANCE, needs_packages, quiet, without_traces
from pipeline.plan.stage import DONE, WEIGHTS, read_done
from pipeline.printable import shown

PYRAMID, README = "pyramid.onnx", "README.md"


class Maps(nn.Module):
    """Images [b, 3, canvas, canvas], normalised, to the pyramid's maps, the finest first."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(images).values())


def export(folder: str, out: str | None) -> int:
    """Write the files into `out`; the exit status. OutputError: it is a stage's folder. WeightsError: ONNX and torch
    disagree, and nothing is written."""
    folder = folder.rstrip("/")
    out = out or storage.join(folder, "export")
    if storage.exists(storage.join(out, DONE)):
        raise OutputError(f"--out {storage.redact(out)} is the folder of a stage; name another one")
    needs_packages()
    detector, card = load_detector(folder)
    with tempfile.TemporaryDirectory() as local:
        path = str(Path(local, PYRAMID))
        difference = _write(Maps(detector.backbone), card, path)
        weights.save_state(storage.join(out, WEIGHTS), detector.state_dict())
        write_card(out, card)
        storage.write_bytes(storage.join(out, README), _text(folder, card, weights.parameter_count(detector)).encode())
        with storage.writing(storage.join(out, PYRAMID)) as temporary:
            shutil.copyfile(path, temporary)
    print(
        f"wrote {WEIGHTS}, detector.yaml, {PYRAMID}, {README} in {shown(out)}; checked: onnxruntime's maps of random "
        f"images differ from torch's by at most {difference:.1e} of the largest"
    )
    return 0


def _write(maps: Maps, card: DetectorCard, path: str) -> float:
    import onnx
    import onnxruntime

    example = torch.randn(2, 3, card.canvas, card.canvas)
    with torch.inference_mode():
        theirs = [each.numpy() for each in maps.eval()(example)]
    names = [f"p{level}" for level in range(len(theirs))]
    with quiet():
        program = torch.onnx.export(
            maps, (example,), dynamo=True, dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["images"], output_names=names, verbose=False,
        )  # fmt: skip
    assert program is not None
    without_traces(program.model_proto.graph)
    onnx.save(program.model_proto, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ours = session.run(names, {"images": example.numpy()})
    pairs = list(zip(ours, theirs, strict=True))
    largest = max(float(np.abs(one - other).max() / max(np.abs(other).max(), 1e-6)) for one, other in pairs)
    if largest > TOLERANCE:
        raise WeightsError(f"ONNX and torch disagree by {largest:.1e} of the largest number; nothing is written")
    return largest


def _text(folder: str, card: DetectorCard, parameters: int) -> str:
    made = read_done(folder)
    figures = made.info.get("validation", {}) if made else {}
    lines = [f"- {name.replace('_', ' ')}: {100 * value:.2f} %" for name, value in figures.items()]
    return "\n".join(
        [
            f"# Mask R-CNN on {card.model}",
            "",
            f"{parameters:,} parameters, canvas {card.canvas} x {card.canvas}, {len(card.classes)} classes: "
            f"{', '.join(card.classes[:20])}{' …' if len(card.classes) > 20 else ''}.",
            "",
            f"`{PYRAMID}`: images float32 [batch, 3, {card.canvas}, {card.canvas}], RGB from 0 to 1, minus mean, "
            "divided by std, in the upper left corner of the canvas; maps of the body's strides, and one "
            "of half the last.",
            "",
            *(["On the validation images of its run:", "", *lines, ""] if lines else []),
            "Licence and origin of the images: not known to the run.",
            "",
        ]
    )
