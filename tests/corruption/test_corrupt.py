"""Corruptions against their definitions, each computed in another way here, and what all of them promise."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image
from scipy import ndimage

from pipeline.config.checks_evaluate import CORRUPTIONS as NAMES
from pipeline.corruption import blur, digital, noise, weather
from pipeline.corruption.corrupt import CORRUPTIONS, canvas, corrupt
from pipeline.corruption.strengths import PHOTOS, SMALL_PICTURES

SIZES = [(8, 8), (1, 1), (33, 17), (64, 64), (3, 60), (300, 200)]
CERTAIN = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def smooth(width: int, height: int, seed: int = 0) -> np.ndarray:
    """A picture float32 [height, width, 3] in 0..1."""
    noisy = np.random.default_rng(seed).random((height, width, 3))
    blurred = ndimage.gaussian_filter(noisy, (2, 2, 0))
    return ((blurred - blurred.min()) / np.ptp(blurred)).astype(np.float32)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray((255 * smooth(width, height, seed)).astype(np.uint8))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_every_place_names_the_same_fifteen() -> None:
    assert tuple(CORRUPTIONS) == NAMES == tuple(PHOTOS) == tuple(SMALL_PICTURES)
    assert len(NAMES) == 15 and {len(table[name]) for table in (PHOTOS, SMALL_PICTURES) for name in NAMES} == {5}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_picture_is_spoilt_in_the_same_way(name: str) -> None:
    for size in SIZES:
        pixels = canvas(picture(*size)) if min(size) > 1 else np.full((1, 1, 3), 90, np.uint8)
        for severity in (1, 5):
            found = corrupt(pixels, name, severity, 7)
            assert (found.shape, found.dtype) == (pixels.shape, np.uint8)
            assert (found == corrupt(pixels, name, severity, 7)).all()
    pixels = canvas(picture(300, 200))
    assert pixels.shape == (224, 224, 3)
    found = corrupt(pixels, name, 3, 7)
    assert (found != pixels).any()
    assert (found == corrupt(pixels, name, 3, 8)).all() == (name in CERTAIN)


@pytest.mark.parametrize("name", NAMES)
def test_severities_grow(name: str) -> None:
    pixels = canvas(picture(224, 224))
    away = [np.abs(corrupt(pixels, name, severity, 1).astype(float) - pixels).mean() for severity in range(1, 6)]
    # Snow, frost, fog and elastic change more than one strength at a time in the published tables.
    if name not in ("snow", "frost", "fog", "elastic_transform", "glass_blur"):
        assert away == sorted(away)
    assert min(away) > 0


def test_noise_has_its_moments() -> None:
    grey = np.full((400, 400, 3), 0.5, np.float32)
    found = noise.gaussian_noise(grey, 0.08, rng())
    assert (found.mean(), found.std()) == pytest.approx((0.5, 0.08), rel=0.01)
    found = noise.shot_noise(grey, 60, rng())
    assert (found.mean(), found.var()) == pytest.approx((0.5, 0.5 / 60), rel=0.02)
    found = noise.impulse_noise(grey, 0.27, rng())
    assert (found == 0).mean() == pytest.approx(0.135, rel=0.02) and (found == 1).mean() == pytest.approx(
        0.135, rel=0.02
    )


def test_zooming_is_scipys() -> None:
    for height, width in ((32, 32), (224, 224), (17, 40)):
        x = smooth(width, height)
        for factor in (1.0, 1.03, 1.11, 1.3):
            high, wide = int(np.ceil(height / factor)), int(np.ceil(width / factor))
            top, left = (height - high) // 2, (width - wide) // 2
            large = ndimage.zoom(x[top : top + high, left : left + wide], (factor, factor, 1), order=1)
            top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
            wanted = large[top : top + height, left : left + width]
            np.testing.assert_allclose(blur.zoomed(x, factor), wanted, atol=2e-5)


def test_zoom_factors_are_those_of_the_published_code() -> None:
    assert [len(some) for some in PHOTOS["zoom_blur"]] == [12, 16, 11, 13, 11]  # as numpy.arange counts
    assert [len(some) for some in SMALL_PICTURES["zoom_blur"]] == [7, 12, 16, 21, 26]


def test_motion_follows_its_line() -> None:
    dot = np.zeros((21, 21, 3), np.float32)
    dot[10, 10] = 1
    flat = blur.along(dot, 4, 2, 0)
    weights = np.exp(-(np.arange(9) ** 2) / 8)
    np.testing.assert_allclose(flat[10, 2:11, 0][::-1], weights / weights.sum(), rtol=1e-5)
    steep = blur.along(dot, 4, 2, 90)
    np.testing.assert_allclose(steep[..., 0].T, flat[..., 0], atol=1e-7)
    assert blur.along(np.full((9, 9, 3), 0.3, np.float32), 20, 15, 33) == pytest.approx(0.3)


def test_glass_moves_pixels_but_for_the_border() -> None:
    x = smooth(40, 30)
    x = np.floor(255 * x) / np.float32(255)
    found = blur.glass_blur(x, (0.01, 2, 1), rng())
    np.testing.assert_array_equal(found[:3], x[:3])
    np.testing.assert_array_equal(found[-2:], x[-2:])
    assert (found[3:-2, 3:-2] != x[3:-2, 3:-2]).any(axis=-1).mean() > 0.8
    known = {tuple(pixel) for pixel in x.reshape(-1, 3).tolist()}
    assert {tuple(pixel) for pixel in found.reshape(-1, 3).tolist()} <= known


def test_brightness_is_value_in_hsv() -> None:
    x = smooth(50, 40)
    x[:5] = 0
    hsv = rgb_to_hsv(x)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.2, 0, 1)
    np.testing.assert_allclose(weather.brightness(x, 0.2, rng()), hsv_to_rgb(hsv), atol=1e-5)


def test_contrast_keeps_means() -> None:
    x = smooth(50, 40)
    found = weather.contrast(x, 0.3, rng())
    np.testing.assert_allclose(found.mean(axis=(0, 1)), x.mean(axis=(0, 1)), rtol=1e-4)
    np.testing.assert_allclose(found.std(axis=(0, 1)), 0.3 * x.std(axis=(0, 1)), rtol=1e-3)


def test_landscapes_fill_their_range() -> None:
    for decay in (1.4, 3.0):
        found = weather.plasma(64, 64, decay, rng())
        assert (found.min(), found.max()) == (0, 1)
    rough, calm = (np.abs(np.diff(weather.plasma(256, 256, decay, rng()), axis=0)).mean() for decay in (1.4, 3.0))
    assert rough > 2 * calm


def test_the_affine_map_takes_three_points_where_it_says() -> None:
    """Of a picture of its own coordinates, what lies at the moved points is where they were."""
    rows, columns = np.mgrid[:60, :90].astype(np.float32)
    found = digital._affine(np.stack([rows, columns, rows], axis=-1), 4.0, rng(3))
    centre, side = np.array([45, 30]), 20
    before = centre + side * np.array([[1, 1], [1, -1], [-1, -1]])
    after = before + rng(3).uniform(-4, 4, before.shape)
    for (x, y), (was_x, was_y) in zip(after, before, strict=True):
        found_y, found_x = (ndimage.map_coordinates(found[..., c], [[y], [x]], order=1)[0] for c in (0, 1))
        assert (found_x, found_y) == pytest.approx((was_x, was_y), abs=1e-3)


def test_pixels_and_jpeg_are_pillows() -> None:
    image = picture(224, 224)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=7)
    assert (corrupt(np.asarray(image), "jpeg_compression", 5, 0) == np.asarray(Image.open(out))).all()
    box = Image.Resampling.BOX
    wanted = image.resize((56, 56), box).resize((224, 224), box)
    assert (corrupt(np.asarray(image), "pixelate", 5, 0) == np.asarray(wanted)).all()
