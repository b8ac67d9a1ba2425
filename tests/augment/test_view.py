"""The training view: a pure function of image, settings and seed that leaves every generator alone.

Run: pytest tests/augment/test_view.py
"""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.augment import randaugment
from pipeline.augment.view import Affine, Augment, crop_box, matrix, seeded_view, train_view, undisturbed
from pipeline.errors import ConfigError

PAPER = "rand-m15-mmax15-n2-p1"
PAPERS_OPERATIONS = {
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness",
    "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd",
}  # fmt: skip


def picture(width=40, height=30):
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x * y) % 256], 2).astype(np.uint8))


def states():
    return random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()


@pytest.mark.parametrize("settings", [
    {}, {"policy": PAPER}, {"policy": "rand-m9-n3-mstd0.5-inc1", "interpolation": "random"},
    {"affine": Affine(10, 0.1, (0.8, 1.2), 10)}, {"policy": "rand-m5-tweights"},
    {"shift": 0.5, "cutout": 0.25}, {"shift": 0.5, "policy": PAPER, "cutout": 0.5},
])  # fmt: skip
def test_a_view_depends_on_the_seed_alone(settings):
    augment = Augment(size=16, **settings)
    views = [train_view(picture(), augment, seed) for seed in range(30)]
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = states()
    again = [train_view(picture(), augment, seed) for seed in range(30)]
    assert states() == before
    assert all(np.array_equal(a, b) for a, b in zip(views, again, strict=True))
    assert len({view.tobytes() for view in views}) == 30
    assert views[0].shape == (3, 16, 16)
    assert views[0].dtype == np.uint8


def test_views_do_not_depend_on_those_before_them():
    augment = Augment(size=16, policy=PAPER)
    with undisturbed():
        forward = [seeded_view(picture(), augment, seed) for seed in range(10)]
        backward = [seeded_view(picture(), augment, seed) for seed in reversed(range(10))][::-1]
    assert all(np.array_equal(a, b) for a, b in zip(forward, backward, strict=True))


def test_all_64_bits_of_the_seed_count():
    augment = Augment(size=8)
    assert not np.array_equal(train_view(picture(), augment, 5), train_view(picture(), augment, 5 + (1 << 63)))


def test_without_noise_the_image_comes_through():
    image = picture(16, 16)
    view = train_view(image, Augment(size=16, scale=(1, 1), ratio=(1, 1), flip=0), 0)
    assert np.array_equal(view, np.asarray(image).transpose(2, 0, 1))


def test_flip_happens_as_often_as_asked():
    image = picture(16, 16)
    augment = Augment(size=16, scale=(1, 1), ratio=(1, 1), flip=0.25)
    flipped = [
        not np.array_equal(train_view(image, augment, seed), np.asarray(image).transpose(2, 0, 1))
        for seed in range(400)
    ]
    assert 0.18 < np.mean(flipped) < 0.32


def test_crops_are_inside_and_as_torchvision_draws_them():
    from torchvision.transforms import RandomResizedCrop

    augment, rng = Augment(size=8), random.Random(0)
    boxes = [crop_box((400, 300), augment, rng) for _ in range(2000)]
    assert all(0 <= l < r <= 400 and 0 <= t < b <= 300 for l, t, r, b in boxes)  # noqa: E741
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(torch.empty(3, 300, 400), [0.08, 1], [3 / 4, 4 / 3]) for _ in range(2000)]
    ours = np.array([(t, l, b - t, r - l) for l, t, r, b in boxes])  # noqa: E741
    for quantile in (0.1, 0.5, 0.9):
        gap = np.quantile(ours, quantile, axis=0) - np.quantile(theirs, quantile, axis=0)
        assert np.abs(gap).max() < 16  # pixels of 300


def test_a_crop_that_cannot_fit_is_the_largest_within_the_ratio():
    assert crop_box((400, 10), Augment(size=8, scale=(1, 1)), random.Random(0)) == (193, 0, 206, 10)
    assert crop_box((10, 400), Augment(size=8, scale=(1, 1)), random.Random(0)) == (0, 193, 10, 206)


