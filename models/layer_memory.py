"""Computes the memory of attention maps or position embeddings on paper, as table 4 of LambdaNetworks does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from models.blocks import STEMS
from models.lambda_resnet import Architecture


@dataclass(frozen=True)
class StageLayers:
    """The layers of a stage that the paper swaps for another kind."""

    side: int
    """Height and width of the maps that the stage puts out."""
    width: int
    """Channels of a layer."""
    count: int


def stage_layers(architecture: Architecture, size: int) -> list[StageLayers]:
    """The stages of a network that hold lambda layers, for images of size × size.

    As in the paper, every layer counts at the side of its stage's output. The first layer of a stage really runs before
    its stride, at twice that side; counted so, the 120 GB of table 4 would be 160.
    """
    a = architecture
    with torch.device("meta"):
        side = STEMS[a.stem](a.in_channels, a.stem_width)(torch.empty(1, a.in_channels, size, size)).shape[-1]
    found = []
    for stage, (depth, width) in enumerate(zip(a.depths, a.widths, strict=True), start=2):
        if stage > 2:
            side = (side + 1) // 2
        count = sum(a.is_lambda(stage, block) for block in range(1, depth + 1))
        if count:
            found.append(StageLayers(side, width, count))
    return found


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the formulas below read: the side of a map with n = side² positions, and the sizes of a layer."""

    side: int
    width: int
    batch: int
    heads: int
    k: int
    window: int

    @property
    def n(self) -> int:
        return self.side**2


NUMBERS: dict[str, Callable[[Sizes], int]] = {
    "global_attention": lambda s: s.batch * s.heads * s.n * s.n,
    "axial_attention": lambda s: s.batch * s.heads * s.n * 2 * s.side,  # along the columns and along the rows
    "local_attention": lambda s: s.batch * s.heads * s.n * s.window**2,
    "linear_attention": lambda s: s.batch * s.heads * (s.width // s.heads) ** 2,  # no map: a summary per head
    "lambda": lambda s: s.k * s.n * s.n,
    "lambda_convolution": lambda s: s.k * s.n * s.window**2,
}
"""Numbers that one layer keeps. Lambda layers keep embeddings, which all images of a batch share."""


def layer_memory(
    layer: str,
    stages: Sequence[StageLayers],
    *,
    batch: int = 128,
    heads: int = 8,
    k: int = 16,
    window: int = 7,
    shared: bool = False,
    bytes_per_number: int = 4,
) -> int:
    """Bytes of all attention maps, or of all position embeddings, of a network (table 4 and its notes).

    `layer` is a key of NUMBERS. Attention uses `heads`, lambda layers use `k`, and the two local kinds use `window`.
    With `shared` the lambda layers of a stage share one set of embeddings. Local attention and the lambda convolution
    follow the space column, Θ(b l h n m) and Θ(l k n m) with m = window²; the paper prints no figure for them, and a
    convolution really keeps only k·m numbers, because it does not lay its embeddings out. As in the paper, the lambdas
    themselves are left out; they are about as large as the other activations.

    Raises ValueError for an unknown layer, a size below 1, and `shared` with attention maps.
    """
    if layer not in NUMBERS:
        raise ValueError(f"there is no analytic memory of layer {layer!r}; the layers are {', '.join(NUMBERS)}")
    sizes = {"batch": batch, "heads": heads, "k": k, "window": window}
    for name, value in {**sizes, "bytes_per_number": bytes_per_number}.items():
        if value < 1:
            raise ValueError(f"{name} is at least 1, not {value}")
    if shared and not layer.startswith("lambda"):
        raise ValueError(f"layers share position embeddings, not attention maps: shared=True does not go with {layer}")
    numbers = 0
    for stage in stages:
        one = NUMBERS[layer](Sizes(side=stage.side, width=stage.width, **sizes))
        numbers += one * (1 if shared else stage.count)
    return numbers * bytes_per_number
