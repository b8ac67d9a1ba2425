"""The labelling worker: every sample has one row, whatever is wrong with it, of shard and teacher alone."""

import functools
import gc
import hashlib
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

from models.over_views import answering
from pipeline.cluster.contract import Resources
from pipeline.cluster.inline import Inline
from pipeline.data import images, label_files, parquet_files, shards
from pipeline.data.shards import Shard
from pipeline.errors import ClusterError, DataError, WeightsError
from pipeline.labelling import labeller
from pipeline.labelling.labeller import Labeller, LabelSpec, make_labeller
from pipeline.labelling.read_ahead import Ahead
from pipeline.labelling.teacher import Teacher

CLASSES = ("red", "green", "blue")
VIEW = images.View(8)


@dataclass
class Card:
    classes: tuple[str, ...] = CLASSES
    test_views: tuple[str, ...] = ()

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


@dataclass
class CroppingCard(Card):
    def view(self) -> images.View:
        return images.View(8, crop=1.0)


def load_cropping(path: str) -> tuple[nn.Module, Any]:
    return Colours(), CroppingCard()


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
    return parquet_files.read_table(os.path.join(spec.out, label_files.file_name(shard.name))).to_pylist()  # noqa: PTH118


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
        assert row["image_hash"] == label_files.image_hash(data)
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
        tables.append(parquet_files.read_table(f"{one.out}/in/001.parquet").replace_schema_metadata())
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
    metadata = parquet_files.read_metadata(f"{spec.out}/in/000.parquet")
    seconds = result.pop("seconds")
    assert {**metadata, "skipped": False} == {
        **result,
        "format": label_files.FORMAT,
        "seconds": metadata["seconds"],
    }
    assert metadata["shard"] == "in/000.tar" and metadata["shard_size"] == shard.size and metadata["cut"] is None
    assert metadata["class_list"] == label_files.class_list_hash(CLASSES) and metadata["teacher"] == spec.teacher
    assert metadata["batch"] == 4 and metadata["dtype"] == "float32" and metadata["transform"]["size"] == 8
    assert set(seconds) == set(metadata["seconds"]) == {*labeller.PARTS, "total"}
    assert all(0 <= value <= seconds[part] for part, value in metadata["seconds"].items())
    assert metadata["shard_sha256"] == hashlib.sha256(Path(shard.path).read_bytes()).hexdigest()


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
    assert result["cut"] and parquet_files.read_metadata(f"{spec.out}/in/000.parquet")["cut"] == result["cut"]
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
    ahead = Ahead(threads=3, ahead=10)
    for expected, value in enumerate(ahead.run(items(), lambda x: x * x, seconds)):
        assert value == expected**2
        consumed += 1
        assert taken - consumed <= 10 + 4 * 3 + 2
    assert consumed == 500 and set(seconds) == {"read", "decode", "wait"}


def test_a_stream_closed_while_it_waits_leaves_all_room_to_the_next() -> None:
    busy = threading.Event()
    ahead = Ahead(threads=1, ahead=8)
    stream = ahead.run(range(20), lambda number: number == 0 or busy.wait(), {})
    assert next(stream)
    while ahead._room._value > 3:  # four items wait for the thread, and the next one has room but no place among them
        threading.Event().wait(0.001)
    stream.close()
    busy.set()
    assert ahead._room._value == 8
    ahead.close()


@pytest.mark.parametrize("where", ["reading", "working"])
def test_running_ahead_raises_what_went_wrong_and_leaves_no_thread(where: str) -> None:
    before = set(threading.enumerate())
    ahead = Ahead(threads=2, ahead=5)

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
        list(ahead.run(items(), work, {}))
    early = ahead.run(iter(range(1000)), lambda x: x, {})
    assert next(early) == 0
    early.close()
    assert list(ahead.run(iter(range(20)), lambda x: x, {})) == list(range(20))  # nothing of its room was lost
    ahead.close()
    assert not set(threading.enumerate()) - before


class Small(Colours):
    """A device whose memory holds `room` images: real errors of torch, as a GPU's allocator and the CPU's raise
    them."""

    def __init__(self, room: int, kind: str) -> None:
        super().__init__()
        self.room, self.kind = room, kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        if len(x) > self.room:
            if self.kind == "cuda":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            torch.empty(1 << 50)
        return logits


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_a_batch_that_does_not_fit_is_halved_for_good_and_the_shard_begins_anew(
    tmp_path: Path, spec: LabelSpec, kind: str
) -> None:
    teacher = Small(3, kind)
    worker = make_labeller(replace(spec, load=lambda _: (teacher, Card()), batch=8))
    first, second = good_shard(tmp_path / "in" / "000.tar", 11), good_shard(tmp_path / "in" / "001.tar", 5, seed=50)
    assert [worker(shard)["batch"] for shard in (first, second)] == [2, 2]
    assert 8 in teacher.batches and teacher.batches[-9:] == [2, 2, 2, 2, 2, 1, 2, 2, 1]
    assert parquet_files.read_metadata(f"{spec.out}/in/001.parquet")["batch"] == 2
    as_if = replace(spec, batch=2, out=str(tmp_path / "asked"))
    make_labeller(as_if)(first)
    assert read(spec, first) == read(as_if, first)


