"""`init`: what it sees in a folder, and that the job it writes runs as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.load import load_job
from pipeline.first_job import interval
from tests import small
from tests.data.tars import picture
from tests.small import command

SHORT = ["duration=2st", "warmup=0st", "overrides={depths: [1, 1, 1], widths: [8, 8, 16]}"]
TINY = [f"teacher.{setting}" for setting in SHORT]
QUIET = ["cluster=inline", "tracking.enabled=false", "evaluate.speed_seconds=0.01"]


def photos(folder: Path, per_class: int = 20, names: tuple[str, ...] = ("cat", "dog"), first: int = 0) -> Path:
    for number in range(per_class * len(names)):
        path = folder / names[number % len(names)] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(first + number))
    return folder


def written(tmp_path: Path, folder: Path) -> tuple[str, Path]:
    """What was said, and the job; `plan` has nothing against it."""
    out = tmp_path / "jobs" / "mine.yaml"
    ran = command("init", folder, "--out", out)
    assert (ran.status, ran.err) == (0, ""), ran
    planned = command("plan", out, f"output={tmp_path / 'out'}")
    assert planned.status == 0 and "blocked" not in planned.out and "!" not in planned.out, planned
    return ran.out, out


def test_a_folder_of_photos_becomes_a_job_that_runs(tmp_path: Path) -> None:
    source = photos(tmp_path / "my photos: 1")
    said, path = written(tmp_path, source)
    assert "28 labelled, 6 validation, 6 test images; 2 classes (cat, dog), the smallest of 20 images" in said
    assert "only 6 validation images: of an accuracy of 50 % the 95 % interval is 19 to 81 %" in said
    job = load_job(str(path))
    assert job.prepare.sources == {"labelled": str(source)} and job.teacher.resolution == 32 and not job.generations
    ran = command("run", path, f"output={tmp_path / 'out'}", *TINY, *QUIET)
    assert (ran.status, ran.err) == (0, ""), ran
    assert "28 labelled, 6 val, 6 test" in ran.out


def test_unlabelled_photos_become_a_student(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos", 40, ("cat", "train"))  # as a class
    photos(source, 90, ("unlabelled",), first=1000)
    said, path = written(tmp_path, source)
    assert "56 labelled, 90 unlabelled, 12 validation, 12 test images; 2 classes (cat, train)" in said
    job = load_job(str(path))
    assert job.prepare.sources["unlabelled"] == str(source / "unlabelled")
    assert [g.student.init for g in job.generations] == ["teacher"]


def test_splits_that_are_there_are_used(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    for split, number in (("train", 20), ("val", 10)):
        photos(source / split, number, first=100 * number)
    said, path = written(tmp_path, source)
    assert "34 labelled, 20 validation, 6 test images" in said and "interval" not in said
    prepare = load_job(str(path)).prepare
    assert prepare.sources == {"labelled": str(source / "train"), "validation": str(source / "val")}
    assert prepare.split_off == {"test": 0.15}


@pytest.mark.slow
def test_a_folder_of_shards_becomes_a_job_that_runs(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    said, path = written(tmp_path, world.shards)
    assert "6 labelled, 8 unlabelled, 3 validation, 3 test images; 3 classes" in said
    students = [f"student.{setting}" for setting in SHORT]
    ran = command("run", path, f"output={world.output}", *TINY, *students, *QUIET)
    assert ran.status == 0 and world.done() == small.STAGES, ran


def test_nothing_is_written_over(tmp_path: Path) -> None:
    source, out = photos(tmp_path / "photos"), tmp_path / "mine.yaml"
    out.write_text("mine")
    ran = command("init", source, "--out", out)
    assert ran.status == 2 and f"{out} is there already, and is not written over" in ran.err, ran
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({}, "there is no folder"),
        ({"a.png": 1}, "a.png lies in no class sub-folder of"),
        ({"cat/a.png": 1}, "holds the one class cat; a job needs labelled images of two classes or more"),
        ({"unlabelled/a.png": 1}, "holds no images in class sub-folders; a job needs labelled images of two classes"),
        (
            {**{f"cat/{n}.png": n for n in range(9)}, **{f"dog/{n}.png": n + 9 for n in range(5)}},
            "class 'dog' of {} has 5 images, and each needs 6: 2 to learn from and 2 for each of validation and test",
        ),
        ({"val/cat/a.png": 1, "cat/b.png": 2}, "and none of labelled images to train on; call it"),
        ({"labelled-000.tar": 1}, "holds shards, but no val-*.tar (validation); call them so"),
    ],
)
def test_what_no_job_can_be_made_of_is_said(tmp_path: Path, made: dict[str, int], said: str) -> None:
    source = tmp_path / "photos"
    for name, number in made.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(picture(number))
    ran = command("init", source, "--out", tmp_path / "mine.yaml")
    assert ran.status == 2 and said.format(source) in ran.err and ran.err.count("\n") == 1, ran
    assert not (tmp_path / "mine.yaml").exists()


def test_the_interval_is_wilsons() -> None:
    low, high = interval(0.9, 50)
    assert (round(low, 4), round(high, 4)) == (0.7864, 0.9565)


def test_a_picture_that_is_none_does_not_end_it(tmp_path: Path) -> None:
    source = photos(tmp_path / "photos")
    for number, content in enumerate((picture(1)[:30], b"<html>no</html>", b"")):
        (source / "cat" / f"bad{number}.png").write_bytes(content)
    ran = command("init", source, "--out", tmp_path / "mine.yaml")
    assert (ran.status, ran.err) == (0, ""), ran
