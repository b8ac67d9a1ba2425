"""A job of detectors: its stages, what they leave, what it says of mistakes."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file

from pipeline.config.load import load_job
from pipeline.errors import ConfigError
from pipeline.graph import stages_of
from pipeline.plan import corpora
from pipeline.prepare.shard_writer import write_split
from tests import small
from tests.detection import world
from tests.small import command


def detectors(*names, **changes):
    plain = dataclasses.asdict(world.settings(duration="2st", checkpoint_every="100st", **changes))
    return [{**plain, "name": name} for name in names]


def write(folder, scenes, *given, **changes):
    job = {
        "name": "found", "cluster": "inline", "workers": {"threads": 1}, "tracking": {"enabled": False},
        "detection": {"data": {"root": str(scenes)}, "detectors": list(given)}, **changes,
    }  # fmt: skip
    path = folder / "found.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A finished job of two detectors, and its output."""
    folder = tmp_path_factory.mktemp("job")
    world.write(folder / "data", train=6, validation=4)
    job = write(folder, folder / "data", *detectors("one", "two"))
    found = command("run", job, f"output={folder / 'out'}", "seed=3")
    assert (found.status, found.err) == (0, ""), found
    return job, folder / "out", found.out


def folder_of(output, stage):
    [found] = output.glob(f"{stage}-????????")
    return found


def test_its_stages_and_their_files(ran):
    job, output, printed = ran
    stages = ["detect-index", "detector-one", "detector-two", "detect-evaluate", "report"]
    assert [stage.name for stage in stages_of(load_job(str(job)))] == stages
    assert all((folder_of(output, stage) / "done.json").exists() for stage in stages)
    trained = folder_of(output, "detector-one")
    assert {"model.safetensors", "detector.yaml", "result.json"} <= {path.name for path in trained.iterdir()}
    assert "AP50 of boxes / masks on 4 validation images" in printed
    again = command("run", job, f"output={output}", "seed=3")
    assert again.status == 0 and "all is done" in again.out


def test_what_is_found_has_the_ids_that_the_images_came_with(ran):
    _, output, _ = ran
    stage = folder_of(output, "detect-evaluate")
    found = json.loads((stage / "one/detections.json").read_text())
    assert all(one["image_id"].startswith("image 10") and one["category_id"] in (7, 3) for one in found)
    assert all(set(one) == {"image_id", "category_id", "bbox", "score", "segmentation"} for one in found)
    record = json.loads((stage / "detection.json").read_text())
    assert (record["source"], record["images"]) == ("validation", 4)
    assert [row["name"] for row in record["detectors"]] == ["one", "two"]
    assert record["detectors"][0]["box"]["ap_large"] is None  # no object is as large


def test_its_report_says_that_the_figures_are_validations(ran):
    _, output, _ = ran
    page = (folder_of(output, "report") / "index.html").read_text()
    assert "There is no test split" in page and "LambdaResNet-101, paper" in page and page.count("<img") == 4
    assert "annotations dropped: none" in page and "neither taught nor scored: " in page


def test_a_change_of_one_detector_leaves_the_other(ran, tmp_path):
    job, output, _ = ran
    shutil.copytree(output, tmp_path / "out")
    plan = command("plan", job, f"output={tmp_path / 'out'}", "seed=3", "detection.detectors.1.lr=0.02")
    assert plan.status == 0, plan
    ahead = [line.split()[0] for line in plan.out.splitlines() if "will run" in line]
    assert ahead == ["detector-two", "detect-evaluate", "report"]


def test_a_test_split_is_what_is_tested_on(ran):
    job, _, _ = ran
    assert corpora.tested_scenes_of(load_job(str(job), ["detection.data.test=test-*.tar"])) == "detection.test"


def test_an_object_of_an_unknown_class_and_a_source_that_is_both(ran, tmp_path):
    job, _, _ = ran
    data = tmp_path / "data"
    world.write(data, train=2, validation=2)
    (data / "classes.json").write_text('["purple", "green"]')
    found = command("run", job, f"output={tmp_path / 'out'}", f"detection.data.root={data}")
    assert found.status == 2 and "which classes.json does not list" in found.err
    both = command("run", job, f"output={tmp_path / 'both'}", "detection.data.validation=train-*.tar")
    assert both.status == 2
    assert "detection.data.validation and detection.data.train both match 2 shards" in both.err, both.err


def test_scenes_without_any_object(ran, tmp_path):
    job, _, _ = ran
    data = tmp_path / "data"
    world.write(data, train=2, validation=2)
    for shard in data.glob("val-*"):
        shard.unlink()
    write_split(str(data), "val", [[world.item(4, 0)]], workers=1)
    found = command("run", job, f"output={tmp_path / 'out'}", f"detection.data.root={data}")
    assert found.status == 2 and "of detection.data.validation have no annotations" in found.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": "One"}, r"detectors\[0\].name is 'One'; use small letters"),
        ({"jitter": [2.0, 0.1]}, r"jitter is \[2.0, 0.1\]; it takes two numbers"),
        ({"init": "gen2-student"}, r"init is 'gen2-student', which is no stage of this job; name a stage folder"),
        ({"duration": "3 weeks"}, r"detection.detectors\[0\].duration"),
        ({"learning_rate": 1}, r"it is called 'lr' here"),
    ],
)
def test_mistakes_in_a_job(tmp_path, changes, said):
    [one] = detectors("one")
    with pytest.raises(ConfigError, match=said):
        load_job(str(write(tmp_path, "data", {**one, **changes})))


