"""The memory column of LambdaNetworks, table 4, from the architecture of ResNet-50."""

from __future__ import annotations

from dataclasses import replace

import pytest

from models.family import ARCHITECTURES
from models.layer_memory import StageLayers, layer_memory, stage_layers

GIB = 2**30
RESNET_50 = stage_layers(ARCHITECTURES["hybrid_resnet_50_llll"], 224)


def test_the_stages_of_resnet_50():
    sizes = [(stage.side, stage.width, stage.count) for stage in RESNET_50]
    assert sizes == [(56, 64, 3), (28, 128, 4), (14, 256, 6), (7, 512, 3)]


@pytest.mark.parametrize("layer, settings, printed", [
    ("global_attention", {}, 122.8),
    ("axial_attention", {}, 4.82),
    ("lambda", {}, 1.92),
    ("lambda", {"k": 8}, 0.96),
    ("lambda", {"shared": True}, 0.625),
])  # fmt: skip
def test_table_4(layer, settings, printed):
    assert layer_memory(layer, RESNET_50, batch=128, **settings) / GIB == pytest.approx(printed, rel=2e-3)


def test_what_the_paper_leaves_out_by_its_own_formulas():
    positions = 3 * 56**2 + 4 * 28**2 + 6 * 14**2 + 3 * 7**2
    assert layer_memory("local_attention", RESNET_50, batch=128) == 128 * 8 * positions * 49 * 4
    assert layer_memory("lambda_convolution", RESNET_50, batch=128) == 16 * positions * 49 * 4
    linear = 3 * 64**2 + 4 * 128**2 + 6 * 256**2 + 3 * 512**2
    assert layer_memory("linear_attention", RESNET_50, batch=128) == 128 * linear // 8 * 4


def test_the_motivating_figure():
    """Section 1: one layer of 8 heads on 128 images of 64×64 takes 64 GB of maps."""
    assert layer_memory("global_attention", [StageLayers(64, 64, 1)], batch=128) == 2**36


def test_maps_grow_with_the_batch_and_embeddings_do_not():
    for layer, growth in (("global_attention", 4), ("axial_attention", 4), ("local_attention", 4), ("lambda", 1)):
        assert layer_memory(layer, RESNET_50, batch=8) == growth * layer_memory(layer, RESNET_50, batch=2)


def test_embeddings_of_the_largest_network():
    """Section 5.2 of the paper's notes: 8 lambda layers in c4 of 420 at 320, bf16, 4.88 MiB each."""
    c4 = stage_layers(ARCHITECTURES["lambda_resnet_420"], 320)[0]
    assert c4 == StageLayers(20, 256, 8)
    assert layer_memory("lambda", [c4], bytes_per_number=2) == 8 * 16 * 400 * 400 * 2
    assert layer_memory("lambda", [c4], shared=True, bytes_per_number=2) / 2**20 == pytest.approx(4.88, abs=0.005)


def test_sides_follow_stem_and_strides():
    assert [s.side for s in stage_layers(ARCHITECTURES["lambda_resnet_tiny"], 30)] == [4]
    assert [s.side for s in stage_layers(replace(ARCHITECTURES["lambda_resnet_cifar_26"], stem="small"), 30)] == [15, 8]
    assert stage_layers(ARCHITECTURES["resnet_50"], 224) == []


@pytest.mark.parametrize("layer, settings, words", [
    ("attention", {}, ["'attention'", "global_attention", "lambda_convolution"]),
    ("lambda", {"k": 0}, ["k", "at least 1", "0"]),
    ("axial_attention", {"shared": True}, ["axial_attention", "shared"]),
])  # fmt: skip
def test_bad_arguments_say_what_is_allowed(layer, settings, words):
    with pytest.raises(ValueError) as error:
        layer_memory(layer, RESNET_50, **settings)
    assert all(word in str(error.value) for word in words)
