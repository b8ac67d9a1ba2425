"""A student smaller than its teacher: `plan` says so before anything has run, and the run when it comes to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import weights
from tests import small
from tests.small import World, command

SMALL = {"depths": [1, 1, 1], "widths": [8, 8, 8]}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return small.make(tmp_path, generations=[{"student": {"overrides": SMALL}}, {"student": {}}])


def sentence() -> str:
    teacher, student = (
        weights.parameter_count(weights.build_model("lambda_resnet_tiny", 3, overrides))
        for overrides in ({**SMALL, "widths": [8, 8, 16]}, SMALL)
    )
    return (
        f"gen1-student has {student:,} parameters, its teacher {teacher:,}: Noisy Student wants a student at least as "
        "large"
    )


def test_plan_names_a_smaller_student(world: World) -> None:
    words = (world.job, f"output={world.output}")
    planned = command("plan", *words)
    assert sentence() in " ".join(planned.out.split()) and planned.out.count("Noisy Student wants") == 1, planned
    (world.shards / "classes.json").unlink()  # a plan can be made before the data is there
    assert command("plan", *words).out.count("Noisy Student wants") == 1
    assert "Noisy Student wants" not in command("plan", *words, "teacher.overrides.widths=[8,8,8]").out


@pytest.mark.slow
def test_so_does_the_run(world: World) -> None:
    ran = world.run()
    assert ran.status == 0 and sentence() in ran.out and ran.out.count("Noisy Student wants") == 1
    planned = command("plan", world.job, f"output={world.output}")  # of what is done, done.json knows
    assert sentence() in " ".join(planned.out.split())