def test_names_and_data_that_exclude_each_other(tmp_path):
    with pytest.raises(ConfigError, match="give each a name of its own"):
        load_job(str(write(tmp_path, "data", *detectors("one", "one"))))
    path = write(tmp_path, "data", *detectors("one"))
    with pytest.raises(ConfigError, match="are both set; drop one of them"):
        load_job(str(path), ["detection.data.dataset=digits"])
    with pytest.raises(ConfigError, match=r"detection\.data\.root is not set"):
        load_job(str(path), ["detection.data.root=null"])


TRAINS = {"model": "lambda_resnet_50", "overrides": world.BODY, "resolution": 32, "duration": "2st", "warmup": "1st"}


def test_a_detector_on_a_student_of_the_same_job(tmp_path):
    [one] = detectors("one", init="gen1-student")
    both = {"data": {"root": "data"}, "teacher": TRAINS, "student": TRAINS, "generations": [{}]}
    job = load_job(str(write(tmp_path, "data", one, **both)))
    stages = {stage.name: stage for stage in stages_of(job)}
    assert list(stages)[-5:] == ["evaluate", "detect-index", "detector-one", "detect-evaluate", "report"]
    assert stages["detector-one"].needs == ("detect-index", "gen1-student")
    for changes, said in (
        ({"init": "gen2-student"}, "name one of gen0-teacher, gen1-student"),
        ({"overrides": {}}, "which is of another architecture: lambda_resnet_50 with"),
    ):
        with pytest.raises(ConfigError, match=said):
            load_job(str(write(tmp_path, "data", {**one, **changes}, **both)))


def test_the_canvas_is_refused_before_anything_is_trained(ran, tmp_path):
    job, _, _ = ran
    found = command("run", job, f"output={tmp_path / 'out'}", "detection.detectors.0.canvas=36")
    assert found.status == 2 and "canvas is 36, which the stride 8" in found.err


def test_predict_draws_what_a_detector_finds_and_writes_it_as_coco_does(ran, tmp_path):
    _, output, _ = ran
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        Image.fromarray(world.scene(number)[0]).save(photos / f"{number}.png")
    (photos / "none.jpg").write_bytes(b"no picture")
    trained = folder_of(output, "detector-one")
    found = command("predict", trained, photos, "--out", tmp_path / "found")
    assert found.status == 0 and "in 2 images, 1 bad" in found.out and "not_an_image" in found.err, found
    record = json.loads((tmp_path / "found/detections.json").read_text())
    assert [one["name"] for one in record["categories"]] == world.CLASSES
    assert [(one["width"], one["height"]) for one in record["images"]] == [(world.WIDTH, world.HEIGHT)] * 2
    assert all(one["category_id"] in (1, 2) and one["area"] >= 0 for one in record["annotations"])
    assert Image.open(tmp_path / "found/000001.png").size == (world.WIDTH, world.HEIGHT)
    assert command("predict", trained, photos / "0.png").status == 0
    assert command("predict", trained, trained, photos).status == 2


@pytest.mark.slow
def test_an_export_is_weights_card_and_pyramid(ran, tmp_path):
    pytest.importorskip("onnxruntime")
    _, output, _ = ran
    found = command("export", folder_of(output, "detector-one"), "--out", tmp_path / "out")
    assert found.status == 0 and "differ from torch's by at most" in found.out, found
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "detector.yaml", "pyramid.onnx", "README.md"}
    again = command("predict", tmp_path / "out", ran[1].parent / "data/val-000.tar")
    assert again.status == 0, again
    refused = command("export", folder_of(output, "detector-one"), "--out", tmp_path / "other", "--int8")
    assert refused.status == 2 and "--int8 is of classifiers" in refused.err


@pytest.mark.slow
def test_one_job_goes_from_teacher_to_student_to_detector(tmp_path):
    world.write(tmp_path / "scenes", train=4, validation=3)
    body = {"model": "lambda_resnet_tiny", "overrides": {"depths": [1, 1, 1], "widths": [8, 8, 16]}}
    [one] = detectors("one", **body, init="gen1-student")
    classifier = small.make(tmp_path, detection={"data": {"root": str(tmp_path / "scenes")}, "detectors": [one]})
    ran = classifier.run()
    assert (ran.status, ran.err) == (0, ""), ran
    student, detector = (folder_of(classifier.output, name) for name in ("gen1-student", "detector-one"))
    theirs, first = load_file(student / "model.safetensors"), load_file(detector / "model.safetensors")
    shared = [name for name in theirs if name.endswith("weight") and f"backbone.body.{name}" in first]
    assert len(shared) > 20
    # Two steps have moved them, but not far.
    moved = [(first[f"backbone.body.{name}"] - theirs[name]).abs().mean().item() for name in shared]
    assert max(moved) < 0.2
    page = (folder_of(classifier.output, "report") / "index.html").read_text()
    assert "Noisy Student training" in page and "<h2>Detectors</h2>" in page and "Images with most mistakes" in page
    assert not [line for line in classifier.call("plan").out.splitlines() if "will run" in line]
