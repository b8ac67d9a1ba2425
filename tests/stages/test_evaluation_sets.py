"""`evaluate.sets`: further labelled sets are entries of the configuration, and touch nothing but the evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import weights
from pipeline.config.checks_evaluate import CORRUPTIONS
from pipeline.corruption.errors import ALEXNET
from pipeline.data import images
from pipeline.data.shards import stream
from pipeline.stages import further_sets
from tests import small
from tests.data import tars
from tests.small import World

STAYING = ("index", "gen0-teacher")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A finished run of a teacher alone, and shards that it does not know of: `copies` holds the test images again."""
    made = small.make(tmp_path_factory.mktemp("sets"), generations=[])
    tars.shard(made.shards / "copies-000.tar", 3, labels=[0, 1, 2], start=200)
    tars.shard(made.shards / "other-000.tar", 4, labels=[0, 0, 1, 2], start=600)
    tars.shard(made.shards / "other-001.tar", 2, labels=[2, 1], start=700)
    (made.shards / "few.json").write_text('{"600.png": ["cat"]}')
    (made.shards / "empty.json").write_text('{"600.png": []}')
    assert made.run().status == 0
    return made


def evaluated(world: World) -> dict[str, Any]:
    """What the newest evaluation says of its sets, of the only model."""
    [model] = json.loads((evaluations(world)[-1] / "evaluate.json").read_text())["models"]
    found: dict[str, Any] = model["sets"]
    return found


def logits_of(world: World, shard: str) -> torch.Tensor:
    """Of the teacher, an image a row."""
    model, card = weights.load_model(str(world.folder("gen0-teacher")))
    pictures = [images.load(data, card.view()) for _, data in stream(str(world.shards / shard))]
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(images.normalise(torch.from_numpy(np.stack(pictures)), card.view()))
    return found


def page_of(world: World) -> str:
    return max(world.output.glob("report-*/index.html"), key=lambda path: path.stat().st_mtime_ns).read_text()


def evaluations(world: World) -> list[Path]:
    return sorted(world.output.glob("evaluate-*"), key=lambda path: path.stat().st_mtime)


def test_adding_sets_reruns_evaluate_and_report_alone(world: World) -> None:
    [first] = evaluations(world)
    before = json.loads((first / "evaluate.json").read_text())
    assert before["models"][0]["sets"] == {}
    sets = "evaluate.sets={same: 'copies-*.tar', other: 'other-*.tar'}"
    planned = small.command("plan", world.job, f"output={world.output}", sets)
    assert "evaluate.sets.other" in planned.out and planned.status == 0
    ran = world.run(sets)
    assert ran.status == 0, ran.err
    redone = [line.split()[1] for line in ran.out.splitlines() if line.startswith("✓")]
    assert redone == ["evaluate", "report"]
    found = json.loads((evaluations(world)[-1] / "evaluate.json").read_text())["models"]
    for old, new in zip(before["models"], found, strict=True):
        figures = ("top1", "top5", "loss", "ece")
        assert {key: new[key] for key in figures} == {key: old[key] for key in figures}
        assert new["sets"]["same"] == {key: new[key] for key in figures}  # the same images
        assert list(new["sets"]) == ["same", "other"] and set(new["sets"]["other"]) == set(figures)
    page = (
        world.folder("report") if False else sorted(world.output.glob("report-*"), key=lambda p: p.stat().st_mtime)[-1]
    )
    text = (page / "index.html").read_text()
    assert "Further sets" in text and "other" in text
    again = world.run(sets)
    assert "all is done; nothing had to run" in again.out
    assert "all is done; nothing had to run" in world.run().out


def test_images_of_a_set_that_models_were_trained_on_are_named(world: World) -> None:
    tars.shard(world.shards / "known-000.tar", 4, labels=[0, 1, 2, 0], start=3)  # the last three of the labelled images
    ran = world.run("evaluate.sets={known: 'known-*.tar'}")
    assert "3 of 4 different images of evaluate.sets.known are labelled images too" in ran.out, ran


def test_a_shard_that_was_touched_is_tested_again(world: World) -> None:
    sets = "evaluate.sets={other: 'other-*.tar'}"
    assert world.run(sets).status == 0
    (world.shards / "other-000.tar").touch()
    ran = world.run(sets)
    assert "✓ evaluate" in ran.out and ran.out.count("done before") == 2


