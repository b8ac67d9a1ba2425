"""How many labels to expect wrong above a threshold, and thresholds that keep them few, against drawn corpora."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from pipeline.labelling import label_noise
from pipeline.selection.candidates import BEYOND
from pipeline.selection.sort_keys import distances

Drawn = tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_], npt.NDArray[np.float32]]


def draw(rng: np.random.Generator, images: int, hardness: npt.NDArray[np.float64]) -> Drawn:
    """Classes that were said, whether they are right, and confidences: too sure, and of some classes more than of
    others."""
    classes = len(hardness)
    truth = rng.integers(classes, size=images)
    sure = 1 - rng.beta(0.4, 2.0, images) * (1 - 1 / classes)
    right = rng.random(images) > np.clip((1.01 - sure) * hardness[truth], 0, 1)
    said = np.where(right, truth, (truth + 1 + rng.integers(classes - 1, size=images)) % classes)
    return said, right, sure.astype(np.float32)


@pytest.mark.parametrize(("images", "classes", "most"), [(450, 10, 0.05), (5000, 10, 0.05), (300, 3, 0.1)])
def test_the_noise_of_a_corpus_lies_where_the_audit_says(images: int, classes: int, most: float) -> None:
    inside, overall = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        hardness = rng.uniform(0.5, 2.5, classes)
        audited, (said, right, sure) = draw(rng, images, hardness), draw(rng, 30_000, hardness)
        found = label_noise.estimate(*audited, classes)
        level = found.describe(found.choose(most), chosen=True)
        kept = [(said == number) & (sure >= np.float32(level["thresholds"][number] or 2)) for number in range(classes)]
        bounds = zip(kept, level["low"], level["high"], strict=True)
        inside += [low <= np.mean(~right[some]) <= high for some, low, high in bounds if some.any()]
        overall.append(np.mean(~right[np.any(kept, axis=0)]))
    assert np.mean(inside) >= 0.9  # of classes
    assert np.mean(overall) <= 1.05 * most
    assert np.mean(overall) >= 0.5 * most  # not by keeping next to nothing


def test_thresholds_are_the_least_that_pass_and_fall_with_what_is_allowed() -> None:
    hardness = np.linspace(0.5, 2.5, 4)
    audited = draw(np.random.default_rng(1), 2000, hardness)
    found = label_noise.estimate(*audited, 4)
    before = [1.0] * 4
    for most in (0.02, 0.05, 0.1, 0.3):
        level = found.describe(found.choose(most), chosen=True)
        least = [1.0 if one is None else one for one in level["thresholds"]]
        assert all(new <= old for new, old in zip(least, before, strict=True))
        assert all(noise <= most for noise in level["noise"] if noise is not None)
        for low, noise, high in zip(level["low"], level["noise"], level["high"], strict=True):
            assert (low is None) == (noise is None) and (low is None or 0 <= low < noise < high <= 1)
        before = least
    said, _, sure = audited
    assert level["kept"] == [int(((said == n) & (sure >= np.float32(least[n]))).sum()) for n in range(4)]


def test_a_class_that_is_always_wrong_passes_nowhere_and_spoils_no_other_one() -> None:
    rng = np.random.default_rng(2)
    said = rng.integers(3, size=3000)
    found = label_noise.estimate(said, said != 1, rng.uniform(0.3, 1, 3000).astype(np.float32), 3)
    level = found.describe(found.choose(0.1), chosen=True)
    assert level["thresholds"][1] is None and level["kept"][1] == 0 and level["noise"][1] is None
    assert level["thresholds"][0] is not None and level["thresholds"][2] is not None


def test_few_images_prove_nothing() -> None:
    """All three are right, and 5 % cannot be promised; of none said of a class, the other classes speak."""
    sure = np.array([0.5, 0.9, 0.99], np.float32)
    found = label_noise.estimate(np.array([0, 1, 1]), np.ones(3, bool), sure, 3)
    assert found.choose(0.05) == [None] * 3
    assert found.describe(found.choose(0.05), chosen=True)["in_all"] == {"noise": None, "low": None, "high": None}
    many = label_noise.estimate(np.zeros(1000, int), np.ones(1000, bool), np.linspace(0, 1, 1000, dtype=np.float32), 2)
    assert many.choose(0.05)[1] is not None


def test_where_no_audited_image_is_so_sure_nothing_is_known() -> None:
    found = label_noise.estimate(np.array([0, 1]), np.ones(2, bool), np.array([0.5, 0.6], np.float32), 2, [0.8])
    level = found.describe(found.look_up([0.8, 0.8]), chosen=False)
    assert level["kept"] == [0, 0] and level["noise"] == level["low"] == [None, None]
    assert label_noise.in_all(level, [3, 4])["noise"] is None and found.choose(1.0) == [0, 0]


def test_levels_at_given_thresholds_are_counts() -> None:
    said, right, sure = draw(np.random.default_rng(3), 500, np.ones(3))
    found = label_noise.estimate(said, right, sure, 3)
    levels = label_noise.levels(found)
    assert [one.get("threshold", one.get("max_noise")) for one in levels] == [
        *label_noise.THRESHOLDS, *label_noise.NOISES,
    ]  # fmt: skip
    for level in levels[: len(label_noise.THRESHOLDS)]:
        confident = sure >= np.float32(level["threshold"])
        assert level["kept"] == np.bincount(said[confident], minlength=3).tolist()
        assert level["in_all"]["noise"] == pytest.approx(np.mean(~right[confident]), abs=0.05)


def test_nothing_is_as_far_as_what_is_left_out() -> None:
    """No confidence, and no missing one, reaches it; so no threshold lets it through."""
    assert distances(np.array([1.0, 0.5, 0.0], np.float32)).max() < BEYOND
