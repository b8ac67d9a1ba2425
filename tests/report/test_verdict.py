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
        (0.5, 3.5, "gen1-student gained 2.0 points of validation top-1 (95 % interval +0.5 to +3.5) on gen0-teacher."),
        (
            -0.5,
            1.5,
            "certain on gen0-teacher: +0.5 points of validation top-1 (95 % interval -0.5 to +1.5).",
        ),
        (
            -3.0,
            -1.0,
            "gen1-student is worse than gen0-teacher, by 2.0 points of validation top-1 (95 % interval -3.0 to -1.0).",
        ),
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
        expected = "gen1-student: 30.0 % of the kept labels are expected to be wrong: raise"
        assert found[2] == f"{expected} select.threshold to 0.6, or train the teacher longer."


def test_advice_for_good_labels_and_for_bad_ones_that_no_threshold_mends() -> None:
    rows = [row("gen0-teacher", 0.8), row("gen1-student", 0.7, -12, -8)]
    good = {"expected_noise": 0.02, "steps": STEPS, "threshold": 0.2}
    hopeless = {"expected_noise": 0.4, "steps": {"count": [10] * 4, "right": [5] * 4}, "threshold": 0.2}
    assert "try a larger student" in verdict.sentences(rows, [good], "gen0-teacher")[-1]
    assert "no threshold keeps that below 5 %" in verdict.sentences(rows, [hopeless], "gen0-teacher")[-1]
    [alone] = verdict.sentences(rows[:1], [], "gen0-teacher")
    assert alone == "gen0-teacher is the only model, with 80.0 % of the validation images right."


def selection(noise: float | None) -> dict[str, Any]:
    return {"expected_noise": noise, "steps": STEPS, "threshold": 0.2}


def test_what_speaks_against_a_selection_is_said_with_what_to_do() -> None:
    assert verdict.of_selection(selection(0.04), [3, 1], ["cat", "dog"]) == []
    [noisy] = verdict.of_selection(selection(0.595), [3, 1], ["cat", "dog"])
    mend = "raise select.threshold to 0.6, or train the teacher longer."
    assert noisy == f"59.5 % of the kept labels are expected to be wrong: {mend}"
    [unknown] = verdict.of_selection(selection(None), [3, 1], ["cat", "dog"])
    assert unknown.startswith("Nothing is known of the kept labels, for no audited image is so sure")
    [empty] = verdict.of_selection(selection(0.01), [3, 0], ["cat", "dog"])
    assert empty.startswith("Of 1 of 2 classes no image is kept (dog), so the student learns it from labelled images")
    [many] = verdict.of_selection(selection(0.01), [0] * 7, list("abcdefg"))
    assert "Of 7 of 7 classes no image is kept (a, b, c, d, e …)" in many


@pytest.mark.parametrize(
    ("others", "cores", "threads", "loaded"),
    [(0.1, 2, 2, False), (0.5, 2, 2, True), (1.9, 8, 2, False), (7.9, 8, 1, True), (30, 64, 1, False)],
)
def test_a_machine_is_loaded_where_others_take_cores_that_were_asked_for(
    others: float, cores: int, threads: int, loaded: bool
) -> None:
    load = {"others": others, "cores": cores, "threads": threads, "seconds": 2.0}
    evaluation = {"load": load, "models": [{"stage": "gen0-teacher", "fastest_round": 11.0, "slowest_round": 10.0}]}
    found = verdict.of_speed(evaluation)
    assert bool(found) == loaded
    if loaded:
        assert found[0].startswith(f"Other processes kept {others:.1f} of {cores} cores busy while speed was measured")
    evaluation["load"] = load | {"seconds": 0.1}  # too short to say so
    assert verdict.of_speed(evaluation) == []


def test_rounds_that_differ_much_are_named() -> None:
    quiet = {"others": 0.0, "cores": 2, "threads": 2, "seconds": 2.0}
    models = [
        {"stage": "gen0-teacher", "fastest_round": 11.0, "slowest_round": 10.0},
        {"stage": "gen1-student", "fastest_round": 21.0, "slowest_round": 10.0},
    ]
    [found] = verdict.of_speed({"load": quiet, "models": models})
    assert found.startswith(
        "The fastest round of gen1-student was 2.1 times as fast as its slowest: images/s say little"
    )
    assert verdict.of_speed({"models": models}) == []  # an evaluation from before these figures
