"""LambdaLayer against the paper's equations, written out, and against timm's layer with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models import LambdaLayer
from models.contraction import ORDERS


def paper(layer: LambdaLayer, x: torch.Tensor) -> torch.Tensor:
    """The equations of LambdaNetworks, one query and one head at a time, as the text has them; training-mode norms."""
    (batch, _, height, width), k, v, h, u = x.shape, layer.k, layer.v, layer.h, layer.u
    positions = [(y, x) for y in range(height) for x in range(width)]
    projected = torch.einsum("oc,bchw->bohw", layer.to_qv.weight[:, :, 0, 0], x)
    mean, var = projected.mean((0, 2, 3), keepdim=True), projected.var((0, 2, 3), unbiased=False, keepdim=True)
    qv = (projected - mean) / (var + layer.norm_qv.eps).sqrt()
    q = qv[:, : h * k].reshape(batch, h, k, height, width)
    values = qv[:, h * k :].reshape(batch, v, u, height, width)
    keys = torch.einsum("oc,bchw->bohw", layer.to_k.weight[:, :, 0, 0], x)
    keys = (keys.exp() / keys.exp().sum((2, 3), keepdim=True)).reshape(batch, k, u, height, width)

    content = torch.einsum("bkumn,bvumn->bkv", keys, values)
    out = torch.zeros(batch, h * v, height, width, dtype=x.dtype)
    for ny, nx in positions:
        position = torch.zeros(batch, k, v, dtype=x.dtype)
        for my, mx in positions:
            dy, dx = my - ny + layer.r // 2, mx - nx + layer.r // 2
            if 0 <= dy < layer.r and 0 <= dx < layer.r:
                position += torch.einsum("ku,bvu->bkv", layer.table[dy, dx], values[..., my, mx])
        for head in range(h):
            y = torch.einsum("bkv,bk->bv", content + position, q[:, head, :, ny, nx])
            out[:, head * v : (head + 1) * v, ny, nx] = y
    return out


@pytest.mark.parametrize("order", [*ORDERS, "auto"])
@pytest.mark.parametrize("height, width, u, r", [(4, 4, 1, 3), (3, 5, 1, 23), (4, 3, 2, 5)])
def test_the_layer_is_the_papers_equations(order, height, width, u, r):
    torch.manual_seed(1)
    layer = LambdaLayer(8, k=3, h=2, u=u, r=r, order=order).double()
    x = torch.randn(2, 8, height, width, dtype=torch.float64)
    torch.testing.assert_close(layer(x), paper(layer, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("side, training", [(6, True), (9, True), (7, False)])
def test_timm_agrees_with_transplanted_weights(order, side, training):
    timm_layers = pytest.importorskip("timm.layers.lambda_layer")
    torch.manual_seed(2)
    ours = LambdaLayer(32, k=8, h=4, r=9, order=order).train(training)
    theirs = timm_layers.LambdaLayer(32, num_heads=4, dim_head=8, r=9).train(training)
    q, v = ours.to_qv.weight.split([32, 8])
    with torch.no_grad():
        theirs.qkv.weight.copy_(torch.cat([q, ours.to_k.weight, v]))
        theirs.conv_lambda.weight.copy_(ours.table.permute(2, 3, 0, 1).unsqueeze(-1))
        theirs.conv_lambda.bias.zero_()
        ours.norm_qv.running_mean.normal_()
        for norm, part in ((theirs.norm_q, slice(0, 32)), (theirs.norm_v, slice(32, None))):
            norm.running_mean.copy_(ours.norm_qv.running_mean[part])
    x = torch.randn(3, 32, side, side)
    expected = theirs(x)
    torch.testing.assert_close(ours(x) / expected.std(), expected / expected.std(), rtol=1e-5, atol=1e-5)


def test_stride_two_is_a_pool_after_the_lambda():
    torch.manual_seed(3)
    layer = LambdaLayer(16, r=5, stride=2).eval()
    whole = LambdaLayer(16, r=5).eval()
    whole.load_state_dict(layer.state_dict())
    x = torch.randn(2, 16, 7, 6)
    assert layer(x).shape == (2, 16, 4, 3)
    torch.testing.assert_close(layer(x), F.avg_pool2d(whole(x), 3, 2, 1))


def test_initialisation_is_the_papers():
    torch.manual_seed(4)
    layer = LambdaLayer(512, k=16, h=4, r=23)
    q, v = layer.to_qv.weight.split([64, 128])
    for weight, std in (
        (q, (16 * 512) ** -0.5),
        (v, 512**-0.5),
        (layer.to_k.weight, 512**-0.5),
        (layer.table, 1),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert weight.mean().item() == pytest.approx(0, abs=0.05 * std)
    assert not [name for name, _ in layer.named_parameters() if "bias" in name and "norm" not in name]
    assert sum(p.numel() for p in layer.parameters()) == 115_344  # 1.9 of the paper's notes: width 512


def test_memory_format_and_autocast_do_not_change_the_result():
    torch.manual_seed(5)
    layer, x = LambdaLayer(32, r=7), torch.randn(4, 32, 6, 6)
    y = layer(x)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-4)
    for order in ORDERS:
        layer.order = order
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = layer(x)
        assert low.dtype == torch.bfloat16
        assert (low.float() - y).std() < 0.02 * y.std()


@pytest.mark.parametrize("arguments, words", [
    ({"h": 5}, ["h=5", "32"]),
    ({"r": 8}, ["odd", "8"]),
    ({"order": "fastest"}, ["'fastest'", "query_first"]),
    ({"stride": 3}, ["1 or 2", "3"]),
    ({"k": 0}, ["k", "at least 1"]),
])  # fmt: skip
def test_bad_arguments_say_what_is_allowed(arguments, words):
    with pytest.raises(ValueError) as error:
        LambdaLayer(32, **arguments)
    assert all(word in str(error.value) for word in words)