def test_some_classes_may_be_answered_and_test_images_of_them_stand_beside(world: World) -> None:
    tars.shard(world.shards / "part-000.tar", 5, labels=[0, 2, 2, 0, 2], start=800)
    ran = world.run("evaluate.sets={part: {shards: 'part-*.tar', classes: [owl, cat]}}")
    assert ran.status == 0, ran.err
    found = evaluated(world)["part"]
    best = logits_of(world, "part-000.tar")[:, [0, 2]].argmax(1)
    assert found["top1"] == pytest.approx((best == torch.tensor([0, 1, 1, 0, 1])).double().mean().item())
    best = logits_of(world, "test-000.tar")[[0, 2]][:, [0, 2]].argmax(1)  # the image of the third class is left out
    assert found["clean"]["top1"] == pytest.approx((best == torch.tensor([0, 1])).double().mean().item())
    assert (found["classes"], found["top5"]) == (2, 1.0)
    assert f"of 2 classes; test images of these: {100 * found['clean']['top1']:.2f} %" in page_of(world)


def test_several_right_classes_and_images_without_any(world: World) -> None:
    tars.shard(world.shards / "real-000.tar", 3, labels=[0, 1, 2], start=810)
    real = {"810.png": ["cat", "owl"], "811": [], "812.png": ["cat", "dog", "owl"]}
    (world.shards / "real.json").write_text(json.dumps(real))
    sets = "evaluate.sets={real: {shards: 'real-*.tar', labels: real.json}}"
    ran = world.run(sets)
    assert ran.status == 0, ran.err
    found = evaluated(world)["real"]
    first = logits_of(world, "real-000.tar")[0].argmax().item() in (0, 2)
    assert found["top1"] == pytest.approx((first + 1) / 2) and found["skipped"] == 1
    assert "1 image without a right class left out" in page_of(world)
    (world.shards / "real.json").write_text(json.dumps(real | {"811": ["dog"]}))  # other labels are another test
    ran = world.run(sets)
    assert "✓ evaluate" in ran.out and evaluated(world)["real"]["skipped"] == 0


def test_a_set_with_a_class_list_of_its_own(world: World) -> None:
    tars.shard(world.shards / "own" / "own-000.tar", 3, labels=[2, 0, 1], start=200)
    (world.shards / "own" / "classes.json").write_text('["dog", "owl", "cat"]')  # the test images under other indexes
    ran = world.run("evaluate.sets={own: own}")
    assert ran.status == 0, ran.err
    [model] = json.loads((evaluations(world)[-1] / "evaluate.json").read_text())["models"]
    assert model["sets"]["own"] == {name: model[name] for name in ("top1", "top5", "loss", "ece")}


def test_folders_of_corruption_and_severity(world: World) -> None:
    for number, folder in enumerate([*(f"snow/{severity}" for severity in range(1, 6)), "fog/2", "spatter/1"]):
        tars.shard(world.shards / "c" / folder / "x-000.tar", 2, labels=[0, 1], start=900 + 2 * number)
    ran = world.run("evaluate.sets={c: {shards: 'c/*/*/*.tar', reference: teacher}}")
    assert ran.status == 0, ran.err
    assert "evaluate.sets.c has no shards of gaussian_noise, shot_noise," in ran.out and "fog/1, fog/3," in ran.out
    found = evaluated(world)["c"]
    assert found["mce"] is None and found["relative_mce"] is None and "snow" not in found["missing"]
    truth = torch.tensor([0, 1])
    wrong = {
        name: 100 * (logits_of(world, f"c/{name}/x-000.tar").argmax(1) != truth).double().mean().item()
        for name in ("snow/1", "snow/4", "fog/2", "spatter/1")
    }
    assert found["errors"]["snow"][0] == pytest.approx(wrong["snow/1"])
    assert found["errors"]["snow"][3] == pytest.approx(wrong["snow/4"])
    assert found["errors"]["fog"] == [None, pytest.approx(wrong["fog/2"]), None, None, None]
    assert found["errors"]["spatter"][0] == pytest.approx(wrong["spatter/1"])
    assert set(found["ce"]) == {"snow"} and found["ce"]["snow"] in (None, pytest.approx(100))
    assert "no mCE: gaussian_noise" in page_of(world)


