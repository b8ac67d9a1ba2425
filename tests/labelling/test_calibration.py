"""Calibration against scikit-learn, scipy and brute force, and what the float16 of label files costs."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.calibration import calibration_curve
from sklearn.metrics import log_loss, precision_recall_fscore_support

from pipeline.data import confidence_bins, label_files
from pipeline.labelling import calibration
from pipeline.labelling.calibration import Answers


def drawn(n: int, classes: int, sharpness: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(logits float64 [n, classes], true classes drawn from softmax(logits / sharpness)): `sharpness` is the
    temperature that calibrates them."""
    rng = np.random.default_rng(seed)
    honest = 2 * rng.standard_normal((n, classes))
    truth = np.array([rng.choice(classes, p=row) for row in softmax(honest, axis=1)], np.int32)
    return honest * sharpness, truth


def stored(logits: np.ndarray, truth: np.ndarray) -> Answers:
    """As a label file keeps them."""
    rows = label_files.rows_from_probs(softmax(logits, axis=1).astype(np.float32))
    return calibration.answers(rows.classes, rows.probs, rows.confidence, truth, logits.shape[1])


def exact_nll(logits: np.ndarray, truth: np.ndarray, temperature: float) -> float:
    return float(-log_softmax(logits / temperature, axis=1)[np.arange(len(truth)), truth].mean())


@pytest.mark.parametrize("sharpness", [0.4, 1.0, 1.7, 2.5])
def test_the_best_temperature_is_that_of_the_logits(sharpness: float) -> None:
    logits, truth = drawn(4000, 10, sharpness)
    found = stored(logits, truth)
    best = minimize_scalar(
        lambda t: exact_nll(logits, truth, t), bounds=(0.05, 20), method="bounded", options={"xatol": 1e-7}
    ).x
    temperature = calibration.best_temperature(found)
    assert temperature == pytest.approx(best, rel=2e-3)  # float16 costs that much and no more
    assert temperature == pytest.approx(sharpness, rel=0.05)
    for t in (temperature, 1.0, 3.0):
        assert calibration.nll(found, t) == pytest.approx(exact_nll(logits, truth, t), rel=2e-3)
        expected = softmax(logits / t, axis=1).max(axis=1)
        np.testing.assert_allclose(calibration.confidence_at(found, t), expected, atol=0.03)
    assert log_loss(truth, softmax(logits, axis=1)) == pytest.approx(calibration.nll(found), rel=2e-3)
    before = confidence_bins.reliability(calibration.confidence_at(found, 1.0), found.correct).ece
    after = confidence_bins.reliability(calibration.confidence_at(found, temperature), found.correct).ece
    assert after < 0.03 and (sharpness == 1.0 or after < before)


def test_what_float16_loses_of_very_sure_teachers_makes_the_temperature_a_little_low() -> None:
    logits, truth = drawn(4000, 10, 4.0)
    assert 3.6 < calibration.best_temperature(stored(logits, truth)) < 4.0


def test_newton_finds_the_minimum_of_a_fine_grid() -> None:
    found = stored(*drawn(300, 5, 2.5, seed=3))
    grid = np.geomspace(0.5, 10, 20_001)
    assert calibration.best_temperature(found) == pytest.approx(
        grid[np.argmin([calibration.nll(found, t) for t in grid])], rel=2e-4
    )


def test_of_many_classes_the_rest_is_spread_evenly() -> None:
    logits, truth = drawn(3000, 200, 1.5)
    found = stored(logits, truth)
    assert found.named.shape == (3000, 32) and found.unnamed == 168
    probs = softmax(logits, axis=1).astype(np.float32)
    rows = label_files.rows_from_probs(probs)
    for t in (1.0, 2.0):  # the same thing written out on all classes
        spread = label_files.spread_targets(rows.classes, rows.probs, 200, temperature=t).astype(np.float64)
        expected = -np.log(spread[np.arange(3000), truth]).mean()
        assert calibration.nll(found, t) == pytest.approx(expected, rel=0.01)
        np.testing.assert_allclose(calibration.confidence_at(found, t), spread.max(axis=1), atol=0.03)
    assert calibration.best_temperature(found) == pytest.approx(1.5, rel=0.1)
    assert np.array_equal(found.correct, probs.argmax(axis=1) == truth)


