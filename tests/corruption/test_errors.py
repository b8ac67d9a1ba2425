"""Corruption errors against the definitions of the paper, and against its numbers."""

from __future__ import annotations

import pytest

from pipeline.config.checks_evaluate import CORRUPTIONS as NAMES
from pipeline.corruption import errors
from pipeline.corruption.errors import Errors


def test_alexnet_has_an_mce_of_100() -> None:
    one = errors.alexnet(NAMES)
    assert set(errors.ALEXNET) == set(NAMES)
    found = errors.ce(one, one)
    assert found == pytest.approx(dict.fromkeys(NAMES, 100)) and errors.mean(found) == pytest.approx(100, abs=1e-9)
    relative = errors.relative_ce(one, one)
    assert relative == pytest.approx(dict.fromkeys(NAMES, 100)) and errors.mean(relative) == pytest.approx(
        100, abs=1e-9
    )
    assert errors.summary(one, one)["clean_error"] == pytest.approx(43.478)  # the paper's table has 43.5


def test_definitions_by_hand() -> None:
    model = Errors(0.1, {"snow": [0.2, 0.4], "fog": [0.1, 0.3]})
    reference = Errors(0.2, {"snow": [0.4, 0.8], "fog": [0.4, 0.6]})
    found = errors.ce(model, reference)
    assert found == pytest.approx({"snow": 50, "fog": 40}) and errors.mean(found) == pytest.approx(45)
    relative = errors.relative_ce(model, reference)
    assert relative == pytest.approx({"snow": 100 * 0.4 / 0.8, "fog": 100 * 0.2 / 0.6})
    assert model.mean == pytest.approx(25)


def test_what_is_not_known_is_not_made_up() -> None:
    perfect = Errors(0.0, {"snow": [0.0], "fog": [0.1]})
    model = Errors(0.0, {"snow": [0.1], "fog": [0.1]})
    found = errors.ce(model, perfect)
    assert found["snow"] is None and found["fog"] == pytest.approx(100) and errors.mean(found) is None
    assert errors.relative_ce(Errors(0.2, {"fog": [0.3]}), Errors(0.3, {"fog": [0.2]})) == {"fog": None}
