"""Packs a batch into one piece of memory, which the training process sees as soon as a loading process filled it.

Handing a tensor to another process costs a file descriptor and a message, and a copy where it does not lie in shared
memory; pinning costs a copy each. So the arrays of a batch lie one behind the other in a single block, made where it is
going to be read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

Kind = tuple[tuple[int, ...], torch.dtype]  # shape and elements of an array


@dataclasses.dataclass(frozen=True)
class Packed:
    """The arrays of one step, in the order in which they lie in `block` uint8 [bytes of all]."""

    step: int
    kinds: Mapping[str, Kind]
    block: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Views of the block, by name: to be filled, or read."""
        found, start = {}, 0
        for name, (shape, dtype) in self.kinds.items():
            stop = start + _bytes(shape, dtype)
            found[name] = self.block[start:stop].view(dtype).view(shape)
            start = stop
        return found

    def pin_memory(self) -> Packed:
        """Called by the DataLoader."""
        return dataclasses.replace(self, block=self.block.pin_memory())


def allocate(step: int, kinds: Mapping[str, Kind]) -> Packed:
    """A batch to be filled; in shared memory where this is a DataLoader's worker."""
    # The widest elements first, so that all begin at multiples of their own size.
    ordered = dict(sorted(kinds.items(), key=lambda item: -item[1][1].itemsize))
    size = sum(_bytes(*kind) for kind in ordered.values())
    if get_worker_info() is None:
        return Packed(step, ordered, torch.empty(size, dtype=torch.uint8))
    storage = torch.UntypedStorage._new_shared(size)  # as torch's own collate does
    return Packed(step, ordered, torch.empty(0, dtype=torch.uint8).set_(storage, 0, (size,)))  # type: ignore[call-overload]


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
