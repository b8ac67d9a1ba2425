"""Prepared shards: the right images with the right labels, the same bytes every time, never half of one."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pandas
import pytest
from PIL import Image

from pipeline.data import classes, images
from pipeline.data.shards import find_shards, read_texts, scan, stream
from pipeline.errors import ConfigError, DataError
from pipeline.prepare import digits, folders, shard_writer, sources, tables
from tests.data.tars import picture


def sums(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def content(folder: Path, split: str) -> list[tuple[str, bytes | None, bytes]]:
    """(key, .cls text, image bytes) of all samples of a split."""
    found = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        reader = stream(str(path))
        pairs = list(reader)
        assert reader.damage is None and reader.left.number == 0
        texts = read_texts(str(path), [sample for sample, _ in pairs], "cls")
        found += [(sample.key, text, data) for (sample, data), text in zip(pairs, texts, strict=True)]
    return found


# Digits


def test_digits(tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    result = digits.digits(str(tmp_path), seed=3, progress=lambda done, total: steps.append((done, total)))
    assert result == {
        "images": {"labelled": 50, "unlabelled": 1107, "val": 190, "test": 450},
        "unlabelled_shards": 6,
        "classes": 10,
    }
    assert steps == [(done, 1797) for done in range(1, 1798)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "classes.json",
        "labelled-000.tar",
        *[f"manifest-{split}.parquet" for split in ("labelled", "test", "unlabelled", "val")],
        "test-000.tar",
        *[f"unlabelled-{number:03d}.tar" for number in range(6)],
        "val-000.tar",
    ]
    assert json.loads((tmp_path / "classes.json").read_text())[:2] == ["zero", "one"]

    from sklearn.datasets import load_digits

    data = load_digits()
    keys: list[str] = []
    for split, per_class in {"labelled": 5, "val": 19, "test": 45, "unlabelled": None}.items():
        samples = content(tmp_path, split)
        keys += [key for key, _, _ in samples]
        for key, text, image in samples:
            pixels = np.asarray(images.decode(image))[..., 0].astype(float)
            assert np.array_equal(np.rint(pixels * 16 / 255), data.images[int(key)])
            assert text == (None if per_class is None else str(data.target[int(key)]).encode())
        if per_class is not None:
            counts = np.bincount([int(text or b"-1") for _, text, _ in samples])
            assert counts.tolist() == [per_class] * 10
            assert len({text for _, text, _ in samples[:12]}) > 2  # classes do not lie together
    assert sorted(keys) == [f"{number:04d}" for number in range(1797)]


def test_digits_by_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        digits.digits(str(tmp_path / name), seed=seed)
    one, again, other = (sums(tmp_path / name) for name in ("a", "again", "b"))
    assert one == again
    same = {"test-000.tar", "val-000.tar", "classes.json", "manifest-test.parquet", "manifest-val.parquet"}
    assert all((one[name] == other[name]) == (name in same) for name in one)


def test_digits_settings(tmp_path: Path) -> None:
    result = digits.digits(str(tmp_path), seed=0, labels_per_class=2, test=103, validation=60, shard_samples=1000)
    assert result["images"] == {"labelled": 20, "unlabelled": 1614, "val": 60, "test": 103}
    assert result["unlabelled_shards"] == 2
    with pytest.raises(ConfigError, match=r"200 labels per class.*lower one of them"):
        digits.digits(str(tmp_path / "x"), seed=0, labels_per_class=200)
    assert not (tmp_path / "x").exists()


def test_a_folder_of_other_shards_is_refused(tmp_path: Path) -> None:
    digits.digits(str(tmp_path), seed=0)
    before = sums(tmp_path)
    with pytest.raises(DataError, match=r"labelled-000\.tar already exists and holds something else"):
        digits.digits(str(tmp_path), seed=1)
    with pytest.raises(DataError, match=r"already holds other shards of 'unlabelled', such as unlabelled-002\.tar"):
        digits.digits(str(tmp_path), seed=0, shard_samples=600)
    (tmp_path / "unlabelled-003.tar").unlink()  # as if it had been killed
    digits.digits(str(tmp_path), seed=0)
    assert sums(tmp_path) == before


def test_webdataset_reads_them(tmp_path: Path) -> None:
    import webdataset

    digits.digits(str(tmp_path), seed=0)
    theirs = webdataset.WebDataset(str(tmp_path / "labelled-000.tar"), shardshuffle=False)
    found = [(sample["__key__"], sample["cls"], sample["png"]) for sample in theirs]
    assert found == content(tmp_path, "labelled")


# Folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes; dots, spaces, capitals and other alphabets in names; two bad files and some that are none."""
    source = tmp_path / "photos"
    for number in range(30):
        name = [f"{number}.png", f"v1.{number} x.PNG", f"ü{number}.jpeg"][number % 3]
        path = source / ["cat", "dog", "eel"][number % 3] / ("deep" if number % 2 else "") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, file_format="JPEG" if name.endswith("jpeg") else "PNG"))
    (source / "cat" / "cut.png").write_bytes(picture(99, 200, 200)[:300])
    (source / "dog" / "page\t.jpg").write_bytes(b"<html>")
    (source / "dog" / "notes.txt").write_text("no image")
    (source / "dog" / "._0.png").write_bytes(b"macOS")
    return source


