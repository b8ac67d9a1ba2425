"""What a job's settings become for the training loop.

Run: pytest tests/stages/test_make_spec.py
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from pipeline import graph, views
from pipeline.augment.noise import augment_of
from pipeline.cluster.inline import Inline
from pipeline.config.settings import Data, Generation, Job
from pipeline.config.settings_train import Affine, Finetune, Teacher, Train
from pipeline.data.images import View
from pipeline.errors import ConfigError
from pipeline.plan.context import Context
from pipeline.plan.corpora import Corpora
from pipeline.plan.stage import SHARDS, Done
from pipeline.stages import finetune
from pipeline.stages.train import check_models, make_spec
from pipeline.train.spec import _source as source
from pipeline.train.spec import view_of
from pipeline.weights import card_of
from tests.train.tiny import write_shard


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """Of a teacher with 40 labelled images."""
    (tmp_path / "classes.json").write_text('["a", "b", "c", "d"]')
    counts = {"labelled": {"labelled-0.tar": 40}, "validation": {"val-0.tar": 8}}
    for names in counts.values():
        for name, count in names.items():
            write_shard(tmp_path / name, count, seed=0)
    (tmp_path / SHARDS).write_text(json.dumps(counts))
    job = Job(name="job", output=str(tmp_path / "out"), data=Data(root=str(tmp_path)))
    [stage] = [stage for stage in graph.stages_of(job) if stage.kind == "train"]
    done = {"index": Done("index", str(tmp_path), "", "")}
    sources = Corpora(job, done, write=False)
    return Context(
        job, stage, graph.stages_of(job), str(tmp_path / "out"), "", done, sources, Inline(), pytest.fail, ""
    )


def test_the_loop_gets_the_settings_as_they_are(context: Context) -> None:
    settings = Teacher(model="m", batch=10, clip=2.0)
    assert make_spec(context, settings).settings is settings


def test_a_fine_tune_is_a_training_without_noise(context: Context) -> None:
    """Of its own settings all, of those before it what says how the work is carried out, and the model as it was
    left."""
    noisy = Train(
        model="m", mixup=0.5, dropout=0.5, clip=1.0, rollbacks=3, segments=3, window=2, precision="float32", keep=7
    )
    own = Finetune(resolution=64, duration="7st", batch=4, lr=0.5, lr_images=0, ema=0.5, label_smoothing=0.3)
    card = card_of("m", {"dropout": 0.5}, ["a"], View(64, 1.0, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    found = finetune.training(own, noisy, card)
    quiet = Train(model="m")
    for item in fields(Finetune):
        assert getattr(found, item.name) == (1.0 if item.name == "crop" else getattr(own, item.name))
    assert [found.segments, found.window, found.precision, found.keep] == [3, 2, "float32", 7]
    for name in ("mixup", "cutmix", "clip", "rollbacks", "dropout", "accumulate", "weights", "init"):
        assert getattr(found, name) == getattr(quiet, name)
    spec = dataclasses.replace(make_spec(context, found), only=("head",))
    assert spec.overrides == card.overrides and spec.view == spec.augment.view == card.view()


def test_an_epoch_is_one_pass_over_the_labelled_images(context: Context) -> None:
    spec = make_spec(context, Teacher(model="m", batch=10, duration="30ep", warmup="2.5ep", evaluate_every="1ep"))
    assert (spec.steps_per_epoch, spec.steps, spec.warmup, spec.evaluate_every) == (4, 120, 10, 4)
    assert spec.lr == pytest.approx(0.1 * 10 / 256)
    assert make_spec(context, Teacher(model="m", batch=10, lr=0.3, lr_images=0)).lr == 0.3


STUDENT: dict[str, Any] = {
    "model": "m",
    "batch": 8,
    "unlabelled_ratio": 1.3,
}  # 10.4, so 10 pseudo-labelled images a step


def student_context(context: Context, student: Train) -> Context:
    """Of generation 2, on one shard of 30 images of which 24 copies are selected; the one beside it gives none."""
    root = Path(context.corpora.root)
    for number in range(2):
        write_shard(root / f"unlabelled-{number}.tar", 30, seed=number)
    summary = {"shards": {"unlabelled-0.tar": 24}}
    (root / "summary.json").write_text(json.dumps(summary))
    (root / "classes.json").write_text('["a", "b", "c", "d"]')
    job = dataclasses.replace(
        context.job, seed=7, teacher=Teacher(model="m", batch=10), generations=[Generation(student=student)] * 2
    )
    [stage] = [stage for stage in graph.stages_of(job) if stage.name == "gen2-student"]
    here = Done("", str(root), "", output="by this teacher")
    done = {**context.needs, "gen2-label": here, "gen2-select": here, "gen1-student": here}
    return dataclasses.replace(
        context, job=job, stage=stage, stages=graph.stages_of(job), needs=done, corpora=Corpora(job, done, write=False)
    )


def test_a_student_learns_from_what_was_selected_at_the_rate_of_both_kinds_of_images(context: Context) -> None:
    of_student = student_context(context, Train(**STUDENT))
    spec = make_spec(of_student, of_student.job.generations[1].student)
    labelled, pseudo = spec.sources
    assert (labelled.name, labelled.per_step, pseudo.name, pseudo.per_step) == ("labelled", 8, "pseudo", 10)
    assert [(Path(shard.path).name, shard.count) for shard in pseudo.shards] == [("unlabelled-0.tar", 24)]
    assert pseudo.shards[0].expected["teacher"] == "by this teacher"
    assert spec.lr == pytest.approx(0.1 * 18 / 256)
    assert (spec.steps_per_epoch, spec.seed) == (5, 7002)  # an epoch is one of the labelled images


def test_what_plan_says_of_the_rate_is_what_training_takes(context: Context) -> None:
    of_student = student_context(context, Train(**STUDENT, lr=0.3))
    spec = make_spec(of_student, of_student.job.generations[1].student)
    said = views._what(of_student.job, of_student.stage, 40)
    assert f"batch 8 + 10 pseudo-labelled, learning rate {spec.lr:.3g}," in said


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_a_students_targets_are_as_its_settings_say(context: Context, labels: str) -> None:
    settings = Train(**STUDENT, labels=labels, temperature=0.5, label_smoothing=0.2)
    soft = make_spec(student_context(context, settings), settings).soft
    assert (soft.smoothing, soft.temperature, soft.hard_pseudo) == (0.2, 0.5, labels == "hard")


@pytest.mark.parametrize(("init", "expected"), [("scratch", None), ("teacher", "model.safetensors")])
def test_a_student_starts_from_its_teacher_by_option(context: Context, init: str, expected: str | None) -> None:
    settings = Train(**STUDENT, init=init)
    spec = make_spec(student_context(context, settings), settings)
    assert spec.init == (expected and f"{context.corpora.root}/{expected}")


def test_segments_are_as_many_as_asked_for_where_there_are_shards(context: Context) -> None:
    shard = make_spec(context, Teacher(model="m", batch=10)).sources[0].shards[0]
    settings = Train(model="m", segments=100, window=3)
    assert [source("labelled", [shard] * number, 10, settings).segments for number in (40, 100, 300)] == [40, 100, 100]
    assert source("labelled", [shard] * 300, 10, settings).window == 3


def test_a_ratio_that_comes_to_no_image_is_refused_before_the_teacher_trains(context: Context) -> None:
    small = {"model": "lambda_resnet_tiny", "resolution": 16, "batch": 2}
    student = Train(**small, unlabelled_ratio=0.2)
    job = dataclasses.replace(context.job, teacher=Teacher(**small), generations=[Generation(student=student)])
    with pytest.raises(ConfigError, match=r"gen1-student: unlabelled_ratio 0\.2 × batch 2 is less than one"):
        check_models(dataclasses.replace(context, job=job, stages=graph.stages_of(job)))


def test_noise_that_a_later_student_cannot_have_is_refused_before_the_teacher_trains(context: Context) -> None:
    small = {"model": "lambda_resnet_tiny", "resolution": 16, "batch": 10}
    student = Train(**small, augment="rand-m9-x2")
    job = dataclasses.replace(context.job, teacher=Teacher(**small), generations=[Generation(student=student)])
    with pytest.raises(ConfigError, match=r"gen1-student: augment is 'rand-m9-x2'.*write e\.g\. rand-m9-n2-p1"):
        check_models(dataclasses.replace(context, job=job, stages=graph.stages_of(job)))


def test_the_training_view_is_what_the_settings_say() -> None:
    noise = Train(
        model="m",
        resolution=32,
        augment="rand-m9-n1-p1",
        augment_ops=["Rotate"],
        crop_scale=[0.5, 1.0],
        flip=0.0,
        affine=Affine(degrees=3.0),
        mean=[0.1, 0.2, 0.3],
    )
    view = augment_of(noise)
    assert (view.size, view.policy, view.ops, view.scale, view.flip) == (
        32,
        "rand-m9-n1-p1",
        ("Rotate",),
        (0.5, 1.0),
        0,
    )
    assert view.affine and view.affine.degrees == 3.0
    assert view.mean == (0.1, 0.2, 0.3)
    assert not view.on_device


def test_lanczos_is_for_the_test_view_alone() -> None:
    settings = Train(model="m", interpolation="lanczos")
    assert (augment_of(settings).interpolation, view_of(settings).interpolation) == ("bicubic", "lanczos")


def test_a_device_carries_out_the_policy_where_there_is_one() -> None:
    assert augment_of(Train(model="m", augment_on="device")).on_device
    assert not augment_of(Train(model="m", augment_on="device", augment="")).on_device
    with pytest.raises(ConfigError, match=r"GaussianBlur.*augment_on: loader"):
        augment_of(Train(model="m", augment_on="device", augment="rand-m9-t3a"))
