"""Corrections of labels: what a file of them may say, and what they change in a run, stage by stage."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import graph, storage
from pipeline.config import load
from pipeline.data import corrections, label_files, parquet_files, shards
from pipeline.data.corrections import COLUMNS
from pipeline.errors import DataError
from pipeline.loading.training_rows import TrainingShard, load_rows
from tests import small
from tests.data import tars
from tests.small import CLASSES

Row = tuple[str, str, int, str]
"""Source, shard, index, class."""


def digest_of(shard: Path, index: int) -> str:
    return hashlib.sha256([data for _, data in shards.stream(str(shard))][index]).hexdigest()


def write(world: small.World, *rows: Row, **changes: str) -> Path:
    """A file of corrections of images that lie in the world's shards; `changes` replace values of every row."""
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS)
    table.writeheader()
    for source, shard, index, name in rows:
        row = {"source": source, "shard": shard, "index": str(index), "path": "a, b.png", "class": name}
        table.writerow({**row, "sha256": digest_of(world.shards / shard, index), **changes})
    path = world.job.parent / "corrections.csv"
    path.write_text(out.getvalue())
    return path


def redone(world: small.World, file: Path) -> set[str]:
    """The stages that a run with the file did again, in a world that was finished without it."""
    before = {path.parent.name for path in world.output.glob("*/done.json")}
    ran = world.run(f"corrections={file}")
    assert ran.status == 0, ran.err
    return {path.parent.name.rpartition("-")[0] for path in world.output.glob("*/done.json")} - {
        name.rpartition("-")[0] for name in before if name in used(world, file)
    }


def used(world: small.World, file: Path) -> set[str]:
    """The folders that the job uses now."""
    job = load.load_job(str(world.job), [f"output={world.output}", f"corrections={file}"])
    return {storage.name(look.folder) for look in graph.look(job) if look.folder}


AFTER_LABELS = {"gen1-select", "gen1-student", "evaluate", "report"}


@pytest.mark.parametrize(
    ("rows", "again"),
    [
        ([], set()),
        ([("labelled", "labelled-000.tar", 3, "cat")], {"index"}),  # which it is already: all that follows stays
        ([("labelled", "labelled-000.tar", 3, "owl")], {*small.STAGES}),
        ([("validation", "val-000.tar", 1, "owl")], {"index", "gen1-audit", "evaluate", "report"}),
        ([("test", "test-000.tar", 1, "drop")], {"index", "evaluate", "report"}),
        ([("unlabelled", "unlabelled-001.tar", 2, "owl")], AFTER_LABELS),
    ],
)
def test_what_depends_on_a_correction_is_done_again_and_nothing_else(
    worlds: small.Store, tmp_path: Path, rows: list[Row], again: set[str]
) -> None:
    world = worlds.finished(tmp_path)
    before = {path.name: path.read_bytes() for path in world.shards.iterdir()}
    file = write(world, *rows)
    assert redone(world, file) == again
    assert {path.name: path.read_bytes() for path in world.shards.iterdir()} == before
    assert redone(world, file) == set()


def test_a_corrected_label_is_the_same_as_one_in_the_shard(worlds: small.Store, tmp_path: Path) -> None:
    """The teacher's fingerprint, and what it trains on, are those of shards that had that label from the start."""
    world = worlds.finished(tmp_path / "one", generations=[])
    assert world.run(f"corrections={write(world, ('labelled', 'labelled-000.tar', 4, 'cat'))}").status == 0
    other = small.make(tmp_path / "two", generations=[])
    tars.shard(other.shards / "labelled-000.tar", 6, labels=[0, 1, 2, 0, 0, 2])
    assert other.run().status == 0
    folders = {path.name for path in world.output.iterdir()}
    assert other.folder("gen0-teacher").name in folders and other.folder("evaluate").name in folders
    name = other.folder("gen0-teacher").name
    weights = [(one.output / name / "model.safetensors").read_bytes() for one in (world, other)]
    assert weights[0] == weights[1]


