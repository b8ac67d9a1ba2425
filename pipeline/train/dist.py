"""Seeds noise by step and worker, and averages what workers saw of batch norm's statistics."""

from __future__ import annotations

import hashlib

import torch

from pipeline.cluster.world import World


def noise_seed(seed: int, step: int, rank: int) -> int:
    """The seed of dropout and stochastic depth in one step of one worker."""
    digest = hashlib.blake2b(f"{seed}/{step}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def average_buffers(world: World, *modules: torch.nn.Module) -> None:
    """Replace floating-point buffers (batch norm's running statistics) by their mean over the workers.

    Running statistics and their EMA are linear in what each worker saw, so it does not matter how often this
    happens; training itself never reads them.
    """
    if world.size == 1:
        return
    buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
    if not buffers:
        return
    flat = world.sum(torch.cat([b.reshape(-1) for b in buffers])) / world.size
    for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
        buffer.copy_(part.view_as(buffer))
