"""`noisy-lambda review`: what it shows, that it is no stage, and what it leaves as it was."""

from __future__ import annotations

import csv
import hashlib
import json
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from pipeline.data import parquet_files
from pipeline.data.corrections import COLUMNS
from pipeline.review.choose import shares
from tests import small
from tests.small import World


def shown(world: World) -> dict[str, Any]:
    """The data in the page."""
    page = (world.output / "review" / "index.html").read_text()
    found: dict[str, Any] = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    return found


def files(world: World) -> dict[str, bytes]:
    """All but what `review` writes."""
    return {
        str(path): path.read_bytes()
        for path in world.output.rglob("*")
        if path.is_file()
        and "review" not in path.relative_to(world.output).parts
        and path.name not in (".lock", ".token")
    }


@pytest.fixture
def finished(worlds: small.Store, tmp_path: Path) -> World:
    """A finished run of a teacher and a student."""
    return worlds.finished(tmp_path)


def test_a_finished_run_is_reviewed_and_stays_as_it_was(finished: World) -> None:
    before, status = files(finished), finished.call("status").out
    ran = finished.call("review", "--images", "5")
    assert (ran.status, ran.err) == (0, ""), ran
    assert files(finished) == before and finished.call("status").out == status
    assert f"page          {finished.output}/review/index.html" in ran.out
    assert "labelled       left out" in ran.out and "! --folds 2 finds labels that may be wrong" in ran.out
    assert "disagreements  left out: there is one teacher, not two" in ran.out
    data = shown(finished)
    between = [item for item in data["items"] if item["group"] == "unlabelled"]
    assert len(data["items"]) == 5 and between and data["classes"] == small.CLASSES
    for item in data["items"]:
        with tarfile.open(finished.shards / item["shard"]) as tar:
            member = tar.extractfile(f"{item['path']}.png")
            assert member and hashlib.sha256(member.read()).hexdigest() == item["sha256"]
    assert "nothing to clean" in finished.call("clean").out
    assert "all is done; nothing had to run" in finished.run().out


def test_files_that_prepare_wrote_down_are_named(finished: World) -> None:
    known = {
        "shard": ["unlabelled-001.tar", "unlabelled-000.tar"],
        "index": [2, 0],
        "path": ["crawl/é.jpg", "crawl/a.jpg"],
    }
    parquet_files.write_table(str(finished.shards / "manifest-unlabelled.parquet"), pa.table(known))
    assert finished.call("review").status == 0
    rows = {(item["shard"], item["index"]): item["path"] for item in shown(finished)["items"]}
    assert rows["unlabelled-001.tar", 2] == "crawl/é.jpg" and rows["unlabelled-000.tar", 0] == "crawl/a.jpg"
    assert "crawl" not in rows["unlabelled-000.tar", 1]


def test_the_tasks_for_label_studio_fit_their_interface(finished: World) -> None:
    assert finished.call("review").status == 0
    folder = finished.output / "review"
    tree = ElementTree.parse(folder / "label_studio.xml").getroot()
    tasks = json.loads((folder / "label_studio.json").read_text())
    assert [choice.get("value") for choice in tree.iter("Choice")] == [*small.CLASSES, "drop"]
    for task in tasks:
        [result] = task["predictions"][0]["result"]
        assert result["value"]["choices"][0] in small.CLASSES
        assert {column for column in COLUMNS if column != "class"} <= set(task["data"])


def test_label_studios_own_sdk_takes_both(finished: World) -> None:
    """Where it is installed; it is too large for the tests' environment."""
    sdk = pytest.importorskip("label_studio_sdk.label_interface")
    assert finished.call("review").status == 0
    folder = finished.output / "review"
    tasks = json.loads((folder / "label_studio.json").read_text())
    interface = sdk.LabelInterface((folder / "label_studio.xml").read_text())
    interface.validate()
    assert all(interface.validate_task({"data": task["data"]}) for task in tasks)
    assert all(interface.validate_prediction(task["predictions"][0]) for task in tasks)


@pytest.fixture
def folded(worlds: small.Store, tmp_path: Path) -> World:
    """A finished run of a teacher, whose labels were reviewed by two folds."""
    world = worlds.finished(tmp_path, generations=[])
    before, status = files(world), world.call("status").out
    ran = world.call("review", "--folds", "2")
    assert (ran.status, ran.err) == (0, ""), ran
    assert "✓ fold1of2  finished" in ran.out and "✓ fold2of2  finished" in ran.out and "· index" in ran.out
    assert before.items() <= files(world).items() and world.call("status").out == status
    return world


