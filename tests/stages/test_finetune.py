"""The `finetune` stage: the last model at a higher resolution, as a stage like any other."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from pipeline import weights
from tests import small
from tests.small import World, command

TUNE = {"resolution": 16, "crop": 1.0, "duration": "3st", "batch": 4, "lr": 0.05, "lr_images": 0}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A job of a teacher, a student and its fine-tune."""
    world = small.make(tmp_path_factory.mktemp("tuned"), finetune=TUNE)
    ran = world.run()
    assert (ran.status, ran.err) == (0, ""), ran
    return world


def stages_of(ran: small.Ran, state: str) -> list[str]:
    return [line.split()[1] for line in ran.out.splitlines() if f" {state}" in line and line[:1] in "·✓"]


def test_the_last_student_is_tuned_and_tested_at_its_own_size(finished: World) -> None:
    before, after = (weights.load_model(str(finished.folder(f"gen1-{kind}"))) for kind in ("student", "finetune"))
    assert (before[1].size, after[1].size, after[1].crop) == (8, 16, 1.0)
    old, new = before[0].state_dict(), after[0].state_dict()
    changed = {name.rpartition(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name.rpartition(".")[0] for names in before[0].roles().values() for name in names}

    done = json.loads((finished.folder("gen1-finetune") / "done.json").read_text())
    assert done["info"]["line"].startswith("gen1-student at 16 pixels, 3 steps, validation top-1 ")
    assert done["info"]["line"].endswith(" % at 8)") and done["model"]
    summary = json.loads((finished.folder("report") / "summary.json").read_text())
    assert [row["stage"] for row in summary["stages"]] == ["gen0-teacher", "gen1-student", "gen1-finetune"]
    tested = json.loads((finished.folder("evaluate") / "evaluate.json").read_text())["models"]
    assert [row["size"] for row in tested] == [8, 8, 16]
    page = (finished.folder("report") / "index.html").read_text()
    assert "student 1, tuned" in page and "Noisy Student training in 1 generation," in page


@pytest.mark.slow
def test_a_rerun_does_nothing_and_another_rate_only_the_fine_tune(finished: World, tmp_path: Path) -> None:
    world = dataclasses.replace(finished, output=tmp_path / "out")
    shutil.copytree(finished.output, world.output, copy_function=shutil.copy2)
    assert "all is done" in world.run().out
    again = world.run("finetune.lr=0.01")
    assert stages_of(again, "finished") == ["gen1-finetune", "evaluate", "report"]
    listed = command("clean", world.job, f"output={world.output}", "finetune.lr=0.01")
    assert listed.out.count("gen1-finetune-") == 1 and "gen1-student" not in listed.out
    without = world.run("finetune.resolution=null")
    assert stages_of(without, "finished") == ["evaluate", "report"]
    planned = command("plan", world.job, f"output={world.output}", "finetune.duration=9st")
    assert "gen1-student at 16 pixels, head and last norm, 9st, batch 4" in " ".join(planned.out.split())


def test_without_generations_it_is_the_teacher(finished: World, tmp_path: Path) -> None:
    """One that was trained elsewhere too; what it is and what it was trained at stands in its model.yaml."""
    world = small.make(tmp_path, generations=[], finetune=TUNE)
    named = [f"data.root={finished.shards}", f"teacher.checkpoint={finished.folder('gen1-finetune')}"]
    lower = world.run(*named, "finetune.resolution=12")
    assert lower.status == 2 and len(lower.err.splitlines()) == 1
    assert "finetune.resolution is 12, less than the 16 pixels at which gen0-teacher was trained" in lower.err
    ran = world.run(*named, "finetune.resolution=24")
    assert (ran.status, ran.err) == (0, ""), ran
    [done] = world.output.glob("gen0-finetune-*/done.json")
    assert weights.read_card(str(done.parent)).size == 24
    assert "teacher, tuned" in (world.folder("report") / "index.html").read_text()


def test_mistakes_are_met_before_anything_is_trained(tmp_path: Path) -> None:
    fixed = {
        "model": "timm/vit_tiny_patch16_224",
        "overrides": {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2},
    }
    world = small.make(tmp_path, finetune=TUNE)
    settings = [f"student.{name}={json.dumps(value)}" for name, value in fixed.items()]
    for words, wanted in (
        (settings, "model 'timm/vit_tiny_patch16_224' does not take images of 16 pixels"),
        (["finetune.resolution=4"], "finetune.resolution is 4, less than generations[0].student.resolution, 8"),
        (
            ["finetune.batch=1000", "finetune.duration=1ep", "generations=[]"],
            "finetune: duration 1ep is less than one step of 1000 images (6 labelled images)",
        ),
    ):
        ran = world.run(*words)
        assert ran.status == 2 and wanted in ran.err and len(ran.err.splitlines()) == 1, ran
    assert not list(world.output.glob("gen*/done.json"))
