"""A timm model as teacher or student, and weights that are there already as the teacher."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import weights
from tests import small
from tests.small import World, command

TIMM = {"model": "timm/test_resnet", "overrides": {}, "resolution": 32, "mean": [0.48, 0.46, 0.41]}


@pytest.fixture(scope="module")
def timm_teacher(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished job: a timm teacher, a student of ours."""
    world = world_with(tmp_path_factory.mktemp("timm"), teacher=TIMM)
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    return world


def world_with(folder: Path, **changes: dict[str, Any]) -> World:
    """The small job, with settings merged into its teacher and student."""
    world = small.make(folder)
    job = yaml.safe_load(world.job.read_text())
    for name, settings in changes.items():
        job[name] |= settings
    world.job.write_text(yaml.safe_dump(job))
    return world


def test_a_timm_teacher(timm_teacher: World) -> None:
    assert timm_teacher.done() == small.STAGES
    model, card = weights.load_model(str(timm_teacher.folder("gen0-teacher")))
    assert type(model).__module__.startswith("timm.")
    assert (card.architecture, card.size, card.mean, card.classes) == (
        "timm/test_resnet",
        32,
        [0.48, 0.46, 0.41],
        small.CLASSES,
    )
    assert weights.load_model(str(timm_teacher.folder("gen1-student")))[1].architecture == "lambda_resnet_tiny"


def test_a_timm_student_with_noise(tmp_path: Path) -> None:
    world = world_with(tmp_path, student=TIMM | {"dropout": 0.2, "stochastic_depth": 0.1})
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    model, card = weights.load_model(str(world.folder("gen1-student")))
    assert card.overrides == {"drop_rate": 0.2, "drop_path_rate": 0.1}
    assert model.drop_rate == 0.2


def test_a_timm_model_exports(timm_teacher: World, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    ran = command("export", timm_teacher.folder("gen0-teacher"), "--out", tmp_path)
    assert (ran.status, ran.err) == (0, "")
    assert (tmp_path / "model.onnx").is_file()


def test_a_run_goes_on_from_another_runs_teacher(timm_teacher: World, tmp_path: Path) -> None:
    """The folder says what the model is, whatever the job says of its teacher; the pseudo-labels are the same."""
    source = timm_teacher.folder("gen0-teacher")
    world = small.make(tmp_path)
    settings = [f"teacher.checkpoint={source}", f"data.root={timm_teacher.shards}"]
    ran = world.run(*settings)
    assert (ran.status, ran.err) == (0, ""), ran
    assert f"timm/test_resnet from {source}" in ran.out and "steps" not in ran.out.split("gen1-label")[0]
    adopted = world.folder("gen0-teacher")
    assert not (adopted / "checkpoints").exists() and not (adopted / "metrics.jsonl").exists()
    assert (adopted / weights.WEIGHTS).read_bytes() == (source / weights.WEIGHTS).read_bytes()
    assert (adopted / weights.CARD).read_text() == (source / weights.CARD).read_text()
    assert world.folder("gen1-label").name == timm_teacher.folder("gen1-label").name
    assert "all is done" in world.run(*settings).out

    # The same weights elsewhere: taken over again, and nothing follows from it.
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    again = world.run(f"teacher.checkpoint={moved}", f"data.root={timm_teacher.shards}")
    assert again.out.count("done before") == len(small.STAGES) - 1, again.out


def test_bare_weights_are_what_the_teachers_settings_say(timm_teacher: World, tmp_path: Path) -> None:
    loose = tmp_path / "best.safetensors"
    shutil.copy(timm_teacher.folder("gen0-teacher") / weights.WEIGHTS, loose)
    world = world_with(tmp_path, teacher=TIMM)
    ran = world.run(f"teacher.checkpoint={loose}")
    assert (ran.status, ran.err) == (0, ""), ran
    card = weights.read_card(str(world.folder("gen0-teacher")))
    assert (card.architecture, card.size, card.classes) == ("timm/test_resnet", 32, small.CLASSES)


def test_a_student_that_starts_from_its_teacher(tmp_path: Path) -> None:
    """`init: teacher` needs the same shapes, and another teacher makes another student."""
    world = world_with(tmp_path, student={"init": "teacher", "dropout": 0.0})
    assert world.run().status == 0
    other = world.run("teacher.overrides.widths=[8,8,8]")
    assert other.status == 2
    assert "does not fit the model" in other.err and "has shape" in other.err
