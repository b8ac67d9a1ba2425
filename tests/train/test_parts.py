"""Learning rate, optimizers, moving average, loss and seeds: small facts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pipeline.train.dist import noise_seed
from pipeline.train.divergence import finite
from pipeline.train.ema import Average, decay_at
from pipeline.train.loss import batch_loss, cross_entropy, weigh
from pipeline.train.optim import OPTIMIZERS, as_here, create_optimizer, lay_out, learning_rate, set_learning_rate
from pipeline.train.validate import better


def test_the_learning_rate_rises_linearly_then_falls_as_a_cosine():
    rates = [learning_rate(step, peak=2.0, steps=100, warmup=20, schedule="cosine") for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == pytest.approx(1.0)
    assert rates[20] == max(rates) == 2.0
    assert rates[60] == pytest.approx(1.0)
    assert 0 < rates[99] < 0.01
    assert learning_rate(99, peak=2.0, steps=100, warmup=20, schedule="constant") == 2.0
    assert learning_rate(0, peak=2.0, steps=1, warmup=0, schedule="cosine") == 2.0


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_spares_batch_norm_alone(network, name):
    optimizer = create_optimizer(network, name, weight_decay=0.1, momentum=0.9)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    names = {n for n, p in network.named_parameters() if id(p) in decayed}
    assert names == {"0.weight", "0.bias", "3.weight", "3.bias"}
    before = copy.deepcopy(network.state_dict())
    set_learning_rate(optimizer, 0.5)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = network.state_dict()
    assert torch.equal(before["1.weight"], after["1.weight"])
    assert after["0.weight"].abs().sum() < before["0.weight"].abs().sum()


def test_sgd_is_nesterov_with_momentum():
    layer = nn.Linear(1, 1, bias=False)
    optimizer = create_optimizer(layer, "sgd", weight_decay=0.0, momentum=0.9)
    set_learning_rate(optimizer, 1.0)
    start = layer.weight.item()
    layer.weight.grad = torch.ones(1, 1)
    optimizer.step()
    assert layer.weight.item() == pytest.approx(start - 1.9)


def test_adamw_decays_apart_from_the_gradient(network):
    """Its first update is lr · sign(gradient), whatever the gradient's size; the decay is lr · decay · weight."""
    optimizer = create_optimizer(network, "adamw", weight_decay=0.1, momentum=0.9)
    set_learning_rate(optimizer, 0.01)
    before = [p.detach().clone() for p in (network[0].weight, network[1].weight)]
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter) * 100
    optimizer.step()
    expected = [before[0] * (1 - 0.01 * 0.1), before[1]]
    for parameter, was in zip((network[0].weight, network[1].weight), expected, strict=True):
        assert torch.allclose(parameter, was - 0.01 * parameter.grad.sign(), atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [None, 5.0])
