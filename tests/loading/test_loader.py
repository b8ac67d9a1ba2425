"""Batches from real tar shards, index files, label files and selections.

Run: pytest tests/loading/test_loader.py
"""

from __future__ import annotations

import dataclasses
import io
import random
import tarfile
from collections import Counter

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from pipeline.augment.view import Augment
from pipeline.data import label_files
from pipeline.errors import DataError
from pipeline.loading import loader
from pipeline.loading.loader import TrainingData, TrainingShard, TrainingSource, batches
from pipeline.loading.targets import SoftTargets
from pipeline.train.loss import batch_loss, cross_entropy, weigh

CLASSES = 4
PLAIN = Augment(size=8, scale=(1, 1), ratio=(1, 1), flip=0)
NOISY = Augment(size=8, policy="rand-m9-n2-p1")
PROBS = np.array([0.5, 0.25, 0.125, 0.125], np.float16)


def colour(shard, index):
    """An image's colour says which sample it is."""
    return (10 * shard + 5, 3 * index + 1, 7)


def write_tar(path, shard, count):
    """[(offset, size)] of the PNGs in a new tar."""
    with tarfile.open(path, "w") as tar:
        for index in range(count):
            file = io.BytesIO()
            Image.new("RGB", (8, 8), colour(shard, index)).save(file, "PNG")
            info = tarfile.TarInfo(f"{index:04d}.png")
            info.size = file.tell()
            file.seek(0)
            tar.addfile(info, file)
    with tarfile.open(path) as tar:
        return [
            (member.offset_data, member.size, label_files.image_hash(tar.extractfile(member).read())) for member in tar
        ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two labelled shards, and two label files over two tars with a selection with copies; one bad sample."""
    folder = tmp_path_factory.mktemp("corpus")
    labelled, pseudo = [], []
    for shard, count in enumerate([7, 5]):
        places = write_tar(folder / f"l{shard}.tar", shard, count)
        pq.write_table(
            pa.table({
                "index": pa.array(range(count), pa.int32()),
                "key": [f"{i:04d}" for i in range(count)],
                "offset": pa.array([o for o, _, _ in places], pa.int64()),
                "size": pa.array([s for _, s, _ in places], pa.int32()),
                "label": pa.array([(i + shard) % CLASSES for i in range(count)], pa.int32()),
                "image_hash": pa.array([h for _, _, h in places], pa.uint64()),
            }),
            folder / f"l{shard}.parquet",
        )  # fmt: skip
        labelled.append(TrainingShard(str(folder / f"l{shard}.tar"), str(folder / f"l{shard}.parquet"), None, count))
    for shard, (count, chosen) in enumerate([(10, {0: 1, 3: 2, 9: 1}), (6, {1: 3, 2: 1})], start=2):
        places = write_tar(folder / f"u{shard}.tar", shard, count)
        good = [i for i in range(count) if i != 5]
        classes = np.array([np.roll(np.arange(CLASSES), -(i % CLASSES)) for i in good], np.int32)
        found = label_files.Predictions(
            classes[:, 0].copy(), np.full(len(good), 0.5, np.float32), classes, np.tile(PROBS, (len(good), 1))
        )
        table = label_files.make_table(
            {
                "index": range(count),
                "key": [f"{i:04d}" for i in range(count)],
                "offset": [o for o, _, _ in places],
                "size": [s for _, s, _ in places],
                "status": ["not_an_image" if i == 5 else "ok" for i in range(count)],
                "image_hash": [h for _, _, h in places],
            },
            np.array(good),
            found,
        )
        label_files.write_labels(str(folder / f"u{shard}.parquet"), table, {})
        pq.write_table(
            pa.table({"index": pa.array(chosen, pa.int32()), "copies": pa.array(chosen.values(), pa.int32())}),
            folder / f"s{shard}.parquet",
        )
        pseudo.append(
            TrainingShard(
                str(folder / f"u{shard}.tar"),
                str(folder / f"u{shard}.parquet"),
                str(folder / f"s{shard}.parquet"),
                sum(chosen.values()),
            )
        )
    return (
        TrainingSource("labelled", tuple(labelled), per_step=4, segments=2, window=1),
        TrainingSource("pseudo", tuple(pseudo), per_step=6, segments=2, window=1),
    )


def run(sources, start=0, stop=6, augment=PLAIN, soft=None, **kw):
    return list(batches(sources, augment=augment, classes=CLASSES, soft=soft or SoftTargets(), seed=5,
                        start_step=start, stop_step=stop, **kw))  # fmt: skip


def key(image):
    red, green, _ = image[:, 0, 0].tolist()
    return (red - 5) // 10, (green - 1) // 3


def equal(a, b):
    return a["step"] == b["step"] and all(torch.equal(a[k], b[k]) for k in ("images", "targets", "hard", "source"))


def test_a_batch_holds_the_images_and_targets_of_both_sources(corpus):
    (first, *rest) = run(corpus, soft=SoftTargets(smoothing=0.1))
    assert [b["step"] for b in [first, *rest]] == list(range(6))
    assert first["images"].shape == (10, 3, 8, 8)
    assert first["images"].dtype == torch.uint8
    assert first["targets"].dtype == torch.float32
    assert first["source"].tolist() == [0] * 4 + [1] * 6
    for image, target, hard, source in zip(*(first[k] for k in ("images", "targets", "hard", "source")), strict=True):
        shard, index = key(image)
        assert (image == torch.tensor(colour(shard, index), dtype=torch.uint8)[:, None, None]).all()
        expected = np.zeros(CLASSES)
        if source == 0:
            assert hard == (index + shard) % CLASSES
            expected[hard] = 0.9
            expected += 0.1 / CLASSES
        else:
            assert hard == -1
            expected[np.roll(np.arange(CLASSES), -(index % CLASSES))] = PROBS
        assert target.numpy() == pytest.approx(expected, abs=1e-6)


def test_every_epoch_holds_every_sample_and_copy_once(corpus):
    # 12 labelled samples: 4 a step, 3 steps an epoch; 8 pseudo-labelled with copies: 6 a step, 4 steps 3 epochs.
    steps = run(corpus, stop=12)
    for source, period, times in ((0, 3, 1), (1, 4, 3)):
        counts = Counter(
            key(i) for b in steps[:period] for i, s in zip(b["images"], b["source"], strict=True) if s == source
        )
        if source == 0:
            assert counts == {(s, i): 1 for s, n in ((0, 7), (1, 5)) for i in range(n)}
        else:
            copies = {(2, 0): 1, (2, 3): 2, (2, 9): 1, (3, 1): 3, (3, 2): 1}
            assert counts == {k: times * n for k, n in copies.items()}


def test_copies_of_an_image_are_noised_differently(corpus):
    pseudo = TrainingSource("pseudo", corpus[1].shards, per_step=8, segments=1)
    seeds = TrainingData([pseudo], augment=NOISY, classes=CLASSES, soft=SoftTargets(), seed=5, rank=0, world=1).samples(
        0
    )[0][1]
    assert len(set(seeds.tolist())) == 8


@pytest.mark.parametrize(
    ("workers", "start_method"), [(1, None), (2, "fork"), pytest.param(1, "spawn", marks=pytest.mark.slow)]
)
def test_worker_processes_change_nothing(corpus, workers, start_method):
    alone = run(corpus, augment=NOISY)
    together = run(corpus, augment=NOISY, workers=workers, start_method=start_method)
    assert len(alone) == len(together)
    assert all(equal(a, b) for a, b in zip(alone, together, strict=True))


def test_ranks_together_make_the_global_batch(corpus):
    whole = run(corpus, augment=NOISY)
    for world in (2, 3, 4):
        ranks = [run(corpus, augment=NOISY, rank=rank, world=world) for rank in range(world)]
        for step, parts in enumerate(zip(*ranks, strict=True)):
            for source in (0, 1):
                joined = torch.cat([p["images"][p["source"] == source] for p in parts])
                assert torch.equal(joined, whole[step]["images"][whole[step]["source"] == source])
        sizes = [len(parts[0]["images"]) for parts in ranks]
        assert max(sizes) - min(sizes) <= 2  # one a source


def test_a_run_resumes_at_any_step_with_the_same_noise(corpus):
    undisturbed = run(corpus, augment=NOISY, stop=9)
    for start in (1, 4, 8):
        resumed = run(corpus, augment=NOISY, start=start, stop=9)
        assert all(equal(a, b) for a, b in zip(undisturbed[start:], resumed, strict=True))


def test_worker_processes_can_be_nice(corpus):
    me = psutil.Process()
    found = batches(
        corpus, augment=PLAIN, classes=CLASSES, soft=SoftTargets(), seed=0, start_step=0, stop_step=4, workers=1, nice=3
    )
    next(found)
    try:
        assert me.nice() + 3 in [child.nice() for child in me.children()]
    finally:
        found.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_callers_generators_are_left_alone(corpus, workers):
    def states():
        return random.getstate(), [str(part) for part in np.random.get_state()], torch.get_rng_state().tolist()

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = states()
    run(corpus, augment=NOISY, workers=workers)
    assert states() == before


def test_hard_pseudo_labels_and_temperature(corpus):
    pseudo = corpus[1:]
    hard = run(pseudo, soft=SoftTargets(hard_pseudo=True, smoothing=0.2))[0]
    assert hard["hard"].tolist() == [key(image)[1] % CLASSES for image in hard["images"]]
    assert hard["targets"].max(1).values.numpy() == pytest.approx(0.85)
    cold = run(pseudo, soft=SoftTargets(temperature=0.5))[0]["targets"]
    squares = PROBS.astype(np.float64) ** 2
    assert cold.max(1).values.numpy() == pytest.approx((squares / squares.sum()).max())


@pytest.mark.parametrize("hard", [False, True])
def test_a_selections_weights_scale_the_loss(corpus, tmp_path, hard):
    shard, weight = corpus[1].shards[0], {0: 0.5, 3: 0.25, 9: 1.0}
    chosen = {"index": pa.array(weight, pa.int32()), "copies": pa.array([1] * 3, pa.int32())}
    soft = SoftTargets(hard_pseudo=hard, smoothing=0.1)
    found = []
    for name, columns in (
        ("plain", chosen),
        ("weighted", chosen | {"weight": pa.array(weight.values(), pa.float32())}),
    ):
        pq.write_table(pa.table(columns), tmp_path / name)
        source = TrainingShard(shard.path, shard.rows, str(tmp_path / name), 3)
        found.append(run([TrainingSource("pseudo", (source,), per_step=3, segments=1)], stop=1, soft=soft)[0])
    plain, weighted = found
    weights = torch.tensor([weight[key(image)[1]] for image in plain["images"]])
    assert torch.equal(weighted["targets"], plain["targets"] * weights[:, None])
    logits = torch.randn(3, CLASSES)
    losses = cross_entropy(logits, plain["targets"])
    total = batch_loss(logits, weigh(weighted["targets"], weighted["source"], 2.0))
    assert total.item() == pytest.approx(2 * (weights * losses).sum().item())


def test_without_a_selection_every_labelled_row_is_taken(corpus):
    shard = corpus[1].shards[0]
    everything = TrainingSource("pseudo", (TrainingShard(shard.path, shard.rows, None, 9),), per_step=9, segments=1)
    assert sorted(key(i)[1] for i in run([everything], stop=1)[0]["images"]) == [0, 1, 2, 3, 4, 6, 7, 8, 9]


def test_rows_beyond_the_memory_limit_are_read_again(corpus, monkeypatch):
    """But not those of the shards that are read from at the same time, one of each source here."""
    corpus = [dataclasses.replace(source, segments=1, window=1) for source in corpus]
    expected = run(corpus)
    monkeypatch.setattr(loader, "ROWS_BYTES", 1)
    monkeypatch.setattr(loader, "KEPT_BYTES", 0)
    data = TrainingData(corpus, augment=PLAIN, classes=CLASSES, soft=SoftTargets(), seed=5, rank=0, world=1)
    assert all(equal(a, data[step]) for step, a in enumerate(expected))
    assert len(data._rows) == 2
    assert not data._kept


@pytest.mark.parametrize("world", [1, 4, 16])
def test_the_more_ranks_the_fewer_rows_a_process_keeps_and_none_is_read_twice(corpus, monkeypatch, world):
    shard, segments, window = corpus[0].shards[0], 16, 2
    source = TrainingSource("labelled", (shard,) * 64, per_step=32, segments=segments, window=window)
    read, load_rows = [], loader.load_rows
    monkeypatch.setattr(loader, "ROWS_BYTES", 1)
    monkeypatch.setattr(loader, "load_rows", lambda shard, **kw: read.append(shard) or load_rows(shard, **kw))
    who = {"rank": world - 1, "world": world}
    data = TrainingData([source], augment=PLAIN, classes=CLASSES, soft=SoftTargets(), seed=5, **who)
    for step in range(64 * 7 // 32):  # an epoch: of each segment, one block after the other
        data.pack(step)
        assert len(data._rows) <= segments * window // world
    assert len(read) == 64 // world


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_another_one_is_named(corpus, tmp_path, workers):
    shard = corpus[0].shards[0]
    broken = tmp_path / "broken.tar"
    with open(shard.path, "rb") as file:  # noqa: PTH123
        content = bytearray(file.read())
    rows = pq.read_table(shard.rows)
    start = rows["offset"][3].as_py()
    content[start : start + rows["size"][3].as_py()] = bytes(rows["size"][3].as_py())
    broken.write_bytes(content)
    source = TrainingSource("labelled", (TrainingShard(str(broken), shard.rows, None, 7),), per_step=7)
    with pytest.raises(DataError, match=r"^image 3 of .*broken\.tar has other bytes .*; bring the old shard [^\n]*$"):
        run([source], workers=workers)


def test_a_shard_that_is_gone_is_named(corpus):
    shard = corpus[0].shards[0]
    source = TrainingSource("labelled", (TrainingShard("/nowhere/a.tar", shard.rows, None, 7),), per_step=7)
    with pytest.raises(DataError, match=r"cannot read image \d of /nowhere/a\.tar"):
        run([source])


def test_counts_and_selections_that_do_not_fit_are_refused(corpus, tmp_path):
    shard = corpus[0].shards[0]
    with pytest.raises(DataError, match="holds 7 samples, but 8 were counted"):
        run([TrainingSource("labelled", (TrainingShard(shard.path, shard.rows, None, 8),), per_step=2)])
    stranger = tmp_path / "selection.parquet"
    pq.write_table(pa.table({"index": pa.array([99], pa.int32()), "copies": pa.array([1], pa.int32())}), stranger)
    with pytest.raises(DataError, match="names samples that"):
        run([TrainingSource("labelled", (TrainingShard(shard.path, shard.rows, str(stranger), 1),), per_step=2)])


def test_a_source_without_images_is_refused_before_anything_is_read(corpus):
    empty = TrainingSource("pseudo", (TrainingShard("no.tar", "no.parquet", None, 0),), per_step=2)
    with pytest.raises(DataError, match="pseudo source holds no image"):
        batches(
            [corpus[0], empty], augment=PLAIN, classes=CLASSES, soft=SoftTargets(), seed=0, start_step=0, stop_step=1
        )


def test_urls_are_read_through_fsspec(corpus):
    import fsspec

    memory = fsspec.filesystem("memory")
    moved = []
    for shard in corpus[0].shards:
        for path in (shard.path, shard.rows):
            memory.put(path, f"/loader/{path.rsplit('/', 1)[-1]}")
        tar, rows = (f"memory://loader/{path.rsplit('/', 1)[-1]}" for path in (shard.path, shard.rows))
        moved.append(TrainingShard(tar, rows, None, shard.count))
    remote = TrainingSource("labelled", tuple(moved), per_step=4, segments=2, window=1)
    assert all(equal(a, b) for a, b in zip(run([remote]), run(corpus[:1]), strict=True))


def test_a_workers_batch_comes_in_one_piece_of_shared_memory(corpus):
    [batch] = run(corpus, stop=1, augment=Augment(size=9, policy="rand-m9-n2-p1", on_device=True), workers=1)
    tensors = {name: value for name, value in batch.items() if name != "step"}
    assert set(tensors) == {"images", "targets", "hard", "source", "operations"}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1
    assert all(tensor.is_shared() for tensor in tensors.values())
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())
    assert batch["images"].is_contiguous(memory_format=torch.channels_last)
    [alone] = run(corpus, stop=1, augment=Augment(size=9, policy="rand-m9-n2-p1", on_device=True))
    assert equal(batch, alone)
    assert torch.equal(batch["operations"], alone["operations"])
    assert not alone["images"].is_shared()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """One shard of JPEGs that are too large to be kept decoded."""
    folder, count = tmp_path_factory.mktemp("photos"), 16
    draw = np.random.default_rng(0)
    with tarfile.open(folder / "photos.tar", "w") as tar:
        for index in range(count):
            file = io.BytesIO()
            coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((200, 160), Image.Resampling.BICUBIC).save(file, "JPEG", quality=80)
            info = tarfile.TarInfo(f"{index:04d}.jpg")
            info.size = file.tell()
            tar.addfile(info, io.BytesIO(file.getvalue()))
    with tarfile.open(folder / "photos.tar") as tar:
        places = [
            (member.offset_data, member.size, label_files.image_hash(tar.extractfile(member).read())) for member in tar
        ]
    rows = {
        "index": pa.array(range(count), pa.int32()),
        "key": [f"{i:04d}" for i in range(count)],
        "offset": pa.array([offset for offset, _, _ in places], pa.int64()),
        "size": pa.array([size for _, size, _ in places], pa.int32()),
        "label": pa.array([0] * count, pa.int32()),
        "image_hash": pa.array([h for _, _, h in places], pa.uint64()),
    }
    pq.write_table(pa.table(rows), folder / "photos.parquet")
    shard = TrainingShard(str(folder / "photos.tar"), str(folder / "photos.parquet"), None, count)
    return TrainingSource("labelled", (shard,), per_step=8, segments=1)


def test_memory_is_flat_over_50_epochs(photos):
    """One decoded photo that stayed behind would be 0.13 MB, one view 0.03 MB: an epoch has 16 of each."""
    augment = Augment(size=96, policy="rand-m9-n1-p1")
    epoch = 16 // photos.per_step
    sizes = []
    others = set(psutil.Process().children())
    for batch in batches([photos], augment=augment, classes=CLASSES, soft=SoftTargets(), seed=5, start_step=0,
                         stop_step=50 * epoch, workers=1):  # fmt: skip
        if batch["step"] in (10 * epoch, 50 * epoch - 1):
            [worker] = set(psutil.Process().children()) - others
            sizes.append(worker.memory_full_info().uss + psutil.Process().memory_full_info().uss)
    assert sizes[1] - sizes[0] < 8 << 20


def test_a_photo_that_no_longer_decodes_is_named(photos, tmp_path):
    shard = photos.shards[0]
    rows = pq.read_table(shard.rows)
    sizes = [size // 2 if index == 9 else size for index, size in enumerate(rows["size"].to_pylist())]
    halved = rows.set_column(rows.column_names.index("size"), "size", pa.array(sizes, pa.int32()))
    with open(shard.path, "rb") as file:  # noqa: PTH123
        file.seek(halved["offset"][9].as_py())
        half = label_files.image_hash(file.read(sizes[9]))
    hashes = [half if index == 9 else found for index, found in enumerate(halved["image_hash"].to_pylist())]
    halved = halved.set_column(rows.column_names.index("image_hash"), "image_hash", pa.array(hashes, pa.uint64()))
    pq.write_table(halved, tmp_path / "rows.parquet")
    source = TrainingSource("labelled", (TrainingShard(shard.path, str(tmp_path / "rows.parquet"), None, 16),), 16)
    with pytest.raises(DataError, match=r"^image 9 of .*photos\.tar .* no longer is \(truncated.*[^\n]*$"):
        run([source], augment=Augment(size=64))
