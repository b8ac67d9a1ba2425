"""Where images are placed on the canvas, and that boxes and masks go with them."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pipeline.augment.jitter import Jitter, place, place_boxes, place_pixels

CANVAS = 64


@pytest.mark.parametrize("size", [(100, 40), (40, 100), (64, 64), (17, 9)])
def test_boxes_and_masks_go_with_the_pixels(size):
    width, height = size
    drawn = np.random.RandomState(0)
    for seed in range(60):
        wide, high = drawn.randint(4, max(5, width // 2)), drawn.randint(3, max(4, height // 2))
        x, y = drawn.randint(0, width - wide + 1), drawn.randint(0, height - high + 1)
        mask = np.zeros((height, width), np.uint8)
        mask[y : y + high, x : x + wide] = 1
        placement = place(width, height, Jitter(CANVAS), seed)
        [[left, top, right, bottom]] = place_boxes(
            np.array([[x, y, x + wide, y + high]], np.float32), width, height, placement
        )
        found = place_pixels(Image.fromarray(mask), placement, (0,), smooth=False)
        pixels = place_pixels(Image.fromarray(mask * 255).convert("RGB"), placement, (9, 9, 9))
        if right - left < 2 or bottom - top < 2:
            continue
        inside = found[int(np.ceil(top)) : int(bottom), int(np.ceil(left)) : int(right)]
        assert inside.size == 0 or inside.mean() > 0.9
        assert found.sum() <= (right - left + 2) * (bottom - top + 2)
        shown_wide, shown_high = placement.shown
        assert (pixels[shown_high:] == 9).all() and (pixels[:, shown_wide:] == 9).all()


def test_a_placement_is_a_function_of_its_seed_and_spreads_over_the_sizes():
    found = [place(100, 50, Jitter(CANVAS), seed) for seed in range(400)]
    assert found == [place(100, 50, Jitter(CANVAS), seed) for seed in range(400)]
    scales = np.array([one.width / CANVAS for one in found])
    assert 0.1 <= scales.min() < 0.2 and 1.9 < scales.max() <= 2.01 and 0.9 < scales.mean() < 1.2
    assert 0.4 < np.mean([one.flip for one in found]) < 0.6
    assert not any(one.left or one.top for one in found if one.width <= CANVAS)


def test_without_jitter_an_image_fills_the_canvas():
    one = place(CANVAS, CANVAS // 2, Jitter(CANVAS, 1.0, 1.0, 0.0), 5)
    assert (one.width, one.height, one.left, one.top, one.flip) == (CANVAS, CANVAS // 2, 0, 0, False)
    picture = np.random.RandomState(0).randint(0, 256, (CANVAS // 2, CANVAS, 3)).astype(np.uint8)
    placed = place_pixels(Image.fromarray(picture), one, (1, 2, 3))
    assert np.array_equal(placed[: CANVAS // 2], picture) and (placed[CANVAS // 2 :] == (1, 2, 3)).all()
