"""The optimizer and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

OPTIMIZERS = ("sgd", "adamw", "lamb")
SCHEDULES = ("cosine", "constant")
NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def create_optimizer(model: nn.Module, name: str, *, weight_decay: float, momentum: float) -> torch.optim.Optimizer:
    """One of OPTIMIZERS (sgd is Nesterov); weight decay on all but normalisation layers, biases included, as
    the reference code of ResNet-RS does. The learning rate is set in every step: `set_learning_rate`."""
    norms = {id(p) for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if id(p) not in norms], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) in norms], "weight_decay": 0.0},
    ]
    extra: dict[str, Any] = {"momentum": momentum} if name == "sgd" else {}
    return create_optimizer_v2([g for g in groups if g["params"]], opt=name, lr=0.0, weight_decay=weight_decay, **extra)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int, schedule: str) -> float:
    """The rate of the update that follows `step` updates: linear over `warmup`, then a half cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
