"""FLOPs by the convention that reproduces the tables of LambdaNetworks and ResNet-RS."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import create_model
from models.attention import ATTENTION
from models.cost import activations, costs, flops


def giga(name: str, size: int = 224, **overrides: object) -> float:
    with torch.device("meta"):
        return flops(create_model(name, **overrides), size) / 1e9


@pytest.mark.parametrize("scope, printed", [(3, 5.7), (7, 6.1), (15, 7.8), (23, 10.0), (31, 12.4), (111, 19.4)])
def test_scope_table(scope, printed):
    assert giga("hybrid_resnet_50_clll", r=scope) == pytest.approx(printed, abs=0.05)


@pytest.mark.parametrize("content, position, printed", [(True, False, 5.0), (False, True, 11.9), (True, True, 12.0)])
def test_content_and_position_table(content, position, printed):
    with torch.device("meta"):
        found = costs(create_model("hybrid_resnet_50_llll", content=content, position=position), 224)
    assert found.flops / 1e9 == pytest.approx(printed, abs=0.05)
    assert found.parameters / 1e6 == pytest.approx(14.9, abs=0.1)  # printed alike, though only some have embeddings


@pytest.mark.parametrize("name, size, printed", [
    ("hybrid_resnet_50_llll", 224, 12.02),
    ("hybrid_resnet_50_cccc", 224, 8.17),
    ("resnet_152_se", 256, 31.0),
    ("resnet_350_se", 256, 68.6),
    ("resnet_420_se", 320, 127.8),
])  # fmt: skip
def test_whole_networks(name, size, printed):
    assert giga(name, size) == pytest.approx(printed, rel=3e-3)


def test_activations_of_resnet_50():
    """11.1 million in Radosavovic et al. 2020, 11.11 in timm's tables."""
    with torch.device("meta"):
        found = activations(create_model("hybrid_resnet_50_cccc"), 224)
    assert found / 1e6 == pytest.approx(11.11, abs=0.005)


@pytest.mark.parametrize(
    "ours, theirs, size", [("resnet_50_se", "resnetrs50", 160), ("resnet_101_se", "resnetrs101", 192)]
)
def test_timms_resnet_rs_costs_the_same(ours, theirs, size):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        assert costs(create_model(ours), size) == costs(timm.create_model(theirs), size)


def test_a_lambda_block_activates_its_projections_and_its_result():
    def of(**overrides: object) -> int:
        with torch.device("meta"):
            return activations(create_model("hybrid_resnet_50_cccl", **overrides), 224)

    lambdas = 49 * (4 + 1 + 1) * (4 * 16 + 512 // 4 + 16 + 512)  # the first of c5's three layers runs at 14 × 14
    with torch.device("meta"):
        plain = activations(create_model("hybrid_resnet_50_cccc"), 224)
    assert of() - plain == lambdas - 3 * 49 * 512


@pytest.mark.parametrize("name", ["axial_attention", "linear_attention"])
def test_self_attention_costs_its_matrix_products(name):
    """Global and local attention run other products than their equations have, so the counter cannot judge them."""
    layer = ATTENTION[name](32, heads=4).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, 32, 9, 9))
    assert flops(layer, 9, channels=32) == counter.get_total_flops()


@pytest.mark.parametrize("name, met", [
    ("global_attention", 2 * 81 + 9 + 9),  # keys, values, and the embeddings of 9 rows and 9 columns
    ("local_attention", 2 * 49 + 7 + 7),
])  # fmt: skip
def test_self_attention_costs_what_every_query_meets(name, met):
    layer = ATTENTION[name](32, heads=4)
    assert flops(layer, 9, channels=32) == 2 * 81 * 32 * (3 * 32 + met)


def test_counting_leaves_the_model_as_it_was():
    model = create_model("lambda_resnet_tiny", 10).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert flops(model, 16) == flops(model, 16) > 0
    assert model.training and all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
