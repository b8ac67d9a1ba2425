"""The LambdaResNet builder: an Architecture (data) becomes a network. Without lambda blocks: ResNet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from models.blocks import SHORTCUTS, STEMS, Bottleneck, SqueezeExcite
from models.lambda_layer import PAPER_SCOPE, PAPER_SCOPE_DEEP, LambdaLayer, check_arguments

LambdaBlocks = str | tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What a network looks like. Stages are numbered from 2 as in the paper (c2, c3, …); all but c2 stride by 2.

    Raises ValueError where the fields do not fit together.
    """

    depths: tuple[int, ...]
    """Blocks of each stage."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Bottleneck width of each stage; its blocks put out `expansion` times that."""
    lambdas: Mapping[int, LambdaBlocks] = field(default_factory=dict)
    """Which blocks of a stage hold a lambda layer in place of the 3×3: "all", "rest" (all but the first, which
    strides), or numbers counted from 1."""
    se: tuple[int, ...] = ()
    """Stages whose convolutional blocks squeeze and excite; lambda blocks never do."""
    stem: str = "d"
    stem_width: int = 64
    shortcut: str = "pool"
    expansion: int = 4
    k: int = 16
    """Query and key depth of the lambda layers."""
    h: int = 4
    """Heads (queries per lambda)."""
    u: int = 1
    """Intra-depth."""
    r: int | None = None
    """Scope; unset means the paper's, 23, or 7 where u > 1."""
    order: str = "auto"
    """Contraction order of the lambda layers, see models.contraction."""
    dropout: float = 0.0
    """Before the classifier."""
    stochastic_depth: float = 0.0
    """Drop rate of the last block; that of the i-th of n blocks is i/n of it."""
    in_channels: int = 3

    def __post_init__(self) -> None:
        stages = range(2, 2 + len(self.depths))
        if not self.depths or len(self.depths) != len(self.widths):
            raise ValueError(f"depths {self.depths} and widths {self.widths} name different numbers of stages")
        for name in ("depths", "widths"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} are at least 1, not {getattr(self, name)}")
        for name in ("stem_width", "expansion", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 1, not {getattr(self, name)}")
        for name, allowed in (("stem", STEMS), ("shortcut", SHORTCUTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 0 and below 1, not {getattr(self, name)}")
        for stage in {*self.se, *self.lambdas} - {*stages}:
            raise ValueError(f"there is no stage c{stage}: the stages are c2 to c{stages[-1]}")
        for stage, blocks in self.lambdas.items():
            depth, width = self.depths[stage - 2], self.widths[stage - 2]
            if blocks not in ("all", "rest") and (isinstance(blocks, str) or {*blocks} - {*range(1, depth + 1)}):
                raise ValueError(
                    f"lambda blocks {blocks!r} of c{stage} are not 'all', 'rest' or numbers from 1 to {depth}"
                )
            check_arguments(width, k=self.k, h=self.h, u=self.u, r=self.scope, order=self.order)

    @property
    def scope(self) -> int:
        if self.r is not None:
            return self.r
        return PAPER_SCOPE if self.u == 1 else PAPER_SCOPE_DEEP

    def is_lambda(self, stage: int, block: int) -> bool:
        """Whether a block, counted from 1, of c`stage` holds a lambda layer."""
        blocks = self.lambdas.get(stage, ())
        if isinstance(blocks, str):
            return blocks == "all" or block > 1
        return block in blocks


class LambdaResNet(nn.Module):
    """A ResNet with lambda layers: images [b, in_channels, height, width] to logits [b, num_classes].

    Runs on any image size and batch. Convolutions start as He's, the classifier as N(0, 0.01), the last batch
    norm of each block at zero, lambda layers as the paper's.
    """

    def __init__(self, architecture: Architecture, num_classes: int = 1000) -> None:
        super().__init__()
        a = self.architecture = architecture
        self.num_classes = num_classes
        self.num_features = a.widths[-1] * a.expansion
        self.stem = STEMS[a.stem](a.in_channels, a.stem_width)
        stages, channels, first = [], a.stem_width, 1
        for stage, depth in enumerate(a.depths, start=2):
            stages.append(build_stage(a, stage, channels, first))
            channels, first = a.widths[stage - 2] * a.expansion, first + depth
        self.stages = nn.Sequential(*stages)
        self.dropout = nn.Dropout(a.dropout)
        self.classifier = nn.Linear(self.num_features, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        own = {m for layer in self.modules() if isinstance(layer, LambdaLayer | SqueezeExcite) for m in layer.modules()}
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module not in own:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map, [b, num_features, height/s, width/s], s the total stride."""
        return self.stages(self.stem(x))

    def forward_head(self, features: Tensor) -> Tensor:
        """Logits of a feature map: average over positions, dropout, classifier."""
        return self.classifier(self.dropout(features.mean((2, 3))))

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def build_stage(a: Architecture, stage: int, channels: int, first: int) -> nn.Sequential:
    """The blocks of c`stage`, fed `channels`; `first` is the number of its first one in the network."""
    width, blocks = a.widths[stage - 2], []
    out = width * a.expansion
    for block in range(1, a.depths[stage - 2] + 1):
        stride = 2 if block == 1 and stage > 2 else 1
        is_lambda = a.is_lambda(stage, block)
        mix: nn.Module
        if is_lambda:
            mix = LambdaLayer(width, k=a.k, h=a.h, u=a.u, r=a.scope, stride=stride, order=a.order)
        else:
            mix = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        shortcut = SHORTCUTS[a.shortcut](channels, out, stride)
        drop = a.stochastic_depth * (first + block - 1) / sum(a.depths)
        se = stage in a.se and not is_lambda
        blocks.append(Bottleneck(channels, width, out, mix, shortcut=shortcut, se=se, drop=drop))
        channels = out
    return nn.Sequential(*blocks)
