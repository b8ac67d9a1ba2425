"""The report's verdict: intervals that cover what they should, and words that follow from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pipeline.labelling import audit
from pipeline.labelling.calibration import Answers
from pipeline.report import verdict


def answers(truth: np.ndarray, right: np.ndarray) -> Answers:
    nothing = np.zeros(len(truth))
    return Answers(nothing[:, None], nothing, 0, nothing, np.where(right, truth, truth + 1), truth)


def test_a_gains_interval_covers_the_true_one_in_95_of_100_draws() -> None:
    """Two models that are right on 70 and 74 % of the images, together on 65 %."""
    rng, covered, draws = np.random.default_rng(0), 0, 2000
    for _ in range(draws):
        kind = rng.choice(4, 300, p=[0.65, 0.05, 0.09, 0.21])  # both, the first, the second, none
        truth = np.zeros(300, np.int64)
        found = audit.gain(answers(truth, kind <= 1), answers(truth, (kind == 0) | (kind == 2)))
        assert found and found["low"] <= found["points"] <= found["high"]
        assert found["points"] == pytest.approx(100 * ((kind == 2).mean() - (kind == 1).mean()), abs=1e-3)
        covered += found["low"] <= 4.0 <= found["high"]
    assert 0.935 <= covered / draws <= 0.97
    assert audit.gain(answers(np.zeros(3), np.ones(3, bool)), answers(np.zeros(4), np.ones(4, bool))) is None


def test_confusion_counts_every_wrong_answer() -> None:
    truth, said = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 0, 0, 1])
    nothing = np.zeros(6)
    found = audit.confusion(Answers(nothing[:, None], nothing, 0, nothing, said, truth))
    assert found[0] == [2, 0, 2] and sorted(found[1:]) == [[0, 1, 1], [2, 1, 1]]


def row(stage: str, accuracy: float, low: float | None = None, high: float = 0.0) -> dict[str, Any]:
    gain = None if low is None else {"points": (low + high) / 2, "low": low, "high": high}
    return {"stage": stage, "validation": {"accuracy": accuracy, "gain": gain}}


STEPS = {"count": [10] * 10, "right": [5, 5, 6, 6, 7, 8, 9, 9, 10, 10]}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.5, 3.5, "gen1-student gained 2.0 points (95 % interval +0.5 to +3.5) on gen0-teacher."),
        (-0.5, 1.5, "gained nothing that is certain on gen0-teacher: +0.5 points (95 % interval -0.5 to +1.5)."),
        (-3.0, -1.0, "gen1-student is worse than gen0-teacher, by 2.0 points (95 % interval -3.0 to -1.0)."),
        (0.0, 2.0, "gained nothing that is certain"),
    ],
)
def test_words_follow_the_interval(low: float, high: float, said: str) -> None:
    best = "gen1-student" if low > 0 else "gen0-teacher"
    rows = [row("gen0-teacher", 0.8), row("gen1-student", 0.82, low, high)]
    found = verdict.sentences(rows, [{"expected_noise": 0.3, "steps": STEPS, "threshold": 0.2}], best)
    assert said in found[0] and found[1].startswith(f"Take {best}: of all models")
    if low > 0:
        assert len(found) == 2
    else:
        # From 0.8 on 20 of 20 labels are right, from 0.7 on 29 of 30, from 0.6 on 38 of 40, from 0.5 on 46 of 50.
        expected = "gen1-student: 30.0 % of the labels that it learnt from are expected to be wrong: raise"
        assert found[2] == f"{expected} select.threshold to 0.6, or train the teacher longer."


def test_advice_for_good_labels_and_for_bad_ones_that_no_threshold_mends() -> None:
    rows = [row("gen0-teacher", 0.8), row("gen1-student", 0.7, -12, -8)]
    good = {"expected_noise": 0.02, "steps": STEPS, "threshold": 0.2}
    hopeless = {"expected_noise": 0.4, "steps": {"count": [10] * 4, "right": [5] * 4}, "threshold": 0.2}
    assert "try a larger student" in verdict.sentences(rows, [good], "gen0-teacher")[-1]
    assert "no threshold keeps that below 5 %" in verdict.sentences(rows, [hopeless], "gen0-teacher")[-1]
    [alone] = verdict.sentences(rows[:1], [], "gen0-teacher")
    assert alone == "gen0-teacher is the only model, with 80.0 % of the validation images right."
