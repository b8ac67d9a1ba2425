"""Puts one model on many workers: replicated (DDP) or sharded (FSDP2).

ddp    every worker holds all weights, their averages and the optimizer's state; gradients are averaged while the
       backward pass still runs
fsdp   every worker holds its part of them and gathers a block's weights just before it computes with them: slower, for
       models that do not fit

FSDP splits parameters in place and forbids copies, so the order is: copy the model for its moving average, `split` the
copy, `wrap` the model, and only then make the optimizer and ask for parameters. On one worker all of this does nothing.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from models import LambdaLayer
from pipeline.cluster.world import World
from pipeline.errors import ConfigError

KINDS = ("ddp", "fsdp")
SMALLEST_UNIT = 0.01  # of the parameters: what is gathered on its own; smaller modules go with what holds them


def wrap(model: nn.Module, world: World, kind: str, *, static_graph: bool = False) -> nn.Module:
    """What to call in place of `model` in training, so that all workers' gradients are averaged in backward.

    `static_graph` (DDP): every step computes with the same parameters, so DDP can plan its messages once, also under
    activation checkpointing. ConfigError for a kind not in KINDS.
    """
    if kind not in KINDS:
        raise ConfigError(f"parallel is '{kind}'; allowed are {', '.join(KINDS)}")
    if world.size == 1:
        return model
    if kind == "fsdp":
        split(model, world, kind)
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the successor of broadcast_buffers is too new to be used
        return Replicated(
            model,
            [world.device] if world.device.type == "cuda" else None,
            broadcast_buffers=False,  # batch norm's statistics: workers average their own before anybody reads them
            gradient_as_bucket_view=True,
            static_graph=static_graph,
        )


class Replicated(DistributedDataParallel):
    """DDP that knows whether its plan is made: with a static graph torch makes it in the first backward pass, which
    fails inside DDP's own `no_sync`."""

    planned = False

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        if self.static_graph and not self.planned:
            self.planned = True
            yield  # sent too early, gradients are right all the same
        else:
            with super().no_sync():
                yield


def split(module: nn.Module, world: World, kind: str) -> None:
    """Under FSDP leave each worker its part of the parameters, in place; every worker calls it with equal weights.

    What repeats in a network (blocks, stages) is gathered and freed on its own, the rest with the whole.
    """
    if kind != "fsdp" or world.size == 1:
        return
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP splits along the first axis
    mesh = init_device_mesh(world.device.type, (world.size,))
    for unit in [*reversed(_units(module)), module]:  # the inner before the outer
        sharded = fully_shard(unit, mesh=mesh)
        if world.device.type == "cpu":
            sharded.set_force_sum_reduction_for_comms(True)  # gloo cannot average


def _units(module: nn.Module) -> list[nn.Module]:
    """What repeats: entries of lists of several modules of one type, if they hold enough parameters; outer ones first.

    Other modules may be used by what holds them in ways that leave no time to gather (their weights read, their output
    changed in place). So are blocks whose lambda layers share embeddings, which go with their stage.
    """
    least = SMALLEST_UNIT * sum(p.numel() for p in module.parameters())
    found = set()
    for holder in module.modules():
        entries = list(holder.children()) if isinstance(holder, nn.Sequential | nn.ModuleList) else []
        if any(_borrows(entry) for entry in entries):
            continue
        kinds = {type(entry) for entry in entries}
        if (
            len(entries) > 1 and len(kinds) == 1 and not kinds & {nn.ModuleList, nn.ModuleDict}
        ):  # these are never called
            found |= {id(e) for e in entries if any(e.children()) and sum(p.numel() for p in e.parameters()) >= least}
    return [entry for entry in module.modules() if id(entry) in found]


def _borrows(entry: nn.Module) -> bool:
    """Whether a lambda layer in it uses the embeddings of one outside."""
    inside = set(entry.modules())
    return any(isinstance(m, LambdaLayer) and m.owner is not None and m.owner not in inside for m in inside)


@contextlib.contextmanager
def no_sync(network: nn.Module) -> Iterator[None]:
    """Around forward and backward of all but the last micro-batch of a step: gradients add up on each worker alone."""
    plain = getattr(network, "_orig_mod", network)  # what torch.compile was given
    if isinstance(plain, DistributedDataParallel):
        with plain.no_sync():
            yield
    elif isinstance(plain, FSDPModule):
        _sync_gradients(plain, False)
        try:
            yield
        finally:
            _sync_gradients(plain, True)
    else:
        yield


def _sync_gradients(module: FSDPModule, on: bool) -> None:
    module.set_requires_gradient_sync(on)
    module.set_is_last_backward(on)


@contextlib.contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """All weights on every worker for a while, so that each may call the module as often as it likes (validation).

    Every worker enters and leaves it. Not for training: nothing is freed in between.
    """
    if not isinstance(module, FSDPModule):
        yield
        return
    units = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
    module.set_reshard_after_forward(False)
    try:
        for unit in units:
            unit.unshard()
        yield
    finally:
        for unit in units:
            unit.reshard()
        module.set_reshard_after_forward(True)
        module.set_reshard_after_forward(False, recurse=False)  # the root's are needed first in backward


def parts(module: nn.Module) -> list[Tensor]:
    """What this worker holds of the parameters and the buffers: plain tensors that share memory with them, in an order
    that depends on the network alone. The same ones for as long as training lasts, so list them once."""
    return [*(_local(p.detach()) for p in module.parameters()), *module.buffers()]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def clip(model: nn.Module, max_norm: float) -> None:
    """Scale the gradients down to a norm of at most `max_norm` over the whole model. Every worker calls it."""
    nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def state_of(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dicts of model (not its wrapper) and optimizer as one worker alone would have them.

    Every worker calls it. Where nothing is split they are the live tensors, not copies. Under FSDP they are gathered
    one after the other into the CPU memory of rank 0; the others get the same names without tensors (None).
    """
    weights: dict[str, Tensor] = tree_map(_gathered, dict(model.state_dict()))
    return weights, tree_map(_gathered, optimizer.state_dict()) if optimizer else {}


def _gathered(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor().detach()
    return full.cpu() if torch.distributed.get_rank() == 0 else None


def load_state_of(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    weights: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Any],
) -> None:
    """Put what `state_of` gave, on any number of workers of any kind, into a model and its optimizer.

    Every worker calls it with all of the state. The names and shapes of `weights` are the model's: see
    `pipeline.weights.load_state` for weights of unknown origin.
    """
    own = model.state_dict()
    model.load_state_dict({name: _as(value, own[name]) for name, value in weights.items()})
    if optimizer is None:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        number: {name: _as(value, parameters[number]) for name, value in slots.items()}
        for number, slots in optimizer_state["state"].items()
    }
    optimizer.load_state_dict({**optimizer_state, "state": state})


def _as(value: Any, like: Tensor) -> Any:
    """The worker's part of `value`, if `like` is split up and of its shape."""
    if not (isinstance(like, DTensor) and isinstance(value, Tensor) and value.shape == like.shape):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
