"""Members leave torch: one graph for every batch size, checked with onnxruntime; three here, up to 152 in test-slow."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from models import create_model, list_models
from models.blocks import Bottleneck
from models.fold import fold_batch_norms

ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

QUICK = {
    "lambda_resnet_tiny": {},
    "lambda_resnet_50": {"depths": (1, 1, 3, 1)},
    "hybrid_resnet_50_ccll": {"depths": (1, 1, 1, 1), "u": 2},
}
"""The first of each kind, with no more blocks than it takes to hold one of every sort."""


def used(name: str, side: int, **overrides: object) -> tuple[nn.Module, torch.Tensor]:
    """A member in eval mode whose branches count, and the images that its norms' statistics are of.

    Untrained, lambda layers double a relative error, as they are products of three; small branches keep 36 of them from
    hiding what the runtime does. On other images they could overflow.
    """
    torch.manual_seed(0)
    model = create_model(name, 10, **overrides)
    for module in model.modules():
        if isinstance(module, Bottleneck):
            nn.init.constant_(module.expand[1].weight, 0.1)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # takes the statistics of the batch as they are
    images = torch.randn(8, 3, side, side)
    with torch.no_grad():
        model.train()(images)
    return model.eval(), images


def check(model: nn.Module, images: torch.Tensor, path: Path) -> None:
    torch.onnx.export(
        model,
        (images[:2],),
        str(path),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        with torch.inference_mode():
            expected = model(images[:batch])
        (found,) = session.run(None, {"images": images[:batch].numpy()})
        scale = expected.std()
        torch.testing.assert_close(torch.from_numpy(found) / scale, expected / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n != "lambda_resnet_tiny" else n for n in QUICK]
)
def test_a_member_of_each_kind_exports_to_onnx_with_a_dynamic_batch(name, tmp_path):
    check(*used(name, 32, **QUICK[name]), tmp_path / "model.onnx")


@pytest.mark.slow
def test_a_folded_member_exports_too(tmp_path):
    model, images = used("lambda_resnet_tiny", 16)
    check(fold_batch_norms(model), images, tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in list_models() if not re.search("_(200|270|350|420)", name)])
def test_every_member_exports_to_onnx_with_a_dynamic_batch(name, tmp_path):
    """The deeper ones repeat the same blocks, for minutes."""
    check(*used(name, 64), tmp_path / "model.onnx")


def test_torch_export_sees_one_graph_for_every_batch():
    model = create_model("lambda_resnet_tiny", 10).eval()
    graph = torch.export.export(model, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for batch in (1, 4):
        images = torch.randn(batch, 3, 8, 8)
        torch.testing.assert_close(graph.module()(images), model(images))
