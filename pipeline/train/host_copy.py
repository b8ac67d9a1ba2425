"""Copies training's state to host memory, so that training stops for the copy alone.

The memory is one block that every copy uses again. A tensor keeps its own strides there, so that even a channels-last
weight is copied as one run of bytes. Where the state lies on a GPU the block is page-locked, and the copies only
queue up behind the work that made the state: whoever reads them calls `wait` first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

ALIGNMENT = 64  # bytes

Tree = TypeVar("Tree")


class HostCopy:
    """Holds one copy at a time."""

    def __init__(self) -> None:
        self._block = np.empty(0, np.uint8)
        self._page_locked = False
        self._layout: list[Any] = []
        self._places: list[Tensor] = []
        self._copied: torch.cuda.Event | None = None

    def reserve(self, tensors: Iterable[Tensor], times: int) -> None:
        """Get memory for `times` copies of these, and a number with each, which may take longer than to copy them."""
        tensors = list(tensors)
        self._allocate(sum(times * _room(t) + ALIGNMENT for t in tensors), any(t.is_cuda for t in tensors))
        self._block.fill(0)

    def take(self, tree: Tree) -> Tree:
        """The same dicts, lists and numbers; the tensors in them are copies, which the next `take` overwrites."""
        tensors: list[Tensor] = []
        pytree.tree_map_only(Tensor, tensors.append, tree)
        on_gpu = any(tensor.is_cuda for tensor in tensors)
        layout = [on_gpu, *((t.dtype, t.shape, t.stride()) for t in tensors)]
        if layout != self._layout:
            total = sum(_room(t) for t in tensors)
            if total > len(self._block) or (on_gpu and not self._page_locked):
                self._allocate(total, on_gpu)
            self._layout, self._places = layout, _places(tensors, self._block)
        for place, tensor in zip(self._places, tensors, strict=True):
            place.copy_(tensor.detach(), non_blocking=True)
        if on_gpu:
            self._copied = torch.cuda.Event()
            self._copied.record()
        places = iter(self._places)
        return pytree.tree_map_only(Tensor, lambda _: next(places), tree)

    def wait(self) -> None:
        """Until the copies are there; any thread may call it."""
        if self._copied is not None:
            self._copied.synchronize()

    def _allocate(self, nbytes: int, page_locked: bool) -> None:
        self._layout, self._places, self._page_locked = [], [], page_locked
        self._block = torch.empty(nbytes, dtype=torch.uint8, pin_memory=page_locked).numpy()


def _room(tensor: Tensor) -> int:
    """Bytes for a copy, none of them shared with the next one's words."""
    return -(-max(1, tensor.numel()) * tensor.element_size() // ALIGNMENT) * ALIGNMENT


def _places(tensors: Sequence[Tensor], block: np.ndarray) -> list[Tensor]:
    """Tensors in the block of the dtypes, shapes and orders in memory of the given ones; each with a storage of its
    own, because of tensors that are views of one storage torch.save writes all of it."""
    places, start = [], 0
    for tensor in tensors:
        flat = torch.frombuffer(block, dtype=tensor.dtype, count=max(1, tensor.numel()), offset=start)
        strides = torch.empty_like(tensor, device="meta").stride()  # the tensor's, made dense if they are not
        places.append(flat.as_strided(tensor.shape, strides))
        start += _room(tensor)
    return places
