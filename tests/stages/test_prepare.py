"""A job that writes its own shards from folders of images."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from tests import small, tiny
from tests.data.tars import picture
from tests.small import command


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A teacher on a folder of three classes that holds a folder of unlabelled images too."""
    for number in range(48):
        folder = "new" if number >= 36 else ("cat", "dog", "owl")[number % 3]
        path = tmp_path / "photos" / folder / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    settings = yaml.safe_load(tiny.JOB)
    short = {"duration": "2st", "warmup": "1st", "batch": 4, "checkpoint_every": "100st"}
    settings |= {
        "output": str(tmp_path / "out"),
        "prepare": {
            "dataset": "folder",
            "source": {"labelled": str(tmp_path / "photos"), "unlabelled": str(tmp_path / "photos" / "new")},
            "split_off": {"validation": 0.2, "test": 0.2},
        },
        "teacher": settings["teacher"] | short,
        "generations": [],
    }
    path = tmp_path / "photos.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def states(job: Path) -> dict[str, str]:
    ran = command("plan", job)
    assert ran.status == 0, ran
    return {
        line.split()[0]: "done" if " done " in line else "to do"
        for line in ran.out.splitlines()
        if line.split() and line.split()[0] in ["prepare", *small.TEACHER_ONLY] and line.split()[1] in ("done", "will")
    }


def test_one_command_takes_a_folder_of_photos_to_a_model(tmp_path: Path, job: Path) -> None:
    assert command("plan", job).status == 0  # clean before there are shards
    ran = command("run", job)
    assert (ran.status, ran.err) == (0, ""), ran
    [folder] = (tmp_path / "out").glob("prepare-*")
    assert json.loads((folder / "classes.json").read_text()) == ["cat", "dog", "owl"]  # and not `new`
    counts = json.loads((folder / "done.json").read_text())["info"]["counts"]
    assert counts == {"labelled": 24, "val": 6, "test": 6, "unlabelled": 12}
    assert {path.name for path in folder.glob("*.parquet")} == {
        f"manifest-{split}.parquet" for split in ("labelled", "val", "test", "unlabelled")
    }
    assert set(states(job).values()) == {"done"}

    # Touched, the images are written again, and nothing is trained again.
    os.utime(tmp_path / "photos" / "cat" / "0.png", (1, 1))
    assert states(job)["prepare"] == "to do"
    ran = command("run", job)
    assert ran.status == 0 and "gen0-teacher  done before" in ran.out, ran

    # A finished run can do without the photos.
    shutil.rmtree(tmp_path / "out" / folder.name)
    shutil.move(tmp_path / "photos", tmp_path / "elsewhere")
    assert set(states(job).values()) == {"done"}


def test_a_folder_that_is_gone_is_named(tmp_path: Path, job: Path) -> None:
    shutil.rmtree(tmp_path / "photos" / "new")
    for name in ("plan", "run"):
        ran = command(name, job)
        assert ran.status == 2 and f"there is no folder {tmp_path}/photos/new to prepare" in ran.err, ran


@pytest.mark.slow
def test_another_image_makes_another_teacher(tmp_path: Path, job: Path) -> None:
    assert command("run", job).status == 0
    for path in sorted((tmp_path / "photos" / "cat").iterdir())[:6]:
        path.write_bytes(picture(int(path.stem) + 900))
    assert command("run", job).status == 0
    assert len(list((tmp_path / "out").glob("gen0-teacher-*"))) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("prepare.source=null", "prepare.source is None; it takes the folder whose sub-folders are the classes"),
        ("prepare.source={labeled: a}", "it takes the folder whose sub-folders are the classes, or folders by what"),
        ("prepare.split_off={validation: 0.1}", "names no test images, which this job needs; write source: {test: FOL"),
        ("prepare.split_off={val: 0.1}", "prepare.split_off names 'val'; what can be split off is validation and test"),
        (
            "prepare.split_off={validation: 2.0}",
            "prepare.split_off.validation is 2.0; it must be between 0.001 and 0.9",
        ),
        ("prepare.split_off={validation: 0.5, test: 0.5}", "prepare.split_off leaves no images to learn from"),
        ("prepare.source={labelled: a, test: b, unlabelled: c}", "both give test images; drop one of them"),
        (
            "prepare.source={labelled: a}; generations=[{student: {model: a}}]",
            "prepare.source names no unlabelled images, which this job needs",
        ),
        ("prepare.labels_per_class=3", "prepare.labels_per_class is 3, which has no effect: prepare.dataset is folder"),
    ],
)
def test_mistakes_in_the_settings(job: Path, settings: str, said: str) -> None:
    ran = command("plan", job, *settings.split("; "))
    assert ran.status == 2 and said in ran.err, ran
