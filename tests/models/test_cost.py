"""FLOPs by the convention that reproduces the tables of LambdaNetworks and ResNet-RS."""

from __future__ import annotations

import pytest
import torch

from models import create_model
from models.cost import flops


def giga(name: str, size: int = 224, **overrides: object) -> float:
    with torch.device("meta"):
        return flops(create_model(name, **overrides), size) / 1e9


@pytest.mark.parametrize("scope, printed", [(3, 5.7), (7, 6.1), (15, 7.8), (23, 10.0), (31, 12.4), (111, 19.4)])
def test_scope_table(scope, printed):
    assert giga("hybrid_resnet_50_clll", r=scope) == pytest.approx(printed, abs=0.05)


@pytest.mark.parametrize("name, size, printed", [
    ("hybrid_resnet_50_llll", 224, 12.02),
    ("hybrid_resnet_50_cccc", 224, 8.17),
    ("resnet_152_se", 256, 31.0),
    ("resnet_350_se", 256, 68.6),
    ("resnet_420_se", 320, 127.8),
])  # fmt: skip
def test_whole_networks(name, size, printed):
    assert giga(name, size) == pytest.approx(printed, rel=3e-3)


def test_counting_leaves_the_model_as_it_was():
    model = create_model("lambda_resnet_tiny", 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert flops(model, 16) == flops(model, 16) > 0
    assert model.training and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
