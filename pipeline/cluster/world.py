"""Tells a process which worker of how many it is, and carries what workers say to each other.

The same loop runs alone, under torchrun and inside Ray Train: `join` finds out where it is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from pipeline.cluster import interface
from pipeline.cluster.inline import innermost, last_line
from pipeline.errors import ClusterError, ConfigError, UserError

Value = TypeVar("Value")
PATIENCE = timedelta(minutes=30)
"""With the other workers: rank 0 may be busy with a slow store. NCCL's own is 10 minutes."""


@dataclass(frozen=True)
class World:
    """This worker (`rank` of `size`) and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all workers, in place. Every worker calls it."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def gather(self, value: Value) -> list[Value]:
        """Every worker's value, by rank. Every worker calls it."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        return found

    def any(self, value: bool) -> bool:
        """Whether it is true of a worker. Every worker calls it."""
        if self.size == 1:
            return value
        return bool(self.sum(torch.tensor([float(value)], device=self.device)).item())

    def agree(self, value: int) -> int:
        """Rank 0's value. Every worker calls it."""
        if self.size == 1:
            return value
        tensor = torch.tensor([value], device=self.device)
        torch.distributed.broadcast(tensor, 0)
        return int(tensor.item())


def gathered(check: Callable[[], None]) -> tuple[str, str] | None:
    """Call `check` in every worker of this process's group: the first error that it raised in one, as (class name,
    text), in all of them. So none goes on to wait for one that has left. Every worker calls it."""
    mine = None
    try:
        check()
    except UserError as error:
        mine = type(error).__name__, str(error)
    except Exception as error:
        mine = "ClusterError", f"a worker on {os.uname().nodename} cannot begin to train: {last_line(error)}"
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return mine
    found: list[tuple[str, str] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return next((one for one in found if one), None)


@contextlib.contextmanager
def join() -> Iterator[World]:
    """The world of this process: torch.distributed's where that is set up (Ray Train), else that of
    torchrun's environment, set up here and torn down at a good end, else one worker alone."""
    if torch.distributed.is_initialized():
        yield _here()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ:
        with process_group():
            yield _here()
    else:
        yield World(0, 1, _device(torch.cuda.is_available()))


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """torch.distributed as torchrun's environment describes it: NCCL where there are GPUs, one for each process of
    this machine, else gloo. ConfigError: more processes than GPUs. ClusterError: they do not reach each other.

    Torn down at a good end only: NCCL would wait there for the other workers, and those for this one, with the message
    of what went wrong still to be shown.
    """
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ConfigError(
            f"torchrun started {os.environ.get('LOCAL_WORLD_SIZE', local + 1)} processes on a machine with {gpus} "
            "GPU(s); start one for each, or hide the GPUs with CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    interface.take_torchruns()
    try:
        if gpus:
            torch.cuda.set_device(local)
            torch.distributed.init_process_group("nccl", timeout=PATIENCE, device_id=torch.device("cuda", local))
        else:
            torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    except RuntimeError as error:
        raise ClusterError(
            f"process {os.environ['RANK']} of torchrun's, on {os.uname().nodename}, does not reach the others: "
            f"{innermost(error)[:300]}; {interface.HINT}"
        ) from error
    yield
    torch.distributed.destroy_process_group()


def _here() -> World:
    distributed = torch.distributed
    on_gpu = "nccl" in distributed.get_backend() and torch.cuda.is_available()
    return World(distributed.get_rank(), distributed.get_world_size(), _device(on_gpu))


def _device(on_gpu: bool) -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