def test_a_correction_may_replace_a_label_that_is_none(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    tars.shard(world.shards / "labelled-000.tar", 6, labels=[0, 1, 2, 0, 7, 2])
    assert "class index 7" in world.run().err
    ran = world.run(f"corrections={write(world, ('labelled', 'labelled-000.tar', 4, 'dog'))}")
    assert ran.status == 0, ran.err


def test_unlabelled_images_get_their_class_with_certainty_or_are_left_out(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path)
    said = [("unlabelled", "unlabelled-000.tar", 1, "drop"), ("unlabelled", "unlabelled-001.tar", 2, "owl")]
    untouched = {path.name: path.read_bytes() for path in world.folder("gen1-label").iterdir()}
    assert redone(world, write(world, *said)) == AFTER_LABELS
    assert {path.name: path.read_bytes() for path in world.folder("gen1-label").iterdir()} == untouched
    [select] = [path for path in world.output.glob("gen1-select-*") if list(path.glob("*.corrected"))]
    summary = json.loads((select / "summary.json").read_text())
    assert summary["corrected"] == {"unlabelled-000.tar": 1, "unlabelled-001.tar": 1}
    assert summary["kept"] == 7
    rows = {}
    for name, count in (("unlabelled-000", 3), ("unlabelled-001", 4)):
        shard = TrainingShard("", str(select / f"{name}.corrected"), str(select / f"{name}.parquet"), count)
        rows[name] = load_rows(shard, soft=True)
    assert rows["unlabelled-000"].index.tolist() == [0, 2, 3]
    found = rows["unlabelled-001"]
    assert found.label[2] == CLASSES.index("owl")
    targets = label_files.spread_targets(found.classes, found.probs, len(CLASSES))
    assert targets[2].tolist() == [0, 0, 1]
    # All else is what the teacher said, and what the columns say of the bytes.
    was = parquet_files.read_table(str(world.folder("gen1-label") / "unlabelled-001.parquet"))
    now = parquet_files.read_table(str(select / "unlabelled-001.corrected"))
    others = np.array([0, 1, 3])
    assert now.take(others).to_pylist() == was.take(others).to_pylist()
    same = ["index", "key", "offset", "size", "status", "image_hash", "crc32"]
    assert now.select(same).to_pylist() == was.select(same).to_pylist()


def test_a_copy_of_a_test_image_is_not_trained_on_when_that_image_is_dropped(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    tars.shard(world.shards / "labelled-000.tar", 6, labels=[0, 1, 2, 0, 1, 2], start=199)
    tars.shard(world.shards / "unlabelled-000.tar", 4, start=201)
    ran = world.run()
    assert "3 labelled images also found in the test shards" in ran.out, ran
    assert redone(world, write(world, ("test", "test-000.tar", 1, "drop"))) == {"index", "evaluate", "report"}


def test_the_best_weights_are_chosen_anew_by_corrected_validation_labels(worlds: small.Store, tmp_path: Path) -> None:
    short = {"model": "lambda_resnet_tiny", "resolution": 8, "duration": "2st", "warmup": "1st", "batch": 4}
    world = worlds.finished(tmp_path, generations=[], teacher={**short, "weights": "best", "evaluate_every": "1st"})
    file = write(world, ("validation", "val-000.tar", 1, "owl"))
    assert redone(world, file) == {"index", "gen0-teacher", "evaluate", "report"}


def test_a_mistake_in_a_rerun_leaves_the_job_that_the_folder_is_known_for(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, generations=[])
    before = (world.output / "job.yaml").read_bytes()
    assert world.run("corrections=nowhere.csv", "teacher.duration=3st").status == 2
    assert (world.output / "job.yaml").read_bytes() == before


def test_the_report_says_how_many_test_labels_are_corrected(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, generations=[])
    rows = [("test", "test-000.tar", 0, "drop"), ("test", "test-000.tar", 1, "owl")]
    ran = world.run(f"corrections={write(world, *rows)}")
    assert "2 test labels corrected" in ran.out
    [page] = [
        path
        for path in world.output.glob("report-*/index.html")
        if "2 test labels corrected by people" in path.read_text()
    ]
    assert "2 test labels corrected by people." in json.loads((page.parent / "summary.json").read_text())["verdict"]


MISTAKES: list[tuple[dict[str, str], str]] = [
    ({"source": "train"}, "has the source 'train'; it must be one of labelled, unlabelled, validation, test"),
    (
        {"shard": "labelled-00.tar"},
        "names the shard 'labelled-00.tar', which the labelled shards do not have; did you ",
    ),
    ({"index": "-1"}, "has the index '-1'; it takes the number of the sample"),
    ({"index": "6"}, "names sample 6 of shard labelled-000.tar, which has 6, counted from 0"),
    ({"class": "dgo"}, "has the class 'dgo'; it takes a name of classes.json or 'drop'; did you mean 'dog'?"),
    ({"class": ""}, "has the class ''"),
    ({"sha256": "ab"}, "has the sha256 'ab'; it takes the 64 hex digits"),
    ({"sha256": "0" * 64}, "is of another image than sample 1 ('"),
]


@pytest.mark.parametrize(("changes", "words"), MISTAKES)
def test_mistakes_are_named_before_anything_is_trained(
    worlds: small.Store, tmp_path: Path, changes: dict[str, str], words: str
) -> None:
    world = worlds.finished(tmp_path, generations=[])
    file = write(world, ("labelled", "labelled-000.tar", 1, "owl"), **changes)
    ran = world.run(f"corrections={file}")
    assert (ran.status, ran.err.count("\n")) == (2, 1), ran.err
    assert f"corrections: line 2 of {file}" in ran.err and words in ran.err
    assert len(list(world.output.glob("gen0-teacher-*"))) == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "begins with the columns (none); they must be source,shard,index,path,class,sha256"),
        (b"shard,class\n", "begins with the columns shard,class"),
        (",".join(COLUMNS).encode() + b"\nlabelled,a.tar,1\n", "line 2 of {} has 3 fields; it takes 6"),
        (",".join(COLUMNS).encode() + b'\n"labelled', "line 2 of {} is no CSV"),
        (b"\xff\xfe", "is not UTF-8 text"),
    ],
)
def test_files_that_are_no_corrections(tmp_path: Path, text: bytes, words: str) -> None:
    path = tmp_path / "c.csv"
    path.write_bytes(text)
    with pytest.raises(DataError) as error:
        corrections.read(str(path), CLASSES)
    assert words.format(path) in str(error.value)
    with pytest.raises(DataError, match="there is no"):
        corrections.read(str(tmp_path / "other.csv"), CLASSES)
    with pytest.raises(DataError, match="cannot be read"):
        corrections.read(str(tmp_path), CLASSES)


