"""LambdaLayer against the paper's equations, written out, and against timm's layer with the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from models import LambdaLayer
from models.choose_order import orders
from models.contraction import ORDERS

ANY = ("auto", *ORDERS)
DENSE = ("auto", *orders(dense=True))


def paper(
    layer: LambdaLayer, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The equations of LambdaNetworks, one query and one context position at a time; training-mode norms."""
    k, v, h, u = layer.k, layer.v, layer.h, layer.u
    weights = [p.weight[:, :, 0, 0] for p in layer.project.modules() if isinstance(p, torch.nn.Conv2d)]
    w_q, w_v, w_k = (
        torch.cat(weights).split([h * k, u * v, u * k * layer.content])
        if context is None
        else split_cross(weights, layer)
    )
    context = x if context is None else context
    height, width = x.shape[2:]
    rows, columns = context.shape[2:]

    def project(weight: torch.Tensor, of: torch.Tensor, norm: bool) -> torch.Tensor:
        y = torch.einsum("oc,bchw->bohw", weight, of).flatten(2)
        mean, var = y.mean((0, 2), keepdim=True), y.var((0, 2), unbiased=False, keepdim=True)
        return (y - mean) / (var + 1e-5).sqrt() if norm else y

    q = project(w_q, x, True).unflatten(1, (h, k))
    values = project(w_v, context, True).unflatten(1, (u, v))
    keys = project(w_k, context, False).unflatten(1, (u, k)) if layer.content else None
    out = torch.zeros(len(x), h * v, height * width, dtype=x.dtype)
    for n in range(height * width):
        at_y, at_x = (2 * (n // width) + 1) * rows // (2 * height), (2 * (n % width) + 1) * columns // (2 * width)
        seen = torch.ones(rows * columns, dtype=torch.bool) if mask is None else mask[n].clone()
        if layer.causal:
            seen[n + 1 :] = False
        if not seen.any():
            continue
        lambdas = torch.zeros(len(x), k, v, dtype=x.dtype)
        if layer.content:
            visible = keys[..., seen]
            if layer.key_norm == "softmax":
                visible = visible.exp() / visible.exp().sum(-1, keepdim=True)
            elif layer.key_norm == "l2":
                visible = visible / visible.square().sum(-1, keepdim=True).sqrt()
            lambdas = lambdas + torch.einsum("bukm,buvm->bkv", visible, values[..., seen])
        if layer.position:
            table = layer.embeddings()
            for m in seen.nonzero()[:, 0].tolist():
                dy, dx = m // columns - at_y + table.shape[0] // 2, m % columns - at_x + table.shape[1] // 2
                if 0 <= dy < table.shape[0] and 0 <= dx < table.shape[1]:
                    lambdas = lambdas + torch.einsum("ku,buv->bkv", table[dy, dx], values[..., m])
        out[:, :, n] = torch.einsum("bkv,bhk->bhv", lambdas, q[..., n]).flatten(1)
    return out.unflatten(2, (height, width))


def split_cross(weights: list[torch.Tensor], layer: LambdaLayer) -> tuple[torch.Tensor, ...]:
    return weights[0], *weights[1].split([layer.u * layer.v, layer.u * layer.k])


def check(layer: LambdaLayer, *inputs: torch.Tensor | None, orders: tuple[str, ...] = ANY) -> None:
    """The layer in every order against `paper`, its value and its gradients."""
    layer = layer.double()
    layer.order = "auto"
    shape = layer(*inputs).shape
    weights = torch.randn(shape, dtype=torch.float64)
    parameters = [p for name, p in layer.named_parameters() if "norm" not in name]

    def run(function: object) -> list[torch.Tensor]:
        y = function(*inputs)
        gradients = torch.autograd.grad((y.view(shape) * weights).sum(), parameters, allow_unused=True)
        return [y.view(shape), *(torch.zeros(()) if g is None else g for g in gradients)]

    expected = run(lambda *given: paper(layer, *given))
    for order in orders:
        layer.order = order
        for a, b in zip(run(layer), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, o=order: f"{o}: {m}")


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("height, width, u, r", [(4, 4, 1, 3), (3, 5, 1, 23), (4, 3, 2, 5), (2, 10, 1, 5)])
def test_the_layer_is_the_papers_equations(height, width, u, r):
    torch.manual_seed(1)
    check(LambdaLayer(8, k=3, h=2, u=u, r=r), images(2, 8, height, width))


@pytest.mark.parametrize("key_norm", ["l2", "none"])
def test_key_norms(key_norm):
    torch.manual_seed(1)
    check(LambdaLayer(8, k=3, h=2, r=3, key_norm=key_norm), images(2, 8, 3, 4))
    layer = LambdaLayer(8, k=3, h=2, r=3, key_norm=key_norm)
    check(layer, images(2, 8, 3, 4), None, torch.rand(12, 12) < 0.5, orders=DENSE)


@pytest.mark.parametrize("switches", [{"content": False}, {"position": False}])
def test_content_and_position_switch_off(switches):
    torch.manual_seed(1)
    layer = LambdaLayer(8, k=3, h=2, u=2, r=3, **switches)
    check(layer, images(2, 8, 3, 4))
    check(layer, images(2, 8, 3, 4), None, torch.rand(12, 12) < 0.5, orders=DENSE)
    assert (layer.table is None) == (not layer.position)


@pytest.mark.parametrize("u", [1, 2])
def test_masked_contexts(u):
    torch.manual_seed(2)
    mask = torch.rand(12, 12) < 0.5
    mask[3] = False  # sees nothing: zero
    layer, x = LambdaLayer(8, k=3, h=2, u=u, r=5), images(2, 8, 3, 4)
    check(layer, x, None, mask, orders=DENSE)
    assert not layer(x, mask=mask).flatten(2)[:, :, 3].any()


@pytest.mark.parametrize("u", [1, 2])
def test_causal_layers_see_only_what_came_before_in_every_order(u):
    torch.manual_seed(2)
    layer, x = LambdaLayer(8, k=3, h=2, u=u, r=5, causal=True), images(2, 8, 3, 4)
    check(layer, x)
    layer.eval()
    changed = x.clone()
    changed[:, :, 2] += 1
    torch.testing.assert_close(layer(changed)[:, :, :2], layer(x)[:, :, :2])
    check(layer.train(), x, None, torch.rand(12, 12) < 0.7, orders=DENSE)


def test_sequences():
    torch.manual_seed(3)
    layer, x = LambdaLayer(8, k=3, h=2, r=5, dims=1, causal=True).double(), images(2, 8, 11)
    for order in ORDERS:
        layer.order = order
        torch.testing.assert_close(layer(x), paper(layer, x.unsqueeze(2)).squeeze(2), rtol=1e-10, atol=1e-10)
    assert LambdaLayer(8, h=2, dims=1, stride=2).double()(x).shape == (2, 8, 6)


@pytest.mark.parametrize("grid", [(3, 4), (2, 2), (6, 5)])
def test_separate_contexts(grid):
    torch.manual_seed(4)
    layer = LambdaLayer(8, dim_context=6, k=3, h=2, u=2, r=5)
    x, context = images(2, 8, 3, 4), images(2, 6, *grid)
    check(layer, x, context, orders=ANY if grid == (3, 4) else DENSE)
    check(layer, x, context, torch.rand(12, grid[0] * grid[1]) < 0.5, orders=DENSE)


def test_global_layers_take_what_their_table_reaches_and_resize():
    torch.manual_seed(5)
    layer = LambdaLayer(8, k=3, h=2, r=None, size=(3, 4))
    assert layer.table.shape == (5, 7, 3, 1)
    check(layer, images(2, 8, 3, 4))
    check(layer, images(2, 8, 2, 3))
    with pytest.raises(ValueError, match=r"4 × 4 .* up to 3 × 4; call resize_table"):
        layer(images(2, 8, 4, 4))
    before = layer.table.clone()
    layer.resize_table((5, 7))
    torch.testing.assert_close(layer.table[::2, ::2], before)  # every second offset is an old one
    layer(images(2, 8, 5, 7))
    # A scope that reaches everywhere is the global layer.
    local, whole = LambdaLayer(8, k=3, h=2, r=9).double(), LambdaLayer(8, k=3, h=2, r=None, size=5).double()
    whole.load_state_dict(local.state_dict())
    x = images(1, 8, 5, 5)
    torch.testing.assert_close(whole(x), local(x))


def test_shared_embeddings_are_one_parameter():
    torch.manual_seed(6)
    first = LambdaLayer(8, k=3, h=2, r=5)
    second = LambdaLayer(8, k=3, h=2, r=5, embeddings_of=first)
    assert second.embeddings() is first.table and "table" not in second.state_dict()
    check(second, images(2, 8, 3, 4))
    both = copy.deepcopy(torch.nn.Sequential(first, second))
    assert both[1].embeddings() is both[0].table  # the copy shares within itself
    with pytest.raises(ValueError, match=r"\[5, 5, 3, 1\]; this lambda layer needs \[7, 7, 3, 1\]"):
        LambdaLayer(8, k=3, h=2, r=7, embeddings_of=first)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("side, training", [(6, True), (9, True), (7, False)])
def test_timm_agrees_with_transplanted_weights(order, side, training):
    timm_layers = pytest.importorskip("timm.layers.lambda_layer")
    torch.manual_seed(2)
    ours = LambdaLayer(32, k=8, h=4, r=9, order=order).train(training)
    theirs = timm_layers.LambdaLayer(32, num_heads=4, dim_head=8, r=9).train(training)
    q, v, k = ours.project.to_qvk.weight.split([32, 8, 8])
    norm_qv = ours.project.norm_qv
    with torch.no_grad():
        theirs.qkv.weight.copy_(torch.cat([q, k, v]))
        theirs.conv_lambda.weight.copy_(ours.table.permute(2, 3, 0, 1).unsqueeze(-1))
        theirs.conv_lambda.bias.zero_()
        norm_qv.running_mean.normal_()
        for norm, part in ((theirs.norm_q, slice(0, 32)), (theirs.norm_v, slice(32, None))):
            norm.running_mean.copy_(norm_qv.running_mean[part])
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
    q, v, k = layer.project.to_qvk.weight.split([64, 128, 16])
    for weight, std in ((q, (16 * 512) ** -0.5), (v, 512**-0.5), (k, 512**-0.5), (layer.table, 1)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert weight.mean().item() == pytest.approx(0, abs=0.05 * std)
    assert not [name for name, _ in layer.named_parameters() if "bias" in name and "norm" not in name]
    assert sum(p.numel() for p in layer.parameters()) == 115_344  # 1.9 of the paper's notes: width 512


@pytest.mark.parametrize("context", [None, 24])
def test_folding_the_norms_changes_nothing(context):
    torch.manual_seed(5)
    layer = LambdaLayer(16, k=4, r=5, dim_context=context).double()
    given = [images(3, 16, 4, 5), *([] if context is None else [images(3, context, 2, 2)])]
    for norm in layer.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(norm.weight, 0.5, 2)
            torch.nn.init.normal_(norm.bias)
    for _ in range(3):
        layer(*given)
    expected = layer.eval()(*given)
    layer.fold()
    assert not [m for m in layer.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    torch.testing.assert_close(layer(*given), expected, rtol=1e-10, atol=1e-10)


def test_memory_format_and_autocast_do_not_change_the_result():
    torch.manual_seed(5)
    layer, x = LambdaLayer(32, r=7), torch.randn(4, 32, 6, 6)
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), y, rtol=1e-4, atol=1e-4)
    for order in ORDERS:
        layer.order = order
        gradients = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                low = layer(x)
            gradients.append(torch.autograd.grad(low.float().square().sum(), layer.project.to_qvk.weight)[0])
        assert low.dtype == torch.bfloat16
        assert (low.float() - y).std() < 0.02 * y.std()
        assert (gradients[1] - gradients[0]).std() < 0.05 * gradients[0].std()


@pytest.mark.parametrize("arguments, words", [
    ({"h": 5}, ["h=5", "32", "1, 2, 4, 8, 16, 32"]),
    ({"r": 8}, ["odd", "8"]),
    ({"order": "fastest"}, ["'fastest'", "query_first"]),
    ({"key_norm": "l1"}, ["'l1'", "softmax"]),
    ({"stride": 3}, ["1 or 2", "3"]),
    ({"dims": 3}, ["1 or 2", "3"]),
    ({"k": 0}, ["k", "at least 1"]),
    ({"r": None}, ["r=None", "size"]),
    ({"size": 7}, ["r=23", "size=7"]),
    ({"r": None, "size": (0, 4)}, ["(0, 4)"]),
    ({"content": False, "position": False}, ["both false"]),
    ({"causal": True, "dim_context": 8}, ["causal", "mask"]),
])  # fmt: skip
def test_bad_arguments_say_what_is_allowed(arguments, words):
    with pytest.raises(ValueError) as error:
        LambdaLayer(32, **arguments)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("layer, given, words", [
    ({}, [None, torch.ones(12, 11, dtype=torch.bool)], ["[12, 12]", "[12, 11]"]),
    ({}, [None, torch.ones(12, 12)], ["bool", "float32"]),
    ({}, [torch.randn(1, 8, 3, 4)], ["takes no context"]),
    ({"dim_context": 8}, [], ["pass the context"]),
    ({"order": "conv"}, [None, torch.ones(12, 12, dtype=torch.bool)], ["'conv'", "lambda_first, query_first"]),
    ({"order": "fourier", "dim_context": 8}, [torch.randn(1, 8, 2, 2)], ["another size", "lambda_first"]),
])  # fmt: skip
def test_bad_inputs_say_what_is_allowed(layer, given, words):
    with pytest.raises(ValueError) as error:
        LambdaLayer(8, h=2, **layer)(torch.randn(1, 8, 3, 4), *given)
    assert all(word in str(error.value) for word in words), error.value
