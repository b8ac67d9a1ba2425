"""Gradient checkpointing changes memory, never a result: loss, gradients, running statistics are the same bits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from models import LambdaResNet, create_model


def trained(
    prepare: Callable[[nn.Module], Callable[[torch.Tensor], torch.Tensor]], **overrides: object
) -> tuple[LambdaResNet, list[torch.Tensor]]:
    """A model after one noised training step's forward and backward, and its loss, gradients and buffers."""
    torch.manual_seed(0)
    model = create_model("lambda_resnet_small", 10, stochastic_depth=0.4, dropout=0.3, **overrides).double()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1)
    loss = prepare(model)(torch.randn(5, 3, 12, 10, dtype=torch.float64)).logsumexp(1).sum()
    loss.backward()
    return model, [loss.detach(), *(p.grad for p in model.parameters()), *model.buffers()]


def compiled(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    return torch.compile(model, backend="aot_eager")


@pytest.mark.parametrize(
    "prepare",
    [pytest.param(lambda model: model, id="eager"), pytest.param(compiled, id="compiled", marks=pytest.mark.slow)],
)
def test_checkpointing_changes_no_bit(prepare):
    _, plain = trained(prepare)
    _, checkpointed = trained(prepare, checkpointing=True)
    assert all(torch.equal(a, b) for a, b in zip(checkpointed, plain, strict=True))


def test_blocks_run_twice_in_training_and_once_without_gradients():
    model = create_model("lambda_resnet_tiny", 10, checkpointing=True)
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    for stage in model.stages:
        for block in stage:
            block.reduce.register_forward_hook(count)
    x = torch.randn(2, 3, 8, 8)
    model(x).sum().backward()
    assert runs == 6
    with torch.no_grad():
        model(x)
    model.eval()(x)
    assert runs == 12