def lines(*rows: dict[str, Any]) -> str:
    usual = {"source": "test", "shard": "a.tar", "index": 0, "path": "", "class": "cat", "sha256": "0" * 64}
    out = io.StringIO()
    table = csv.DictWriter(out, COLUMNS)
    table.writeheader()
    table.writerows({**usual, **row} for row in rows)
    return out.getvalue()


def test_a_sample_is_corrected_once(tmp_path: Path) -> None:
    path = tmp_path / "c.csv"
    path.write_text(lines({}, {"index": 1}, {"sha256": "0" * 64}), encoding="utf-8-sig")  # as spreadsheets save it
    found = corrections.read(str(path), CLASSES)
    assert found.count("test") == 2 and found.of("test", "a.tar")[1].label == 0
    path.write_text(lines({}, {"index": 1}, {"class": "drop"}))
    with pytest.raises(DataError, match=r"line 4 of .* says something else of the same sample than line 2"):
        corrections.read(str(path), CLASSES)
    path.write_text(lines({"class": "drop"}))
    with pytest.raises(DataError, match="a class is called 'drop'"):
        corrections.read(str(path), [*CLASSES, "drop"])


def test_the_order_of_rows_and_the_path_change_nothing(tmp_path: Path) -> None:
    texts = (lines({}, {"index": 1}), lines({"index": 1}, {"path": "x.png"}), lines({}, {"index": 2}), lines())
    digests = []
    for text in texts:
        (tmp_path / "c.csv").write_text(text)
        digests.append(corrections.read(str(tmp_path / "c.csv"), CLASSES).digest("test"))
    assert digests[0] == digests[1] != digests[2]
    assert digests[3] is None


def test_corrections_of_what_the_job_does_not_use_are_said(worlds: small.Store, tmp_path: Path) -> None:
    world = worlds.finished(tmp_path, generations=[])
    ran = world.run(f"corrections={write(world, ('unlabelled', 'unlabelled-000.tar', 1, 'owl'))}")
    assert ran.status == 0
    assert "1 of source 'unlabelled' have no effect, for this job does not train or test on it" in ran.out


def test_a_class_for_what_is_no_picture_is_refused(worlds: small.Store, tmp_path: Path) -> None:
    world = small.make(tmp_path, data={"root": str(tmp_path / "shards"), "max_bad_fraction": 0.5})
    tars.make(world.shards / "unlabelled-001.tar", {"a.png": tars.picture(7), "b.png": b"no picture"})
    assert world.run().status == 0
    ran = world.run(f"corrections={write(world, ('unlabelled', 'unlabelled-001.tar', 1, 'owl'))}")
    assert ran.status == 2 and "cannot be decoded (not_an_image); write 'drop' there" in ran.err
    ran = world.run(f"corrections={write(world, ('unlabelled', 'unlabelled-001.tar', 1, 'drop'))}")
    assert ran.status == 0, ran.err
