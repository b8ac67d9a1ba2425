"""How answers on further sets are marked: class lists of their own, some classes only, several right ones, folders."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.config.checks_evaluate import CORRUPTIONS
from pipeline.config.settings_evaluate import EvaluationSet
from pipeline.data import index_files
from pipeline.data.shards import Shard, find_shards
from pipeline.errors import DataError
from pipeline.plan import marking
from pipeline.prepare import folders

CLASSES = ["cat", "dog", "owl"]
SOURCE = "evaluate.sets.x"
IMAGENET = marking._of_timm(marking.IMAGENET).split()


def read(
    entry: dict[str, Any] | None = None, shards: list[str] | None = None, classes: list[str] = CLASSES, root: Any = ""
) -> marking.Marking:
    found = [Shard(path.rpartition("/")[2], path, 1, "", SOURCE) for path in shards or []]
    set_ = EvaluationSet(shards="x", **entry or {})
    return marking.read(SOURCE, set_, found, classes, f"{root}/classes.json", str(root))


def test_folders_that_are_numbers_keep_them_though_they_sort_as_text(tmp_path: Path) -> None:
    """ImageNet-V2 has folders "0" to "999"."""
    for number in range(12):
        folder = tmp_path / "v2" / str(number)
        folder.mkdir(parents=True)
        Image.fromarray(np.full((4, 4, 3), 10 * number, np.uint8)).save(folder / f"{number}.png")
    folders.folder(str(tmp_path / "v2"), str(tmp_path / "shards"), split="v2")
    assert json.loads((tmp_path / "shards" / "classes.json").read_text())[:4] == ["0", "1", "10", "11"]
    names = [f"n{number:08d}" for number in range(12)]
    shards = find_shards(str(tmp_path / "shards" / "v2-*.tar"), SOURCE)
    meaning = read(shards=[shard.path for shard in shards], classes=names, root=tmp_path).meaning
    assert meaning is not None and meaning[:4] == (0, 1, 10, 11)
    index = index_files.make_indexer(str(tmp_path / "out"), names, meanings={SOURCE: meaning})
    for shard in shards:
        assert index((SOURCE, shard)).per_class.tolist() == [1] * 12
        path = index_files.rows_path(str(tmp_path / "out"), SOURCE, shard.name)
        rows = pq.read_table(path, columns=["offset", "size", "label"]).to_pylist()
        data = Path(shard.path).read_bytes()
        for row in rows:
            image = Image.open(io.BytesIO(data[row["offset"] : row["offset"] + row["size"]]))
            assert image.getpixel((0, 0))[0] == 10 * row["label"]


def test_a_class_list_beside_the_shards_goes_by_name(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    shards = [str(tmp_path / name / "1.tar") for name in ("a", "b")]
    assert read(shards=shards, root=tmp_path) == marking.Marking()  # none
    for name in ("a", "b"):
        (tmp_path / name / "classes.json").write_text(json.dumps(CLASSES))
    assert read(shards=shards, root=tmp_path) == marking.Marking()  # the job's own
    for name in ("a", "b"):
        (tmp_path / name / "classes.json").write_text('["owl", "cat"]')
    assert read(shards=shards, root=tmp_path).meaning == (2, 0)
    (tmp_path / "classes.json").write_text('["owl", "cat", "dog"]')  # the job's, wherever its shards lie
    assert read(shards=[str(tmp_path / "1.tar")], root=tmp_path) == marking.Marking()
    (tmp_path / "b" / "classes.json").write_text('["owl", "cow"]')
    with pytest.raises(DataError, match=r"says what class indexes mean, and .*/b has another one; prepare all"):
        read(shards=shards, root=tmp_path)
    (tmp_path / "b" / "classes.json").unlink()
    with pytest.raises(DataError, match="has none; prepare all"):
        read(shards=shards, root=tmp_path)
    (tmp_path / "a" / "classes.json").write_text('["owl", "cow"]')
    with pytest.raises(DataError, match="names 'cow', which is none of the job's 3 classes"):
        read(shards=shards[:1], root=tmp_path)


def test_classes_that_may_be_answered(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text("2\n0\n")
    (tmp_path / "some.json").write_text('["owl", "cat"]')
    for said in (["owl", "cat"], [2, 0], "some.txt", "some.json", str(tmp_path / "some.txt")):
        assert read({"classes": said}, root=tmp_path).answers == (2, 0)
    numbers = ["2", "1", "0"]  # names go before indexes
    assert read({"classes": [2, 0]}, classes=numbers).answers == (0, 2)


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_imagenet_a_and_r_have_200_classes_each(name: str, tmp_path: Path) -> None:
    answers = read({"classes": name}, classes=IMAGENET).answers
    indexes = marking._of_timm(f"{name.replace('-', '_')}_indices.txt")
    (tmp_path / "indexes.txt").write_text(indexes)
    assert answers is not None and len(set(answers)) == 200
    assert sorted(answers) == sorted(map(int, indexes.split()))
    assert read({"classes": "indexes.txt"}, classes=IMAGENET, root=tmp_path).answers is not None
    turned = read({"classes": name}, classes=IMAGENET[::-1]).answers  # by name, whatever the job's order
    assert turned == tuple(999 - number for number in answers)


def test_real_labels_are_those_of_imagenets_validation_images() -> None:
    right = read({"labels": "imagenet-real"}, classes=IMAGENET).right
    assert right is not None and len(right) == 50_000
    assert sum(not some for some in right.values()) == 3_163  # Beyer et al. 2020: 46,837 have labels
    assert marking.of_image("00012345_ILSVRC2012_val_00000001", right) == "ILSVRC2012_val_00000001"
    assert marking.of_image("val/ILSVRC2012_val_00050000", right) == "ILSVRC2012_val_00050000"
    assert marking.of_image("ILSVRC2012_val_00050001", right) is None
    turned = read({"labels": "imagenet-real"}, classes=IMAGENET[::-1]).right
    assert turned is not None
    first = "ILSVRC2012_val_00000001"
    assert turned[first] == tuple(sorted(999 - number for number in right[first]))


def test_labels_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text('{"a/one.two.jpg": ["owl", "cat", "owl"], "b/x y.png": [], "z": ["dog"]}')
    right = read({"labels": "real.json"}, root=tmp_path).right
    assert right == {"one_two": (0, 2), "x_y": (), "z": (1,)}
    keys = {"00000007_one_two": "one_two", "c/z": "z", "00000000_x_y": "x_y", "00000007_one": None}
    assert {key: marking.of_image(key, right) for key in keys} == keys


def corrupted(names: list[str]) -> list[str]:
    return [f"/data/c/{name}/x-000.tar" for name in names]


def test_corruptions_and_severities_are_folders() -> None:
    shards = [Shard(path, path, 1, "", SOURCE) for path in corrupted(["snow/1", "fog/5", "spatter/2"])]
    entry = EvaluationSet(shards="c/*/*/*.tar", reference="teacher")
    parts = marking.read(SOURCE, entry, shards, CLASSES, "/data/classes.json", "/data").parts
    assert parts is not None and list(parts.values()) == [("snow", "1"), ("fog", "5"), ("spatter", "2")]
    lacking = marking.missing(parts.values())
    assert "snow" not in lacking and "gaussian_noise" in lacking
    assert [name for name in lacking if "/" in name] == [
        *(f"snow/{severity}" for severity in (2, 3, 4, 5)),
        *(f"fog/{severity}" for severity in (1, 2, 3, 4)),
    ]
    assert marking.missing((name, severity) for name in CORRUPTIONS for severity in marking.SEVERITIES) == []


@pytest.mark.parametrize(
    ("entry", "files", "words"),
    [
        ({"classes": "imagenet-a"}, {}, "imagenet-a names 'n01498041', which is none of the job's 3 classes"),
        ({"classes": "imagenet-a"}, {}, "this set is for a job whose class list has ImageNet's classes"),
        ({"classes": "imagenet-b"}, {}, "classes is 'imagenet-b'; it takes imagenet-a, imagenet-r, a list, or"),
        ({"classes": ["owl", "dgo"]}, {}, "names 'dgo', which is none of the job's 3 classes ('cat', …); did you mean"),
        ({"classes": [0, 3]}, {}, "names the class index 3, but the job has 3 classes (0 to 2)"),
        ({"classes": ["owl", "owl"]}, {}, "names the class 'owl' twice"),
        ({"classes": "a.txt"}, {}, "a.txt: there is no such file; correct the path"),
        ({"classes": "a.txt"}, {"a.txt": "\n"}, "a.txt names no class"),
        ({"classes": "a.json"}, {"a.json": "{}"}, "a.json is no JSON list"),
        ({"classes": "a.json"}, {"a.json": "["}, "a.json is not JSON"),
        ({"classes": "a.json"}, {"a.json": "[]"}, "a.json names no class"),
        ({"labels": "real"}, {}, "labels is 'real'; it takes imagenet-real, or a .json file of {image: [classes]}"),
        ({"labels": "imagenet-real"}, {}, "imagenet-real names 'n01440764', which is none of the job's 3 classes"),
        ({"labels": "r.json"}, {"r.json": '{"a": "cat"}'}, 'is not of the form {"image": ["class", …]}'),
        ({"labels": "r.json"}, {"r.json": '{"a": [["cat"]]}'}, "neither a name nor an index"),
        ({"labels": "r.json"}, {"r.json": '{"a": [true]}'}, "neither a name nor an index"),
        ({"labels": "r.json"}, {"r.json": '{"a": ["cow"]}'}, "names 'cow', which is none of the job's 3 classes"),
        ({"labels": "r.json"}, {"r.json": '{"a/1.jpg": [0], "b/1.jpg": [1]}'}, "names two images '1'"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, entry: dict[str, Any], files: dict[str, str], words: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as error:
        read(entry, root=tmp_path)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{SOURCE}.{next(iter(entry))}"), error.value


@pytest.mark.parametrize(
    ("reference", "folder", "words"),
    [
        ("teacher", "snow", "such as snow/3, but x-000.tar lies in c/snow; rename the folders, or drop"),
        ("teacher", "snow/6", "lies in snow/6"),
        ("alexnet", "spatter/1", "errors are known for 15 corruptions, and 'spatter' is none of them"),
    ],
)
def test_mistakes_in_folders(reference: str, folder: str, words: str) -> None:
    with pytest.raises(DataError) as error:
        read({"reference": reference}, corrupted([folder]))
    assert words in str(error.value) and "\n" not in str(error.value)
