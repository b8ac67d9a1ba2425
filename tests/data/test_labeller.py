"""The labelling worker: every sample one row, whatever is wrong with it; rows that depend on shard and teacher alone."""

import functools
import io
import os
import pickle
import tarfile
import threading
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pipeline.data import images, labels, shards
from pipeline.data.ahead import run_ahead
from pipeline.data.labeller import LabelSpec, make_labeller
from pipeline.data.shards import Shard
from pipeline.errors import DataError, WeightsError

CLASSES = ("red", "green", "blue")
VIEW = images.View(8)


@dataclass
class Card:
    classes: tuple[str, ...] = CLASSES

    def view(self) -> images.View:
        return VIEW


class Colours(nn.Module):
    """Means of the channels as logits; remembers the batches it saw. Its dropout would show if it were noised."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(x))
        return self.dropout(x.mean((2, 3)))


class Broken(Colours):
    """No finite answer for pictures that are quite black."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return torch.where(x.amax((1, 2, 3), keepdim=False)[:, None] < -1.5, float("nan"), logits)


def load_colours(path: str) -> tuple[nn.Module, Any]:
    return Colours(), Card()


def load_broken(path: str) -> tuple[nn.Module, Any]:
    return Broken(), Card()


def load_other_classes(path: str) -> tuple[nn.Module, Any]:
    return Colours(), Card(("red", "green", "yellow"))


def picture(seed: int, side: int = 12, form: str = "PNG", black: bool = False) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8) // (255 if black else 1)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, form)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Shard:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return shard_at(path)


def shard_at(path: Path) -> Shard:
    return Shard(f"{path.parent.name}/{path.name}", str(path), path.stat().st_size, "", "unlabelled")


def good_shard(path: Path, count: int, seed: int = 0) -> Shard:
    return write_tar(path, [(f"{i:04d}.png", picture(seed + i)) for i in range(count)])


@pytest.fixture
def spec(tmp_path: Path) -> LabelSpec:
    return LabelSpec(load_colours, "teacher", "11" * 32, CLASSES, str(tmp_path / "out"), batch=4, device="cpu")


def read(spec: LabelSpec, shard: Shard) -> list[dict[str, Any]]:
    return labels.read_labels(os.path.join(spec.out, labels.file_name(shard.name))).to_pylist()  # noqa: PTH118


