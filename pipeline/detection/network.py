"""Builds the detector: torchvision's Mask R-CNN with a feature pyramid over a body of ours or of timm.

The canvas is fixed, in training and in tests: a lambda layer looks at the whole map, so padding to the largest image of
a batch would make an image's answer depend on its neighbours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, box_area
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from pipeline import storage, weights
from pipeline.detection.card import DetectorCard, read_card
from pipeline.errors import ConfigError
from pipeline.plan.stage import WEIGHTS

SHAPES = (0.5, 1.0, 2.0)  # of anchors, height ÷ width
POOLED, POOLED_MASK = 7, 14  # cells that a region is read at
LEAST_SCORE, MOST = 0.05, 100  # of what is found in an image
IN_CROWD = 0.5  # share of a region inside a crowd from which on it is no background


def build_detector(card: DetectorCard) -> GeneralizedRCNN:
    """The network with new weights, in training mode, with torchvision's numbers where the card says nothing.
    ConfigError: an unknown body, or one that the canvas does not suit."""
    body = build_body(card.model, card.overrides)
    strides: list[int] = list(body.strides)  # type: ignore[arg-type]
    if card.canvas % (last := max(strides)):
        raise ConfigError(
            f"canvas is {card.canvas}, which the stride {last} of the last map of '{card.model}' does not divide; "
            f"take {card.canvas // last * last or last} or another multiple of {last}"
        )
    names = [str(level) for level in range(len(strides))]
    sides = [card.anchor * stride for stride in (*strides, 2 * strides[-1])]
    anchors = AnchorGenerator(tuple((side,) for side in sides), (SHAPES,) * len(sides))
    width, classes = card.fpn, len(card.classes) + 1
    proposals = Proposals(
        anchors, RPNHead(width, anchors.num_anchors_per_location()[0]), 0.7, 0.3, 256, 0.5,
        {"training": 2 * card.proposals, "testing": card.proposals},
        {"training": 2 * card.proposals, "testing": card.proposals}, 0.7,
    )  # fmt: skip
    regions = Regions(
        MultiScaleRoIAlign(names, POOLED, 2), TwoMLPHead(width * POOLED**2, card.head),
        FastRCNNPredictor(card.head, classes), 0.5, 0.5, card.regions, 0.25, None, LEAST_SCORE, 0.5, MOST,
        MultiScaleRoIAlign(names, POOLED_MASK, 2), MaskRCNNHeads(width, (width,) * 4, 1),
        MaskRCNNPredictor(width, width, classes),
    )  # fmt: skip
    return GeneralizedRCNN(WithPyramid(body, width), proposals, regions, FixedCanvas(card.canvas, card.mean, card.std))


def load_detector(folder: str) -> tuple[GeneralizedRCNN, DetectorCard]:
    """The trained detector of a folder, in eval mode on the CPU, and its card. WeightsError."""
    card = read_card(folder)
    detector = build_detector(card)
    path = storage.join(folder, WEIGHTS)
    weights.load_state(detector, weights.read_state(path), path)
    return detector.eval(), card


def build_body(name: str, overrides: Mapping[str, Any]) -> nn.Module:
    """Images to maps; `.channels` and `.strides` say of what kind. Of timm's the maps from stride 4 on."""
    if not name.startswith("timm/"):
        import models

        try:
            return models.create_model(name, features_only=True, **overrides)
        except ValueError as error:
            raise ConfigError(f"model '{name}': {error}") from error
    import timm

    try:
        body: Any = timm.create_model(name.removeprefix("timm/"), features_only=True, **overrides)
        strides = body.feature_info.reduction()
        wanted = [place for place, stride in enumerate(strides) if stride >= 4]
        body = timm.create_model(name.removeprefix("timm/"), features_only=True, out_indices=wanted, **overrides)
    except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"model '{name}' gives no feature maps ({reason}); name another one of timm's, or one of `python -m models`"
        ) from error
    body.channels, body.strides = body.feature_info.channels(), body.feature_info.reduction()
    found: nn.Module = body
    return found


class WithPyramid(nn.Module):
    """Images [b, 3, h, w] to maps of `out_channels`, by level; the last is the one before it at half its size."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.body, self.out_channels = body, width
        channels: list[int] = list(body.channels)  # type: ignore[arg-type]
        self.fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = self.fpn(OrderedDict((str(level), each) for level, each in enumerate(self.body(x))))
        return maps


class FixedCanvas(GeneralizedRCNNTransform):
    """Normalises images, and scales each to fit the canvas, in whose upper left corner it lies; the rest is the mean
    colour. In training they are placed already."""

    def __init__(self, canvas: int, mean: list[float], std: list[float]) -> None:
        super().__init__(canvas, canvas, list(mean), list(std))
        self.canvas = canvas

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        height, width = image.shape[-2:]
        if self.training:
            return image, target
        scale = self.canvas / max(height, width)
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0], target

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        batch = images[0].new_zeros(len(images), 3, self.canvas, self.canvas)
        for place, image in zip(batch, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
        return batch


class Proposals(RegionProposalNetwork):
    """Anchors inside a crowd are no background."""

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        labels, boxes = super().assign_targets_to_anchors(anchors, targets)
        return _without_crowds(labels, anchors, [target["crowds"] for target in targets]), boxes


class Regions(RoIHeads):
    """Regions inside a crowd are no background."""

    crowds: list[Tensor]

    def select_training_samples(self, proposals: list[Tensor], targets: list[dict[str, Tensor]] | None) -> Any:
        self.crowds = [target["crowds"] for target in targets or []]
        try:
            return super().select_training_samples(proposals, targets)
        finally:
            self.crowds = []

    def assign_targets_to_proposals(
        self, proposals: list[Tensor], gt_boxes: list[Tensor], gt_labels: list[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        matched, labels = super().assign_targets_to_proposals(proposals, gt_boxes, gt_labels)
        return matched, _without_crowds(labels, proposals, self.crowds)


def _without_crowds(labels: list[Tensor], boxes: list[Tensor], crowds: list[Tensor]) -> list[Tensor]:
    """Labels whose zeros (background) are -1 (neither) where half of the box lies in a crowd."""
    found = []
    for label, box, crowd in zip(labels, boxes, crowds, strict=True):
        inside = _share_inside(box, crowd) >= IN_CROWD if len(crowd) else torch.zeros_like(label, dtype=torch.bool)
        found.append(label.masked_fill(inside & (label == 0), -1))
    return found


def _share_inside(boxes: Tensor, crowds: Tensor) -> Tensor:
    """Of each box [n] the largest share that a crowd covers."""
    low = torch.maximum(boxes[:, None, :2], crowds[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], crowds[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    return (shared / box_area(boxes).clamp(min=1e-6)[:, None]).amax(1)
