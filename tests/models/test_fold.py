"""Folding batch norms changes the number of passes, not the function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from models import LambdaLayer, create_model
from models.fold import fold_batch_norms


def used(name: str, **overrides: object) -> nn.Module:
    """A model whose norms all do something."""
    torch.manual_seed(0)
    model = create_model(name, 10, **overrides)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1)
            nn.init.normal_(norm.bias, std=0.2)
            nn.init.normal_(norm.running_mean, std=0.2)
            nn.init.uniform_(norm.running_var, 0.5, 2)
    return model


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.parametrize("name, overrides", [
    ("lambda_resnet_medium", {}),
    ("lambda_resnet_small", {"stem": "d", "se": (2, 3), "u": 2}),
    ("lambda_resnet_small", {"stem": "vanilla", "shortcut": "conv", "layer": "axial_attention"}),
])  # fmt: skip
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_the_folded_copy_answers_alike(name, overrides, dtype, tolerance):
    model = used(name, **overrides).to(dtype)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = fold_batch_norms(model)
    x = torch.randn(3, 3, 18, 23, dtype=dtype)
    expected = model.eval()(x)
    torch.testing.assert_close(folded(x) / expected.std(), expected / expected.std(), rtol=tolerance, atol=tolerance)
    assert not folded.training and norms(folded) < norms(model) / 3
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_only_the_norm_after_a_lambda_is_left():
    folded = fold_batch_norms(used("lambda_resnet_medium", lambdas={}))
    assert norms(folded) == 0
    folded = fold_batch_norms(used("lambda_resnet_medium"))
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert [name for name in left if "mix.0" not in name] == [
        "stages.1.1.mix.1",
        "stages.2.0.mix.1",
        "stages.2.1.mix.1",
    ]


def test_a_layer_folds_itself():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x))

        def fold(self) -> None:
            self.conv = nn.utils.fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()

    model = nn.Sequential(Scaled(), nn.ReLU())
    nn.init.uniform_(model[0].norm.running_var, 0.5, 2)
    folded, x = fold_batch_norms(model), torch.randn(2, 3, 4, 4)
    assert norms(folded) == 0 and norms(model) == 1
    torch.testing.assert_close(folded(x), model.eval()(x))


def test_norms_that_workers_share_are_folded_too():
    model = used("lambda_resnet_small", stem="d")
    plain = fold_batch_norms(model)
    synchronised = fold_batch_norms(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    x = torch.randn(2, 3, 18, 23)
    assert torch.equal(synchronised(x), plain(x))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(6, track_running_stats=False), nn.InstanceNorm2d(6, affine=True)])
def test_a_lambda_layer_refuses_to_fold_what_is_no_scale(norm):
    layer = LambdaLayer(4, k=1, h=2, r=3)
    layer.project.norm_qv = norm
    with pytest.raises(ValueError, match=f"{type(norm).__name__}, which cannot be folded"):
        layer.fold()


def test_what_computes_more_than_a_convolution_and_a_norm_stays_as_it_is():
    """Layers of timm's: a norm with an activation in it, a convolution that standardises its weights."""
    layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    pairs = [
        (nn.Conv2d(3, 4, 1), layers.BatchNormAct2d(4)),
        (layers.StdConv2d(3, 4, 1), nn.BatchNorm2d(4)),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)),
        (nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
    ]
    x = torch.randn(2, 3, 5, 5)
    for conv, norm in pairs:
        if norm.running_mean is not None:
            nn.init.normal_(norm.running_mean)
        model = nn.Sequential(conv, norm).eval()
        torch.testing.assert_close(fold_batch_norms(model)(x), model(x))