def test_every_sample_has_one_row_in_order_and_bad_ones_say_why(tmp_path: Path, spec: LabelSpec) -> None:
    jpeg = picture(1, 64, "JPEG")
    members = [
        ("a.png", picture(0)),
        ("b.JPG", jpeg),
        ("c.jpg", jpeg[: len(jpeg) // 2]),
        ("d.jpg", b"<html>not found</html>"),
        ("e.png", b""),
        ("notes.txt", b"no image here"),
        ("a.png", picture(2)),
        ("a.txt", b"caption"),
        ("sub/a.webp", picture(3, form="WEBP")),
        ("f.png", picture(4)),
        ("g.png", picture(5)),
    ]
    shard = write_tar(tmp_path / "in" / "000.tar", members)
    result = make_labeller(spec)(shard)
    rows = read(spec, shard)
    assert [row["index"] for row in rows] == list(range(9))
    assert [row["key"] for row in rows] == ["a", "b", "c", "d", "e", "a", "sub/a", "f", "g"]
    bad = ["truncated", "not_an_image", "empty"]
    assert [row["status"] for row in rows] == ["ok", "ok", *bad, "ok", "ok", "ok", "ok"]
    counts = {"ok": 6, "empty": 1, "not_an_image": 1, "truncated": 1}
    assert result["counts"] == counts and result["rows"] == 9 and result["without_image"] == 1
    for row in rows:
        data = shards.read_at(shard.path, row["offset"], row["size"])
        assert row["image_hash"] == labels.image_hash(data)
        if row["status"] == "ok":
            pixels = images.normalise(torch.from_numpy(images.load(data, VIEW))[None], VIEW)
            probs = pixels.mean((2, 3)).softmax(1)[0].numpy()
            assert row["label"] == probs.argmax()
            np.testing.assert_allclose(row["confidence"], probs.max(), rtol=1e-5)
            np.testing.assert_allclose(row["probs"], probs[row["classes"]], rtol=1e-3)
        else:
            assert row["label"] is row["confidence"] is row["classes"] is row["probs"] is None


def test_rows_depend_on_shard_and_teacher_alone(tmp_path: Path, spec: LabelSpec) -> None:
    first = good_shard(tmp_path / "in" / "000.tar", 11)
    second = good_shard(tmp_path / "in" / "001.tar", 10, seed=100)
    tables = []
    for number, (threads, order) in enumerate([(1, [second]), (4, [first, second])]):
        one = replace(spec, out=str(tmp_path / str(number)), threads=threads)
        worker = make_labeller(one)
        for shard in order:
            worker(shard)
        tables.append(labels.read_labels(f"{one.out}/in/001.parquet").replace_schema_metadata())
    assert tables[0].equals(tables[1])


def test_a_batch_never_spans_two_shards(tmp_path: Path, spec: LabelSpec) -> None:
    teacher = Colours()
    worker = make_labeller(replace(spec, load=lambda _: (teacher, Card())))
    worker(good_shard(tmp_path / "in" / "000.tar", 10))
    worker(good_shard(tmp_path / "in" / "001.tar", 4))
    assert teacher.batches == [4, 4, 2, 4]
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


def test_the_file_says_what_it_is(tmp_path: Path, spec: LabelSpec) -> None:
    shard = good_shard(tmp_path / "in" / "000.tar", 5)
    result = make_labeller(spec)(shard)
    metadata = labels.read_metadata(f"{spec.out}/in/000.parquet")
    assert {**metadata, "skipped": False} == {**result, "format": labels.FORMAT, "transform": metadata["transform"]}
    assert metadata["shard"] == "in/000.tar" and metadata["shard_size"] == shard.size and metadata["cut"] is None
    assert metadata["class_list"] == labels.class_list_hash(CLASSES) and metadata["teacher"] == spec.teacher
    assert metadata["batch"] == 4 and metadata["dtype"] == "float32" and metadata["transform"]["size"] == 8
    assert set(metadata["seconds"]) == {"read", "decode", "wait", "forward", "total"}


def test_finished_shards_are_not_done_again_and_foreign_files_are_replaced(tmp_path: Path, spec: LabelSpec) -> None:
    shard = good_shard(tmp_path / "in" / "000.tar", 5)
    path = Path(spec.out) / "in" / "000.parquet"
    first = make_labeller(spec)(shard)
    written = path.stat().st_mtime_ns
    again = make_labeller(spec)(shard)
    assert again["skipped"] and again["counts"] == first["counts"] and path.stat().st_mtime_ns == written
    assert not make_labeller(replace(spec, teacher="22" * 32))(shard)["skipped"]
    path.write_bytes(b"half a file")
    assert not make_labeller(spec)(shard)["skipped"]
    longer = good_shard(tmp_path / "in" / "000.tar", 60)
    assert make_labeller(spec)(longer)["rows"] == 60 and len(read(spec, longer)) == 60
    assert [file.name for file in path.parent.iterdir()] == ["000.parquet"]


def test_a_damaged_tar_gives_its_samples_up_to_the_damage(tmp_path: Path, spec: LabelSpec) -> None:
    whole = good_shard(tmp_path / "in" / "000.tar", 10)
    make_labeller(spec)(whole)
    expected = read(spec, whole)
    path = tmp_path / "in" / "000.tar"
    path.write_bytes(path.read_bytes()[: expected[6]["offset"] + 100])
    damaged = shard_at(path)
    result = make_labeller(spec)(damaged)
    rows = read(spec, damaged)
    assert result["cut"] and labels.read_metadata(f"{spec.out}/in/000.parquet")["cut"] == result["cut"]
    assert rows[:4] == expected[:4]  # the first whole batch, bit by bit
    assert [(row["key"], row["label"]) for row in rows[:6]] == [(row["key"], row["label"]) for row in expected[:6]]
    assert [row["status"] for row in rows] == ["ok"] * 6 + ["truncated"] * (len(rows) - 6)


@pytest.mark.parametrize("content", [b"<html>no such bucket</html>" * 100, b"\x1f\x8b" + bytes(range(256)) * 10])
def test_a_shard_that_is_no_tar_is_named_and_leaves_nothing(tmp_path: Path, spec: LabelSpec, content: bytes) -> None:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "000.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"in/000\.tar"):
        make_labeller(spec)(shard_at(path))
    assert not Path(spec.out).exists() or not any(Path(spec.out).rglob("*.*"))


def test_a_tar_without_samples(tmp_path: Path, spec: LabelSpec) -> None:
    empty = write_tar(tmp_path / "in" / "empty.tar", [])
    assert make_labeller(spec)(empty)["rows"] == 0 and read(spec, empty) == []
    text = write_tar(tmp_path / "in" / "text.tar", [("a.txt", b"x" * 600)])
    assert make_labeller(spec)(text)["without_image"] == 1 and read(spec, text) == []
    path = tmp_path / "in" / "text.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"in/text\.tar is damaged before its first image"):
        make_labeller(spec)(shard_at(path))


def test_no_finite_answer_is_a_status(tmp_path: Path, spec: LabelSpec) -> None:
    members = [(f"{i}.png", picture(i, black=i in (1, 4))) for i in range(6)]
    shard = write_tar(tmp_path / "in" / "000.tar", members)
    make_labeller(replace(spec, load=load_broken))(shard)
    rows = read(spec, shard)
    assert [row["status"] for row in rows] == ["ok", "not_finite", "ok", "ok", "not_finite", "ok"]
    assert [row["label"] is None for row in rows] == [False, True, False, False, True, False]
    good = replace(spec, out=str(tmp_path / "good"))
    make_labeller(good)(shard)
    assert [row for row in rows if row["label"] is not None] == [read(good, shard)[i] for i in (0, 2, 3, 5)]


def test_a_teacher_of_other_classes_is_refused(spec: LabelSpec) -> None:
    with pytest.raises(WeightsError, match=r"teacher knows 3 classes.*trained on the job's class list"):
        make_labeller(replace(spec, load=load_other_classes))


def test_the_worker_can_be_sent_to_another_process(tmp_path: Path, spec: LabelSpec) -> None:
    make_worker = pickle.loads(pickle.dumps(functools.partial(make_labeller, spec)))  # noqa: S301
    assert make_worker()(good_shard(tmp_path / "in" / "000.tar", 3))["counts"] == {"ok": 3}


def test_running_ahead_keeps_the_order_and_is_bounded() -> None:
    taken, consumed = 0, 0

    def items() -> Any:
        nonlocal taken
        for number in range(500):
            taken += 1
            yield number

    seconds: dict[str, float] = {}
    for expected, value in enumerate(run_ahead(items(), lambda x: x * x, threads=3, ahead=10, seconds=seconds)):
        assert value == expected**2
        consumed += 1
        assert taken - consumed <= 10 + 4 * 3 + 2
    assert consumed == 500 and set(seconds) == {"read", "decode", "wait"}


@pytest.mark.parametrize("where", ["reading", "working"])
def test_running_ahead_raises_what_went_wrong_and_leaves_no_thread(where: str) -> None:
    before = threading.active_count()

    def items() -> Any:
        for number in range(100):
            if where == "reading" and number == 20:
                raise OSError("connection lost")
            yield number

    def work(number: int) -> int:
        if where == "working" and number == 20:
            raise OSError("connection lost")
        return number

    with pytest.raises(OSError, match="connection lost"):
        list(run_ahead(items(), work, threads=2, ahead=5, seconds={}))
    early = run_ahead(iter(range(1000)), lambda x: x, threads=2, ahead=5, seconds={})
    assert next(early) == 0
    early.close()
    assert threading.active_count() == before