@pytest.mark.parametrize(("wrong", "expected"), [(0, calibration.COOLEST), (8, calibration.HOTTEST)])
def test_without_a_minimum_the_end_of_the_range_is_given(wrong: int, expected: float) -> None:
    """All right: the sharper the better; all wrong where the truth is least probable: the flatter the better."""
    logits = np.tile([3.0, 1.0, 0.0], (8, 1))
    truth = np.array([2] * wrong + [0] * (8 - wrong), np.int32)
    assert calibration.best_temperature(stored(logits, truth)) == expected


def test_probabilities_that_float16_loses_stay_finite() -> None:
    logits = np.array([[200.0, 0.0, -5.0]] * 10)
    found = stored(logits, np.array([0] * 9 + [1], np.int32))
    assert np.isfinite(calibration.nll(found)) and np.isfinite(calibration.best_temperature(found))


@pytest.mark.parametrize("bins", [15, 10, 4])
def test_reliability_against_scikit_learn(bins: int) -> None:
    found = stored(*drawn(2000, 4, 2.0))
    confidence = calibration.confidence_at(found, 1.0)
    diagram = confidence_bins.reliability(confidence, found.correct, bins)
    filled = diagram.count > 0
    accuracy, mean = calibration_curve(found.correct, confidence, n_bins=bins, strategy="uniform")
    np.testing.assert_allclose(diagram.accuracy[filled], accuracy)
    np.testing.assert_allclose(diagram.confidence[filled], mean)
    gap = 0.0
    for lower in range(bins):  # Guo et al., equation 5, word for word
        inside = (confidence > lower / bins) & (confidence <= (lower + 1) / bins)
        if inside.any():
            gap += inside.sum() / len(confidence) * abs(found.correct[inside].mean() - confidence[inside].mean())
    assert diagram.count.sum() == 2000 and diagram.ece == pytest.approx(gap)


def test_bins_are_closed_on_the_right_and_hold_everything() -> None:
    confidence = np.array([0.0, 0.25, 0.5, 0.75, 1.0], np.float32)
    assert confidence_bins.reliability(confidence, np.ones(5, bool), 4).count.tolist() == [2, 1, 1, 1]
    empty = confidence_bins.reliability(confidence[:0], np.ones(0, bool), 4)
    assert empty.count.tolist() == [0] * 4 and empty.ece == 0


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.9])
def test_precision_and_recall_against_scikit_learn(threshold: float) -> None:
    found = stored(*drawn(1500, 6, 1.5))
    confidence = calibration.confidence_at(found, 1.0)
    kept = calibration.keep(found, confidence, threshold, 6)
    said = np.where(confidence >= np.float32(threshold), found.predicted, -1)
    precision, recall, _, support = precision_recall_fscore_support(found.truth, said, labels=range(6), zero_division=0)
    np.testing.assert_allclose([p or 0 for p in kept.precision], precision)
    np.testing.assert_allclose(kept.recall, recall)
    assert kept.true.tolist() == support.tolist()
    assert kept.noise == pytest.approx(1 - (said == found.truth)[said >= 0].mean())
    each = calibration.keep(found, confidence, [threshold] * 5 + [2.0], 6)
    assert each.kept.tolist() == [*kept.kept[:5].tolist(), 0] and each.precision[5] is None


def test_expected_noise_is_weighted_by_what_is_kept() -> None:
    assert calibration.expected_noise([0.5, 1.0], 0.3, [3, 1]) == pytest.approx(0.375)
    assert calibration.expected_noise([0.5, None], 0.3, [1, 1]) == pytest.approx(0.4)
    assert calibration.expected_noise([None, None], None, [1, 1]) is None
    assert calibration.expected_noise([0.5, 1.0], 0.3, [0, 0]) is None
    found = stored(*drawn(1500, 6, 1.0))
    kept = calibration.keep(found, calibration.confidence_at(found, 1.0), 0.4, 6)
    # With the audit's own distribution it is simply the share of wrong labels.
    assert calibration.expected_noise(kept.precision, kept.noise, kept.kept) == pytest.approx(kept.noise)