def arguments(policy, ops=(), images=400):
    """{operation: absolute arguments} of what is drawn for some images, and how many operations each image gets."""
    made, found, layers = randaugment._make(Augment(size=100, policy=policy, ops=ops).operations), {}, Counter()
    for op in made.ops:
        op.aug_fn = lambda seen, *given, name=op.name, **_: [*seen, (name, *given)]
    with undisturbed():
        for seed in range(images):
            randaugment._seed(random.Random(seed))
            drawn = made([])
            layers[len(drawn)] += 1
            for name, *given in drawn:
                found.setdefault(name, []).extend(given)
    return found, layers


@pytest.mark.parametrize("magnitude", [10, 15])
def test_the_papers_policies_are_applied_in_full(magnitude):
    """Both operations fire on every image, at the magnitude that is written: timm alone clips to 10 and skips half.

    The scales are those of the reference code, PAPER.md 4.2, where timm has the same operation with the same scale.
    """
    found, layers = arguments(f"rand-m{magnitude}-mmax{magnitude}-n2-p1")
    assert layers == {2: 400}
    assert set(found) == PAPERS_OPERATIONS - {"Cutout", "TranslateX", "TranslateY"} | {"TranslateXRel", "TranslateYRel"}
    m = magnitude / 10
    expected = {"Rotate": 30 * m, "ShearX": 0.3 * m, "ShearY": 0.3 * m, "Posterize": int(4 * m)}
    expected |= dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), 1.8 * m + 0.1)
    expected |= {"Solarize": 256, "SolarizeAdd": min(128, int(110 * m))}  # 256: nothing, as the reference code has it
    expected |= {
        "TranslateXRel": 0.45 * m,
        "TranslateYRel": 0.45 * m,
    }  # of the side, instead of 10 pixels for each unit
    for name, value in expected.items():
        assert [*{abs(given) for given in found[name]}] == [pytest.approx(value)], name
    for name in ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"):
        assert 0.25 < np.mean(np.array(found[name]) > 0) < 0.75, name


def test_the_papers_translation_can_be_asked_for():
    found, _ = arguments("rand-m15-mmax15-n2-p1", ops=("TranslateX", "TranslateY"), images=20)
    assert {abs(given) for name in found for given in found[name]} == {150.0}


def test_what_timm_would_do_unasked_is_seen():
    """Without mmax and p1: the reason for writing them."""
    found, layers = arguments("rand-m15-n2")
    assert {abs(given) for given in found["Rotate"]} == {30.0}
    assert 0.4 < sum(n * times for n, times in layers.items()) / 800 < 0.6


def test_two_layers_change_an_image_twice():
    image = picture(16, 16)
    views = [
        train_view(
            image, Augment(size=16, policy=f"rand-m9-n{n}-p1", ops=("Invert",), scale=(1, 1), ratio=(1, 1), flip=0), 0
        )
        for n in (1, 2)
    ]
    original = np.asarray(image).transpose(2, 0, 1)
    assert np.array_equal(views[0], 255 - original)
    assert np.array_equal(views[1], original)


@pytest.mark.parametrize("kind", ["", "-inc1", "-t3aw", "-tweights"])
@pytest.mark.parametrize("magnitude", [0, 1, 10, 15, 30])
def test_every_operation_works_at_every_magnitude(kind, magnitude):
    policy = randaugment._randaugment(
        Augment(size=8, policy=f"rand-m{magnitude}-mmax{magnitude or 10}-p1{kind}").operations
    )
    with undisturbed():
        for op in policy.ops:
            assert op(picture()).size == (40, 30)


def test_ops_restrict_the_policy():
    policy = randaugment._randaugment(Augment(size=8, policy=PAPER, ops=("Rotate", "ShearX")).operations)
    assert [op.name for op in policy.ops] == ["Rotate", "ShearX"]


def test_the_fill_is_the_mean_colour():
    augment = Augment(
        size=16, policy="rand-m10-n1-p1", ops=("TranslateXRel",), scale=(1, 1), ratio=(1, 1), flip=0, mean=(1, 0, 0.5)
    )
    view = train_view(Image.new("RGB", (16, 16), "blue"), augment, 0)
    assert {tuple(p) for p in view.reshape(3, -1).T.tolist()} >= {(255, 0, 128)}


