"""The feature pyramid: a map a stage, a classifier's weights, and detectors that read it."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn

from models import create_model, load_weights


@pytest.mark.parametrize("name, overrides, channels, strides", [
    ("lambda_resnet_50", {}, [256, 512, 1024, 2048], [4, 8, 16, 32]),
    ("hybrid_resnet_50_llll", {}, [256, 512, 1024, 2048], [4, 8, 16, 32]),
    ("lambda_resnet_cifar_14", {"stem": "small"}, [64, 128, 256], [1, 2, 4]),
    ("lambda_resnet_tiny", {}, [32, 64, 128], [2, 4, 8]),
])  # fmt: skip
def test_maps_have_the_channels_and_strides_that_are_named(name, overrides, channels, strides):
    with torch.device("meta"):
        pyramid = create_model(name, features_only=True, **overrides)
        maps = pyramid(torch.empty(2, 3, 96, 50))
    assert (pyramid.channels, pyramid.strides) == (channels, strides)
    assert [tuple(each.shape) for each in maps] == [
        (2, c, -(-96 // s), -(-50 // s)) for c, s in zip(channels, strides, strict=True)
    ]


def test_it_takes_a_classifiers_weights_and_ends_in_its_features():
    torch.manual_seed(0)
    classifier = create_model("lambda_resnet_small", 10).eval()
    for norm in classifier.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1)
    pyramid = create_model("lambda_resnet_small", features_only=True).eval()
    state = {name: t for name, t in classifier.state_dict().items() if not name.startswith("classifier.")}
    load_weights(pyramid, state)
    x = torch.randn(2, 3, 17, 24)
    maps = pyramid(x)
    assert torch.equal(maps[-1], classifier.forward_features(x))
    torch.testing.assert_close(maps[1], classifier.stages[1](maps[0]), rtol=0, atol=0)


class WithFpn(nn.Module):
    """What torchvision's detectors take for a backbone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        ops = pytest.importorskip("torchvision.ops")
        self.body, self.out_channels = body, 16
        self.fpn = ops.FeaturePyramidNetwork(body.channels, self.out_channels)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.fpn(OrderedDict((str(i), each) for i, each in enumerate(self.body(x))))


def test_mask_rcnn_reads_it():
    detection = pytest.importorskip("torchvision.models.detection")
    ops = pytest.importorskip("torchvision.ops")
    torch.manual_seed(0)
    body = create_model("lambda_resnet_tiny", features_only=True)
    levels = [str(i) for i in range(3)]
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,), (32,)), ((1.0,),) * 3)
    model = detection.MaskRCNN(
        WithFpn(body), 3, min_size=48, max_size=64, rpn_anchor_generator=anchors, box_score_thresh=0.0,
        box_roi_pool=ops.MultiScaleRoIAlign(levels, 7, 2), mask_roi_pool=ops.MultiScaleRoIAlign(levels, 14, 2),
    )  # fmt: skip
    image = torch.rand(3, 40, 50)
    square = torch.zeros(1, 40, 50, dtype=torch.uint8)
    square[:, 8:24, 10:30] = 1
    target = {"boxes": torch.tensor([[10.0, 8, 30, 24]]), "labels": torch.tensor([1]), "masks": square}
    sum(model([image], [target]).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in body.parameters())
    (found,) = model.eval()([image])
    assert len(found["boxes"]) and found["masks"].shape == (len(found["boxes"]), 1, 40, 50)
