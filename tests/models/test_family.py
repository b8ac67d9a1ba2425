"""The family: parameter counts of the paper, names, overrides, and what every network must do."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from models import LambdaLayer, LambdaResNet, create_model, list_models, load_weights
from models.attention import ATTENTION
from models.blocks import SqueezeExcite, StochasticDepth
from models.family import DEPTHS, TRAINED_AT, resolution

MILLIONS = {
    "lambda_resnet_101": 36.87,
    "lambda_resnet_152": 51.40,
    "lambda_resnet_101_c4": 25.98,
    "lambda_resnet_152_c4": 35.08,
    "lambda_resnet_200_c4": 41.67,
    "resnet_50": 25.61,
    "resnet_101": 44.6,
    "resnet_101_se": 63.6,
    "resnet_152": 60.2,
    "resnet_152_se": 86.6,
    "hybrid_resnet_50_cccc": 25.56,
    "hybrid_resnet_50_lccc": 25.49,
    "hybrid_resnet_50_llcc": 24.99,
    "hybrid_resnet_50_lllc": 21.73,
    "hybrid_resnet_50_llll": 15.00,
    "hybrid_resnet_50_clll": 15.06,
    "hybrid_resnet_50_ccll": 15.56,
    "hybrid_resnet_50_cccl": 18.83,
}
ABLATION = {  # (k, h, u): millions, where the paper and the count agree
    (16, 4, 1): 15.00,
    (32, 4, 1): 15.44,
    (8, 4, 1): 14.78,
    (8, 8, 1): 14.74,
    (16, 8, 1): 15.08,
    (32, 8, 1): 15.76,
    (8, 8, 4): 15.26,
    (8, 8, 8): 16.04,
    (16, 4, 4): 16.04,
}
SMALL = ("lambda_resnet_tiny", "lambda_resnet_small", "lambda_resnet_medium")
PLAIN = ("lambda_resnet_cifar_plain", "resnet_cifar_plain")
CIFAR = ("lambda_resnet_cifar_14", "lambda_resnet_cifar_26", *PLAIN)


def unbuilt(name: str, **overrides: object) -> LambdaResNet:
    with torch.device("meta"):
        return create_model(name, **overrides)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def agrees(count: int, printed: float) -> bool:
    """Equal to as many decimals as are printed, a tie rounded either way."""
    decimals = 1 if round(printed, 1) == printed and printed > 40 else 2
    return abs(count / 1e6 - printed) <= 0.501 * 10**-decimals


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts_are_the_papers(name):
    assert agrees(parameters(unbuilt(name)), MILLIONS[name])


@pytest.mark.parametrize("k, h, u", ABLATION)
def test_parameter_counts_of_the_ablation(k, h, u):
    assert agrees(parameters(unbuilt("hybrid_resnet_50_llll", k=k, h=h, u=u)), ABLATION[k, h, u])


def test_lambda_blocks_of_c4_are_counted_from_one_and_bring_no_squeeze():
    stages = unbuilt("lambda_resnet_101").stages
    lambdas = [[isinstance(block.mix[0], LambdaLayer) for block in stage] for stage in stages]
    assert [i for i, is_lambda in enumerate(lambdas[2], start=1) if is_lambda] == [6, 12, 18]
    assert all(lambdas[3]) and not any(lambdas[0] + lambdas[1])
    squeezes = [any(isinstance(m, SqueezeExcite) for m in stage.modules()) for stage in stages]
    assert squeezes == [True, True, False, False]


def test_the_names():
    kinds = ("lambda_resnet_{}", "lambda_resnet_{}_c4", "resnet_{}", "resnet_{}_se")
    scaled = {kind.format(depth) for kind in kinds for depth in (50, 101, 152, 200, 270, 350, 420)}
    letters = ("cccc", "lccc", "llcc", "lllc", "llll", "clll", "ccll", "cccl")
    hybrids = {f"hybrid_resnet_50_{each}" for each in letters}
    assert {*list_models()} == scaled | hybrids | {*SMALL, *CIFAR}


def test_resolutions_are_those_of_the_recipes():
    recipes = Path(__file__).parents[2] / "conf" / "recipe"
    rows = {tuple(int(n) for n in path.stem.split("_")[-1].split("-")) for path in recipes.glob("lambda_resnet_*.yaml")}
    assert {(depth, size) for depth, sizes in TRAINED_AT.items() for size in sizes} == rows
    assert [resolution(f"lambda_resnet_{depth}") for depth in DEPTHS] == [160, 192, 288, 224, 256, 320, 320]
    others = ("lambda_resnet_152_c4", "resnet_152_se", "lambda_resnet_tiny")
    assert [resolution(name) for name in others] == [224, 224, 32]


@pytest.mark.parametrize("layer", ATTENTION)
def test_lambda_blocks_hold_the_self_attention_that_is_named(layer):
    model = unbuilt("hybrid_resnet_50_ccll", layer=layer, heads=4)
    mixers = [type(block.mix[0]) for stage in model.stages for block in stage]
    assert mixers == [nn.Conv2d] * 7 + [ATTENTION[layer]] * 9
    assert all(m.heads == 4 for m in model.modules() if isinstance(m, ATTENTION[layer]))
    torch.manual_seed(0)
    small = create_model("lambda_resnet_tiny", 10, layer=layer)
    small(torch.randn(2, 3, 9, 13)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_self_attention_initialises_itself():
    torch.manual_seed(0)
    model = create_model("lambda_resnet_tiny", 10, layer="global_attention")
    (layer,) = (m for m in model.stages[2].modules() if isinstance(m, ATTENTION["global_attention"]))
    assert layer.to_qkv.weight.std().item() == pytest.approx(64**-0.5, rel=0.05)


def test_a_stage_shares_the_embeddings_of_its_first_lambda_layer():
    separate, shared = (unbuilt("hybrid_resnet_50_clll", share_embeddings=share) for share in (False, True))
    assert parameters(separate) - parameters(shared) == (13 - 3) * 23 * 23 * 16
    assert [name for name in shared.state_dict() if "table" in name] == [f"stages.{s}.0.mix.0.table" for s in (1, 2, 3)]


def test_a_copy_shares_its_own_embeddings():
    torch.manual_seed(0)
    model = create_model("lambda_resnet_small", 10, share_embeddings=True, lambdas={4: "all"}).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)
    x = torch.randn(2, 3, 16, 16)
    before, other = model(x), copy.deepcopy(model)
    assert torch.equal(other(x), before)
    with torch.no_grad():
        other.stages[2][0].mix[0].table.zero_()
    assert torch.equal(model(x), before)
    zeroed = other(x)
    with torch.no_grad():
        model.stages[2][0].mix[0].table.zero_()
    assert torch.equal(model(x), zeroed) and not torch.equal(zeroed, before)


@pytest.mark.parametrize("switch", [{"content": False}, {"position": False}, {"key_norm": "l2"}, {"key_norm": "none"}])
def test_switches_reach_the_layers(switch):
    torch.manual_seed(0)
    usual, other = create_model("lambda_resnet_small", 10), create_model("lambda_resnet_small", 10, **switch)
    for norm in usual.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.ones_(norm.weight)
    state = usual.state_dict()  # of a projection's rows the keys are last, and a layer without content has none
    load_weights(other, {name: state[name][: len(t)] if t.ndim else t for name, t in other.state_dict().items()})
    x = torch.randn(3, 3, 16, 16)
    assert not torch.allclose(other(x), usual(x), rtol=0.01)
    layers = [m for m in other.modules() if isinstance(m, LambdaLayer)]
    assert len(layers) == 3 and all(getattr(m, name) == value for m in layers for name, value in switch.items())


def test_roles_name_the_classifier_and_the_last_norm():
    model = unbuilt("lambda_resnet_50")
    assert model.roles() == {
        "head": ["classifier.weight", "classifier.bias"],
        "last_norm": ["stages.3.2.expand.1.weight", "stages.3.2.expand.1.bias"],
    }
    names = dict(model.named_parameters())
    assert names.keys() >= {name for role in model.roles().values() for name in role}
    assert isinstance(model.get_submodule("stages.3.2.expand.1"), nn.BatchNorm2d)
    assert unbuilt("lambda_resnet_tiny").roles()["last_norm"][0] == "stages.2.0.expand.1.weight"


@pytest.mark.parametrize("name", list_models())
def test_every_name_builds(name):
    assert parameters(unbuilt(name, num_classes=10)) > 10_000


def test_the_demo_members_grow():
    counts = [parameters(unbuilt(name, num_classes=10)) for name in SMALL]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize("side", [8, 11, 16, 32])
@pytest.mark.parametrize("name", SMALL)
def test_small_members_train_on_any_size_and_batch(name, side):
    torch.manual_seed(0)
    model = create_model(name, 10, stochastic_depth=0.2, dropout=0.1)
    for batch in (2, 3):
        model(torch.randn(batch, 3, side, side)).logsumexp(1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    features = model.eval().forward_features(torch.randn(1, 3, side, side))
    assert features.shape == (1, model.num_features, -(-side // 8), -(-side // 8))  # the stem and two stages halve
    assert model.forward_head(features).shape == (1, 10)


def test_a_small_member_learns():
    torch.manual_seed(0)
    model = create_model("lambda_resnet_tiny", 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    images = torch.randn(64, 3, 8, 8)
    labels = (images[:, 0, 2, 2] * images[:, 1, 6, 6] > 0).long()  # needs an interaction across positions
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.1


def test_initial_state():
    model = create_model("lambda_resnet_small", 1000)
    assert all((block.expand[1].weight == 0).all() for stage in model.stages for block in stage)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert not model.classifier.bias.any()


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
    rates = [m.rate for m in unbuilt("resnet_50", stochastic_depth=0.2).modules() if isinstance(m, StochasticDepth)]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(1, 17)])
    torch.manual_seed(0)
    drop = StochasticDepth(0.25)
    y = drop(torch.ones(4000, 2, 1, 1))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert torch.equal(y[:, 0], y[:, 1])
    assert y.mean().item() == pytest.approx(1, abs=0.05)
    torch.manual_seed(0)
    assert torch.equal(drop(torch.ones(4000, 2, 1, 1)), y)
    assert torch.equal(drop.eval()(y), y)


def test_channels_last_and_autocast():
    torch.manual_seed(0)
    model = create_model("lambda_resnet_tiny", 10)
    x = torch.randn(4, 3, 16, 16)
    for block in model.modules():
        if isinstance(block, nn.BatchNorm2d):
            nn.init.normal_(block.weight, 1, 0.1)
    expected = model(x)
    last = model.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    assert (low - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("name, overrides, words", [
    ("lambda_resnet_51", {}, ["'lambda_resnet_51'", "lambda_resnet_50"]),
    ("lambda_resnet_tiny", {"kay": 4}, ["'kay'", "stochastic_depth"]),
    ("lambda_resnet_tiny", {"k": "4"}, ["k is a whole number", "'4'"]),
    ("lambda_resnet_tiny", {"h": True}, ["h is a whole number"]),
    ("lambda_resnet_tiny", {"h": 3}, ["h=3", "32"]),
    ("lambda_resnet_tiny", {"r": 4}, ["odd", "4"]),
    ("lambda_resnet_tiny", {"order": "best"}, ["'best'", "lambda_first"]),
    ("lambda_resnet_tiny", {"stem": "big"}, ["'big'", "small"]),
    ("lambda_resnet_tiny", {"dropout": 1.0}, ["dropout", "below 1"]),
    ("lambda_resnet_tiny", {"depths": [1, 2]}, ["(1, 2)", "(16, 32, 64)"]),
    ("lambda_resnet_tiny", {"depths": [0, 1, 1]}, ["depths", "at least 1"]),
    ("lambda_resnet_tiny", {"lambdas": {5: "all"}}, ["c5", "c4"]),
    ("lambda_resnet_tiny", {"lambdas": {4: [2]}}, ["(2,)", "from 1 to 1"]),
    ("lambda_resnet_tiny", {"layer": "attention"}, ["'attention'", "lambda", "axial_attention"]),
    ("lambda_resnet_tiny", {"layer": "axial_attention", "heads": 5}, ["heads=5", "32"]),
    ("lambda_resnet_tiny", {"layer": "axial_attention", "heads": 0}, ["heads", "at least 1", "0"]),
    ("lambda_resnet_tiny", {"layer": "axial_attention", "position": False}, ["position", "axial_attention", "leave"]),
    ("lambda_resnet_tiny", {"layer": "axial_attention", "share_embeddings": True}, ["share_embeddings", "axial_att"]),
    ("lambda_resnet_tiny", {"position": False, "share_embeddings": True}, ["share_embeddings", "position False"]),
    ("lambda_resnet_tiny", {"checkpointing": 1}, ["checkpointing is true or false", "1"]),
    ("lambda_resnet_tiny", {"key_norm": "batch"}, ["'batch'", "softmax"]),
    ("lambda_resnet_tiny", {"content": False, "position": False}, ["content", "position"]),
    ("lambda_resnet_tiny", {"num_classes": 0}, ["num_classes", "0"]),
])  # fmt: skip
def test_bad_requests_name_found_and_allowed(name, overrides, words):
    with pytest.raises(ValueError) as error:
        unbuilt(name, **overrides)
    assert all(word in str(error.value) for word in words), error.value


def test_overrides_as_yaml_gives_them():
    model = unbuilt("lambda_resnet_tiny", num_classes=10, widths=[24, 32, 48], depths=[1, 3, 2], dropout=0, r=None)
    assert model.num_features == 96
    assert [len(stage) for stage in model.stages] == [1, 3, 2]
    assert sum(isinstance(m, LambdaLayer) for m in model.modules()) == 4
    assert model.architecture.scope == 23


def test_weights_that_do_not_fit_are_named():
    model = create_model("lambda_resnet_tiny", 10)
    state = create_model("lambda_resnet_tiny", 7).state_dict()
    state["extra.weight"] = state.pop("stem.1.bias")
    before = model.classifier.weight.clone()
    with pytest.raises(ValueError) as error:
        load_weights(model, state)
    text = str(error.value)
    assert "classifier.weight (expected [10, 128], found [7, 128])" in text
    assert "missing: stem.1.bias" in text and "unexpected: extra.weight" in text
    assert torch.equal(model.classifier.weight, before)
    other = create_model("lambda_resnet_tiny", 10)
    load_weights(other, model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))


# ---- plain networks ----------------------------------------------------------------------------------------


def test_plain_networks_are_lambda_layers_and_3x3_convolutions_alone():
    model = create_model(PLAIN[0], 10).eval()
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, LambdaLayer):
            module.register_forward_hook(lambda module, given, made, name=name: sizes.update({name: made.shape[2:]}))
    x = torch.randn(2, 3, 32, 32)
    assert model(x).shape == (2, 10)
    assert sizes == {"stages.1.1.mix.0": (8, 8), "stages.2.1.mix.0": (4, 4)}
    convolutions = [m for m in create_model(PLAIN[1], 10).modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 7 and {m.kernel_size for m in convolutions} == {(3, 3)}
    assert 1_100_000 < parameters(unbuilt(PLAIN[1], num_classes=10)) < 1_200_000


def test_a_plain_block_adds_its_input_where_the_shapes_agree():
    """Its last norm starts at scale zero, so that it begins as the identity on what is not negative."""
    model = create_model(PLAIN[0], 10).train()
    x = torch.rand(2, 64, 8, 8)
    assert torch.equal(model.stages[0][0](x), x)
    assert model.stages[1][0](x).shape == (2, 128, 4, 4) and not model.stages[1][0].adds


@pytest.mark.parametrize(("overrides", "words"), [
    ({"expansion": 2}, "plain blocks neither expand nor squeeze"),
    ({"se": [2]}, "plain blocks neither expand nor squeeze"),
    ({"lambdas": {3: "all"}}, "block 1 of c3 takes 64 channels to 128, which a lambda layer cannot"),
    ({"block": "fancy"}, "block is one of bottleneck, plain"),
])  # fmt: skip
def test_what_plain_blocks_cannot_do_is_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        create_model(PLAIN[0], 10, **overrides)
