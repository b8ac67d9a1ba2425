"""Everything that runs on a training device, on a GPU that is not there: torch follows shapes and devices alone.

A tensor that is made on the wrong device fails here, on any machine.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from models import LambdaLayer, create_model, list_models
from models.attention import ATTENTION
from pipeline.augment.noise import Augment
from pipeline.augment.on_device import augment
from pipeline.augment.randaugment import KINDS, WIDTH
from pipeline.data import images
from pipeline.data.images import View
from pipeline.labelling.teacher import Teacher
from pipeline.train.loss import batch_loss, weigh
from pipeline.train.mixup import mix
from pipeline.train.scores import Scores
from tests.models.test_uses import LAYERS

CUDA = torch.device("cuda", 0)
VIEW = View(32)
QUICK: dict[str, dict[str, Any]] = {
    "lambda_resnet_50": {"depths": (1, 1, 3, 1)},
    "resnet_101_se": {"depths": (1, 1, 1, 1)},
    "hybrid_resnet_50_ccll": {"depths": (1, 1, 1, 1), "u": 2},
    "lambda_resnet_small": {},
    "lambda_resnet_cifar_14": {},
}
MASKED = [{"key_norm": norm, "order": order} for norm in ("softmax", "l2") for order in ("lambda_first", "query_first")]


@pytest.fixture(autouse=True)
def a_gpu() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True):  # what comes from numpy lies on the host
        yield


def there(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=CUDA)


def built(make: Callable[..., nn.Module], *arguments: Any, **options: Any) -> nn.Module:
    with torch.device(CUDA):
        return make(*arguments, **options)


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device == CUDA


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("training", [True, False])
def test_layers(make, training):
    layer = built(make).train(training)
    for batch in (1, 2):
        assert on_gpu(layer(there(batch, 8, 4, 5)))
    with torch.no_grad():
        assert on_gpu(layer(there(2, 8, 4, 5)))


@pytest.mark.parametrize("variant", MASKED)
@pytest.mark.parametrize("context", [None, (3, 3), (4, 5)])
def test_masks_and_contexts(variant, context):
    layer = built(LambdaLayer, 8, k=3, h=2, r=5, dim_context=None if context is None else 6, **variant)
    given = [there(2, 8, 4, 5), *([] if context is None else [there(2, 6, *context)])]
    keys = 20 if context is None else context[0] * context[1]
    assert on_gpu(layer(*given, mask=there(20, keys, dtype=torch.bool)))
    if context is not None:
        assert on_gpu(layer(*given))


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in list_models()]
)
def test_members(name):
    model = built(create_model, name, 10, **QUICK.get(name, {}))
    for network in (model, model.eval()):
        assert on_gpu(network(there(2, 3, 64, 64)))


@pytest.mark.parametrize("layer", ATTENTION)
def test_members_with_attention(layer):
    assert on_gpu(built(create_model, "lambda_resnet_tiny", 10, layer=layer)(there(2, 3, 16, 24)))


class Drawn:
    """A tensor of the host whose numbers can be read all the same."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers, self.shape = numbers, numbers.shape

    def numpy(self) -> np.ndarray:
        return self.numbers

    def to(self, device: torch.device, non_blocking: bool) -> torch.Tensor:
        return torch.from_numpy(self.numbers).to(device, non_blocking=non_blocking)


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation(kind):
    operations = np.zeros((3, 1, WIDTH), np.float32)
    operations[:, 0, 0] = KINDS.index(kind)
    settings = Augment(32, policy="rand-m9-n1", on_device=True)
    assert on_gpu(augment(there(3, 3, 32, 32, dtype=torch.uint8), settings, Drawn(operations)))


def test_a_step_of_training():
    pixels = there(4, 3, 32, 32, dtype=torch.uint8)
    targets = weigh(there(4, 10), there(4, dtype=torch.uint8), 0.5)
    inputs, targets = mix(images.normalise(pixels, VIEW, torch.bfloat16), targets, mixup=0.2, cutmix=1.0, seed=3)
    assert on_gpu(inputs) and on_gpu(targets) and inputs.dtype == torch.bfloat16
    model = built(create_model, "lambda_resnet_tiny", 10, stochastic_depth=0.2, dropout=0.1)
    assert on_gpu(batch_loss(model(inputs.float()), targets))


def test_evaluation():
    scores = Scores(10, CUDA)
    scores.add_bad(1)
    scores.add(there(4, 10), there(4, dtype=torch.int64))
    assert on_gpu(scores.sums)


@pytest.mark.parametrize("flip", [False, True])
def test_the_teacher(flip):
    model = built(create_model, "lambda_resnet_tiny", 10).eval()
    teacher = Teacher(model, VIEW, CUDA, torch.bfloat16, temperature=1.5, flip=flip)
    probs = teacher.probabilities(images.normalise(there(4, 3, 32, 32, dtype=torch.uint8), VIEW))
    assert on_gpu(probs) and probs.dtype == torch.float32


def test_what_is_made_on_the_wrong_device_fails_here():
    class Wrong(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.zeros(x.shape[1:])

    with pytest.raises(RuntimeError, match="device"):
        copy.deepcopy(Wrong())(there(2, 3))
