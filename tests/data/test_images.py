"""Decoding whatever is in a corpus, and the one view that labelling and evaluation share."""

from __future__ import annotations

import io
import multiprocessing
import os
import resource
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.data import images
from pipeline.data.images import FORMATS, STATUSES, BadImage, View, decode, load, normalise, to_array
from pipeline.data.shards import stream
from pipeline.errors import ConfigError
from tests.data.tars import picture


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


def pixels(data: bytes, **options: int) -> np.ndarray:
    """What `decode` gives, int [h, w, 3]."""
    return np.asarray(decode(data, **options)).astype(int)


SMOOTH = np.asarray(Image.open(io.BytesIO(picture(1, 40, 30)))).astype(int)


@pytest.mark.parametrize("file_format", FORMATS)
def test_formats(file_format: str) -> None:
    seen = pixels(picture(1, 40, 30, file_format))
    assert seen.shape == SMOOTH.shape
    allowed = {"JPEG": 4.0, "WEBP": 4.0, "AVIF": 4.0, "GIF": 12.0}.get(file_format, 0.0)  # a GIF has 256 colours
    assert np.abs(seen - SMOOTH).mean() <= allowed


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
def test_jpeg_as_torchvision_decodes_it(options: dict[str, Any]) -> None:
    from torchvision.io import ImageReadMode, decode_jpeg

    for image in (Image.fromarray(SMOOTH.astype(np.uint8)), Image.fromarray(SMOOTH[..., 0].astype(np.uint8))):
        data = saved(image, "JPEG", **options)
        theirs = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
        assert np.array_equal(pixels(data), theirs.permute(1, 2, 0).numpy())


