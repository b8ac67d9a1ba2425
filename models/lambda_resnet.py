"""Builds networks from an Architecture: a LambdaResNet, or a ResNet if it names no lambda blocks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.architecture import Architecture as Architecture
from models.attention import ATTENTION, SelfAttention
from models.blocks import SHORTCUTS, STEM_STRIDES, STEMS, Bottleneck, Plain, SqueezeExcite
from models.lambda_layer import LambdaLayer
from models.recompute import recomputed

OWN_START = (LambdaLayer, SelfAttention, SqueezeExcite)
"""The layers that initialise their own convolutions."""


class Stage(nn.Sequential):
    """Blocks in a row; with `checkpointing`, training computes each a second time for its gradients."""

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        recompute = self.checkpointing and self.training and torch.is_grad_enabled()
        for block in self:
            x = recomputed(block, x) if recompute else block(x)
        return x


class Backbone(nn.Module):
    """The stem and the stages, which a classifier and a feature pyramid share under the same parameter names."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.stem = STEMS[a.stem](a.in_channels, a.stem_width)
        stages, channels, first = [], a.stem_width, 1
        for stage, depth in enumerate(a.depths, start=2):
            stages.append(build_stage(a, stage, channels, first))
            channels, first = a.widths[stage - 2] * a.expansion, first + depth
        self.stages = nn.Sequential(*stages)

    def reset_parameters(self) -> None:
        """Fills everything anew, statistics too: what a network needs after `to_empty`."""
        for module in reversed([*self.modules()][1:]):  # the inner first, which the outer may start otherwise
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self.start()

    def start(self) -> None:
        """Initialises convolutions as He et al. do; other layers initialise themselves. Skips the meta device."""
        own = {m for layer in self.modules() if isinstance(layer, OWN_START) for m in layer.modules()}
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in own and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_pyramid(self, x: Tensor) -> list[Tensor]:
        """The output of every stage, c2 first: [b, channels, ⌈height/s⌉, ⌈width/s⌉] at its stride s."""
        maps = [self.stem(x)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps[1:]


class FeaturePyramid(Backbone):
    """The feature maps that detectors and segmenters read: images [b, in_channels, height, width] to one map per stage.

    ImageNet members give c2 to c5, of strides 4 to 32. It takes the weights of the classifier of the same architecture,
    without `classifier.*`.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__(architecture)
        a = architecture
        self.channels = [width * a.expansion for width in a.widths]
        self.strides = [STEM_STRIDES[a.stem] * 2**stage for stage in range(len(a.depths))]
        self.start()

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.forward_pyramid(x)


class LambdaResNet(Backbone):
    """A ResNet with lambda layers: images [b, in_channels, height, width] to logits [b, num_classes].

    Runs on any image size and batch. Convolutions start as He's, the classifier as N(0, 0.01), the last batch
    norm of each block at zero, lambda layers as the paper's.
    """

    def __init__(self, architecture: Architecture, num_classes: int = 1000) -> None:
        super().__init__(architecture)
        self.num_classes = num_classes
        self.num_features = architecture.widths[-1] * architecture.expansion
        self.dropout = nn.Dropout(architecture.dropout)
        self.classifier = nn.Linear(self.num_features, num_classes)
        self.start()

    def start(self) -> None:
        super().start()
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, [b, num_features, height/s, width/s], s the total stride."""
        features: Tensor = self.stages(self.stem(x))
        return features

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits of a feature map: average over positions, dropout, classifier."""
        logits: Tensor = self.classifier(self.dropout(features.mean((2, 3))))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def roles(self) -> dict[str, list[str]]:
        """Names of the parameters that fine-tuning at another resolution trains (Touvron et al., 2019).

        "head" is the classifier, "last_norm" the batch norm at the end of the last block's branch. The running
        statistics of all other norms belong to the frozen network, and would go on changing in training mode. So keep
        the network in eval mode, except for the module of "last_norm", because the resolution shifts its statistics.
        """
        inside = "mix.1" if self.architecture.block == "plain" else "expand.1"
        norm = f"stages.{len(self.stages) - 1}.{self.architecture.depths[-1] - 1}.{inside}"
        return {
            role: [f"{module}.{name}" for name, _ in self.get_submodule(module).named_parameters()]
            for role, module in (("head", "classifier"), ("last_norm", norm))
        }


def build_stage(a: Architecture, stage: int, channels: int, first: int) -> Stage:
    """The blocks of c`stage` for an input of `channels`; its first block is number `first` of the network."""
    width = a.widths[stage - 2]
    blocks: list[nn.Module] = []
    out = width * a.expansion
    owner: LambdaLayer | None = None
    for block in range(1, a.depths[stage - 2] + 1):
        stride = 2 if block == 1 and stage > 2 else 1
        is_lambda = a.is_lambda(stage, block)
        mix: nn.Module
        if is_lambda:
            mix = _lambda_or_attention(a, width, stride, owner)
        else:
            mix = nn.Conv2d(channels if a.block == "plain" else width, width, 3, stride, 1, bias=False)
        if a.share_embeddings and owner is None and isinstance(mix, LambdaLayer):
            owner = mix
        drop = a.stochastic_depth * (first + block - 1) / sum(a.depths)
        se = stage in a.se and not is_lambda
        if a.block == "plain":
            blocks.append(Plain(channels, out, mix, stride=stride, drop=drop))
        else:
            shortcut = SHORTCUTS[a.shortcut](channels, out, stride)
            blocks.append(Bottleneck(channels, width, out, mix, shortcut=shortcut, se=se, drop=drop))
        channels = out
    built = Stage(*blocks)
    built.checkpointing = a.checkpointing
    return built


def _lambda_or_attention(a: Architecture, width: int, stride: int, owner: LambdaLayer | None) -> nn.Module:
    """The layer of a block that `lambdas` names; `owner`, if any, lends its table of embeddings."""
    if a.layer != "lambda":
        return ATTENTION[a.layer](width, heads=a.heads, stride=stride)
    return LambdaLayer(
        width,
        k=a.k,
        h=a.h,
        u=a.u,
        r=a.scope,
        stride=stride,
        content=a.content,
        position=a.position,
        key_norm=a.key_norm,
        embeddings_of=owner,
        order=a.order,
    )