def test_folder(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out"
    steps: list[tuple[int, int]] = []
    result = folders.folder(
        str(photos), str(out), shard_samples=12, progress=lambda done, total: steps.append((done, total))
    )
    assert result == {"shards": 3, "images": 30, "bad": 2, "skipped": 1, "classes": 3}
    assert steps[-1] == (32, 32)
    samples = content(out, "labelled")
    assert len({key for key, _, _ in samples}) == 30 and all("." not in key for key, _, _ in samples)
    originals = {path.read_bytes(): path for path in photos.rglob("*") if path.is_file()}
    for key, text, data in samples:
        path = originals[data]  # byte for byte
        assert ["cat", "dog", "eel"][int(text or b"-1")] == path.relative_to(photos).parts[0]
        assert scan(str(out / "labelled-000.tar")).samples[0].suffix in ("png", "jpeg")
        assert key.isascii()
    assert json.loads((out / "classes.json").read_text()) == ["cat", "dog", "eel"]
    bad = sorted(line.split("\t") for line in (out / "bad_files.txt").read_text().splitlines())
    assert [(split, Path(name).name) for split, name, _ in bad] == [
        ("labelled", "cut.png"),
        ("labelled", "notes.txt"),
        ("labelled", "page\\t.jpg"),
    ]
    assert [reason.partition(":")[0] for _, _, reason in bad] == ["truncated", "skipped", "not_an_image"]


@pytest.mark.slow  # every process imports webdataset, and so torch
def test_the_same_bytes_from_one_process_and_from_several(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders.folder(str(photos), str(tmp_path / "one"), shard_samples=12)
    monkeypatch.setattr("pipeline.prepare.shard_writer.IN_PROCESS", 0)
    quiet = threading.Thread(target=threading.Event().wait, daemon=True)
    quiet.start()  # a process with threads must not be forked
    steps: list[tuple[int, int]] = []
    result = folders.folder(
        str(photos), str(tmp_path / "two"), shard_samples=12, workers=2,
        progress=lambda done, total: steps.append((done, total)),
    )  # fmt: skip
    assert result["images"] == 30 and steps[-1] == (32, 32) and len(steps) == 3
    assert sums(tmp_path / "one") == sums(tmp_path / "two")


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, photos: Path) -> None:
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        folders.folder(str(photos), str(tmp_path / name), shard_samples=12, seed=seed)
    assert sums(tmp_path / "one") == sums(tmp_path / "again") != sums(tmp_path / "other")


def test_unlabelled_folder_and_a_second_split(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out"
    folders.folder(str(photos), str(out), split="unlabelled", labelled=False)
    assert not (out / "classes.json").exists()
    assert len(content(out, "unlabelled")) == 30
    assert {text for _, text, _ in content(out, "unlabelled")} == {None}
    folders.folder(str(photos), str(out))
    for name in ("cat", "eel"):
        (photos / name).rename(tmp_path / name)
    assert folders.folder(str(photos), str(out), split="val", max_bad=0.2)["classes"] == 3
    assert {text for _, text, _ in content(out, "val")} == {b"1"}  # dog is class 1 though it is alone here
    splits = [line.split("\t")[0] for line in (out / "bad_files.txt").read_text().splitlines()]
    assert sorted(splits) == ["labelled"] * 3 + ["unlabelled"] * 3 + ["val"] * 2
    (photos / "dog").rename(photos / "wolf")
    with pytest.raises(DataError, match="has no class 'wolf'"):
        folders.folder(str(photos), str(out), split="test")


def test_folders_that_cannot_be_prepared(tmp_path: Path) -> None:
    source, out = tmp_path / "source", str(tmp_path / "out")
    with pytest.raises(DataError, match="there is no folder"):
        folders.folder(str(source), out)
    source.mkdir()
    with pytest.raises(DataError, match="holds no image files"):
        folders.folder(str(source), out)
    (source / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.png lies in no class sub-folder"):
        folders.folder(str(source), out)
    with pytest.raises(ConfigError, match="cannot name a split"):
        folders.folder(str(source), out, split="../x", labelled=False)
    assert not Path(out).exists()
    with pytest.raises(DataError, match=r"none of the 1 files is a readable image.*not_an_image"):
        folders.folder(str(source), out, labelled=False)
    assert [path.name for path in Path(out).iterdir()] == ["bad_files.txt"]


def test_nothing_half_written_when_it_fails(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = images.decode
    calls = []

    def failing(data: bytes, **options: int) -> Image.Image:
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(data, **options)

    monkeypatch.setattr(images, "decode", failing)
    with pytest.raises(KeyboardInterrupt):
        folders.folder(str(photos), str(tmp_path / "out"), shard_samples=12)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["labelled-000.tar"]
    folders.folder(str(photos), str(tmp_path / "out"), shard_samples=12)
    folders.folder(str(photos), str(tmp_path / "undisturbed"), shard_samples=12)
    assert sums(tmp_path / "out") == sums(tmp_path / "undisturbed")


def test_shard_sizes() -> None:
    assert shard_writer.split_shards([], 10, 10) == []
    assert shard_writer.split_shards([1] * 5, 100, 2) == [range(2), range(2, 4), range(4, 5)]
    assert shard_writer.split_shards([4, 4, 4, 20, 1], 10, 100) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    sizes = np.random.default_rng(0).integers(1, 50, 500).tolist()
    shards = shard_writer.split_shards(sizes, 200, 9)
    assert [i for part in shards for i in part] == list(range(500))
    assert all(sum(sizes[i] for i in part) <= 200 and len(part) <= 9 for part in shards)


# Tables


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_table(tmp_path: Path, photos: Path, suffix: str) -> None:
    rows = [(str(path.relative_to(tmp_path)), path.parts[-2]) for path in sorted(photos.glob("cat/*.png"))]
    frame = pandas.DataFrame(rows, columns=["path", "label"])
    path = str(tmp_path / f"table.{suffix}")
    getattr(frame, f"to_{suffix}")(path, index=False)
    result = tables.table(path, str(tmp_path / "out"), max_bad=0.2)
    assert result == {"shards": 1, "images": 5, "bad": 1, "skipped": 0, "classes": 1}
    assert {text for _, text, _ in content(tmp_path / "out", "labelled")} == {b"0"}
    tables.table(path, str(tmp_path / "plain"), split="unlabelled", label=None, max_bad=0.2)
    assert {text for _, text, _ in content(tmp_path / "plain", "unlabelled")} == {None}


def test_table_of_class_indexes(tmp_path: Path, photos: Path) -> None:
    paths = sorted(str(path) for path in photos.glob("eel/*.jpeg"))
    frame = pandas.DataFrame({"file": [*paths, "missing.jpg"], "class": [*range(len(paths)), 7]})
    frame.to_csv(tmp_path / "t.csv")
    options = {"image": "file", "label": "class", "label_is": "index", "max_bad": 0.2}
    result = tables.table(str(tmp_path / "t.csv"), str(tmp_path / "out"), **options)
    assert result["classes"] == 8 and result["bad"] == 1
    found = {data: int(text or b"-1") for _, text, data in content(tmp_path / "out", "labelled")}
    assert found == {Path(path).read_bytes(): number for number, path in enumerate(paths)}
    assert "No such file" in (tmp_path / "out" / "bad_files.txt").read_text()
    frame["class"] += 1
    frame.to_csv(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"holds class 8, but .*classes\.json has 8 classes"):
        tables.table(str(tmp_path / "t.csv"), str(tmp_path / "out"), split="val", **options)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("path,label\na.png,1\n", {"image": "file"}, "has no column 'file'; its columns are path, label"),
        ("path,label\na.png,\n", {}, "row 0 has nothing in column 'label'"),
        ("path,label\na.png,-1\n", {"label_is": "index"}, "holds '-1'; class indexes are whole numbers from 0"),
        ("path,label\na.png,1.0\n", {"label_is": "index"}, "holds '1.0'; class indexes are whole numbers from 0"),
        ("path,label\n", {}, "has no rows"),
        ("", {}, "cannot be read as a csv table"),
    ],
)
def test_bad_tables(tmp_path: Path, text: str, options: dict[str, str], message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        tables.table(str(tmp_path / "t.csv"), str(tmp_path / "out"), **options)
    assert not (tmp_path / "out").exists()


def test_no_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no table"):
        tables.table(str(tmp_path / "t.parquet"), str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"neither \.parquet nor \.csv"):
        tables.table(str(tmp_path / "t.xlsx"), str(tmp_path / "out"))


@pytest.mark.parametrize(
    "values, names",
    [
        (["100234", "200345", "300456"], ["100234", "200345", "300456"]),
        (["001", "010", "002"], ["001", "002", "010"]),
        (["NA", "None", "true", "null"], ["NA", "None", "null", "true"]),
        ([" cat", "cat ", "caf\u00e9", "cafe\u0301"], ["caf\u00e9", "cat"]),
        ([str(number) for number in range(12)], sorted(map(str, range(12)))),
    ],
)
@pytest.mark.parametrize("way", ["csv", "parquet", "folder"])
def test_a_label_is_its_text_whichever_way_it_comes_in(
    tmp_path: Path, values: list[str], names: list[str], way: str
) -> None:
    paths = []
    for number, value in enumerate(values):
        path = tmp_path / "pictures" / value / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
        paths.append(str(path))
    out = str(tmp_path / "out")
    if way == "folder":
        folders.folder(str(tmp_path / "pictures"), out)
    else:
        table = str(tmp_path / f"t.{way}")
        getattr(pandas.DataFrame({"path": paths, "label": values}), f"to_{way}")(table, index=False)
        tables.table(table, out)
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == names
    found = {data: names[int(text or b"-1")] for _, text, data in content(tmp_path / "out", "labelled")}
    expected = {Path(path).read_bytes(): classes.plain(value) for path, value in zip(paths, values, strict=True)}
    assert found == expected


def test_whole_numbers_in_a_parquet_column_are_names_too(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    pandas.DataFrame({"path": ["a.png", "a.png"], "label": [7, 300_456]}).to_parquet(tmp_path / "t.parquet")
    assert tables.table(str(tmp_path / "t.parquet"), str(tmp_path / "out"))["classes"] == 2


def test_classes_that_look_alike_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("Cat", "cat", "dog"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "a.png").write_bytes(picture(len(name)))
    assert folders.folder(str(tmp_path / "in"), str(tmp_path / "out"))["classes"] == 3
    assert "'Cat' and 'cat' differ in case or Unicode form alone" in caplog.text


def test_tables_that_hold_the_images(tmp_path: Path) -> None:
    pictures = [picture(number) for number in range(4)]
    rows = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(pictures)]
    for name, column in (("bytes", pictures), ("hugging_face", rows)):
        path = str(tmp_path / f"{name}.parquet")
        pandas.DataFrame({"image": column, "label": ["a", "b", "a", "b"]}).to_parquet(path)
        assert tables.table(path, str(tmp_path / name), image="image")["images"] == 4
        assert {data for _, _, data in content(tmp_path / name, "labelled")} == set(pictures)
    bad = [*pictures, b"no picture"]
    pandas.DataFrame({"image": bad}).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=r"1 of 5 pictures are bad .*, more than --max-bad 0\.1 allows"):
        tables.table(str(tmp_path / "bad.parquet"), str(tmp_path / "bad"), image="image", label=None)
    assert "row 4 of bad.parquet" in (tmp_path / "bad" / "bad_files.txt").read_text()


def test_every_file_of_a_folder_ends_in_one_count(tmp_path: Path) -> None:
    """Links that lead back are followed once; what is no regular file is not waited for; other kinds are named."""
    source = tmp_path / "in"
    (source / "cat").mkdir(parents=True)
    (source / "dog").mkdir()
    (source / "cat" / "again").symlink_to(source)
    (source / "cat" / "a.png").write_bytes(picture(1))
    (source / "cat" / "b.jfif").write_bytes(picture(2, file_format="JPEG"))
    (source / "cat" / "bare").write_bytes(picture(3))
    (source / "dog" / "c.heic").write_bytes(b"x")
    (source / "dog" / "d.txt").write_text("x")
    (source / "dog" / "e.png").symlink_to(source / "nowhere")
    os.mkfifo(source / "dog" / "f.png")
    with pytest.raises(DataError, match=r"^2 of 5 pictures are bad or not decoded here"):
        folders.folder(str(source), str(tmp_path / "out"))
    result = folders.folder(str(source), str(tmp_path / "out"), max_bad=0.5)
    assert result == {"shards": 1, "images": 3, "bad": 1, "skipped": 3, "classes": 2}
    listed = {Path(line.split("\t")[1]).name: line.split("\t")[2] for line in bad_lines(tmp_path / "out")}
    assert listed["c.heic"] == "skipped: .heic is not decoded here" and listed["d.txt"] == "skipped: no picture"
    assert listed["f.png"] == "skipped: no regular file" and listed["e.png"].startswith("unreadable")
    assert len(listed) == result["bad"] + result["skipped"]


def bad_lines(out: Path) -> list[str]:
    return (out / "bad_files.txt").read_text().splitlines()


def test_two_at_once_do_not_swap_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one begins when the first has looked for a class list and found none."""
    for name, kinds in (("first", ("ant", "bee")), ("second", ("bee", "cow"))):
        for kind in kinds:
            (tmp_path / name / kind).mkdir(parents=True)
            (tmp_path / name / kind / "a.png").write_bytes(picture(len(kind)))
    real = sources.agree_on_classes
    begun: list[bool] = []

    def agree(out: str, names: list[str]) -> list[str]:
        found = real(out, names)
        if not begun:
            begun.append(True)
            folders.folder(str(tmp_path / "second"), out, split="val")
        return found

    monkeypatch.setattr(sources, "agree_on_classes", agree)
    with pytest.raises(DataError, match="another `prepare` wrote it meanwhile"):
        folders.folder(str(tmp_path / "first"), str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["bee", "cow"]
    assert not list((tmp_path / "out").glob("labelled-*.tar"))


# What is split off


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Two classes of 20 images; of each class two are there twice, and one is bad."""
    folder = tmp_path / "album"
    for number in range(40):
        path = folder / ("cat" if number < 20 else "dog") / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    for number in (0, 1, 20, 21):
        path = folder / ("cat" if number < 20 else "dog") / f"{number:02d}.png"
        path.with_name(f"copy of {number:02d}.png").write_bytes(path.read_bytes())
    (folder / "cat" / "bad.png").write_bytes(b"no image")
    (folder / "dog" / "bad.png").write_bytes(b"no image")
    return folder


SHARES = {"validation": 0.15, "test": 0.1}


def images_of(out: Path) -> dict[str, list[tuple[bytes | None, bytes]]]:
    return {
        split: sorted((text, data) for _, text, data in content(out, split)) for split in ("labelled", "val", "test")
    }


def test_every_class_gives_its_share_and_identical_images_stay_together(tmp_path: Path, album: Path) -> None:
    out = tmp_path / "out"
    counts = folders.folder(str(album), str(out), split_off=SHARES)
    found = images_of(out)
    assert counts == {
        "shards": 3, "images": 44, **{split: len(images) for split, images in found.items()}, "bad": 2, "skipped": 0,
        "classes": 2,
    }  # fmt: skip
    distinct = {split: {data for _, data in images} for split, images in found.items()}
    assert not distinct["val"] & distinct["test"] and not (distinct["val"] | distinct["test"]) & distinct["labelled"]
    for split, number in {"val": 3, "test": 2, "labelled": 15}.items():
        for text in (b"0", b"1"):
            assert len({data for label, data in found[split] if label == text}) == number, split
    bad = {line.split("\t")[0] for line in (out / "bad_files.txt").read_text().splitlines()}
    assert bad == {"labelled"}


def test_what_is_split_off_does_not_depend_on_names_and_order(tmp_path: Path, album: Path) -> None:
    folders.folder(str(album), str(tmp_path / "one"), split_off=SHARES)
    for path in list(album.rglob("*.png")):
        path.rename(path.with_name(hashlib.sha256(path.name.encode()).hexdigest() + ".png"))
    folders.folder(str(album), str(tmp_path / "renamed"), split_off=dict(reversed(SHARES.items())))
    folders.folder(str(album), str(tmp_path / "other"), split_off=SHARES, seed=1)
    one, renamed, other = (images_of(tmp_path / name) for name in ("one", "renamed", "other"))
    assert one["labelled"] == renamed["labelled"] != other["labelled"]


def test_splitting_off_again_changes_nothing_and_another_way_is_refused_untouched(tmp_path: Path, album: Path) -> None:
    out = tmp_path / "out"
    folders.folder(str(album), str(out), split_off=SHARES)
    before = sums(out)
    folders.folder(str(album), str(out), split_off=SHARES)
    assert sums(out) == before
    (out / "val-000.tar").unlink()
    for other in ({"validation": 0.3}, {}):
        with pytest.raises(DataError, match="already exists and holds something else"):
            folders.folder(str(album), str(out), split_off=other)
    assert "val-000.tar" not in sums(out)
    folders.folder(str(album), str(out), split_off=SHARES)
    assert sums(out) == before


@pytest.mark.parametrize(
    ("images", "shares", "message"),
    [
        (
            5,
            SHARES,
            r"class 'dog' has 5 different readable images; .* takes at least 6, 2 in each split and 2 to learn",
        ),
        (20, {"valid": 0.1}, "'valid' cannot be split off; what can is validation and test"),
        (20, {"validation": 15}, "the share to split off for validation is 15; it is between 0 and 1"),
        (20, {"validation": 0.5, "test": 0.5}, "splitting off 1 of the images leaves none"),
        (20, {"val": 0.1, "validation": 0.1}, "twice"),
    ],
)
def test_what_cannot_be_split_off_is_said_and_nothing_written(
    tmp_path: Path, album: Path, images: int, shares: dict[str, float], message: str
) -> None:
    for path in sorted((album / "dog").glob("[0-9]*.png"))[images:]:
        path.unlink()
    for path in album.rglob("copy*"):
        path.unlink()
    with pytest.raises((ConfigError, DataError), match=message):
        folders.folder(str(album), str(tmp_path / "out"), split_off=shares)
    assert not (tmp_path / "out").exists()


def test_the_manifest_says_where_each_sample_comes_from(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out"
    folders.folder(str(photos), str(out), shard_samples=12)
    rows = pandas.read_parquet(out / "manifest-labelled.parquet")
    assert list(rows.columns) == ["shard", "index", "key", "path", "sha256"]
    place = 0
    for path in sorted(out.glob("labelled-*.tar")):
        reader = stream(str(path))
        for sample, data in reader:
            row = rows.iloc[place]
            assert (row["shard"], row["index"], row["key"]) == (path.name, sample.index, sample.key)
            assert row["sha256"] == hashlib.sha256(data).hexdigest()
            assert (photos / row["path"]).read_bytes() == data
            place += 1
    assert place == len(rows) == 30
    for pattern in ("labelled-*.tar", str(out), "*.tar"):
        assert not any("manifest" in shard.name for shard in find_shards(pattern, "labelled", str(out)))


def test_the_manifest_of_a_table_has_its_paths(tmp_path: Path, photos: Path) -> None:
    (tmp_path / "list.csv").write_text(f"path,label\nphotos/cat/0.png,a\n{photos}/cat/deep/3.png,b\n")
    tables.table(str(tmp_path / "list.csv"), str(tmp_path / "out"))
    rows = pandas.read_parquet(tmp_path / "out" / "manifest-labelled.parquet")
    assert sorted(rows["path"]) == sorted(["photos/cat/0.png", f"{photos}/cat/deep/3.png"])
