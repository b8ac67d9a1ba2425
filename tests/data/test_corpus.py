"""The corpus stays what it was at first use, and says what is different now."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.data import corpus
from pipeline.data.classes import read_classes, write_classes
from pipeline.data.shards import find_shards
from pipeline.errors import DataError
from tests.data.tars import shard


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for number in range(3):
        shard(tmp_path / "data" / f"{number:03d}.tar", 1 + number)
    return tmp_path / "data"


def freeze(output: Path, data: Path, source: str = "unlabelled", **options: bool) -> corpus.Corpus:
    return corpus.freeze(str(output), find_shards("*.tar", source, str(data)), source, "*.tar", **options)


def test_first_use_freezes(tmp_path: Path, data: Path) -> None:
    first = freeze(tmp_path / "out", data)
    (file,) = (tmp_path / "out").iterdir()
    assert file.name == f"corpus-{first.fingerprint[:8]}.json" and len(first.fingerprint) == 64
    assert json.loads(file.read_text())["shards"] == [[s.name, s.size] for s in first.shards]
    before = file.read_bytes()
    assert freeze(tmp_path / "out", data) == first and first.changes == []
    assert file.read_bytes() == before


def test_fingerprint_is_names_and_sizes_alone(tmp_path: Path, data: Path) -> None:
    first = freeze(tmp_path / "out", data)
    (data / "001.tar").touch()
    moved = data.rename(tmp_path / "moved")
    again = freeze(tmp_path / "out", moved)
    assert again.fingerprint == first.fingerprint and again.changes == []
    assert again.shards[1].path == str(moved / "001.tar") and again.shards[1].stamp != first.shards[1].stamp
    # A pinned value: labelled corpora of users are known by it.
    assert corpus.fingerprint([]) == "4f53cda18c2baa0c0354bb5f9a3ecbe5ed12ab4d8e11ba873c2f11161202b945"


def test_growth_is_told_and_waits_for_refreeze(tmp_path: Path, data: Path) -> None:
    first = freeze(tmp_path / "out", data)
    shard(data / "000a.tar", 1)
    again = freeze(tmp_path / "out", data)
    assert (again.fingerprint, again.shards) == (first.fingerprint, first.shards)
    assert len(again.changes) == 1 and "1 new shards are not used (000a.tar)" in again.changes[0]
    grown = freeze(tmp_path / "out", data, refreeze=True)
    assert len(grown.shards) == 4 and grown.changes == [] and grown.fingerprint != first.fingerprint
    assert freeze(tmp_path / "out", data) == grown
    # Back to the first list by another refreeze: the newest use counts, not the newest file.
    (data / "000a.tar").unlink()
    assert freeze(tmp_path / "out", data, refreeze=True).fingerprint == first.fingerprint
    shard(data / "000a.tar", 1)
    assert freeze(tmp_path / "out", data).fingerprint == first.fingerprint


def test_missing_and_resized_shards_are_errors(tmp_path: Path, data: Path) -> None:
    freeze(tmp_path / "out", data)
    shard(data / "001.tar", 9)
    with pytest.raises(DataError, match=r"001\.tar has \d+ bytes instead of \d+.*--refreeze"):
        freeze(tmp_path / "out", data)
    (data / "001.tar").unlink()
    with pytest.raises(DataError, match=r"missing: 001\.tar"):
        freeze(tmp_path / "out", data)
    assert len(freeze(tmp_path / "out", data, refreeze=True).shards) == 2


def test_sources_with_equal_lists_do_not_disturb_each_other(tmp_path: Path, data: Path) -> None:
    one, other = freeze(tmp_path / "out", data, "one"), freeze(tmp_path / "out", data, "other")
    assert one.fingerprint == other.fingerprint and len(list((tmp_path / "out").iterdir())) == 1
    shard(data / "009.tar", 1)
    assert freeze(tmp_path / "out", data, "one", refreeze=True).changes == []
    assert freeze(tmp_path / "out", data, "one").fingerprint != one.fingerprint
    assert freeze(tmp_path / "out", data, "other").fingerprint == one.fingerprint


def test_plan_writes_nothing(tmp_path: Path, data: Path) -> None:
    seen = freeze(tmp_path / "out", data, write=False)
    assert not (tmp_path / "out").exists()
    assert freeze(tmp_path / "out", data) == seen


def test_secrets_of_a_pattern_are_not_written(tmp_path: Path, data: Path) -> None:
    shards = find_shards("*.tar", "s", str(data))
    corpus.freeze(str(tmp_path / "out"), shards, "s", ["https://me:secret@host/x.tar?sig=secret"])
    (file,) = (tmp_path / "out").iterdir()
    assert "secret" not in file.read_text()


def test_classes(tmp_path: Path) -> None:
    write_classes(str(tmp_path), ["zebra", "ant"])
    assert read_classes(str(tmp_path)) == read_classes(str(tmp_path / "classes.json")) == ["zebra", "ant"]


@pytest.mark.parametrize(
    ("text", "message"),
    [("[", "is not JSON"), ("{}", "is not a list"), ("[]", "is not a list"), ("[1]", "is not a list"),
     ('["a", "b", "a"]', "names a class twice: a"), (None, "there is no")],
)  # fmt: skip
def test_bad_classes(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "classes.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(str(tmp_path))
