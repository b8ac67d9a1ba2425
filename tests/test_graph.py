"""Stages as records: a new one touches its file and a line of the graph; a format rises and undoes nothing."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import graph
from pipeline.config.load import load_job
from pipeline.plan.context import Context
from pipeline.plan.corpora import Corpora
from pipeline.plan.inputs import Inputs
from pipeline.plan.kind import Kind, Line
from pipeline.plan.stage import Result, Stage
from tests import small
from tests.small import World

HEAVY = ("torch", "timm", "torchvision", "ray", "mlflow", "matplotlib", "pyarrow", "numpy")


# ---- what would be the file of a new stage -----------------------------------------------------------------


def count(context: Context) -> Result:
    """Counts the letters of the class names."""
    letters = sum(map(len, context.corpora.classes))
    Path(context.folder, "letters.json").write_text(json.dumps(letters))
    return Result({"line": f"{letters} letters"}, metrics={"letters": letters})


def identity(inputs: Inputs) -> dict[str, Any]:
    return {"classes": inputs.classes, "index": inputs.output("index")}


LETTERS = Kind("letters", stages="letters", needs=lambda line, generation: ("index",), identity=identity, run=count)


@pytest.fixture
def with_letters(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Its entry in the dict, and its line in the graph: behind `index`."""
    monkeypatch.setitem(graph.KINDS, "letters", LETTERS)
    given = graph.stages_of

    def stages_of(*arguments: Any) -> list[Stage]:
        line = Line(arguments[0])
        for stage in given(*arguments):
            line.stages.append(stage)
            if stage.name == "index":
                line.stages.append(Stage("letters", "letters", LETTERS.needs(line, 0)))
        return line.stages

    monkeypatch.setattr(graph, "stages_of", stages_of)
    yield


# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(worlds: small.Store) -> World:
    """A finished run of a teacher alone."""
    return worlds.original(generations=[])


@pytest.fixture
def finished(worlds: small.Store, tmp_path: Path) -> World:
    """A copy of it."""
    return worlds.finished(tmp_path, generations=[])


STATES = ("done", "will", "blocked", "not")  # a line of text may begin with a stage's name too


def states(world: World, *words: str) -> dict[str, str]:
    """{stage: state} as `plan` has it."""
    shown = small.command("plan", world.job, f"output={world.output}", *words)
    assert shown.status == 0, shown.err
    rows = [line.split() for line in shown.out.splitlines()]
    names = {*small.STAGES, "letters"}
    return {
        row[0]: "will run" if row[1:3] == ["will", "run"] else row[1]
        for row in rows
        if row and row[0] in names and row[1] in STATES
    }


def test_a_new_stage_is_run_planned_shown_and_cleaned(finished: World, with_letters: None) -> None:
    expected = dict.fromkeys(("index", "gen0-teacher", "evaluate", "report"), "done") | {"letters": "will run"}
    assert states(finished) == expected
    ran = finished.run()
    assert ran.status == 0 and ran.out.count("done before") == 4
    folder = next(finished.output.glob("letters-*"))
    assert json.loads((folder / "letters.json").read_text()) == sum(map(len, small.CLASSES))
    assert json.loads((folder / "done.json").read_text())["metrics"] == {"letters": 9}
    status = small.command("status", finished.job, f"output={finished.output}")
    assert "9 letters" in status.out
    (finished.output / "letters-00000000").mkdir()
    cleaned = small.command("clean", finished.job, f"output={finished.output}")
    assert "letters-00000000" in cleaned.out and folder.name not in cleaned.out


def test_an_unknown_kind_is_no_report(world: World) -> None:
    """Its fingerprint must not silently be another kind's."""
    job = load_job(str(world.job))
    with pytest.raises(KeyError, match="letters"):
        graph.inputs_of(job, Stage("letters", "letters", ()), {}, Corpora(job, {}))


def test_no_two_stages_of_a_job_share_a_name_and_each_has_one_of_its_kind() -> None:
    for path in sorted((Path(__file__).parent / "pinned").glob("*.yaml")):
        stages = graph.stages_of(load_job(str(path)))
        assert len({stage.name for stage in stages}) == len(stages)
        for stage in stages:
            assert re.fullmatch(graph.KINDS[stage.kind].stages, stage.name), stage
            assert set(stage.needs) <= {other.name for other in stages[: stages.index(stage)]}


def raised(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(graph.KINDS, kind, dataclasses.replace(graph.KINDS[kind], format=2))


def test_what_was_finished_under_an_earlier_format_stays_done(finished: World, monkeypatch: pytest.MonkeyPatch) -> None:
    raised(monkeypatch, "train")
    assert set(states(finished).values()) == {"done"}
    assert "all is done; nothing had to run" in finished.run().out
    cleaned = small.command("clean", finished.job, f"output={finished.output}")
    assert cleaned.out.strip() == "nothing to clean"


def test_what_was_not_finished_is_begun_anew_and_said(finished: World, monkeypatch: pytest.MonkeyPatch) -> None:
    before = finished.folder("gen0-teacher")
    (before / "done.json").unlink()
    raised(monkeypatch, "train")
    ran = finished.run()
    assert ran.status == 0
    assert f"! gen0-teacher was begun in {before.name} by an earlier version; it is begun anew" in ran.out
    after = [path for path in finished.output.glob("gen0-teacher-*") if path != before]
    assert len(after) == 1 and (after[0] / "done.json").exists()
    assert ran.out.count("done before") == 3  # its weights are equal, so what follows is done


def test_a_finished_job_is_looked_at_without_heavy_imports() -> None:
    """A rerun of a finished job takes a second, for it reads a few JSON files and ends."""
    code = f"import sys, pipeline.runner, pipeline.graph; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
