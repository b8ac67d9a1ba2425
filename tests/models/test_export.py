"""The smallest member leaves torch: one graph for every batch size, checked with onnxruntime; the big ones in test-slow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from models import create_model

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def check(name: str, side: int, folder: Path) -> None:
    torch.manual_seed(0)
    model = create_model(name, 10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # else the zero scales would hide the branches
            nn.init.uniform_(module.weight, 0.5, 1)
    model.train()(torch.randn(8, 3, side, side))
    model.eval()
    path = folder / f"{name}.onnx"
    torch.onnx.export(
        model,
        (torch.randn(2, 3, side, side),),
        str(path),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 5):
        images = torch.randn(batch, 3, side, side)
        with torch.inference_mode():
            expected = model(images)
        (found,) = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


def test_tiny_exports_to_onnx_with_a_dynamic_batch(tmp_path):
    check("lambda_resnet_tiny", 16, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name, side", [("lambda_resnet_50", 64), ("hybrid_resnet_50_llll", 64)])
def test_resnets_export_to_onnx(name, side, tmp_path):
    check(name, side, tmp_path)


def test_torch_export_sees_one_graph_for_every_batch():
    model = create_model("lambda_resnet_tiny", 10).eval()
    graph = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 4):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(graph.module()(images), model(images))
