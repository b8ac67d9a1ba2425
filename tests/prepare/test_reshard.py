"""A global shuffle of shards: every sample once, whole and unchanged, where a hash says, with the labels it had."""

from __future__ import annotations

import collections
import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pandas
import pyarrow.parquet as pq
import pytest

from pipeline.cluster.inline import Inline
from pipeline.data import hashing, label_files, parquet_files, shards
from pipeline.errors import ConfigError, DataError
from pipeline.prepare import reshard, spread, whole_samples
from tests import small
from tests.data.tars import END, make, member, picture
from tests.prepare.test_cluster_tables import content

Sample = tuple[tuple[str, ...], tuple[bytes, ...]]


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reshard, "UNIT_BYTES", 9000)
    monkeypatch.setattr(spread.Writer.__init__, "__defaults__", (2000,))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Eight shards of twelve samples, sorted by class, in two folders, with the same names and keys."""
    for number in range(8):
        members = []
        for sample in range(12):
            seed = 12 * number + sample
            members += [(f"a/k{sample}.PNG", picture(seed)), (f"a/k{sample}.cls", str(number // 2).encode())]
            members += [(f"a/k{sample}.depth.png", picture(seed + 999)), (f"a/k{sample}.npy", bytes([seed] * seed))]
        make(tmp_path / "old" / "ab"[number % 2] / f"labelled-{number // 2:03d}.tar", members)
    (tmp_path / "old" / "classes.json").write_text(json.dumps(["ant", "bee", "cow", "dog"]))
    return tmp_path / "old"


def samples(folder: Path, pattern: str = "**/*.tar") -> list[tuple[str, int, str, Sample]]:
    """(shard, index, key, suffixes and bytes of all members) of every sample."""
    found = []
    for path in sorted(folder.glob(pattern)):
        name = path.relative_to(folder).as_posix()
        reader = whole_samples.Reader(str(path), name)
        for one in reader:
            found.append((name, one.index, one.key, (tuple(one.suffixes), tuple(one.members))))
        assert not reader.bad and not reader.skipped
    return found


def test_every_sample_goes_where_its_hash_says(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "new"
    found = reshard.reshard(str(corpus / "*" / "*.tar"), str(out), Inline(), shards=5, seed=3)
    assert found == {"shards": 5, "images": 96, "bad": 0, "skipped": 0}
    before, after = samples(corpus), samples(out)
    assert collections.Counter(sample for *_, sample in before) == collections.Counter(sample for *_, sample in after)
    assert len({(shard, key) for shard, _, key, _ in after}) == 96, "keys are of their own now"
    by_place = {(shard, index): sample for shard, index, _, sample in before}
    rows = pandas.read_parquet(out / "manifest-labelled.parquet").to_dict("records")
    assert [(row["shard"], row["index"], row["key"]) for row in rows] == [one[:3] for one in after]
    for row, (shard, _, _, sample) in zip(rows, after, strict=True):
        assert by_place[row["from_shard"], row["from_index"]] == sample
        key = hashing.chain(3, hashing.name_key(row["from_shard"]))
        assert shard == f"labelled-{hashing.chain(key ^ row['from_index']) % 5:03d}.tar"
    assert json.loads((out / "classes.json").read_text()) == ["ant", "bee", "cow", "dog"]
    classes = [{sample[1][1] for shard, _, _, sample in after if shard == f"labelled-00{n}.tar"} for n in range(5)]
    assert all(len(of_shard) == 4 for of_shard in classes), "no shard is of one class"
    assert not [path for path in out.iterdir() if path.name.startswith(".spread")]


def test_what_samples_are_is_the_same_for_every_reader(tmp_path: Path, corpus: Path) -> None:
    """The image of a sample is the one that it was: the order of its members is kept."""
    reshard.reshard(str(corpus / "*" / "*.tar"), str(tmp_path / "new"), Inline(), shards=3)
    here = [picture for path in corpus.rglob("*.tar") for _, picture in shards.stream(str(path))]
    there = [picture for path in (tmp_path / "new").glob("*.tar") for _, picture in shards.stream(str(path))]
    assert sorted(here) == sorted(there)


def test_units_decide_nothing_and_a_seed_all(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def shuffled(name: str, **options: Any) -> dict[str, str]:
        reshard.reshard(str(corpus / "*" / "*.tar"), str(tmp_path / name), Inline(), shards=4, **options)
        return content(tmp_path / name)

    one = shuffled("one")
    assert shuffled("seed", seed=1) != one
    monkeypatch.setattr(reshard, "UNIT_BYTES", 1 << 30)
    monkeypatch.setattr(spread.Writer.__init__, "__defaults__", (1 << 30,))
    assert shuffled("two") == one
    reshard.reshard(str(tmp_path / "one"), str(tmp_path / "again"), Inline(), shards=4)
    keys = [key for _, _, key, _ in samples(tmp_path / "again")]
    assert all(key.count("_") == 1 for key in keys), "numbers do not pile up"


def test_it_goes_on_where_it_was(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, written = str(corpus / "*" / "*.tar"), []
    reshard.reshard(source, str(tmp_path / "whole"), Inline(), shards=4)
    real = whole_samples.write

    def write(path: str, found: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        real(path, found)

    monkeypatch.setattr(whole_samples, "write", write)
    with pytest.raises(KeyboardInterrupt):
        reshard.reshard(source, str(tmp_path / "new"), Inline(), shards=4)
    monkeypatch.setattr(spread, "Writer", None)  # all is spread
    written.clear()
    reshard.reshard(source, str(tmp_path / "new"), Inline(), shards=4)
    assert len(written) == 2 and content(tmp_path / "new") == content(tmp_path / "whole")


def test_what_is_no_whole_sample_is_listed(tmp_path: Path) -> None:
    members = [(f"k{number}.png", picture(number)) for number in range(30)]
    make(tmp_path / "x-000.tar", [*members, ("note.txt", b"no picture"), ("p.1.png", b"1"), ("p.2.png", b"2")])
    cut = b"".join(member(f"c{number}.png", picture(number + 50)) for number in range(3))
    (tmp_path / "x-001.tar").write_bytes(cut + member("d.png", b"abc", size=900))
    found = reshard.reshard(str(tmp_path / "x-*.tar"), str(tmp_path / "new"), Inline(), shards=2)
    assert found == {"shards": 2, "images": 33, "bad": 3, "skipped": 1}
    listed = (tmp_path / "new" / "bad_files.txt").read_text().splitlines()
    assert listed[0] == "x\tx-000.tar: p.1.png\tskipped: 2 images, several share a name up to its first dot"
    assert "x-001.tar\tdamaged: the file ends" in listed[1] and listed[2] == "x\tx-001.tar: d\ttruncated: .png"
    assert listed[3] == "x\tx-000.tar: note.txt\tskipped: 1 sample without a picture (.txt)"


def test_bad_input(tmp_path: Path, corpus: Path) -> None:
    source, out = str(corpus / "*" / "*.tar"), str(tmp_path / "new")

    def refused(text: str, kind: type[Exception] = ConfigError, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            reshard.reshard(**{"source": source, "out": out, "cluster": Inline(), "shards": 3, **options})

    refused(r"--shards is 0; it is a number from 1", shards=0)
    refused(r"--shards is 500, and 96 samples would leave \d+ of them empty; ask for fewer", shards=500)
    old = str(corpus / "a")
    refused(r"--out .* is the folder of the old shards; choose another", source=old, out=old)
    refused(r"'a b' cannot name a split", split="a b")
    refused(r"no shard matches", DataError, source=str(tmp_path / "nothing-*.tar"))
    refused(r"--labels .* has no finished label stage of these shards", DataError, labels=str(tmp_path))
    make(tmp_path / "odd" / "first.tar", {"a.png": picture(0)})
    refused(r"called first\.tar …, not NAME-000\.tar with one NAME; say by --split", source=str(tmp_path / "odd"))
    (tmp_path / "odd" / "first.tar").write_bytes(b"<html>" * 500)
    refused(r"shard .*first\.tar is not an uncompressed tar", DataError, source=str(tmp_path / "odd"), split="odd")
    Path(out).mkdir(exist_ok=True)
    (Path(out) / "labelled-001.tar").write_bytes(END)
    refused(r"labelled-001\.tar already exists and holds something else", DataError)
    (Path(out) / "labelled-009.tar").write_bytes(END)
    refused(r"already holds other shards of 'labelled', such as labelled-009\.tar", DataError)
    assert sorted(path.name for path in Path(out).glob("*.tar")) == ["labelled-001.tar", "labelled-009.tar"]


@pytest.fixture
def labelled(worlds: small.Store, tmp_path: Path) -> small.World:
    return worlds.finished(tmp_path / "world")


def test_labels_are_carried_over(labelled: small.World, tmp_path: Path) -> None:
    """The run labels nothing again, and selects from the same labels of the same images."""
    old = labelled.folder("gen1-label")
    pattern = str(labelled.shards / "unlabelled-*.tar")
    before = {}
    for path in sorted(labelled.shards.glob("unlabelled-*.tar")):
        rows = pq.read_table(old / label_files.file_name(path.name)).to_pylist()
        before |= {row["image_hash"]: row for row in rows}
    out = tmp_path / "new"
    found = small.command("reshard", pattern, "--out", out, "--shards", 2, "--labels", labelled.output)
    assert (found.status, found.err) == (0, ""), found
    shutil.rmtree(old)
    ran = labelled.run(f"data.unlabelled={out}/unlabelled-*.tar")
    assert ran.status == 0, ran
    [folder] = [path.parent for path in labelled.output.glob("gen1-label-*/done.json")]
    after = {}
    for path in sorted(out.glob("unlabelled-*.tar")):
        metadata = parquet_files.read_metadata(str(folder / label_files.file_name(path.name)))
        assert metadata["seconds"] == {}, "labelled anew"
        rows = pq.read_table(folder / label_files.file_name(path.name)).to_pylist()
        for sample, image in shards.stream(str(path)):
            row = rows[sample.index]
            assert (row["index"], row["key"], row["offset"], row["size"]) == (
                sample.index, sample.key, sample.offset, sample.size,
            )  # fmt: skip
            assert row["image_hash"] == label_files.image_hash(image)
            after[row["image_hash"]] = row
    same = ("status", "label", "confidence", "classes", "probs", "crc32")
    assert {name: [row[one] for one in same] for name, row in after.items()} == {
        name: [row[one] for one in same] for name, row in before.items()
    }


def test_labels_of_other_images_are_refused(labelled: small.World, tmp_path: Path) -> None:
    shard = labelled.shards / "unlabelled-001.tar"
    shard.write_bytes(shard.read_bytes().replace(picture(400), picture(400)[::-1]))
    pattern, out = str(labelled.shards / "unlabelled-*.tar"), str(tmp_path / "new")
    with pytest.raises(DataError, match=r"sample 0 of shard unlabelled-001\.tar is another image than the one"):
        reshard.reshard(pattern, out, Inline(), shards=2, labels=str(labelled.output))
    with contextlib.suppress(DataError):
        reshard.reshard(pattern, out, Inline(), shards=2, labels=str(labelled.output))
    assert not list(Path(out).glob("*.tar"))
