"""Decoding whatever is in a corpus, and the one view that labelling and evaluation share."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tars import picture

from pipeline.data.images import FORMATS, STATUSES, BadImage, View, decode, load, normalise, to_array
from pipeline.data.shards import stream
from pipeline.errors import ConfigError


def saved(image: Image.Image, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def status_of(data: bytes, **options: int) -> str:
    with pytest.raises(BadImage) as failure:
        decode(data, **options)
    assert failure.value.status in STATUSES and failure.value.detail
    return failure.value.status


COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("file_format", FORMATS)
def test_formats(file_format: str) -> None:
    image = decode(picture(1, 40, 30, file_format))
    assert (image.mode, image.size) == ("RGB", (40, 30))
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(decode(picture(1, 40, 30))))
    assert difference.mean() < (12 if file_format in ("JPEG", "WEBP", "AVIF", "GIF") else 1e-9)


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("1", "PNG"), ("CMYK", "TIFF"), ("P", "GIF")],
)
def test_modes(mode: str, file_format: str) -> None:
    image = Image.fromarray(COLOURS).convert(mode)
    seen = decode(saved(image, file_format))
    assert seen.mode == "RGB"
    assert np.array_equal(np.asarray(seen), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_not_blended() -> None:
    rgba = np.dstack([COLOURS, np.zeros((6, 8), np.uint8)])
    assert np.array_equal(np.asarray(decode(saved(Image.fromarray(rgba), "PNG"))), COLOURS)
    palette = Image.fromarray(COLOURS).quantize(16)
    opaque = np.asarray(palette.convert("RGB"))
    data = saved(palette, "PNG", transparency=bytes([0, 128] + [255] * 14))
    assert np.array_equal(np.asarray(decode(data)), opaque)


def test_sixteen_bits_are_scaled() -> None:
    grey = np.array([[0, 257, 128 * 257, 255 * 257]], dtype=np.uint16)
    for file_format in ("PNG", "TIFF"):
        seen = np.asarray(decode(saved(Image.fromarray(grey), file_format)))
        assert seen[0, :, 0].tolist() == [0, 1, 128, 255] and (seen[..., 0] == seen[..., 2]).all()


def test_cmyk_jpeg() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red, green, blue = np.asarray(decode(saved(image, "JPEG"))).reshape(-1, 3).mean(0)
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.fromarray(COLOURS)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how a camera would have stored it
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for file_format in ("PNG", "TIFF"):
        seen = decode(saved(stored, file_format, exif=exif))
        assert np.array_equal(np.asarray(seen), COLOURS), file_format


def test_damaged_exif_loses_no_picture() -> None:
    image = Image.fromarray(COLOURS)
    assert decode(saved(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")).size == (8, 6)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("red", "blue")]
    for file_format in ("GIF", "WEBP", "PNG"):
        data = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
        red, _, blue = np.asarray(decode(data))[0, 0]
        assert red > 240 and blue < 15, file_format


# Bad images


@pytest.mark.parametrize("file_format", FORMATS)
def test_cut_images(file_format: str) -> None:
    data = picture(2, 120, 90, file_format)
    for part in (0.2, 0.5, 0.8):
        assert status_of(data[: int(part * len(data))]) in ("truncated", "unreadable")
    if file_format in ("JPEG", "PNG", "WEBP", "BMP"):
        assert status_of(data[: len(data) // 2]) == "truncated"


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 10) + b"IDAT" + bytes(14)


def test_reasons() -> None:
    assert status_of(b"") == "empty"
    assert status_of(b"<html>404</html>") == "not_an_image"
    assert status_of(bytes(5000)) == "not_an_image"
    assert status_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n") == "not_an_image"  # no Ghostscript
    assert status_of(png_header(60_000, 60_000)) == "too_large"
    assert status_of(png_header(14_000, 14_000)) == "too_large"
    assert status_of(picture(0, 100, 100), max_pixels=9_999) == "too_large"
    assert decode(picture(0, 100, 100), max_pixels=10_000).size == (100, 100)
    assert status_of(b"GIF89a" + b"junk") == "unreadable"


def test_random_damage_is_always_a_bad_image_or_a_picture() -> None:
    random = np.random.default_rng(3)
    for file_format in FORMATS:
        whole = np.frombuffer(picture(3, 24, 24, file_format), np.uint8)
        for _ in range(60):
            data = whole.copy()
            places = random.integers(0, len(data), 6)
            data[places] = random.integers(0, 256, 6)
            try:
                assert decode(data.tobytes(), max_pixels=1 << 22).mode == "RGB"
            except BadImage as bad:
                assert bad.status in STATUSES


# The view


def test_equal_size_is_not_resampled() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    assert np.array_equal(to_array(image, View(32, 1.0)), np.asarray(image).transpose(2, 0, 1))
    wide = Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 41, 3), dtype=np.uint8))
    assert np.array_equal(to_array(wide, View(32, 1.0)), np.asarray(wide)[:, 4:36].transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(100, 80), (81, 233), (33, 32), (20, 24), (400, 301)])
@pytest.mark.parametrize("view", [View(32), View(24, 0.95, "bilinear"), View(48, 1.0, "lanczos")])
def test_the_same_as_torchvision(size: tuple[int, int], view: View) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    transform = Compose([Resize(view.resize, InterpolationMode(view.interpolation)), CenterCrop(view.size)])
    image = decode(picture(4, *size))
    theirs = np.asarray(transform(image)).transpose(2, 0, 1).astype(int)
    ours = to_array(image, view)
    assert ours.shape == (3, view.size, view.size) and ours.dtype == np.uint8 and ours.flags.c_contiguous
    assert np.abs(ours - theirs).max() <= 1


def test_extreme_shapes_take_no_memory() -> None:
    for size in ((30_000, 1), (1, 30_000), (1, 1)):
        assert to_array(Image.new("RGB", size, "red"), View(64))[0].min() == 255


def test_scaled_decoding_changes_little_and_only_large_photos() -> None:
    view = View(32, 0.875)
    data = picture(5, 640, 480, "JPEG", quality=90)
    assert decode(data, at_least=view.at_least).size == (160, 120)
    assert decode(data, at_least=300).size == (640, 480)
    assert decode(picture(5, 640, 480), at_least=1).size == (640, 480)  # a PNG
    full = to_array(decode(data), view).astype(int)
    assert np.abs(load(data, view) - full).mean() < 1


def test_normalise() -> None:
    view = View(4, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    batch = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    mean, std = torch.tensor(view.mean).view(3, 1, 1), torch.tensor(view.std).view(3, 1, 1)
    expected = (batch / 255 - mean) / std
    torch.testing.assert_close(normalise(batch, view), expected)
    assert normalise(batch, view, torch.bfloat16).dtype == torch.bfloat16
    last = normalise(batch.contiguous(memory_format=torch.channels_last), view)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert batch.dtype == torch.uint8 and batch.max() > 1  # the input is as it was


@pytest.mark.parametrize("settings", [{"interpolation": "cubic"}, {"crop": 0.0}, {"crop": 1.5}, {"size": 0}])
def test_impossible_views(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"allowed are nearest|impossible"):
        View(**{"size": 8, **settings})


def test_real_photos(data_root: Path) -> None:
    view = View(64)
    arrays = [load(data, view) for _, data in stream(str(data_root / "imagenet-sample" / "photos-000.tar"))]
    assert len(arrays) == 50 and all(array.std() > 5 for array in arrays)
