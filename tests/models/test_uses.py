"""What people do with layers: write to the output, give no image, transform, compile, fill from nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from models import LambdaLayer, create_model
from models.attention import ATTENTION
from models.blocks import SqueezeExcite
from models.contraction import ORDERS

VARIANTS = [
    {}, {"u": 2}, {"content": False}, {"position": False}, {"key_norm": "l2"}, {"causal": True}, {"stride": 2},
    {"r": None, "size": 6},
]  # fmt: skip
LAYERS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"{order} {variant}": lambda order=order, variant=variant: LambdaLayer(
            8, **{"k": 3, "h": 2, "r": 3, "order": order, **variant}
        )
        for order in ("auto", *ORDERS)
        for variant in VARIANTS
    },
    **{name: lambda kind=kind: kind(8, heads=2) for name, kind in ATTENTION.items()},
    "se": lambda: SqueezeExcite(8),
}
"""Every layer and variant of one, of 8 channels."""


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_output_may_be_written_to(make):
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(2, 8, 4, 5)
    weights = torch.randn_like(layer(x))
    expected = torch.autograd.grad((F.relu(layer(x) + 1) * weights).sum(), list(layer.parameters()))
    found = torch.autograd.grad((layer(x).add_(1).relu_() * weights).sum(), list(layer.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_batch_of_none_gives_none(make):
    layer, x = make(), torch.randn(0, 8, 4, 5, requires_grad=True)
    y = layer(x)
    assert y.shape == (0, *layer(torch.randn(2, 8, 4, 5)).shape[1:])
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or not p.grad.any() for p in layer.parameters())
    with torch.no_grad():
        assert layer.eval()(x).shape == y.shape


def test_networks_take_a_batch_of_none():
    assert create_model("lambda_resnet_tiny", 10)(torch.randn(0, 3, 16, 16)).shape == (0, 10)


@pytest.mark.parametrize("order", ORDERS)
def test_transforms_of_torch_func_differentiate_and_vmap_is_refused(order):
    torch.manual_seed(0)
    layer, x = LambdaLayer(8, k=3, h=2, r=3, order=order).eval().double(), torch.randn(2, 8, 4, 4).double()
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(layer, p, (x,)).square().sum())(parameters)
    layer(x).square().sum().backward()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(found[name], p.grad)
    direction = torch.randn_like(x)
    _, slope = torch.func.jvp(layer, (x,), (direction,))
    by_difference = (layer(x + 1e-6 * direction) - layer(x - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(slope, by_difference, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"inside torch\.vmap; give it the images as one batch"):
        torch.vmap(layer)(x.unsqueeze(1))


@pytest.mark.parametrize("r, size", [(5, None), (None, 12)])
def test_export_with_any_height_and_width(r, size):
    torch.manual_seed(0)
    layer = LambdaLayer(8, k=3, h=2, r=r, size=size).eval()
    sides = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    graph = torch.export.export(layer, (torch.randn(2, 8, 6, 7),), dynamic_shapes=(sides,)).module()
    for shape in ((1, 8, 4, 4), (3, 8, 9, 5), (2, 8, 12, 12)):
        x = torch.randn(shape)
        torch.testing.assert_close(graph(x), layer(x), rtol=1e-4, atol=1e-4)


def test_one_compiled_layer_takes_images_of_several_sizes():
    torch.manual_seed(0)
    layer = LambdaLayer(8, k=3, h=2, r=5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for height, width in ((4, 4), (6, 5)):
        x = torch.randn(2, 8, height, width)
        found, expected = compiled(x), layer(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        gradients = [torch.autograd.grad(y.square().sum(), layer.table)[0] for y in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("overrides", [{}, {"layer": "axial_attention"}, {"se": (2, 3)}, {"share_embeddings": True}])
def test_a_network_of_nothing_is_filled_as_a_new_one_is(overrides):
    with torch.device("meta"):
        model = create_model("lambda_resnet_small", 10, **overrides)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    new = create_model("lambda_resnet_small", 10, **overrides).state_dict()
    ways = [[model], [m for m in model.modules() if hasattr(m, "reset_parameters")]]
    for modules in ways:  # at once, and as some trainers do it: one by one, the outer first
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.detach().fill_(float("nan") if tensor.is_floating_point() else 7)
        for module in modules:
            module.reset_parameters()
        assert all(value.isfinite().all() and (value != 7).all() for value in model.state_dict().values())
        if modules == [model]:
            found = {
                key: (value.float().mean(), value.float().std(unbiased=False))
                for key, value in model.state_dict().items()
            }
    for key, expected in new.items():
        mean, spread = found[key]
        if (expected == expected.flatten()[:1]).all():  # norms and biases
            assert mean == expected.flatten()[0] and spread == 0, key
        else:
            rough = 5 / expected.numel() ** 0.5
            assert (spread / expected.std()).item() == pytest.approx(1, abs=rough), key
            assert abs(mean - expected.mean()) < rough * expected.std(), key


def test_what_is_hidden_is_without_effect_however_large():
    torch.manual_seed(0)
    for order in ("lambda_first", "query_first"):
        layer = LambdaLayer(8, k=3, h=2, r=5, order=order).eval()
        with torch.no_grad():
            layer.project.to_qvk.weight[-3:] *= 100  # keys far apart
        x = torch.randn(2, 8, 3, 4)
        mask = torch.rand(12, 12) < 0.5
        mask[:, 7] = False
        loud = x.clone()
        loud[:, :, 1, 3] *= 50  # position 7
        seen = [n for n in range(12) if n != 7]
        quiet, found = (layer(each, mask=mask).flatten(2)[..., seen] for each in (x, loud))
        torch.testing.assert_close(found, quiet)
        assert found.abs().amax((0, 1)).min() > 0.01


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_masked_content_in_half_precision_stays_close(dtype, tolerance):
    from models.content import masked_content

    torch.manual_seed(0)
    q, keys, v = torch.randn(2, 6, 2, 3), 5 * torch.randn(2, 40, 1, 3), torch.randn(2, 40, 4)
    mask = torch.rand(6, 40) < 0.5
    for norm in ("softmax", "l2"):
        halves = (t.to(dtype) for t in (q, keys, v))
        expected = masked_content(q.to(dtype).float(), keys.to(dtype).float(), v.to(dtype).float(), mask, norm, True)
        found = masked_content(*halves, mask, norm, True)
        assert found.dtype == dtype
        assert (found.float() - expected).abs().max() < tolerance * expected.abs().max()


def unprojected(layer: LambdaLayer, weights: list[Tensor]) -> LambdaLayer:
    """The layer in eval mode without norms, its projections those given."""
    layer = layer.eval().double()
    layer.fold()
    convs = [m for m in layer.project.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for conv, weight in zip(convs, weights, strict=True):
            conv.weight.copy_(weight)
            conv.bias.zero_()
    return layer


def test_linear_attention_is_a_content_lambda():
    """Appendix D.4. One head of efficient attention with queries that are left as they are: Q (softmax(K)ᵀ V)."""
    torch.manual_seed(0)
    theirs = ATTENTION["linear_attention"](8, heads=1).double()
    q, k, v = theirs.to_qkv.weight.detach().split(8)
    ours = unprojected(LambdaLayer(8, k=8, h=1, r=1, position=False), [torch.cat([q, v, k])])
    x = torch.randn(2, 8, 3, 4).double()
    queries = F.conv2d(x, q).flatten(2)  # [2, 8, 12]
    # Theirs normalises queries over channels; a lambda is linear, so the ratio of the two is that of the queries.
    context = F.conv2d(x, k).flatten(2).softmax(2) @ F.conv2d(x, v).flatten(2).mT
    torch.testing.assert_close(ours(x).flatten(2), context.mT @ queries)
    torch.testing.assert_close(theirs(x).flatten(2), context.mT @ queries.softmax(1))


def test_squeeze_and_excite_is_a_lambda_of_depth_one():
    """Appendix D.4. A query and a value of one number per channel; the context is the channel's excitation alone."""
    torch.manual_seed(0)
    theirs = SqueezeExcite(8).double()
    one = torch.ones(1, 1, 1, 1)
    ours = unprojected(
        LambdaLayer(1, dim_context=1, k=1, h=1, r=1, position=False), [one, torch.cat([one, torch.randn(1, 1, 1, 1)])]
    )
    x = torch.randn(2, 8, 3, 4).double()
    gates = theirs.expand(theirs.reduce(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
    found = ours(x.flatten(0, 1).unsqueeze(1), gates.flatten(0, 1).unsqueeze(1))
    torch.testing.assert_close(found.view_as(x), theirs(x))


@pytest.mark.parametrize("norm", ["softmax", "l2", "none"])
@pytest.mark.parametrize("u", [1, 2])
def test_causal_content_is_content_under_a_triangle(norm, u):
    """Also where later keys are so much larger than earlier ones that a common maximum would leave nothing of these."""
    from models.content import CHUNK, causal_content, masked_content

    for n in (1, 2, CHUNK, CHUNK + 1, 3 * CHUNK - 1):
        torch.manual_seed(n)
        growing = torch.linspace(0, 900, n, dtype=torch.double)[None, :, None, None]
        keys = (30 * torch.randn(2, n, u, 4, dtype=torch.double) + growing).requires_grad_()
        q = torch.randn(2, n, 3, 4, dtype=torch.double, requires_grad=True)
        v = torch.randn(2, n * u, 5, dtype=torch.double, requires_grad=True)
        triangle = torch.ones(n, n, dtype=torch.bool).tril()
        found, expected = causal_content(q, keys, v, norm), masked_content(q, keys, v, triangle, norm, True)
        torch.testing.assert_close(found, expected)
        given = torch.randn_like(found)
        grads = [torch.autograd.grad(y, (q, keys, v), given) for y in (found, expected)]
        torch.testing.assert_close(*grads)
