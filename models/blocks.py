"""Builds the parts of ResNets: stems, shortcuts, the bottleneck, squeeze-and-excite, stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.batch_norm import BatchNorm2d


def conv_bn(
    channels: int, out: int, kernel: int, *, stride: int = 1, act: bool = True, gamma: float = 1.0
) -> nn.Sequential:
    """Convolution without bias ("same" padding), batch norm that starts at scale gamma and, if `act`, ReLU."""
    conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
    norm = BatchNorm2d(out, gamma=gamma)
    return nn.Sequential(conv, norm, nn.ReLU()) if act else nn.Sequential(conv, norm)


def vanilla_stem(channels: int, out: int) -> nn.Sequential:
    """7×7 convolution and 3×3 max pool, a stride of 4 in all (He et al.)."""
    return nn.Sequential(conv_bn(channels, out, 7, stride=2), nn.MaxPool2d(3, 2, 1))


def resnet_d_stem(channels: int, out: int) -> nn.Sequential:
    """Three 3×3 convolutions and, instead of the max pool, a fourth of stride 2; a stride of 4 in all (ResNet-RS)."""
    return nn.Sequential(
        conv_bn(channels, out // 2, 3, stride=2),
        conv_bn(out // 2, out // 2, 3),
        conv_bn(out // 2, out, 3),
        conv_bn(out, out, 3, stride=2),
    )


def small_stem(channels: int, out: int) -> nn.Sequential:
    """One 3×3 convolution of stride 1, for images of 8 to 64 pixels."""
    return conv_bn(channels, out, 3)


def half_stem(channels: int, out: int) -> nn.Sequential:
    """One 3×3 convolution of stride 2: as the small stem, but all later layers cost a quarter."""
    return conv_bn(channels, out, 3, stride=2)


def pair_stem(channels: int, out: int) -> nn.Sequential:
    """Two 3×3 convolutions, the second of stride 2: the first sees every pixel, at half the channels."""
    return nn.Sequential(conv_bn(channels, out // 2, 3), conv_bn(out // 2, out, 3, stride=2))


STEMS = {"vanilla": vanilla_stem, "d": resnet_d_stem, "small": small_stem, "half": half_stem, "pair": pair_stem}
STEM_STRIDES = {"vanilla": 4, "d": 4, "small": 1, "half": 2, "pair": 2}


def conv_shortcut(channels: int, out: int, stride: int) -> nn.Module:
    """1×1 convolution with the stride; the identity if the shapes agree."""
    if stride == 1 and channels == out:
        return nn.Identity()
    return conv_bn(channels, out, 1, stride=stride, act=False)


def pool_shortcut(channels: int, out: int, stride: int) -> nn.Module:
    """ResNet-D: 2×2 average pool, then an unstrided 1×1 convolution, so that no input is skipped."""
    if stride == 1:
        return conv_shortcut(channels, out, 1)
    pool = nn.AvgPool2d(2, stride, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, *conv_bn(channels, out, 1, act=False))


SHORTCUTS = {"conv": conv_shortcut, "pool": pool_shortcut}


class SqueezeExcite(nn.Module):
    """x · sigmoid(W₂ relu(W₁ mean(x))), mean over positions, W₁ to a quarter of the channels (Hu et al.)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, channels // 4, 1)
        self.expand = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed: Tensor = self.reduce(x.mean((2, 3), keepdim=True)).relu()
        gates: Tensor = self.expand(squeezed).sigmoid()
        return x * gates


class StochasticDepth(nn.Module):
    """Drops, in training, the whole branch of an example with probability `rate` and rescales the other examples.

    It draws the mask from torch's global generator of the device.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0:
            return x
        keep = 1 - self.rate
        return x * x.new_empty(x.shape[0], 1, 1, 1).bernoulli_(keep).div_(keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


class Bottleneck(nn.Module):
    """relu(shortcut(x) + drop(se(conv1×1(relu(bn(mix(conv1×1(x)))))))). The last batch norm starts at scale zero.

    `mix`, a 3×3 convolution or a lambda layer, combines positions at `width` channels and has the stride.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        out: int,
        mix: nn.Module,
        *,
        shortcut: nn.Module,
        se: bool = False,
        drop: float = 0.0,
    ) -> None:
        super().__init__()
        self.reduce = conv_bn(channels, width, 1)
        self.mix = nn.Sequential(mix, BatchNorm2d(width), nn.ReLU())
        self.expand = conv_bn(width, out, 1, act=False, gamma=0.0)
        self.se = SqueezeExcite(out) if se else nn.Identity()
        self.drop = StochasticDepth(drop)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        branch = self.drop(self.se(self.expand(self.mix(self.reduce(x)))))
        return torch.relu(self.shortcut(x) + branch)


class Plain(nn.Module):
    """relu(bn(mix(x))), and with the input added before the ReLU where the shapes agree: relu(x + drop(bn(mix(x)))).

    `mix`, a 3×3 convolution or a lambda layer, maps `channels` to `out`; no 1×1 convolutions around it. The batch norm
    of a block that adds its input starts at scale zero.
    """

    def __init__(self, channels: int, out: int, mix: nn.Module, *, stride: int = 1, drop: float = 0.0) -> None:
        super().__init__()
        self.adds = stride == 1 and channels == out
        self.mix = nn.Sequential(mix, BatchNorm2d(out, gamma=0.0 if self.adds else 1.0))
        self.drop = StochasticDepth(drop)

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self.mix(x)
        return torch.relu(x + self.drop(branch) if self.adds else branch)