def test_lamb_moves_each_layer_by_a_share_of_its_own_norm(network, weight_decay, clip):
    """Equation of algorithm 2 of arXiv 1904.00962; norm layers, which are not decayed, move as with Adam."""
    optimizer = create_optimizer(network, "lamb", weight_decay=weight_decay, momentum=0.9, clip=clip)
    set_learning_rate(optimizer, 0.01)
    draw = torch.Generator().manual_seed(1)
    expected = {}
    gradients = {name: torch.randn(p.shape, generator=draw) for name, p in network.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    for name, parameter in network.named_parameters():
        parameter.grad = gradients[name].clone()
        scaled = gradients[name] / (1.0 if clip else max(norm, 1.0))  # its own clipping, unless that has been done
        move = scaled / (scaled.abs() + 1e-6) + (0 if name.startswith("1.") else weight_decay) * parameter.detach()
        trust = 1.0 if name.startswith("1.") else parameter.detach().norm() / move.norm()
        expected[name] = parameter.detach() - 0.01 * trust * move
    optimizer.step()
    for name, parameter in network.named_parameters():
        assert torch.allclose(parameter, expected[name], atol=1e-6), name


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_fused_optimizer_goes_on_from_the_state_of_another_one(network, name):
    """The weights lie in channels-last order, a state from a file in another one; it may come from an unfused
    optimizer."""
    network = network.to(memory_format=torch.channels_last)
    plain = copy.deepcopy(network)
    optimizers = [create_optimizer(n, name, weight_decay=0.1, momentum=0.9) for n in (network, plain)]
    assert optimizers[0].defaults["fused"]
    for group in optimizers[1].param_groups:
        group["fused"], group["foreach"] = False, False
    draw = torch.Generator().manual_seed(1)
    for step in range(4):
        if step == 2:
            saved = copy.deepcopy(optimizers[1].state_dict())
            for slots in saved["state"].values():
                slots.update({key: value.contiguous() for key, value in slots.items()})
            optimizers[0] = create_optimizer(network, name, weight_decay=0.1, momentum=0.9)
            optimizers[0].load_state_dict(as_here(optimizers[0], saved))
            lay_out(optimizers[0])
            assert optimizers[0].param_groups[0]["fused"]
        for one, other in zip(network.parameters(), plain.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=draw).to(one).contiguous()
            one.grad = torch.empty_like(one).copy_(one.grad)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            set_learning_rate(optimizer, 0.1)
            optimizer.step()
    for one, other in zip(network.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_finite_is_no_nan_and_no_infinity():
    assert finite([torch.ones(3), torch.tensor(1e30), torch.tensor(5), torch.empty(0)])
    assert not finite([torch.ones(3), torch.tensor([1.0, float("nan")])])
    assert not finite([torch.tensor(float("-inf"))])


def test_the_best_is_the_first_of_the_highest_accuracy_and_of_these_the_lowest_loss():
    first = {"top1": 0.5, "loss": 1.0}
    assert better(first, None)
    assert not better(first, first)
    assert better({"top1": 0.6, "loss": 2.0}, first)
    assert better({"top1": 0.5, "loss": 0.9}, first)
    assert not better({"top1": 0.4, "loss": 0.1}, first)


def test_the_average_follows_weights_statistics_and_counters(network):
    average = Average(network, 0.5)
    value = {name: tensor.clone().double() for name, tensor in network.state_dict().items()}
    for step in range(6):
        network(torch.randn(8, 3, 4, 4))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, tensor in network.state_dict().items():
            value[name] = decay * value[name] + (1 - decay) * tensor.double()
    found = average.module.state_dict()
    assert found["1.num_batches_tracked"] == 6
    assert not average.module.training
    for name in value:
        if name != "1.num_batches_tracked":
            assert torch.allclose(found[name].double(), value[name], atol=1e-6), name


def test_the_average_is_short_at_first():
    assert decay_at(0, 0.9999) == pytest.approx(0.1)
    assert decay_at(90, 0.9999) == pytest.approx(0.91)
    assert decay_at(10**7, 0.9999) == 0.9999


def test_the_loss_is_cross_entropy_summed_with_weights():
    logits = torch.randn(5, 4, dtype=torch.bfloat16)
    hard = torch.tensor([0, 3, 1, 2, 2])
    targets = nn.functional.one_hot(hard, 4).float()
    each = nn.functional.cross_entropy(logits.float(), hard, reduction="none")
    assert torch.allclose(cross_entropy(logits, targets), each)
    source = torch.tensor([0, 0, 1, 1, 1], dtype=torch.uint8)
    assert batch_loss(logits, weigh(targets, source, 1.0)).item() == pytest.approx(each.sum().item(), rel=1e-6)
    weighted = each[:2].sum() + 0.25 * each[2:].sum()
    assert batch_loss(logits, weigh(targets, source, 0.25)).item() == pytest.approx(weighted.item(), rel=1e-6)


def test_noise_differs_by_seed_step_and_rank():
    seeds = {noise_seed(seed, step, rank) for seed in range(3) for step in range(20) for rank in range(4)}
    assert len(seeds) == 240
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert noise_seed(1, 2, 3) == 1138364116778193076  # pinned: a resumed run must draw the same noise
