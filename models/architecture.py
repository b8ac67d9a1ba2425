"""Describes a LambdaResNet as data: its stages, their blocks, and the layers in the blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from models.attention import ATTENTION
from models.attention import check_arguments as check_attention
from models.blocks import SHORTCUTS, STEMS
from models.lambda_layer import PAPER_SCOPE, PAPER_SCOPE_DEEP, check_arguments

LambdaBlocks = str | tuple[int, ...]
BLOCKS = ("bottleneck", "plain")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a network. Stages are numbered from 2 as in the paper (c2, c3, …); all but c2 have stride 2.

    Raises ValueError if the fields do not fit together.
    """

    depths: tuple[int, ...]
    """Blocks of each stage."""
    widths: tuple[int, ...] = (64, 128, 256, 512)
    """Bottleneck width of each stage; its blocks output `expansion` times as many channels."""
    lambdas: Mapping[int, LambdaBlocks] = field(default_factory=dict)
    """The blocks of each stage that hold a lambda layer instead of the 3×3: "all", "rest" (all but the first, which
    has the stride), or numbers counted from 1."""
    layer: str = "lambda"
    """The kind of layer in those blocks: "lambda", or for comparison a self-attention of models.attention."""
    se: tuple[int, ...] = ()
    """Stages whose convolutional blocks use squeeze-and-excite; lambda blocks never do."""
    stem: str = "d"
    stem_width: int = 64
    shortcut: str = "pool"
    block: str = "bottleneck"
    """"bottleneck", or "plain": nothing but the 3×3 convolution or the lambda layer, on `widths` channels. The first
    block of a plain stage changes the channels, which a lambda layer cannot."""
    expansion: int = 4
    k: int = 16
    """Query and key depth of the lambda layers."""
    h: int = 4
    """Heads (queries per lambda)."""
    u: int = 1
    """Intra-depth."""
    r: int | None = None
    """Scope; None means the paper's, which is 23, or 7 if u > 1."""
    content: bool = True
    """Whether lambda layers have content lambdas."""
    position: bool = True
    """Whether lambda layers have position lambdas."""
    key_norm: str = "softmax"
    """How lambda layers normalise keys over the context: "softmax", "l2" or "none"."""
    share_embeddings: bool = False
    """One table of position embeddings for each stage; the stage's first lambda layer owns it."""
    order: str = "auto"
    """Contraction order of the lambda layers, see models.contraction."""
    heads: int = 8
    """Heads of self-attention, if `layer` names one."""
    dropout: float = 0.0
    """Dropout rate before the classifier."""
    stochastic_depth: float = 0.0
    """Drop rate of the last block; the i-th of n blocks has i/n of that rate."""
    checkpointing: bool = False
    """Whether training keeps only the input of each block and computes the block again for its gradients."""
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
        for name, allowed in (
            ("stem", STEMS), ("shortcut", SHORTCUTS), ("layer", ("lambda", *ATTENTION)), ("block", BLOCKS),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        for name in ("dropout", "stochastic_depth"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is at least 0 and below 1, not {getattr(self, name)}")
        for stage in {*self.se, *self.lambdas} - {*stages}:
            raise ValueError(f"there is no stage c{stage}: the stages are c2 to c{stages[-1]}")
        self._check_layers()
        if self.block == "plain":
            self._check_plain()

    def _check_plain(self) -> None:
        if self.expansion != 1 or self.se:
            raise ValueError("plain blocks neither expand nor squeeze: leave out se, and set expansion to 1")
        for stage, width in enumerate(self.widths, 2):
            channels = self.widths[stage - 3] if stage > 2 else self.stem_width
            if self.is_lambda(stage, 1) and channels != width:
                raise ValueError(
                    f"block 1 of c{stage} takes {channels} channels to {width}, which a lambda layer cannot; leave it "
                    f"out of lambdas: 'rest'"
                )

    def _check_layers(self) -> None:
        """Checks the layers of the blocks that `lambdas` names."""
        if self.layer != "lambda" and not (self.content and self.position):
            raise ValueError(
                f"only lambda layers have the switches content and position; leave them out with {self.layer}"
            )
        if self.share_embeddings and (self.layer != "lambda" or not self.position):
            raise ValueError(
                "share_embeddings shares the position embeddings of lambda layers, but with layer "
                f"{self.layer!r} and position {self.position} there are none; leave it out"
            )
        for stage, blocks in self.lambdas.items():
            depth, width = self.depths[stage - 2], self.widths[stage - 2]
            if blocks not in ("all", "rest") and (isinstance(blocks, str) or {*blocks} - {*range(1, depth + 1)}):
                raise ValueError(
                    f"lambda blocks {blocks!r} of c{stage} are not 'all', 'rest' or numbers from 1 to {depth}"
                )
            if self.layer == "lambda":
                check_arguments(
                    width,
                    k=self.k,
                    h=self.h,
                    u=self.u,
                    r=self.scope,
                    order=self.order,
                    key_norm=self.key_norm,
                    content=self.content,
                    position=self.position,
                )
            else:
                check_attention(width, heads=self.heads)

    @property
    def scope(self) -> int:
        if self.r is not None:
            return self.r
        return PAPER_SCOPE if self.u == 1 else PAPER_SCOPE_DEEP

    def is_lambda(self, stage: int, block: int) -> bool:
        """Whether a block, counted from 1, of c`stage` holds a lambda layer (or, by `layer`, self-attention)."""
        blocks = self.lambdas.get(stage, ())
        if isinstance(blocks, str):
            return blocks == "all" or block > 1
        return block in blocks
