"""A timm model as teacher or student, and weights that are there already as the teacher."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline import weights
from pipeline.plan.stage import CARD, WEIGHTS
from tests import small
from tests.small import World, command

TIMM = {"model": "timm/test_resnet", "overrides": {}, "resolution": 32, "mean": [0.48, 0.46, 0.41]}


@pytest.fixture(scope="module")
def timm_teacher(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished job: a timm teacher, a student of ours."""
    world = world_with(small.make(tmp_path_factory.mktemp("timm")), teacher=TIMM)
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    return world


def world_with(world: World, **changes: dict[str, Any]) -> World:
    """The same world, with settings merged into its job's teacher and student."""
    job = yaml.safe_load(world.job.read_text())
    for name, settings in changes.items():
        job[name] |= settings
    world.job.write_text(yaml.safe_dump(job))
    return world


def labels_alone(world: World, *settings: str) -> None:
    """Run a job as far as its labels: the selection refuses to keep nothing."""
    ran = world.run(*settings, "select.threshold=1.0")
    assert "the selection keeps no image" in ran.err, ran


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


def test_a_timm_student_with_noise(worlds: small.Store, tmp_path: Path) -> None:
    labelled = worlds.finished(tmp_path, until="gen1-select")
    world = world_with(labelled, student=TIMM | {"dropout": 0.2, "stochastic_depth": 0.1})
    ran = world.run()
    assert (ran.status, ran.err, ran.out.count("done before")) == (0, "", 5), ran
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
    assert (adopted / WEIGHTS).read_bytes() == (source / WEIGHTS).read_bytes()
    assert (adopted / CARD).read_text() == (source / CARD).read_text()
    assert world.folder("gen1-label").name == timm_teacher.folder("gen1-label").name
    assert "all is done" in world.run(*settings).out

    # The same weights elsewhere: taken over again, and nothing follows from it.
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    again = world.run(f"teacher.checkpoint={moved}", f"data.root={timm_teacher.shards}")
    assert again.out.count("done before") == len(small.STAGES) - 1, again.out

    # The same weights, said to look at images otherwise: another teacher.
    card = weights.read_card(str(moved))
    weights.write_card(str(moved), dataclasses.replace(card, crop=0.9))
    changed = world.run(f"teacher.checkpoint={moved}", f"data.root={timm_teacher.shards}")
    assert changed.status == 2 and "model.yaml is not the file that its stage left" in changed.err
    (moved / "done.json").unlink()  # on purpose
    labels_alone(world, f"teacher.checkpoint={moved}", f"data.root={timm_teacher.shards}")
    assert len(list(world.output.glob("gen1-label-*"))) == 2


def test_bare_weights_are_what_the_teachers_settings_say(timm_teacher: World, tmp_path: Path) -> None:
    loose = tmp_path / "best.safetensors"
    shutil.copy(timm_teacher.folder("gen0-teacher") / WEIGHTS, loose)
    world = world_with(small.make(tmp_path, generations=[]), teacher=TIMM)
    ran = world.run(f"teacher.checkpoint={loose}")
    assert (ran.status, ran.err) == (0, ""), ran
    card = weights.read_card(str(world.folder("gen0-teacher")))
    assert (card.architecture, card.size, card.classes) == ("timm/test_resnet", 32, small.CLASSES)


