"""Defines the record of a contraction order: its function, its cost and what it can do.

Shape suffixes as in models.contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters


class Apply(Protocol):
    """Applies lambdas to the queries that stand on their context's own grid. Returns y_BNHV."""

    def __call__(
        self, q_BNHK: Tensor, keys_BJK: Tensor | None, v_BJV: Tensor, table_YXKU: Tensor, height: int, width: int
    ) -> Tensor: ...


class ApplyDense(Protocol):
    """The same under a mask, and for queries that stand anywhere on the context's grid."""

    def __call__(
        self,
        q_BNHK: Tensor,
        keys_BJK: Tensor | None,
        v_BJV: Tensor,
        table_YXKU: Tensor,
        height: int,
        width: int,
        mask_NM: Tensor | None,
        place_N: Tensor | None,
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a cost reads: sizes only, so that a choice never looks at numbers."""

    height: int
    width: int
    """Sides of the context."""
    batch: int
    k: int
    v: int
    h: int
    u: int
    r: int
    """The longer side of the table."""
    training: bool
    """Whether a backward pass follows."""

    @property
    def lambdas(self) -> int:
        """Numbers in the lambdas of one image."""
        return self.height * self.width * self.k * self.v

    @property
    def map(self) -> int:
        """Entries of the query-context map of one head and image."""
        n = self.height * self.width
        return n * n * self.u

    @property
    def embeddings(self) -> int:
        """Numbers in the embeddings of all offsets, which a batch shares."""
        return self.map * self.k


@dataclass(frozen=True)
class Order:
    """A contraction order. An entry of models.contraction.ORDERS is all that the layer knows of it."""

    plain: Apply
    cost: Callable[[Workload], float]
    """Estimates the cost of a call, see models.choose_order."""
    dense: ApplyDense | None = None
    """Takes a mask and placed queries; None where the order cannot, as it needs the same offsets around every query."""
    content_lambdas: bool = False
    """Whether content under a mask is built as lambdas too, n·k·v, and not as a query-context map, h·n·j."""

    def apply(
        self,
        q_BNHK: Tensor,
        keys_BJK: Tensor | None,
        v_BJV: Tensor,
        table_YXKU: Tensor,
        height: int,
        width: int,
        mask_NM: Tensor | None = None,
        place_N: Tensor | None = None,
    ) -> Tensor:
        """Applies lambdas by `plain`, or by `dense` where there is a mask or queries are placed."""
        if mask_NM is None and place_N is None:
            return self.plain(q_BNHK, keys_BJK, v_BJV, table_YXKU, height, width)
        assert self.dense is not None
        return self.dense(q_BNHK, keys_BJK, v_BJV, table_YXKU, height, width, mask_NM, place_N)


def weighted(weights: Sequence[float], terms: Sequence[float]) -> float:
    """Sums the terms of a cost by their fitted weights."""
    return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def others_differentiate() -> bool:
    """Whether a compiler, an exporter or a transform of torch.func derives the backward pass.

    It must see plain products then, that write to no view."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def refuse_vmap() -> None:
    """Raises ValueError inside torch.vmap, which knows nothing of memory formats."""
    if torch._C._are_functorch_transforms_active() and any(
        level.key() == torch._C._functorch.TransformType.Vmap for level in retrieve_all_functorch_interpreters()
    ):
        raise ValueError(
            "a lambda layer cannot be called inside torch.vmap; give it the images as one batch, or loop over them"
        )
