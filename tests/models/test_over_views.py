"""A network over views of its images: the mean of its probabilities, and what the views are."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models.over_views import OverViews, answering, network_of


class Corner(nn.Module):
    """Two logits: the top left pixel, and the top right one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0, 0, [0, -1]]


@pytest.mark.parametrize(("views", "count"), [(["flip"], 2), (["shift"], 3), (["shift", "flip"], 6)])
def test_the_answer_is_the_mean_probability(views: list[str], count: int) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)).eval()
    x = torch.randn(3, 3, 8, 8)
    network(x)
    over = OverViews(network, views)
    assert over.count == count == len(over._views_of(x))
    expected = torch.stack([network(view).softmax(1) for view in over._views_of(x)]).mean(0)
    torch.testing.assert_close(over(x).softmax(1), expected)
    torch.testing.assert_close(over(x.contiguous(memory_format=torch.channels_last)).softmax(1), expected)


def test_views_are_the_mirror_image_and_a_pixel_up_left_and_down_right() -> None:
    x = torch.arange(64.0).view(1, 1, 8, 8)
    plain, mirrored = OverViews(Corner(), ["flip"])._views_of(x)
    assert torch.equal(plain, x) and torch.equal(mirrored, x.flip(3))
    found = OverViews(Corner(), ["shift", "flip"])._views_of(x)
    for view, (down, up) in ((x, (found[2], found[3])), (x.flip(3), (found[4], found[5]))):
        assert torch.equal(down[..., 1:, 1:], view[..., :-1, :-1]) and torch.equal(up[..., :-1, :-1], view[..., 1:, 1:])
        assert torch.equal(down[..., 0, 1:], view[..., 1, :-1]), "what comes in is mirrored, without the edge"
    big = torch.randn(1, 1, 64, 64)
    assert torch.equal(OverViews(Corner(), ["shift"])._views_of(big)[1][..., 2:, 2:], big[..., :-2, :-2])


def test_without_views_nothing_changes_and_the_network_is_found() -> None:
    network = Corner()
    assert answering(network, []) is network and network_of(network) is network
    assert network_of(answering(network, ["flip"])) is network
    assert network_of(copy.deepcopy(answering(network, ["flip"]))) is not network
    with pytest.raises(ValueError, match="no view 'flop'; the views are flip, shift"):
        answering(network, ["flop"])