def test_weights_as_people_have_them(timm_teacher: World, tmp_path: Path) -> None:
    """With what wrappers put before the names; of a training that had diverged; as a pickle."""
    whole = timm_teacher.folder("gen0-teacher") / WEIGHTS
    state = weights.read_state(str(whole))
    wrapped = {f"module._orig_mod.{name}": one for name, one in state.items()}
    weights.save_state(str(tmp_path / "a.safetensors"), wrapped)
    world = world_with(small.make(tmp_path, generations=[]), teacher=TIMM)
    ran = world.run(f"teacher.checkpoint={tmp_path / 'a.safetensors'}")
    assert ran.status == 0 and "begin with 'module._orig_mod.', which a wrapper puts there" in ran.out
    assert (world.folder("gen0-teacher") / WEIGHTS).read_bytes() == whole.read_bytes()

    worst = next(name for name, one in state.items() if one.is_floating_point())
    state[worst].view(-1)[0] = float("nan")
    weights.save_state(str(tmp_path / "b.safetensors"), state)
    torch.save({"state_dict": state}, tmp_path / "c.pth.tar")
    for name, words in {
        "b.safetensors": f"no numbers (NaN or infinite) in 1 of its {len(state)} tensors, such as {worst}",
        "c.pth.tar": "c.pth.tar is no .safetensors file; other formats can run code",
    }.items():
        ran = world.run(f"teacher.checkpoint={tmp_path / name}")
        assert (ran.status, ran.err.count("\n")) == (2, 1) and words in ran.err, ran


def test_a_student_that_starts_from_its_teacher(worlds: small.Store, tmp_path: Path) -> None:
    """`init: teacher` needs the same shapes, and another teacher makes another student."""
    labelled = worlds.finished(tmp_path, until="gen1-select")
    world = world_with(labelled, student={"init": "teacher", "dropout": 0.0})
    assert world.run().status == 0
    other = world.run("teacher.overrides.widths=[8,8,8]")
    assert other.status == 2
    assert "the weights do not fit" in other.err and "of another shape" in other.err


def test_several_teachers_are_averaged(timm_teacher: World, tmp_path: Path) -> None:
    """One folder with all of them in it; labels are the mean of their probabilities, and another list another
    teacher."""
    first = timm_teacher.folder("gen0-teacher")
    other = small.make(tmp_path)
    settings = [f"data.root={timm_teacher.shards}", "generations=[]"]
    assert other.run(*settings, "teacher.resolution=32", "teacher.mean=[0.48,0.46,0.41]").status == 0
    second = other.folder("gen0-teacher")
    world = small.make(tmp_path / "both")
    named = [f"data.root={timm_teacher.shards}", f"teacher.checkpoint=[{first},{second}]"]
    ran = world.run(*named)
    assert (ran.status, ran.err) == (0, ""), ran
    assert f"the mean of timm/test_resnet from {first}, lambda_resnet_tiny from {second}" in ran.out
    averaged, card = weights.load_model(str(world.folder("gen0-teacher")))
    images = torch.rand(5, 3, 32, 32)
    with torch.inference_mode():
        expected = sum(weights.load_model(str(path))[0](images).softmax(1) for path in (first, second)) / 2
        torch.testing.assert_close(averaged(images).softmax(1), expected)
    assert card.architecture == "ensemble" and card.size == 32
    assert "all is done" in world.run(*named).out
    labels_alone(world, named[0], f"teacher.checkpoint=[{first},{first}]")
    assert len(list(world.output.glob("gen1-label-*/done.json"))) == 2


def test_teachers_that_cannot_be_averaged_are_named(timm_teacher: World, tmp_path: Path) -> None:
    first = timm_teacher.folder("gen0-teacher")
    second = timm_teacher.folder("gen1-student")
    world = small.make(tmp_path)
    settings = f"data.root={timm_teacher.shards}"
    ran = world.run(settings, f"teacher.checkpoint=[{first},{second}]")
    assert ran.status == 2 and f"{second} looks at images as 8 pixels" in ran.err and "32 pixels" in ran.err
    classes = tmp_path / "classes"
    shutil.copytree(first, classes, ignore=shutil.ignore_patterns("done.json"))  # changed below
    card = weights.read_card(str(classes))
    weights.write_card(str(classes), dataclasses.replace(card, classes=["ant", "dog", "owl"]))
    ran = world.run(settings, f"teacher.checkpoint=[{first},{classes}]")
    assert ran.status == 2 and f"{classes} was trained for other classes (3: ant, dog, owl)" in ran.err
    for wrong in ("[]", "[1]", "3", "{a: b}"):
        ran = world.run(settings, f"teacher.checkpoint={wrong}")
        assert ran.status == 2 and "teacher.checkpoint is" in ran.err and "or a list of them" in ran.err
