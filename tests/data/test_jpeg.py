"""The part of a JPEG that a training view needs, next to what Pillow makes of the whole.

Run: pytest tests/data/test_jpeg.py
"""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipeline.augment.view import Augment, train_view
from pipeline.data import images, shards
from pipeline.data.jpeg import Jpeg, open_image, without_rows_below

BICUBIC, BILINEAR = Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def picture(width=400, height=300):
    y, x = np.mgrid[:height, :width]
    waves = [128 + 100 * np.sin(x / 17 + y / 31), 255 * x / width, 255 * y / height]
    return Image.fromarray(np.stack(waves, 2).astype(np.uint8))


def saved(image, kind="JPEG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def distance(a, b):
    return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16))


@pytest.mark.parametrize("resample", [BICUBIC, BILINEAR])
@pytest.mark.parametrize("box", [(31, 17, 181, 157), (200, 100, 260, 130), (399, 299, 400, 300), (0, 0, 400, 1)])
def test_a_crop_is_that_of_the_whole_picture(box, resample):
    data = saved(picture(), quality=90)
    ours = open_image(data, 0).resize((96, 80), resample, box)
    theirs = images.decode(data).resize((96, 80), resample, box)
    assert (ours.size, ours.mode) == (theirs.size, theirs.mode)
    assert distance(ours, theirs).max() <= 2  # the same filter, rounded at other places


@pytest.mark.parametrize("bottom", [1, 15, 16, 30, 100, 299, 300])
@pytest.mark.parametrize("options", [
    {"subsampling": "4:4:4"}, {"subsampling": "4:2:2"}, {"subsampling": "4:2:0"},
    {"progressive": True}, {"restart_marker_rows": 1}, {"comment": b"before the frame header"},
])  # fmt: skip
def test_rows_below_a_crop_are_not_decoded(options, bottom):
    for image in (picture(), picture().convert("L")):
        data = saved(image, quality=90, **options)
        part, whole = (np.asarray(images.decode(found)) for found in (without_rows_below(data, bottom), data))
        assert np.array_equal(part[:bottom], whole[:bottom])
        assert bottom <= len(part) <= min(bottom + 17, 300)


def test_a_frame_header_that_is_not_found_is_left_to_the_decoder():
    for data in (b"", b"\xff\xd8", saved(picture())[:30], b"no picture"):
        assert without_rows_below(data, 10) == data


@pytest.mark.parametrize(("side", "decoded"), [(76, (400, 300)), (75, (200, 150)), (37, (100, 75)), (18, (50, 38))])
def test_a_crop_larger_than_the_view_is_decoded_smaller(side, decoded, monkeypatch):
    seen = []
    monkeypatch.setattr(images, "finish", lambda header, of=images.finish: seen.append(of(header)) or seen[0])
    view = open_image(saved(picture(), quality=95), 0).resize((side, side), BICUBIC, (0, 0, 400, 300))
    assert seen[0].size == decoded
    assert distance(view, picture().resize((side, side), BICUBIC)).mean() < 2.5


@pytest.mark.parametrize("turn", [*range(1, 9), 9, 90])  # the last two are none: nothing is turned
@pytest.mark.parametrize("side", [16, 120])
def test_orientation_is_known_before_decoding(turn, side):
    exif = Image.Exif()
    exif[images.ORIENTATION] = turn
    data = saved(picture(), quality=95, exif=exif)
    upright = images.decode(data)
    found = open_image(data, 0)
    assert found.size == upright.size
    box = (10, 20, 250, 260)
    assert distance(found.resize((side, side), BICUBIC, box), upright.resize((side, side), BICUBIC, box)).mean() < 3


@pytest.mark.parametrize(("mode", "options"), [("L", {}), ("CMYK", {}), ("RGB", {"progressive": True})])
def test_every_kind_of_jpeg(mode, options):
    data = saved(picture().convert(mode), quality=90, **options)
    ours = open_image(data, 0).resize((50, 50), BICUBIC, (0, 0, 300, 300))
    assert distance(ours, images.decode(data).resize((50, 50), BICUBIC, (0, 0, 300, 300))).mean() < 1.5


def test_large_pictures_lie_in_several_pieces_of_memory():
    data = saved(Image.new("RGB", (2400, 2000), (200, 100, 50)), quality=80)
    ours = open_image(data, 0).resize((1300, 1300), BILINEAR, (0, 0, 2400, 2000))
    assert ours.getextrema() == tuple((value, value) for value in images.decode(data).getpixel((0, 0)))


def test_the_small_and_all_other_formats_are_decoded_outright():
    small, png = saved(picture()), saved(picture(), "PNG")
    for data, limit in ((small, 400 * 300), (png, 0)):
        found = open_image(data, limit)
        assert isinstance(found, Image.Image)
        assert np.array_equal(np.asarray(found), np.asarray(images.decode(data)))
    assert isinstance(open_image(small, 400 * 300 - 1), Jpeg)


def test_damage_is_told_when_it_is_met():
    data = saved(picture(), quality=90)
    cut = open_image(data[: len(data) // 2], 0)
    with pytest.raises(images.BadImage, match="truncated"):
        cut.resize((32, 32), BICUBIC, (0, 0, 400, 300))
    for bad, status in ((b"", "empty"), (b"no picture at all", "not_an_image"), (data[:30], "truncated")):
        with pytest.raises(images.BadImage) as error:
            open_image(bad, 0)
        assert error.value.status == status
    with pytest.raises(images.BadImage, match="too_large"):
        open_image(saved(Image.new("L", (20_000, 9_000))), 0)


def test_random_damage_is_a_bad_image_or_a_picture():
    whole = saved(picture(90, 70), quality=80, subsampling="4:2:0")
    draw, bad = np.random.default_rng(0), 0
    for _ in range(300):
        data = bytearray(whole)
        for place in draw.integers(2, 700, 4):  # most of them in the headers
            data[place] = draw.integers(256)
        try:
            view = open_image(bytes(data), 0).resize((24, 24), BICUBIC, (5, 5, 80, 60))
            assert (view.size, view.mode) == ((24, 24), "RGB")
        except images.BadImage:
            bad += 1
    assert 30 < bad < 300


def test_views_of_photos_are_those_of_their_pixels(data_root):
    """What the short cuts change, over real photos: far less than a view's noise."""
    augment, whole, means = Augment(224), [], []
    for path in sorted((data_root / "imagenet-sample").glob("*.tar"))[:1]:
        for sample, data in list(shards.stream(str(path)))[:12]:
            ours, plain = (
                train_view(image, augment, sample.index) for image in (open_image(data, 0), images.decode(data))
            )
            means.append(distance(ours, plain).mean())
            whole.append(distance(train_view(images.decode(data), augment, sample.index + 1), plain).mean())
    assert max(means) < 1
    assert np.mean(means) < 0.3
    assert np.mean(whole) > 20  # another crop
