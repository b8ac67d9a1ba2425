"""`min_gain`: generations end where a student hardly gains, everything after copes, and a rerun decides the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import graph
from pipeline.config.load import load_job
from pipeline.plan import early_stop
from pipeline.plan.stage import Done
from tests import small
from tests.small import World, command

REST = [
    "gen2-audit",
    "gen2-label",
    "gen2-select",
    "gen2-student",
    "gen3-audit",
    "gen3-label",
    "gen3-select",
    "gen3-student",
]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A job of three generations that wants more than any student can gain."""
    generations = [{"student": {}}, {"student": {}}, {"student": {"lr": 0.02}}]
    world = small.make(tmp_path_factory.mktemp("stopped"), generations=generations, min_gain=100)
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    return world


def stages_in(world: World) -> set[str]:
    return {path.parent.name.rpartition("-")[0] for path in world.output.glob("*/done.json")}


def line_of(ran: small.Ran) -> str:
    [line] = [line for line in ran.out.splitlines() if "not run" in line]
    return line


def test_later_generations_are_not_run_and_all_say_so(stopped: World) -> None:
    assert stages_in(stopped) == {*small.STAGES}
    again = stopped.run()
    assert "all is done" in again.out
    line = " ".join(line_of(again).split())
    assert line.startswith("· generations 2 to 3 not run student 1 gained ")
    assert line.endswith(" points of validation top-1 over its teacher, less than min_gain 100")

    summary = json.loads(again.out.splitlines()[-1])
    assert [row["stage"] for row in summary["stages"]] == ["gen0-teacher", "gen1-student"]
    top1 = [
        json.loads((stopped.folder(name) / "result.json").read_text())["top1"]
        for name in ("gen0-teacher", "gen1-student")
    ]
    gain = pytest.approx(100 * (top1[1] - top1[0]), abs=1e-4)
    assert summary["stop"] == {"after_generation": 1, "gain_points": gain, "min_gain": 100.0}
    page = (stopped.folder("report") / "index.html").read_text()
    assert "Generations 2 to 3 not run: student 1 gained " in page and "training in 1 generation," in page
    for verb in ("plan", "status"):
        shown = " ".join(command(verb, stopped.job, f"output={stopped.output}").out.split())
        assert "generations 2 to 3 not run" in shown and "gen2-" not in shown, shown


@pytest.mark.slow
def test_with_less_wanted_the_run_goes_on_where_it_stopped(stopped: World) -> None:
    more = stopped.run("min_gain=-100")
    assert (more.status, more.err) == (0, ""), more
    finished = [line.split()[1] for line in more.out.splitlines() if line.startswith("✓")]
    assert finished == [*REST, "evaluate", "report"] and "not run" not in more.out
    assert "stop" not in json.loads(more.out.splitlines()[-1])
    back = stopped.run()
    assert "all is done" in back.out and "generations 2 to 3" in line_of(back)
    unused = command("clean", stopped.job, f"output={stopped.output}").out
    assert all(f"{name}-" in unused for name in REST) and "gen1-" not in unused


@pytest.mark.slow
def test_without_the_generations_left_out_the_report_is_another_one(stopped: World) -> None:
    """Teacher, student and tests are the same; but nothing stopped early."""
    shorter = stopped.run("generations=[{student: {}}]")
    assert [line.split()[1] for line in shorter.out.splitlines() if line.startswith("✓")] == ["report"]
    assert "stop" not in json.loads(shorter.out.splitlines()[-1]) and "not run" not in shorter.out


@pytest.mark.slow
def test_a_teacher_from_elsewhere_is_judged_by_the_audit(stopped: World, tmp_path: Path) -> None:
    """It is the same model on the same images, so the gain is the same."""
    world = small.make(tmp_path, generations=[{"student": {}}, {"student": {}}], min_gain=100)
    named = [f"data.root={stopped.shards}", f"teacher.checkpoint={stopped.folder('gen0-teacher')}"]
    ran = world.run(*named)
    assert (ran.status, ran.err) == (0, ""), ran
    assert "generation 2 " in line_of(ran)
    gains = [json.loads(one.run(*words).out.splitlines()[-1])["stop"] for one, words in ((world, named), (stopped, []))]
    assert gains[0] == gains[1]


def test_the_rule(stopped: World) -> None:
    """Under the threshold, not at it; the first such generation counts; what is not known yet decides nothing."""
    job = load_job(str(stopped.job), ["min_gain=0.5"])

    def done(*top1: float) -> dict[str, Done]:
        names = ["gen0-teacher", *(f"gen{number}-student" for number in range(1, len(top1)))]
        found: dict[str, Any] = {"fingerprint": "", "output": ""}
        return {
            name: Done(name, "", info={"validation": {"top1": value}}, **found)
            for name, value in zip(names, top1, strict=False)
        }

    for accuracies, expected in (
        ((), None),
        ((0.60,), None),
        ((0.60, 0.605), None),
        ((0.60, 0.6049), 1),
        ((0.60, 0.61, 0.61), 2),
        ((0.60, 0.55, 0.70), 1),
        ((0.60, 0.61, 0.62, 0.62), None),
    ):
        stop = early_stop.find(job, done(*accuracies))
        assert (stop.generation if stop else None) == expected, accuracies
        names = [stage.name for stage in graph.stages_of(job, done(*accuracies))]
        assert [name for name in names if name.endswith("student")] == [
            f"gen{n}-student" for n in range(1, (expected or 3) + 1)
        ]
    assert early_stop.find(load_job(str(stopped.job), ["min_gain=null"]), done(0.6, 0.5)) is None


@pytest.mark.slow
def test_the_fine_tune_is_of_the_last_student_there_is(stopped: World) -> None:
    ran = stopped.run("finetune={resolution: 8, duration: 1st, batch: 4}")
    assert (ran.status, ran.err) == (0, ""), ran
    finished = [line.split()[1] for line in ran.out.splitlines() if line.startswith("✓")]
    assert finished == ["gen1-finetune", "evaluate", "report"]
