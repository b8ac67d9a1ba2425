"""Selection equals sorting everything, whatever the files, their grouping and their order."""

import functools
import hashlib
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.data import cut, labels
from pipeline.data.selection import Settings, select_all
from pipeline.errors import DataError


def inline(function: Callable[[Any], Any], units: Sequence[Any]) -> Iterable[Any]:
    """As a cluster does it: the function is pickled, results come in any order."""
    function = pickle.loads(pickle.dumps(function))  # noqa: S301
    results = [function(unit) for unit in units]
    random.Random(len(units)).shuffle(results)
    return results


def write_shard(folder: Path, name: str, label: np.ndarray, confidence: np.ndarray, **more: Any) -> str:
    """A label file of samples whose label is >= 0; the others are bad."""
    n, good = len(label), np.flatnonzero(label >= 0)
    columns = {
        "index": range(n),
        "key": [f"{i:06d}" for i in range(n)],
        "offset": [512 + 1024 * i for i in range(n)],
        "size": [100] * n,
        "status": ["ok" if value >= 0 else "truncated" for value in label],
        "image_hash": more.pop("hashes", np.arange(n, dtype=np.uint64)),
    }
    found = labels.Predictions(
        label[good].astype(np.int32),
        confidence[good].astype(np.float32),
        label[good, None].astype(np.int32),
        confidence[good, None].astype(np.float16),
    )
    path = str(folder / labels.file_name(name))
    labels.write_labels(path, labels.make_table(columns, good, found), {"shard": name, **more})
    return path


