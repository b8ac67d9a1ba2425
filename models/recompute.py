"""Checkpoints blocks that hold batch norms: the backward pass computes them a second time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """Computes block(x) and keeps only x: the backward pass runs the block a second time (Chen et al., 2016).

    Result and gradients are those of block(x): the second run repeats the random draws, and running statistics include
    a batch once, in the first run.
    """

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _buffers_kept(block)

    y: Tensor
    if torch.compiler.is_compiling():  # a compiled graph keeps buffers out of what it computes twice
        y = checkpoint(block, x, use_reentrant=False)
    else:
        y = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
    return y


@contextmanager
def _buffers_kept(block: nn.Module) -> Iterator[None]:
    """Lets the block write to copies of its buffers.

    Norms cannot simply skip their statistics: they would save other tensors than in the first run, which torch rejects.
    """
    kept = [
        (module, name, buffer) for module in block.modules() for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, buffer.clone())
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)