def test_an_affine_map_keeps_the_centre_and_turns_about_it():
    rng = random.Random(3)
    for _ in range(20):
        a, b, c, d, e, f = matrix(Affine(90, 0, (0.5, 2), 20), 16, rng)
        assert (a * 8 + b * 8 + c, d * 8 + e * 8 + f) == pytest.approx((8, 8))
    a, b, _, d, e, _ = matrix(Affine(scale=(2, 2)), 16, rng)
    assert (a, b, d, e) == pytest.approx((0.5, 0, 0, 0.5))  # magnified twice: half a step in the image


@pytest.mark.parametrize(("settings", "text"), [
    ({"policy": "rand-m9-x2"}, "rand-m9-x2"),
    ({"policy": "randm9"}, "randm9"),
    ({"policy": "rand-nine"}, "rand-nine"),
    ({"policy": "augmix-m3"}, "augmix"),
    ({"policy": "rand-m9", "ops": ("Rotat",)}, "Rotat'.*Rotate"),
    ({"ops": ("Rotate",)}, "augment_ops is set without a policy"),
    ({"interpolation": "cubic"}, "bilinear, bicubic, random"),
    ({"scale": (0.5, 0.1)}, "crop_scale"),
    ({"scale": (0.5, 1.1)}, "at most 1"),
    ({"ratio": (0, 1)}, "crop_ratio"),
    ({"on_device": True}, "augment_on is device"),
    ({"flip": 2}, "flip is 2"),
])  # fmt: skip
def test_mistakes_are_named_at_construction(settings, text):
    with pytest.raises(ConfigError, match=text):
        Augment(size=16, **settings)


# ---- shift, alternating flip, cutout -----------------------------------------------------------------------


def test_a_shift_moves_the_whole_image_and_mirrors_what_comes_in():
    image = picture(16, 16)
    pixels = np.asarray(image).transpose(2, 0, 1)
    padded = np.pad(pixels, ((0, 0), (4, 4), (4, 4)), "reflect")
    allowed = {padded[:, y : y + 16, x : x + 16].tobytes(): (y, x) for y in range(9) for x in range(9)}
    seen = Counter(
        allowed[train_view(image, Augment(size=16, shift=0.25, flip=0), seed).tobytes()] for seed in range(1500)
    )
    assert len(seen) == 81, "every offset, in whole pixels, and nothing else"
    assert max(seen.values()) < 50


@pytest.mark.parametrize("size", [(40, 30), (30, 40), (400, 10)])
def test_of_a_longer_image_a_square_is_taken(size):
    views = [train_view(picture(*size), Augment(size=10, shift=0.1, flip=0), seed) for seed in range(40)]
    assert all(view.shape == (3, 10, 10) for view in views) and len({view.tobytes() for view in views}) > 20


def test_an_alternating_flip_does_what_it_is_told():
    image, augment = picture(16, 16), Augment(size=16, scale=(1, 1), ratio=(1, 1), alternate_flip=True)
    pixels = np.asarray(image).transpose(2, 0, 1)
    for seed in range(20):
        assert np.array_equal(train_view(image, augment, seed), pixels)
        assert np.array_equal(train_view(image, augment, seed, mirrored=True), pixels[:, :, ::-1])


@pytest.mark.parametrize("policy", ["", "rand-m3-n1-p1"])
def test_cutout_hides_a_square_under_the_mean_after_all_else(policy):
    image = Image.new("RGB", (16, 16), (255, 255, 255))
    augment = Augment(size=16, scale=(1, 1), ratio=(1, 1), cutout=0.25, mean=(0.1, 0.2, 0.3), policy=policy)
    areas = Counter()
    for seed in range(300):
        hidden = (train_view(image, augment, seed) == np.array(augment.fill)[:, None, None]).all(axis=0)
        rows, columns = hidden.any(axis=1).sum(), hidden.any(axis=0).sum()
        if not policy:
            assert hidden.sum() == rows * columns and 2 <= rows <= 4 and 2 <= columns <= 4
        assert hidden.any()
        areas[int(hidden.sum())] += 1
    assert areas.most_common(1)[0][0] == 16 and (policy or max(areas) == 16)


def test_cutout_is_not_for_policies_on_the_device():
    with pytest.raises(ConfigError, match="cutout hides what the policy has made"):
        Augment(size=16, policy=PAPER, on_device=True, cutout=0.25)
