"""The lambda layer against independent code with the same weights: lambda-networks, timm and the paper's pseudo-code.

They are the layers of benchmarks/peers.py, so this also says that the benchmarks compare like with like.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import lambda_resnet, peers
from models import LambdaLayer, create_model
from models.contraction import ORDERS

PEERS = [name for name in peers.LAYERS if name != peers.OURS]
NORM = ("weight", "bias", "running_mean", "running_var")


def make(name: str, *args: Any, **settings: Any) -> nn.Module:
    if name.startswith("lambda-networks"):
        pytest.importorskip("lambda_networks")
    if name == "timm":
        pytest.importorskip("timm")
    return peers.build(name, *args, **settings)


def weights(layer: LambdaLayer) -> dict[str, Tensor]:
    """The layer's weights by role: rows of q, k, v as (h k), (u k), (u v), norms as NORM, the table [r, r, k, u]."""
    project, queries = layer.project, layer.h * layer.k
    q, v, k = project.to_qvk.weight.split(project.sizes)
    found = {"q": q, "k": k, "v": v, "table": layer.embeddings()}
    for name in NORM:
        found[f"q.{name}"] = getattr(project.norm_qv, name)[:queries]
        found[f"v.{name}"] = getattr(project.norm_qv, name)[queries:]
    return {name: tensor.detach() for name, tensor in found.items()}


def transplant(layer: LambdaLayer, name: str, peer: nn.Module) -> None:
    """Copies our layer's weights into a peer's, biases that ours lacks at zero."""
    source = weights(layer)
    table = source["table"]
    with torch.no_grad():
        if name == "timm":
            peer.qkv.weight.copy_(torch.cat([source["q"], source["k"], source["v"]]))
            peer.conv_lambda.weight.copy_(table.permute(2, 3, 0, 1).unsqueeze(-1))
            peer.conv_lambda.bias.zero_()
        else:
            for projection in ("q", "k", "v"):
                getattr(peer, f"to_{projection}").weight.copy_(source[projection])
        if name == "einsum":
            peer.table.copy_(table.flatten(0, 1).squeeze(-1))
        elif name == "lambda-networks":
            peer.pos_conv.weight.copy_(table.permute(2, 3, 0, 1).unsqueeze(2))
            peer.pos_conv.bias.zero_()
        elif name == "lambda-networks global":
            peer.rel_pos_emb.copy_(fitted(table, peer.rel_pos_emb.shape[0]))
        for part, norm in (("q", peer.norm_q), ("v", peer.norm_v)):
            for each in NORM:
                getattr(norm, each).copy_(source[f"{part}.{each}"])


def fitted(table: Tensor, side: int) -> Tensor:
    """The table cut or zero-padded around its centre to side × side offsets."""
    out = torch.zeros(side, side, *table.shape[2:], dtype=table.dtype)
    kept = min(side, table.shape[0])
    ours, theirs = (table.shape[0] - kept) // 2, (side - kept) // 2
    out[theirs : theirs + kept, theirs : theirs + kept] = table[ours : ours + kept, ours : ours + kept]
    return out


def shake(layer: LambdaLayer) -> None:
    """Norms away from their initial ones and zeros, so that a swapped or forgotten one shows."""
    with torch.no_grad():
        for name, tensor in layer.project.norm_qv.state_dict().items():
            if name != "num_batches_tracked":
                tensor.uniform_(0.5, 1.5)


def assert_equal(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours / theirs.std(), theirs / theirs.std(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("side, r", [(6, 23), (9, 7)])
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_with_our_weights_gives_our_output_and_gradient(name, side, r, training, dtype, tolerance):
    torch.manual_seed(1)
    ours = LambdaLayer(24, k=6, h=3, r=r)
    shake(ours)
    theirs = make(name, 24, side=side, k=6, h=3, r=r)
    transplant(ours, name, theirs)
    ours, theirs = ours.to(dtype).train(training), theirs.to(dtype).train(training)
    x = torch.randn(2, 24, side, side, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    y, expected = ours(x), theirs(x)
    assert_equal(y, expected, tolerance)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert_equal(dx, torch.autograd.grad(expected, x, dy)[0], tolerance)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("u", [1, 2])
@pytest.mark.parametrize("name, context, scope", [
    ("lambda-networks global", {"n": 6}, {"r": None, "size": 6}),
    ("lambda-networks global", {"n": 6}, {"r": 11}),
    ("lambda-networks", {"r": 5}, {"r": 5}),
])  # fmt: skip
def test_both_contexts_and_intra_depth_agree_with_lambda_networks(name, context, scope, u, order):
    lambda_networks = pytest.importorskip("lambda_networks")
    torch.manual_seed(2)
    ours = LambdaLayer(16, k=5, h=2, u=u, order=order, **scope)
    shake(ours)
    theirs = lambda_networks.LambdaLayer(16, dim_k=5, heads=2, dim_u=u, **context)
    transplant(ours, name, theirs)
    x = torch.randn(2, 16, 6, 6)
    assert_equal(ours(x), theirs(x), 1e-5)
    assert_equal(ours.double()(x.double()), theirs.double()(x.double()), 1e-10)


@pytest.mark.parametrize("name", PEERS)
def test_a_network_of_the_benchmark_computes_the_same_with_a_peer_inside(name):
    make(name, 16, side=4)
    torch.manual_seed(3)
    ours = create_model("lambda_resnet_tiny", 10)
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)  # at zero, as the last one of a block starts, it would hide the lambda layer
    theirs = create_model("lambda_resnet_tiny", 10)
    theirs.load_state_dict(ours.state_dict())
    sides = lambda_resnet.lambda_sides(theirs, 32)
    assert [*sides.values()] == [(8, 4)]  # a stride: the peer is to be pooled
    lambda_resnet.put_inside(name, theirs, sides)
    for path in sides:
        peer = theirs.get_submodule(path)
        transplant(ours.get_submodule(path), name, peer[0] if isinstance(peer, nn.Sequential) else peer)
    images = torch.randn(2, 3, 32, 32)
    assert_equal(ours.eval()(images), theirs.eval()(images), 1e-5)
