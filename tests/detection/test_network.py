"""The detector: one canvas for all, crowds that are no background, images without objects."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pipeline.detection.network import build_body, build_detector
from pipeline.detection.spec import card_of
from pipeline.errors import ConfigError
from tests.detection.world import CANVAS, CLASSES, settings

CARD = card_of(settings(), CLASSES)


def detector(**changes):
    torch.manual_seed(0)
    return build_detector(dataclasses.replace(CARD, **changes))


def target(boxes=(), labels=(), crowds=()):
    masks = torch.zeros(len(boxes), CANVAS, CANVAS, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    found = {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
    }
    return {**found, "masks": masks, "crowds": torch.tensor(crowds, dtype=torch.float32).reshape(-1, 4)}


def test_an_image_is_answered_alike_whatever_is_beside_it():
    net = detector().eval()
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 1)
    seen = []
    net.backbone.register_forward_hook(lambda module, given, maps: seen.append(maps["0"]))
    small, large = torch.rand(3, 20, 12), torch.rand(3, 90, 40)
    with torch.inference_mode():
        net([small])
        net([small, large])
    torch.testing.assert_close(seen[0][0], seen[1][0], rtol=1e-5, atol=1e-6)
    assert seen[0].shape[-1] == CANVAS // 4


@pytest.mark.parametrize("targets", [[target()], [target(), target([[2, 3, 20, 21]], [1])]])
def test_every_parameter_gets_a_gradient_also_where_there_is_nothing(targets):
    net = detector().train()
    losses = net([torch.rand(3, CANVAS, CANVAS) for _ in targets], targets)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_what_lies_in_a_crowd_is_no_background():
    net = detector()
    boxes = [torch.tensor([[0.0, 0, 8, 8], [4, 0, 12, 8], [20, 20, 30, 30], [1, 1, 7, 7]])]
    crowd = target([[0, 0, 8, 8]], [1], [[0, 0, 9, 9]])
    labels, _ = net.rpn.assign_targets_to_anchors(boxes, [crowd])
    without, _ = net.rpn.assign_targets_to_anchors(boxes, [target([[0, 0, 8, 8]], [1])])
    assert without[0].tolist() == [1, -1, 0, -1] or without[0][2] == 0
    assert labels[0][0] == 1 and labels[0][2] == 0
    assert all(label != 0 for label in labels[0][[1, 3]].tolist())
    net.roi_heads.crowds = [crowd["crowds"]]
    _, found = net.roi_heads.assign_targets_to_proposals(boxes, [crowd["boxes"]], [crowd["labels"]])
    assert found[0].tolist() == [1, -1, 0, 1]


def test_what_is_found_lies_in_the_image_as_it_was():
    net = detector().eval()
    net.roi_heads.score_thresh = 0.0
    with torch.inference_mode():
        [found] = net([torch.rand(3, 50, 20)])
    assert len(found["boxes"]) and found["masks"].shape[-2:] == (50, 20)
    assert (found["boxes"] >= 0).all() and (found["boxes"].amax(0) <= torch.tensor([20, 50, 20, 50]) + 1e-3).all()


def test_a_canvas_that_the_stride_does_not_divide_and_a_body_that_is_none():
    with pytest.raises(ConfigError, match=r"canvas is 36, which the stride 8 of the last map .* take 32 or another"):
        detector(canvas=36)
    with pytest.raises(ConfigError, match="there is no model"):
        detector(model="lambda_resnet_51")
    with pytest.raises(ConfigError, match=r"model 'timm/nothing' gives no feature maps"):
        detector(model="timm/nothing", overrides={})


@pytest.mark.slow
def test_a_body_of_timm():
    body = build_body("timm/resnet18", {})
    assert (list(body.channels), list(body.strides)) == ([64, 128, 256, 512], [4, 8, 16, 32])
    assert [tuple(each.shape[1:]) for each in body(torch.rand(1, 3, 64, 64))][-1] == (512, 2, 2)