def test_webp_and_gif_as_torchvision_decodes_them() -> None:
    from torchvision.io import decode_gif, decode_webp

    for file_format, theirs in (("WEBP", decode_webp), ("GIF", decode_gif)):
        data = picture(2, 40, 30, file_format)
        their = theirs(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        assert np.array_equal(pixels(data), their.permute(1, 2, 0).numpy()), file_format
    assert np.array_equal(pixels(saved(Image.fromarray(COLOURS), "WEBP", lossless=True)), COLOURS)


def png(width: int, height: int, depth: int, colour: int, rows: bytes, before: bytes = b"") -> bytes:
    """A PNG by hand: `rows` are the raw scanlines, each with its filter byte, `before` chunks ahead of the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_grey_of_few_bits(depth: int) -> None:
    levels = (1 << depth) - 1
    values = np.arange(8) * levels // 7
    packed = np.packbits(((values[:, None] >> np.arange(depth - 1, -1, -1)) & 1).astype(np.uint8))
    seen = pixels(png(8, 1, depth, 0, b"\0" + packed.tobytes()))
    assert seen[0].tolist() == [[255 * value // levels] * 3 for value in values.tolist()]


def test_palette() -> None:
    table = np.random.default_rng(1).integers(0, 256, (16, 3), dtype=np.uint8)
    places = np.random.default_rng(2).integers(0, 16, (1, 20), dtype=np.uint8)
    data = png(20, 1, 8, 3, b"\0" + places.tobytes(), chunk(b"PLTE", table.tobytes()))
    assert np.array_equal(pixels(data), table[places])
    shown = Image.fromarray(places)
    shown.putpalette(table.tobytes())
    for file_format in ("GIF", "BMP", "TIFF"):
        assert np.array_equal(pixels(saved(shown, file_format)), table[places]), file_format


def test_what_is_transparent_shows_white() -> None:
    alpha = np.linspace(0, 255, 48).astype(int).reshape(6, 8, 1)
    over_white = (COLOURS * alpha + 255 * (255 - alpha)) / 255
    rgba = Image.fromarray(np.dstack([COLOURS, alpha]).astype(np.uint8))
    for file_format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert np.abs(pixels(saved(rgba, file_format, **options)) - over_white).max() <= 0.51, file_format
    grey = Image.fromarray(np.dstack([COLOURS[..., :1], alpha]).astype(np.uint8), "LA")
    assert np.abs(pixels(saved(grey, "PNG")) - over_white[..., :1]).max() <= 0.51
    opaque = Image.fromarray(np.dstack([COLOURS, np.full((6, 8), 255, np.uint8)]))
    assert np.array_equal(pixels(saved(opaque, "PNG")), COLOURS)


def test_transparent_palettes_and_colours() -> None:
    table, alpha = np.array([[0, 0, 0], [200, 100, 0], [10, 20, 30]]), np.array([0, 128, 255])
    data = png(
        3, 1, 8, 3, b"\0\0\1\2", chunk(b"PLTE", table.astype(np.uint8).tobytes()) + chunk(b"tRNS", b"\0\x80\xff")
    )
    expected = (table * alpha[:, None] + 255 * (255 - alpha[:, None])) / 255
    assert np.abs(pixels(data)[0] - expected).max() <= 0.51
    keyed = png(2, 1, 8, 2, b"\0" + bytes([1, 2, 3, 9, 9, 9]), chunk(b"tRNS", bytes([0, 1, 0, 2, 0, 3])))
    assert pixels(keyed)[0].tolist() == [[255, 255, 255], [9, 9, 9]]
    shown = Image.fromarray(np.array([[0, 1]], np.uint8))
    shown.putpalette([0, 0, 0, 5, 6, 7])
    assert pixels(saved(shown, "GIF", transparency=0))[0].tolist() == [[255, 255, 255], [5, 6, 7]]


def test_sixteen_bits_are_scaled() -> None:
    grey = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.floor(grey / 257 + 0.5)
    for file_format in ("PNG", "TIFF"):
        seen = pixels(saved(Image.fromarray(grey), file_format))
        assert np.array_equal(seen, np.repeat(expected[..., None], 3, 2)), file_format
    values = np.array([[0, 257, 300, 33_000, 65_535, 128]], ">u2")
    for colour, channels in ((2, 3), (4, 2), (6, 4)):
        data = png(6 // channels, 1, 16, colour, b"\0" + values[:, : 6 // channels * channels].tobytes())
        found = values[:, : 6 // channels * channels].reshape(-1, channels) / 257
        alpha = found[:, -1:] / 255 if colour >= 4 else 1.0
        expected = found[:, : 3 if channels > 2 else 1] * alpha + 255 * (1 - alpha)
        assert np.abs(pixels(data)[0] - expected).max() <= 1.6, colour  # Pillow keeps the upper byte
    assert pixels(saved(Image.fromarray(np.array([[-5, 257, 70_000]], np.int32)), "TIFF"))[0, :, 0].tolist() == [
        0,
        1,
        255,
    ]


def test_floating_point_pixels_are_refused() -> None:
    assert status_of(saved(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")) == "unreadable"


def test_cmyk() -> None:
    inks = np.asarray(Image.fromarray(COLOURS).resize((64, 48)).convert("CMYK")).astype(int)
    inks[..., 3] = np.arange(64) * 2
    image = Image.fromarray(inks.astype(np.uint8), "CMYK")
    expected = (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255
    assert np.abs(pixels(saved(image, "TIFF")) - expected).max() <= 1
    assert np.abs(pixels(saved(image, "JPEG", quality=100, subsampling=0)) - expected).mean() < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = Image.fromarray(COLOURS)
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how a camera would have stored it
    stored = upright if back is None else upright.transpose(Image.Transpose(back))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for file_format, options in (("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(pixels(saved(stored, file_format, exif=exif, **options)), COLOURS), file_format
    big = Image.fromarray(COLOURS).resize((64, 48), Image.Resampling.NEAREST)
    stored = big if back is None else big.transpose(Image.Transpose(back))
    for file_format in {"JPEG", "AVIF"} & set(FORMATS):
        lossy = {"quality": 100, "subsampling": "4:4:4", "exif": exif.tobytes()}
        assert np.abs(pixels(saved(stored, file_format, **lossy)) - np.asarray(big)).mean() < 4, file_format


def test_scaled_decoding_keeps_the_orientation() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(SMOOTH.astype(np.uint8)).resize((640, 480))
    seen = decode(saved(stored, "JPEG", exif=exif), at_least=100)
    assert seen.size == (120, 160)
    expected = np.asarray(stored.rotate(-90, expand=True).resize((120, 160))).astype(int)
    assert np.abs(np.asarray(seen) - expected).mean() < 3


def test_damaged_exif_loses_no_picture() -> None:
    image = Image.fromarray(COLOURS)
    assert decode(saved(image, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")).size == (8, 6)


def test_first_frame_of_an_animation() -> None:
    for file_format in {"GIF", "WEBP", "PNG", "AVIF", "TIFF", "MPO"} & {*FORMATS, "MPO"}:
        frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
        data = saved(frames[0], file_format, save_all=True, append_images=frames[1:])
        red, _, blue = np.asarray(decode(data))[0, 0]
        assert red > 240 and blue < 15, file_format


# Bad images


@pytest.mark.parametrize("file_format", FORMATS)
def test_cut_images(file_format: str) -> None:
    data = picture(2, 120, 90, file_format)
    for part in (0.2, 0.5, 0.8):
        assert status_of(data[: int(part * len(data))]) in ("truncated", "unreadable")
    if file_format != "TIFF":
        assert status_of(data[: len(data) // 2]) == "truncated"


def test_reasons() -> None:
    assert status_of(b"") == "empty"
    assert status_of(b"<html>404</html>") == "not_an_image"
    assert status_of(bytes(5000)) == "not_an_image"
    assert status_of(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n") == "not_an_image"  # no Ghostscript
    assert status_of(png(60_000, 60_000, 8, 2, b"")) == "too_large"
    assert status_of(png(14_000, 14_000, 8, 2, b"")) == "too_large"
    assert status_of(picture(0, 100, 100), max_pixels=9_999) == "too_large"
    assert decode(picture(0, 100, 100), max_pixels=10_000).size == (100, 100)
    assert status_of(b"GIF89a" + b"junk") == "unreadable"


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "LA", "I;16", "CMYK", "1"])
def test_no_picture_takes_more_memory_than_is_said_beforehand(mode: str) -> None:
    """By the growth of a forked process while it decodes 3000 x 3000 pixels."""
    data = io.BytesIO()
    Image.new(mode, (3000, 3000)).save(data, "TIFF" if mode == "CMYK" else "PNG")
    said = images.memory_of(Image.open(data))
    assert status_of(data.getvalue(), max_bytes=said - 1) == "too_large"
    receive, send = multiprocessing.Pipe(duplex=False)
    if (child := os.fork()) == 0:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        decode(data.getvalue(), max_bytes=said)
        send.send(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
        os._exit(0)
    os.waitpid(child, 0)
    assert receive.recv() <= said + (16 << 20)


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


SIZES = [(100, 80), (81, 233), (33, 32), (20, 24), (400, 301), (500, 60)]
VIEWS = [View(32), View(24, 0.95, "bilinear"), View(48, 1.0, "lanczos"), View(16, 1.0, "bicubic")]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("view", VIEWS)
def test_the_same_as_torchvision(size: tuple[int, int], view: View) -> None:
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    transform = Compose([Resize(view.resize, InterpolationMode(view.interpolation)), CenterCrop(view.size)])
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    for image, allowed in ((decode(picture(4, *size)), 1), (noise, 2)):
        theirs = np.asarray(transform(image)).transpose(2, 0, 1).astype(int)
        ours = to_array(image, view)
        assert ours.shape == (3, view.size, view.size) and ours.dtype == np.uint8 and ours.flags.c_contiguous
        difference = np.abs(ours - theirs)
        if view.interpolation == "lanczos":  # the part that stays is resized alone
            difference = difference[:, 4:-4, 4:-4]
        assert difference.max() <= allowed


def test_the_same_as_the_formula() -> None:
    """Cubic convolution (Keys, a = -0.5) widened to the scale, in float64."""
    view, (width, height) = View(32), (150, 100)
    picture = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    wide, high = int(view.resize * width / height), view.resize
    expected = weights(height, high) @ picture.astype(float).transpose(2, 0, 1) @ weights(width, wide).T
    left, top = round((wide - 32) / 2), round((high - 32) / 2)
    expected = expected[:, top : top + 32, left : left + 32].clip(0, 255)
    assert np.abs(to_array(Image.fromarray(picture), view) - expected).max() <= 2


def test_a_picture_in_several_pieces_of_memory() -> None:
    large = Image.fromarray(SMOOTH.astype(np.uint8)).resize((2600, 2200))  # 22 MB, and Pillow's blocks have 16
    theirs = np.asarray(large.resize((63, 54), Image.Resampling.BICUBIC)).transpose(2, 0, 1).astype(int)
    assert np.abs(to_array(large, View(54, 1.0)) - theirs[:, :, 4:58]).max() <= 1


def test_large_pictures_are_resized_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    quick = to_array(noise, View(48)).astype(int)
    monkeypatch.setattr(images, "COPIED", 0)
    sparing = to_array(noise, View(48))
    assert np.abs(quick - sparing)[:, 4:-4, 4:-4].max() <= 2 and np.abs(quick - sparing).max() <= 16


def weights(source: int, target: int) -> np.ndarray:
    """float64 [target, source]."""
    scale = source / target
    x = np.abs((np.arange(source) + 0.5)[None] - scale * (np.arange(target) + 0.5)[:, None]) / max(scale, 1)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    kernel: np.ndarray = np.where(x < 1, near, np.where(x < 2, far, 0))
    return kernel / kernel.sum(1, keepdims=True)


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
