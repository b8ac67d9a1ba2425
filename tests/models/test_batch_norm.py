"""Gradients of batch norm at any layout of input and gradient, against its formula in double precision."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from models import LambdaLayer, create_model
from models.batch_norm import BatchNorm2d
from models.blocks import conv_bn
from models.contraction import ORDERS

LAYOUTS = ("rows first", "channels last", "transposed", "meaningless stride", "slice", "slice of channels last")


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x in another layout of memory."""
    last = x.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return x.flatten(2).mT.contiguous().mT.unflatten(2, x.shape[2:])
    if layout == "meaningless stride":
        return torch.as_strided(last, x.shape, (1, *last.stride()[1:])) if len(x) == 1 else last
    if layout == "slice":
        return torch.cat([x, x], 1)[:, : x.shape[1]]
    if layout == "slice of channels last":
        return torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, : x.shape[1]]
    return last if layout == "channels last" else x


def by_formula(norm: nn.BatchNorm2d, x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient at x, by torch's derivative of the formula."""
    x = x.detach().double().contiguous().requires_grad_()
    mean, var = (
        (x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True))
        if norm.training
        else (t.double()[:, None, None] for t in (norm.running_mean, norm.running_var))
    )
    y = (x - mean) * (var + norm.eps).rsqrt() * norm.weight.double()[:, None, None]
    y.backward(gradient.double().contiguous())
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(4, 3, 5), (16, 1, 7), (4, 7, 1), (1, 3, 3)])
def test_gradients_do_not_depend_on_layouts(batch, training, shape):
    torch.manual_seed(0)
    norm = BatchNorm2d(shape[0]).train(training)
    nn.init.uniform_(norm.weight, 0.5, 2)
    for of_input, of_gradient in itertools.product(LAYOUTS, LAYOUTS):
        x = laid_out(torch.randn(batch, *shape), of_input).requires_grad_()
        gradient = laid_out(torch.randn(batch, *shape), of_gradient)
        norm(x).backward(gradient)
        expected = by_formula(norm, x, gradient)
        torch.testing.assert_close(
            x.grad.double(), expected, rtol=1e-3, atol=1e-4, msg=lambda m, a=of_input, b=of_gradient: f"{a}, {b}: {m}"
        )


def gradients(model: nn.Module, x: Tensor, weights: Tensor, transpose: bool) -> list[Tensor]:
    y = model(x)
    loss = (y.flatten(2).mT * weights.flatten(2).mT).sum() if transpose else (y * weights).sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("context", [None, 6])
def test_a_lambda_layer_learns_from_one_image_as_from_two_of_it(layout, order, context):
    torch.manual_seed(1)
    layer = LambdaLayer(8, dim_context=context, k=3, h=2, r=5, order=order).double()
    given = [torch.randn(1, n, 4, 3).double() for n in (8, *([] if context is None else [context]))]
    weights = torch.randn(1, 8, 4, 3).double()
    found = []
    for copies in (1, 2):
        inputs = [x.expand(copies, -1, -1, -1).contiguous(memory_format=layout) for x in given]
        loss = (layer(*inputs).flatten(2).mT * weights.flatten(2).mT).sum() / copies
        found.append(torch.autograd.grad(loss, list(layer.parameters())))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_transposes_the_features_of_one_image_gets_their_gradients(layout):
    torch.manual_seed(2)
    pyramid = create_model("lambda_resnet_tiny", features_only=True).double()
    for module in pyramid.modules():
        if isinstance(module, BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1)
    for part in (conv_bn(3, 8, 3, act=False).double(), nn.Sequential(pyramid.stem, pyramid.stages)):
        x = torch.randn(1, 3, 12, 10).double().contiguous(memory_format=layout)
        weights = torch.randn_like(part(x))
        plain, transposed = (gradients(part, x, weights, transpose) for transpose in (False, True))
        for a, b in zip(plain, transposed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_every_norm_of_the_family_is_guarded_and_starts_again_at_its_scale():
    model = create_model("lambda_resnet_small", 10, se=(2,))
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and {type(norm) for norm in norms} == {BatchNorm2d}
    before = [norm.weight.detach().clone() for norm in norms]
    for norm in norms:
        nn.init.normal_(norm.weight)
        norm.reset_parameters()
    assert all(torch.equal(norm.weight, old) for norm, old in zip(norms, before, strict=True))
    assert {float(old[0]) for old in before} == {0.0, 1.0}
