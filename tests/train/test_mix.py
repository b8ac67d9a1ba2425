"""Mixup and CutMix: what is blended, how much, and that it depends on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.train.mixup import mix

B, SIDE = 64, 12


def marked(b=B, side=SIDE):
    """Images whose every value is their number, and targets that name them."""
    pixels = torch.arange(1.0, b + 1)[:, None, None, None].expand(b, 3, side, side).contiguous()
    return pixels, torch.eye(b)


def test_without_both_nothing_is_touched():
    pixels, targets = marked()
    mixed, blended = mix(pixels, targets, mixup=0.0, cutmix=0.0, seed=1)
    assert mixed is pixels
    assert blended is targets


@pytest.mark.parametrize(
    "kind", [{"mixup": 0.4, "cutmix": 0.0}, {"mixup": 0.0, "cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]
)
def test_a_target_says_how_much_of_whom_its_image_shows(kind):
    pixels, targets = marked()
    mixed, blended = mix(pixels, targets, **kind, seed=3)
    partners = []
    for own, (image, target) in enumerate(zip(mixed, blended, strict=True)):
        assert target.sum().item() == pytest.approx(1)
        others = [i for i in target.nonzero().flatten().tolist() if i != own]
        assert len(others) <= 1  # none: the box was too small for a pixel
        shown = sum(weight * (i + 1) for i, weight in enumerate(target.tolist()))
        assert image.mean().item() == pytest.approx(shown, rel=1e-5)
        partners += others
    assert len(partners) == len(set(partners))  # nobody is shown twice: all keep their weight in the batch
    assert len(partners) > 0.8 * B


def test_cutmix_pastes_one_box_bit_for_bit():
    torch.manual_seed(0)
    pixels, targets = torch.randn(B, 3, SIDE, SIDE).bfloat16(), torch.eye(B)
    mixed, blended = mix(pixels, targets, mixup=0.0, cutmix=1.0, seed=3)
    for own in range(B):
        foreign = (mixed[own] != pixels[own]).any(0)
        area = foreign.sum().item()
        assert blended[own, own].item() == pytest.approx(1 - area / SIDE**2, abs=1e-6)
        if area:
            rows, columns = foreign.any(1), foreign.any(0)
            assert area == rows.sum() * columns.sum()
            (partner,) = (i for i in blended[own].nonzero().flatten().tolist() if i != own)
            assert torch.equal(mixed[own][:, foreign], pixels[partner][:, foreign])


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_mixup_draws_its_weights_from_the_beta_distribution(alpha):
    pixels, targets = marked(1024, 1)
    _, blended = mix(pixels, targets, mixup=alpha, cutmix=0.0, seed=0)
    mine = blended.diagonal().double()
    assert mine.mean().item() == pytest.approx(0.5, abs=0.05)
    assert mine.var().item() == pytest.approx(0.25 / (2 * alpha + 1), rel=0.1)


def test_cutmix_cuts_off_the_drawn_area_but_for_the_border():
    _, blended = mix(torch.zeros(512, 1, 96, 96), torch.eye(512), mixup=0.0, cutmix=1.0, seed=0)
    theirs = 1 - blended.diagonal().double()
    # A side √(1-λ) whose centre is anywhere loses a quarter of its length to each border: E[u(1-√u/4)²] for u in 0 … 1.
    assert theirs.mean().item() == pytest.approx(1 / 2 - 1 / 5 + 1 / 48, abs=0.04)


def test_with_both_each_image_gets_one_of_them():
    pixels, targets = torch.rand(B, 3, SIDE, SIDE), torch.eye(B)
    mixed, blended = mix(pixels, targets, mixup=1.0, cutmix=1.0, seed=1)
    whole = [(mixed[i] != pixels[i]).float().mean().item() > 0.99 for i in range(B)]
    boxed = [0 < (mixed[i] != pixels[i]).float().mean().item() < 0.99 for i in range(B)]
    assert sum(whole) > B / 4
    assert sum(boxed) > B / 4
    assert not any(w and blended[i, i] == 1 for i, w in enumerate(whole))


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    pixels, targets = torch.rand(8, 3, SIDE, SIDE), torch.rand(8, 4)
    first = mix(pixels, targets, mixup=0.4, cutmix=1.0, seed=2**63 + 5)
    torch.manual_seed(2), np.random.seed(2)
    again, other = (mix(pixels, targets, mixup=0.4, cutmix=1.0, seed=seed) for seed in (2**63 + 5, 6))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])


def test_bytes_are_blended_and_rounded():
    pixels, targets = marked(32, 4)
    mixed, blended = mix(pixels.to(torch.uint8), targets, mixup=1.0, cutmix=0.0, seed=5)
    exact, same = mix(pixels, targets, mixup=1.0, cutmix=0.0, seed=5)
    assert mixed.dtype == torch.uint8
    assert torch.equal(mixed, exact.round().to(torch.uint8))
    assert torch.equal(blended, same)


def test_an_image_alone_stays_as_it_is():
    pixels, targets = marked(1)
    assert mix(pixels, targets, mixup=1.0, cutmix=1.0, seed=0)[0] is pixels


def test_weights_travel_with_their_image():
    pixels, _ = marked(2, 4)
    targets = torch.tensor([[1.0, 0.0], [0.0, 0.25]])  # the second image counts a quarter
    _, blended = mix(pixels, targets, mixup=1.0, cutmix=0.0, seed=4)
    kept = blended[0, 0].item()
    assert blended[0, 1].item() == pytest.approx(0.25 * (1 - kept))
    assert blended[1, 1].item() / 0.25 + blended[1, 0].item() == pytest.approx(1)
