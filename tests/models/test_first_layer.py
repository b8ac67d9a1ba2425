"""Whitening filters: patches come out with unit variances and without correlations, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import create_model
from models.first_layer import first_convolution, whiten


def pictures(n: int = 70, side: int = 16) -> torch.Tensor:
    """Smooth ones, whose neighbouring pixels and channels go together."""
    torch.manual_seed(0)
    grey = F.interpolate(torch.randn(n, 1, 4, 4), (side, side), mode="bilinear")
    return grey + 0.3 * torch.randn(n, 3, 1, 1) + 0.1 * torch.randn(n, 3, side, side)


@pytest.mark.parametrize(("out", "taken"), [(8, 4), (70, 27)])
def test_patches_come_out_white(out: int, taken: int) -> None:
    images, network = pictures(), nn.Sequential(nn.Conv2d(3, out, 3, 2, bias=False))
    before = network[0].weight.detach().clone()
    whiten(network, images)
    answers = network[0](images).detach().transpose(0, 1).flatten(1)
    second = answers[:taken] @ answers[:taken].T / answers.shape[1]
    assert (second - torch.eye(taken)).abs().max() < 0.06, "smaller variances are a little smaller still"
    assert torch.equal(answers[taken : 2 * taken], -answers[:taken])
    assert torch.equal(network[0].weight[2 * taken :], before[2 * taken :])


def test_the_first_directions_hold_the_most_and_signs_are_fixed() -> None:
    images = pictures()
    few, many = (nn.Sequential(nn.Conv2d(3, out, 3)) for out in (4, 20))
    for network in (few, many):
        whiten(network, images)
    assert torch.equal(few[0].weight[:2], many[0].weight[:2])
    assert all(row.abs().max() == row.max() for row in few[0].weight[:2].flatten(1))


def test_the_family_and_what_has_no_such_convolution() -> None:
    model = create_model("lambda_resnet_cifar_plain", 3)
    untouched = [p.detach().clone() for p in model.parameters()][1:]
    whiten(model, pictures())
    assert all(torch.equal(a, b) for a, b in zip([*model.parameters()][1:], untouched, strict=True))
    assert first_convolution(model) is model.stem[0][0]
    for network in (nn.Linear(3, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(3, 3, 3, groups=3)):
        with pytest.raises(ValueError, match="does not begin with a convolution of 3 channels"):
            first_convolution(network)