def test_each_labelled_image_is_held_out_once_and_folds_are_stages(folded: World) -> None:
    answered: list[int] = []
    for number in (1, 2):
        folder = folded.folder(f"fold{number}of2")
        trained, held_out, answers = (
            parquet_files.read_table(str(folder / part / "labelled-000.parquet"))
            for part in ("labelled", "held_out", "answers")
        )
        rows = [row for row, status in enumerate(answers["status"].to_pylist()) if status == "ok"]
        assert rows == held_out["index"].to_pylist() and len(answers) == 6
        assert sorted([*rows, *trained["index"].to_pylist()]) == list(range(6))
        assert sorted(held_out["label"].to_pylist() + trained["label"].to_pylist()) == [0, 0, 1, 1, 2, 2]
        assert sorted(held_out["label"].to_pylist()) == [0, 1, 2]
        answered += rows
    assert sorted(answered) == list(range(6))
    again = folded.call("review", "--folds", "2")
    assert again.out.count("done before") == 3 and "running" not in again.out
    (folded.folder("fold2of2") / "done.json").unlink()  # as if it had been killed
    again = folded.call("review", "--folds", "2")
    assert "· fold1of2  done before" in again.out and "✓ fold2of2  finished" in again.out


def test_folds_are_cleaned_away_once_the_recipe_is_another(folded: World) -> None:
    assert "nothing to clean" in folded.call("clean").out
    cleaned = folded.call("clean", "teacher.lr=0.05").out
    assert folded.folder("fold1of2").name in cleaned and folded.folder("fold2of2").name in cleaned
    assert "nothing to clean" in folded.call("clean", "workers.cpus=2").out


def test_the_folds_find_labels_and_corrected_images_are_not_shown_again(folded: World, tmp_path: Path) -> None:
    items = [item for item in shown(folded)["items"] if item["group"] == "labelled"]
    assert items, "two steps of training make doubtful labels of some of six"
    first = items[0]
    rows = [{name: first[name] for name in COLUMNS if name != "class"} | {"class": "drop"}]
    with (tmp_path / "corrections.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    ran = folded.call("review", "--folds", "2", f"corrections={tmp_path / 'corrections.csv'}")
    assert (ran.status, ran.err) == (0, ""), ran
    assert "✓ fold1of2  finished" in ran.out  # the labelled images are others now
    data = shown(folded)
    places = {(item["source"], item["shard"], item["index"]) for item in data["items"]}
    assert (first["source"], first["shard"], first["index"]) not in places
    assert data["earlier"] == [[str(rows[0][name]) for name in data["columns"]]]


def test_folds_before_any_run_leave_the_job_alone(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    ran = world.call("review", "--folds", "3")
    assert (ran.status, ran.err) == (0, ""), ran
    assert {path.name.partition("-")[0] for path in world.output.iterdir() if path.is_dir()} == {
        "index", "fold1of3", "fold2of3", "fold3of3", "review",
    }  # fmt: skip
    assert not (world.output / "job.yaml").exists() and not (world.output / "progress.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--folds", "1"], "--folds is 1; give at least 2"),
        (["--images", "0"], "--images is 0; give at least 1"),
        ([], "is finished that could be reviewed; run the job"),
        (["--folds", "2", "teacher.checkpoint=x.safetensors"], "but teacher.checkpoint adopts"),
        (["corrections=nowhere.csv"], "corrections: there is no nowhere.csv"),
    ],
)
def test_mistakes_end_in_a_sentence(words: list[str], said: str, tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    ran = world.call("review", *words)
    assert ran.status == 2 and said in ran.err, ran
    assert not (world.output / "review").exists()


def test_names_from_data_cannot_leave_the_page(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    hostile = ["</script><script>alert(1)</script>", 'a "b" & <c>', "猫"]
    (world.shards / "classes.json").write_text(json.dumps(hostile))
    assert world.call("review", "--folds", "2").status == 0
    page = (world.output / "review" / "index.html").read_text()
    assert page.count("<script") == 2 and shown(world)["classes"] == hostile
    tree = ElementTree.parse(world.output / "review" / "label_studio.xml").getroot()
    assert [choice.get("value") for choice in tree.iter("Choice")] == [*hostile, "drop"]


@pytest.mark.parametrize(
    ("there", "most", "taken"),
    [
        ([100, 100, 100, 100], 200, [50, 50, 50, 50]),
        ([500, 0, 10, 100], 200, [95, 0, 10, 95]),
        ([3, 2, 1, 0], 200, [3, 2, 1, 0]),
        ([9, 9, 9, 9], 3, [1, 1, 1, 0]),
        ([0, 0, 0, 0], 5, [0, 0, 0, 0]),
    ],
)
def test_groups_share_the_page(there: list[int], most: int, taken: list[int]) -> None:
    assert shares(there, most) == taken


def test_a_job_that_measures_has_nothing_to_review(tmp_path: Path) -> None:
    path = tmp_path / "measure.yaml"
    path.write_text(yaml.safe_dump({"name": "m", "measure": {"models": ["lambda_resnet_tiny@8"]}}))
    ran = small.command("review", path, f"output={tmp_path / 'out'}")
    assert ran.status == 2 and "measure.models" in ran.err