def test_a_teacher_that_fits_in_no_size_is_one_sentence(tmp_path: Path, spec: LabelSpec) -> None:
    worker = make_labeller(replace(spec, load=lambda _: (Small(0, "cuda"), Card())))
    with pytest.raises(ClusterError, match=r"does not fit into the memory of its device with a batch of one image"):
        worker(good_shard(tmp_path / "in" / "000.tar", 3))
    assert not Path(spec.out, "in").exists()


def test_the_next_shard_is_decoded_while_one_is_with_the_device(
    tmp_path: Path, spec: LabelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = threading.Event()
    prepare = labeller._prepare

    def observed(view: images.View, max_bytes: int | None, item: Any) -> Any:
        if item[0].key.startswith("next"):
            decoded.set()
        return prepare(view, max_bytes, item)

    class Waiting(Colours):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert decoded.wait(30), "nothing was decoded meanwhile"
            return super().forward(x)

    monkeypatch.setattr(labeller, "_prepare", observed)
    first = good_shard(tmp_path / "in" / "000.tar", 7)
    second = write_tar(tmp_path / "in" / "001.tar", [(f"next{i}.png", picture(i)) for i in range(7)])
    make_worker = functools.partial(make_labeller, replace(spec, load=lambda _: (Waiting(), Card())))
    units = [(shard.name, shard) for shard in (first, second)]
    outcomes = list(Inline().map(make_worker, units, resources=Resources(), overlap=2))
    assert [outcome.error for outcome in outcomes] == [None, None]
    alone = replace(spec, out=str(tmp_path / "alone"))
    for shard in (first, second):
        make_labeller(alone)(shard)
        assert read(spec, shard) == read(alone, shard)


def test_stopping_early_ends_what_runs_and_leaves_no_thread(tmp_path: Path, spec: LabelSpec) -> None:
    before = set(threading.enumerate())
    shards_ = [good_shard(tmp_path / "in" / f"{n:03d}.tar", 30 if n else 1) for n in range(4)]
    outcomes = Inline().map(
        functools.partial(make_labeller, spec), [(s.name, s) for s in shards_], resources=Resources(), overlap=2
    )
    next(outcomes)
    outcomes.close()
    gc.collect()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert not set(threading.enumerate()) - before


def test_flip_averages_probabilities(tmp_path: Path, spec: LabelSpec) -> None:
    class Left(Colours):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * x[..., : x.shape[-1] // 2].mean((2, 3))

    shard = good_shard(tmp_path / "in" / "000.tar", 6)
    flipped = replace(spec, load=lambda _: (Left(), Card()), flip=True)
    assert make_labeller(flipped)(shard)["flip"] is True
    for row in read(flipped, shard):
        data = shards.read_at(shard.path, row["offset"], row["size"])
        pixels = images.normalise(torch.from_numpy(images.load(data, VIEW))[None], VIEW)
        mean = (Left()(pixels).softmax(1) + Left()(pixels.flip(3)).softmax(1))[0] / 2
        np.testing.assert_allclose(row["confidence"], mean.max(), rtol=1e-5)
        assert row["label"] == int(mean.argmax())
    plain = make_labeller(replace(flipped, flip=False))(shard)
    assert not plain["skipped"] and plain["flip"] is False


def test_views_of_the_model_are_obeyed_and_flip_is_their_alias(tmp_path: Path, spec: LabelSpec) -> None:
    class Left(Colours):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.batches.append(len(x))
            return 3 * x[..., : x.shape[-1] // 2].mean((2, 3))

    def probs(one: LabelSpec) -> list[list[float]]:
        return [row["probs"] for row in read(one, shard)]

    shard = good_shard(tmp_path / "in" / "000.tar", 6)
    plain = replace(spec, load=lambda _: (Left(), Card()), out=str(tmp_path / "plain"))
    flipped = replace(plain, flip=True, out=str(tmp_path / "flipped"))
    network = Left()
    card = Card(test_views=("flip",))
    over = replace(plain, load=lambda _: (answering(network, card.test_views), card), out=str(tmp_path / "over"))
    made = {one.out: make_labeller(one)(shard) for one in (plain, flipped, over)}
    assert made[over.out]["transform"]["test_views"] == ["flip"] and "test_views" not in made[plain.out]["transform"]
    np.testing.assert_allclose(probs(over), probs(flipped), atol=1e-3)
    assert not np.allclose(probs(over), probs(plain), atol=1e-3)
    passes = sum(network.batches)
    both = replace(over, flip=True, out=str(tmp_path / "both"))
    make_labeller(both)(shard)
    assert sum(network.batches) == 2 * passes == 24, "asked for twice, done once"
    assert probs(both) == probs(over)
    assert not make_labeller(replace(plain, out=over.out))(shard)["skipped"], "other views, another file"


def test_a_compiled_teacher_sees_one_batch_size(tmp_path: Path, spec: LabelSpec) -> None:
    module = Colours().eval()
    compiled = Teacher(module, VIEW, torch.device("cpu"), torch.float32, compiled=True)
    shard = good_shard(tmp_path / "in" / "000.tar", 10)
    assert Labeller(spec, compiled)(shard)["compiled"] is True
    assert module.batches == [4, 4, 4]
    plain = replace(spec, out=str(tmp_path / "plain"))
    make_labeller(plain)(shard)
    assert read(spec, shard) == read(plain, shard)


def test_a_shard_that_changed_under_the_run_is_named(tmp_path: Path, spec: LabelSpec) -> None:
    path = tmp_path / "in" / "000.tar"
    listed = replace(good_shard(path, 4), stamp=str(path.stat().st_mtime_ns))
    worker = make_labeller(spec)
    good_shard(path, 30)
    with pytest.raises(DataError, match=r"in/000\.tar changed under the run: it has \d+ bytes, and \d+ were listed"):
        worker(listed)
    good_shard(path, 4, seed=9)  # as long as before
    known = replace(listed, sha256="ab" * 32)
    with pytest.raises(
        DataError, match=r"in/000\.tar changed under the run: it has the listed size, and other content"
    ):
        worker(known)
    path.unlink()
    with pytest.raises(DataError, match=r"in/000\.tar is gone since it was listed"):
        worker(listed)
    assert not list(Path(spec.out).rglob("*.parquet"))
    again = good_shard(path, 4)
    first = worker(replace(again, stamp="of another day"))
    assert not first["skipped"]  # touched, but what was read is what lies there
    touched = replace(again, stamp="of a third day", sha256=first["shard_sha256"])
    assert worker(touched)["skipped"]
    good_shard(path, 4, seed=9)
    with pytest.raises(DataError, match="other content"):
        worker(touched)


def test_label_files_of_another_corpus_are_taken_over_where_the_shard_is_the_same(
    tmp_path: Path, spec: LabelSpec
) -> None:
    shards_ = [good_shard(tmp_path / "in" / f"{n:03d}.tar", 4, seed=10 * n) for n in range(3)]
    shards_ = [replace(shard, stamp=str(Path(shard.path).stat().st_mtime_ns)) for shard in shards_]
    for shard in shards_:
        make_labeller(spec)(shard)
    os.utime(shards_[1].path, ns=(1, 1))
    good_shard(Path(shards_[2].path), 4, seed=70)
    now = [replace(shard, stamp=str(Path(shard.path).stat().st_mtime_ns)) for shard in shards_]
    second = replace(spec, out=str(tmp_path / "second"), earlier=(str(tmp_path / "nothing"), spec.out))
    worker = make_labeller(second)
    assert [worker(shard)["skipped"] for shard in now] == [True, True, False]
    for shard, taken in zip(now, (True, True, False), strict=True):
        old, new = (Path(out, label_files.file_name(shard.name)) for out in (spec.out, second.out))
        assert old.samefile(new) == taken
    for change in ({"teacher": "22" * 32}, {"flip": True}, {"temperature": 2.0}, {"batch": 2}):
        other = replace(second, out=str(tmp_path / f"other-{next(iter(change))}"), **change)
        assert not make_labeller(other)(now[0])["skipped"]
    other = replace(second, out=str(tmp_path / "other-view"), load=load_cropping)
    assert not make_labeller(other)(now[0])["skipped"], "the same weights look at other pixels"


def test_normalising_on_the_cpu_gives_the_bits_of_the_plain_way() -> None:
    teacher = Teacher(Colours(), VIEW, torch.device("cpu"), torch.float32)
    for rows in (7, 3, 9):
        batch = torch.randint(0, 256, (rows, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        assert torch.equal(teacher._host.normalise(batch, VIEW), images.normalise(batch, VIEW))
