"""Makes the optimizer, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase

OPTIMIZERS = ("sgd", "adamw", "lamb", "muon")
SCHEDULES = ("cosine", "constant", "drops")
DROPS = (0.9, 0.95, 0.975)  # shares of the steps after which the rate is divided by 10
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def create_optimizer(
    model: nn.Module, name: str, *, weight_decay: float, momentum: float, clip: float | None = None
) -> torch.optim.Optimizer:
    """One of OPTIMIZERS; weight decay on all but normalisation layers, biases included, as the reference code of
    ResNet-RS does. The learning rate is set in every step: `set_learning_rate`.

    sgd   Nesterov momentum
    adamw Loshchilov & Hutter, arXiv 1711.05101
    lamb  You et al., arXiv 1904.00962, whose layers adapt also where `weight_decay` is 0. It clips the gradient's norm
          at 1 itself, unless `clip` says that this has been done.
    muon  Jordan et al., https://kellerjordan.github.io/posts/muon: the update of each matrix, and of each convolution
          as one, is made orthogonal, in bfloat16; all else, the classifier too, takes AdamW's. Updates are scaled as
          Liu et al., arXiv 2502.16982, do it, so that both take AdamW's learning rates. torch's own Muon knows no
          convolutions.
    """
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0},
    ]
    extra: dict[str, Any] = {}
    if name == "muon":
        extra |= {"nesterov": True, "adjust_lr_fn": "match_rms_adamw"}
        last = {id(p) for p in list(_linear(model))[-1:]}
        rest, head = ([p for p in groups[0]["params"] if (id(p) in last) == inside] for inside in (False, True))
        groups[0]["params"] = rest
        groups.append({"params": head, "weight_decay": weight_decay, "use_fallback": True})
    elif name == "lamb":
        groups[0]["always_adapt"] = True
        extra["max_grad_norm"] = None if clip else 1.0
    elif not any(isinstance(p, DTensor) for p in trained):  # not all fused updates know parameters split up by FSDP
        extra["fused"] = True
    if name == "sgd":
        extra["momentum"] = momentum
    return create_optimizer_v2([g for g in groups if g["params"]], opt=name, lr=0.0, weight_decay=weight_decay, **extra)


def _linear(model: nn.Module) -> Iterator[Tensor]:
    """The weights of linear layers in the order of definition; the last one is the classifier's."""
    return (module.weight for module in model.modules() if isinstance(module, nn.Linear))


def as_here(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """A saved state whose updates will be computed as `optimizer` does it: fused or not, whatever they were before."""
    own = {name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults}
    return {**state, "param_groups": [{**group, **own} for group in state["param_groups"]]}


def lay_out(optimizer: torch.optim.Optimizer) -> None:
    """Order what was loaded in memory as the parameters are: fused updates walk through both side by side."""
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, schedule: str) -> float:
    """The rate of the update that follows `step` updates: linear over `warmup`, then a half cosine to 0, or what else
    `schedule` says."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    if schedule == "drops":
        return peak / 10 ** sum(step >= share * steps for share in DROPS)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