def test_published_errors_of_alexnet_give_it_100() -> None:
    """Through the shares of right answers that are counted on a whole set."""
    names = {f"{name}/{severity}": 1 - ALEXNET[name] for name in CORRUPTIONS for severity in range(1, 6)}
    half = {part: 1 - (1 - top1) / 2 for part, top1 in names.items()}
    clean = {"gen0-teacher": 1 - 0.56522, "gen1-student": (1 - 0.56522) / 2}
    tops = {"gen0-teacher": names, "gen1-student": half}
    found = further_sets._corruption_errors("alexnet", tops, clean)
    assert found["gen0-teacher"]["mce"] == pytest.approx(100, abs=1e-9)
    assert found["gen0-teacher"]["relative_mce"] == pytest.approx(100, abs=1e-9)
    assert found["gen1-student"]["mce"] == pytest.approx(50) == found["gen1-student"]["relative_mce"]
    assert further_sets._corruption_errors("teacher", tops, clean)["gen1-student"]["mce"] == pytest.approx(50)
    few = {"snow/1": 0.5, "snow/2": 0.25}  # no corruption is whole
    [some] = further_sets._corruption_errors("alexnet", {"gen0-teacher": few}, clean).values()
    assert some["errors"] == {"snow": [50, 75, None, None, None]}
    assert (some["ce"], some["mce"], some["mean_error"]) == ({}, None, None)
    del names["snow/3"]
    assert further_sets._corruption_errors("alexnet", {"gen0-teacher": names}, clean)["gen0-teacher"]["mce"] is None


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("{learned: 'labelled-*.tar'}", "evaluate.sets.learned and data.labelled both match 1 shard,"),
        ("{none: 'nothing-*.tar'}", "nothing-*.tar"),
        ("{test: 'other-*.tar'}", "evaluate.sets names a set 'test'"),
        ("{'a/b': 'other-*.tar'}", "evaluate.sets names a set 'a/b'"),
        ("{other: ''}", "evaluate.sets.other is empty"),
        ("{unlabelled: 'unlabelled-*.tar'}", "has no label"),
        ("[other-*.tar]", "evaluate.sets"),
        ("{a: {classes: [cat]}}", "evaluate.sets.a.shards is not set"),
        ("{a: {shard: 'other-*.tar'}}", "unknown key 'evaluate.sets.a.shard'; did you mean 'shards'?"),
        ("{a: {shards: 'other-*.tar', classes: [cat], labels: r.json}}", "a has both classes and labels; an entry"),
        ("{a: {shards: 'other-*.tar', classes: 7}}", "classes is 7; it takes imagenet-a, imagenet-r, the path of"),
        ("{a: {shards: 'other-*.tar', classes: []}}", "classes is []; it takes imagenet-a"),
        ("{a: {shards: 'other-*.tar', classes: imagenet-r}}", "imagenet-r names 'n01443537', which is none of the"),
        (
            "{a: {shards: 'other-*.tar', classes: [cat, owl]}}",
            "holds images of the class 'dog', which is none of the 2",
        ),
        ("{c: {shards: 'other-*.tar', reference: resnet}}", "reference is 'resnet'"),
        ("{c: {shards: 'other-*.tar', reference: alexnet}}", "its shards lie in folders corruption/severity"),
        ("{r: {shards: 'other-*.tar', labels: none.json}}", "none.json: there is no such file"),
        ("{r: {shards: 'other-*.tar', labels: few.json}}", "labels says nothing of the image '601'"),
        ("{r: {shards: 'other-*.tar', labels: empty.json}}", "has no class for any image"),
    ],
)
def test_mistakes_in_sets_are_one_sentence(world: World, setting: str, said: str) -> None:
    ran = world.run(f"evaluate.sets={setting}")
    assert ran.status == 2 and said in ran.err and ran.err.count("\n") == 1, ran


def test_a_pattern_that_matches_nothing_does_not_wait_for_evaluate(worlds: small.Store, tmp_path: Path) -> None:
    """Whatever is done already: neither the first stage that runs, nor a later one, begins."""
    nothing = "evaluate.sets={none: 'nothing-*.tar'}"
    for until in ("gen1-select", "index"):
        finished = worlds.finished(tmp_path / until, until)
        done = finished.done()
        ran = finished.run(nothing)
        assert ran.status == 2 and "no shard matches nothing-*.tar" in ran.err and finished.done() == done