def random_shards(folder: Path, seed: int, classes: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Skewed classes, many confidences of exactly 1, some bad samples, names in sub-folders."""
    rng = np.random.default_rng(seed)
    shards = {}
    for number in range(int(rng.integers(1, 9))):
        n = int(rng.integers(0, 200))
        label = np.minimum(rng.geometric(0.3, n) - 1, classes - 1)
        label[rng.random(n) < 0.1] = -1
        confidence = rng.random(n, np.float32)
        confidence = np.where(rng.random(n) < 0.4, np.float32(1), confidence)
        confidence = np.where(rng.random(n) < 0.2, np.round(confidence, 1), confidence).astype(np.float32)
        name = f"{'ab'[number % 2]}/{number:03d}.tar"
        shards[name] = (label, confidence)
        write_shard(folder, name, label, confidence)
    return shards


def splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    z = (x + 0x9E3779B97F4A7C15) & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def by_sorting(
    shards: dict[str, tuple[np.ndarray, np.ndarray]],
    classes: int,
    threshold: float,
    per_class: int | None,
    max_copies: int | None = None,
) -> dict[str, dict[int, int]]:
    """The contract, naively: {shard: {index: copies}}."""
    ranked: list[list[tuple[float, int, str, int]]] = [[] for _ in range(classes)]
    for name, (label, confidence) in shards.items():
        start = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
        for index, (c, p) in enumerate(zip(label, confidence, strict=True)):
            if c >= 0 and p >= np.float32(threshold):
                ranked[c].append((-float(p), splitmix64(start ^ index), name, index))
    copies: dict[str, dict[int, int]] = {name: {} for name in shards}
    for rows in ranked:
        rows.sort()
        for rank, (_, _, name, index) in enumerate(rows):
            number = 1
            if per_class is not None:
                number = per_class // len(rows) + (rank < per_class % len(rows))
            if max_copies is not None:
                number = min(number, max_copies)
            if number:
                copies[name][index] = number
    return {name: dict(sorted(rows.items())) for name, rows in copies.items()}


def read_back(folder: Path, names: Iterable[str]) -> dict[str, dict[int, int]]:
    found = {}
    for name in names:
        table = labels.read_labels(str(folder / labels.file_name(name)))
        found[name] = dict(zip(table["index"].to_pylist(), table["copies"].to_pylist(), strict=True))
    return found


@pytest.fixture(params=[None, 0, 40])
def small_passes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is, where all rows are gathered at once; and with few counters and none or some rows gathered late."""
    if request.param is not None:
        monkeypatch.setattr(cut, "BINS", 64)
        monkeypatch.setattr(cut, "GATHERED", request.param)


@pytest.mark.usefixtures("small_passes")
@pytest.mark.parametrize("seed", range(18))
def test_selection_equals_sorting_everything(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    classes = int(rng.integers(1, 8))
    shards = random_shards(tmp_path / "labels", seed, classes)
    threshold = float(rng.choice([0.0, 0.3, 0.5, 1.0]))
    per_class = None if seed % 6 == 5 else int(rng.choice([1, 3, 20, 64, 300]))
    max_copies = int(rng.integers(1, 6)) if seed % 3 == 0 else None
    paths = [str(tmp_path / "labels" / labels.file_name(name)) for name in shards]
    settings = Settings(classes, threshold, per_class, max_copies)
    out = tmp_path / "out"
    summary = select_all(paths, settings, inline, str(out), groups=3)
    expected = by_sorting(shards, classes, threshold, per_class, max_copies)
    assert read_back(out, shards) == expected
    assert summary["shards"] == {name: sum(rows.values()) for name, rows in sorted(expected.items())}
    every = [(c, p) for label, confidence in shards.values() for c, p in zip(label, confidence, strict=True)]
    good = [(c, p) for c, p in every if c >= 0]
    assert summary["samples"] == len(every) and summary["labelled"] == len(good) == sum(summary["histogram"])
    available = [sum(c == k and p >= np.float32(threshold) for c, p in good) for k in range(classes)]
    assert summary["available"] == available and summary["confident"] == sum(available)
    assert summary["kept"] == sum(len(rows) for rows in expected.values()) == sum(summary["kept_per_class"])
    assert summary["copies"] == sum(summary["copies_per_class"]) == sum(summary["shards"].values())
    assert sum(summary["kept_histogram"]) == summary["kept"]
    if per_class is not None and max_copies is None:
        assert summary["copies_per_class"] == [per_class if n else 0 for n in available]
    assert summary["empty"] == [k for k, n in enumerate(available) if n == 0]
    assert summary["short"] == [k for k, n in enumerate(available) if 0 < n < (per_class or 0)]


def test_files_do_not_depend_on_order_or_grouping(tmp_path: Path) -> None:
    shards = random_shards(tmp_path / "labels", seed=4, classes=5)
    paths = [str(tmp_path / "labels" / labels.file_name(name)) for name in shards]
    contents = []
    for number, (order, groups) in enumerate([(paths, 1), (paths[::-1], 2), (sorted(paths), 100)]):
        out = tmp_path / str(number)
        summary = select_all(order, Settings(5, 0.3, 40), inline, str(out), groups=groups)
        contents.append(([(out / labels.file_name(name)).read_bytes() for name in shards], summary))
    assert len(shards) > 3 and contents[0] == contents[1] == contents[2]


def test_a_short_class_gets_copies_the_most_confident_one_more_and_many_are_reported(tmp_path: Path) -> None:
    label, confidence = np.array([0, 0, 0, 1, 0]), np.array([0.5, 0.9, 0.7, 0.4, 0.1])
    path = write_shard(tmp_path, "a.tar", label, confidence)
    summary = select_all([path], Settings(3, 0.3, 20), inline, str(tmp_path / "out"))
    assert read_back(tmp_path / "out", ["a.tar"])["a.tar"] == {0: 6, 1: 7, 2: 7, 3: 20}
    assert summary["much_copied"] == [1] and summary["short"] == [0, 1] and summary["empty"] == [2]
    summary = select_all([path], Settings(3, 0.3, 20, max_copies=6), inline, str(tmp_path / "capped"))
    assert read_back(tmp_path / "capped", ["a.tar"])["a.tar"] == {0: 6, 1: 6, 2: 6, 3: 6}
    assert summary["much_copied"] == [] and summary["copies"] == 24


def test_copies_of_held_out_images_are_dropped_before_the_cut(tmp_path: Path) -> None:
    hashes = np.array([5, 2**64 - 1, 7, 0], np.uint64)
    path = write_shard(tmp_path, "a.tar", np.array([0, 0, 0, -1]), np.array([0.9, 0.8, 0.7, 0]), hashes=hashes)
    exclude = np.array([2, 5, 6], np.uint64)
    summary = select_all([path], Settings(1, 0.3, 1, exclude=exclude), inline, str(tmp_path / "out"))
    assert read_back(tmp_path / "out", ["a.tar"])["a.tar"] == {1: 1}
    assert (summary["confident"], summary["excluded"], summary["available"]) == (3, 1, [2])


def test_the_tie_hash_is_pinned() -> None:
    assert cut.mix(np.zeros(1, np.uint64))[0] == 0xE220A8397B1DCDAF  # splitmix64's first output for seed 0
    assert [hex(value) for value in cut.tie_hash("train/000.tar", np.arange(3))] == [
        "0x7269f57e520cba8d",
        "0xa77eb09961d6fa05",
        "0xd3dc8584bc15a27c",
    ]


def test_labels_of_another_teacher_or_class_are_refused(tmp_path: Path) -> None:
    path = write_shard(tmp_path, "a.tar", np.array([0, 4]), np.array([0.9, 0.8]), teacher="11")
    run = functools.partial(select_all, [path], map_fn=inline, out=str(tmp_path / "out"))
    with pytest.raises(DataError, match=r"a\.parquet does not fit.*'11' instead of '22'"):
        run(settings=Settings(5, expected={"teacher": "22"}))
    with pytest.raises(DataError, match=r"a\.parquet holds classes 0 to 4.*allowed are classes 0 to 2"):
        run(settings=Settings(3, expected={"teacher": "11"}))
    with pytest.raises(DataError, match="no label file to select from"):
        select_all([], Settings(3), inline, str(tmp_path / "out"))
