"""The sample rule: which members make a sample, and that everything else is counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pipeline.data import samples, shards
from pipeline.data.index_files import Classes, read_labels
from pipeline.data.samples import DOTS, Left
from pipeline.data.shards import Shard, scan, stream
from pipeline.errors import DataError
from tests import small
from tests.data.tars import make, picture

PNG, JPEG = picture(1), picture(2, file_format="JPEG")


@pytest.mark.parametrize("names, used", [
    (["a.jpg"], "a.jpg"),
    (["a.depth.png", "a.jpg", "a.cls"], "a.jpg"),
    (["a.seg.jpg", "a.left.png", "a.PNG"], "a.PNG"),
    (["a.left.png", "a.json"], "a.left.png"),
    (["a.jpg", "a.png"], "a.jpg"),
    (["a.jfif"], "a.jfif"),
    (["a"], "a"),
    (["a.mask", "a.jpg"], "a.jpg"),
    (["a.mask", "a.left.jpg"], "a.left.jpg"),
    (["a.x.png", "a.y.png"], None),
    (["a.mask", "a.jfif"], None),
    (["a.heic"], None),
    (["a.txt"], None),
])  # fmt: skip
def test_the_image_of_a_run(tmp_path: Path, names: list[str], used: str | None) -> None:
    content = {name: picture(number) for number, name in enumerate(names) if not name.endswith((".json", ".cls"))}
    path = make(tmp_path / "a.tar", [(name, content.get(name, b"{}")) for name in names])
    reader = stream(path)
    found = list(reader)
    assert [data for _, data in found] == ([] if used is None else [content[used]])
    assert [sample for sample, _ in found] == scan(path).samples
    assert reader.left.number == (used is None)


def test_pictures_whose_key_ends_at_a_dot_are_counted_one_by_one(tmp_path: Path) -> None:
    names = [f"IMG_2023.07.{number:02d}.png" for number in range(20)]
    path = make(
        tmp_path / "a.tar", [*((name, PNG) for name in names), ("k.jpg", JPEG), ("h.heic", b"x"), ("t.txt", b"x")]
    )
    reader = stream(path)
    assert [sample.key for sample, _ in reader] == ["k"]
    assert reader.left == Left(
        images={DOTS: 20, ".heic": 1},
        runs={".txt": 1},
        example={DOTS: names[0], ".heic": "h.heic", ".txt": "t.txt"},
        number=3,
    )


def test_every_run_ends_in_one_count(tmp_path: Path) -> None:
    draw = random.Random(0)
    suffixes = ["jpg", "png", "x.png", "y.jpg", "cls", "json", "txt", "heic", "jfif", "", "mask", "left.webp"]
    for number in range(200):
        members = [
            (f"{draw.choice('abc')}{'.' if suffix else ''}{suffix}", draw.choice([PNG, b"none", b""]))
            for suffix in draw.choices(suffixes, k=draw.randrange(9))
        ]
        path = make(tmp_path / f"{number}.tar", members)
        keys = [name.partition(".")[0] for name, _ in members]
        runs = sum(1 for place, key in enumerate(keys) if place == 0 or keys[place - 1] != key)
        reader = stream(path)
        found = [sample for sample, _ in reader]
        assert len(found) + reader.left.number == runs
        assert found == scan(path).samples
        assert (
            sum(reader.left.runs.values())
            + sum(count for reason, count in reader.left.images.items() if reason != DOTS)
            + (reader.left.images.get(DOTS, 0) > 0)
            <= runs
        )
        assert set(reader.left.example) == {*reader.left.images, *reader.left.runs}


def labels_of(tmp_path: Path, names: list[str], members: list[tuple[str, bytes]]) -> list[int]:
    path = make(tmp_path / "l.tar", members)
    reader = stream(path)
    found = [sample for sample, _ in reader]
    return read_labels(Shard("l.tar", path, 1, "", "labelled"), found, Classes(names), None, reader.apart)


@pytest.mark.parametrize("names, suffix, text, expected", [
    (["cat", "dog"], "cls", b"1", 1),
    (["cat", "dog"], "cls", b" 1\n", 1),
    (["cat", "dog"], "cls", b"\xef\xbb\xbf1", 1),
    (["cat", "dog"], "cls", b"dog", 1),
    (["cat", "caf\u00e9"], "cls", "cafe\u0301 ".encode(), 1),
    (["cat", "dog"], "json", b'{"label": 1}', 1),
    (["cat", "dog"], "json", b'\xef\xbb\xbf{"label": "dog"}', 1),
    (["0", "1"], "cls", b"1", 1),
    (["0", "1"], "json", b'{"label": "1"}', 1),
    (["1", "0"], "json", b'{"label": 1}', 1),
    (["1", "0"], "cls", b"1", 1),
    (["1", "0"], "json", b'{"label": "1"}', "name of class 0 and another class's index"),
    (["001", "7"], "cls", b"001", 1),
    (["001", "7"], "json", b'{"label": "001"}', "name of class 0 and another class's index"),
    (["cat", "dog"], "json", b'{"label": "1"}', "label '1'; it must be a class index from 0 to 1, or a class name"),
    (["cat", "dog"], "json", b'{"label": true}', "label 'True'"),
    (["cat", "dog"], "json", b'{"label": 1.0}', "label '1.0'"),
    (["cat", "dog"], "json", b"[" * 100_000, 'without a "label"'),
    (["cat", "dog"], "cls", b"9" * 5000, "label '999"),
    (["cat", "dog"], "cls", b"dogs", "such as 'dog'"),
    (["cat", "dog"], "cls", b"2", "class index 2, but classes.json has 2 classes"),
    (["cat", "dog"], "json", b'{"label": -1}', "class index -1"),
])  # fmt: skip
def test_what_a_label_means(tmp_path: Path, names: list[str], suffix: str, text: bytes, expected: int | str) -> None:
    members = [("a.png", PNG), (f"a.{suffix}", text)]
    if isinstance(expected, int):
        assert labels_of(tmp_path, names, members) == [expected]
        return
    with pytest.raises(DataError) as error:
        labels_of(tmp_path, names, members)
    assert expected in str(error.value) and len(str(error.value)) < 400


def test_a_label_that_lies_elsewhere_in_the_tar_is_named(tmp_path: Path) -> None:
    members = [("a.png", PNG), ("b.png", PNG), ("a.cls", b"0"), ("b.cls", b"1")]
    with pytest.raises(DataError, match=r"'a'\) of shard l\.tar has no label beside it: .* lies elsewhere in the tar"):
        labels_of(tmp_path, ["x", "y"], members)
    with pytest.raises(DataError, match="has no label; every labelled sample needs"):
        labels_of(tmp_path, ["x", "y"], members[:2])


def test_labels_in_json_cost_one_opening_of_the_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    real = shards._open
    monkeypatch.setattr(shards, "_open", lambda path, cache: opened.append(path) or real(path, cache))
    pairs = [pair for n in range(20) for pair in ((f"{n}.png", PNG), (f"{n}.json", b'{"label": 1}'))]
    assert labels_of(tmp_path, ["x", "y"], pairs) == [1] * 20
    assert len(opened) <= 3  # its samples, .cls members, .json members


def test_what_is_said_of_a_shard_stays_short(tmp_path: Path) -> None:
    reader = stream(make(tmp_path / "a.tar", [(f"{n}.kind{n}", b"x") for n in range(100)]))
    assert list(reader) == [] and reader.left.number == 100
    assert len(reader.left.runs) == samples.MOST_REASONS + 1 and sum(reader.left.runs.values()) == 100
    assert set(reader.left.example) == set(reader.left.runs)


def dotted(count: int) -> list[tuple[str, bytes]]:
    return [(f"IMG_2023.07.{number:02d}.png", picture(number)) for number in range(count)]


def test_unlabelled_pictures_that_are_skipped_fail_the_stage_or_are_said(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    make(world.shards / "unlabelled-000.tar", dotted(20))
    ran = world.run()
    assert ran.status == 2 and "Traceback" not in ran.err
    assert "20 of 24 unlabelled images cannot be used (20 dots in the key), more than data.max_bad_fraction" in ran.err
    assert "write the shard again by `prepare`" in ran.out
    ran = world.run("data.max_bad_fraction=1.0")
    assert ran.status == 0 and "4 images of 2 shards labelled, 20 bad" in ran.out
    info: dict[str, Any] = json.loads((world.folder("gen1-label") / "done.json").read_text())["info"]
    assert info["bad"] == {DOTS: 20} and info["rule"] == samples.RULE


def test_labelled_pictures_that_are_skipped_fail_the_index_or_are_said(tmp_path: Path) -> None:
    world = small.make(tmp_path, generations=[])
    make(world.shards / "test-000.tar", [*dotted(9), ("t.png", PNG), ("t.cls", b"owl")])
    ran = world.run()
    assert ran.status == 2 and "9 of 10 test images cannot be used" in ran.err
    ran = world.run("data.max_bad_fraction=0.95")
    assert (
        ran.status == 0 and "9 images of shard test/test-000.tar skipped, the first is 'IMG_2023.07.00.png'" in ran.out
    )
    assert "1 test, 9 bad" in ran.out


def test_other_kinds_of_pictures_and_shards_without_any_are_said(tmp_path: Path) -> None:
    world = small.make(tmp_path)
    heic = [(f"h{number}.heic", b"x") for number in range(2)]
    jfif = [(f"j{number}.jfif", picture(number, file_format="JPEG")) for number in range(5)]
    make(world.shards / "unlabelled-000.tar", [*heic, *jfif, ("k.jpg", JPEG), ("n.txt", b"x")])
    make(world.shards / "unlabelled-002.tar", [])
    make(world.shards / "unlabelled-003.tar", [("only.txt", b"x")])
    ran = world.run("data.max_bad_fraction=0.5")
    assert ran.status == 0, ran
    assert "10 images of 4 shards labelled, 2 bad, 2 samples (2 .txt) without an image" in ran.out
    assert "2 images of shard unlabelled-000.tar skipped, the first is 'h0.heic': .heic is not decoded here" in ran.out
    assert "shard unlabelled-002.tar holds no image: it has no members" in ran.out
    assert "shard unlabelled-003.tar holds no image, only 1 sample (1 .txt)" in ran.out
